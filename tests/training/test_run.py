"""Whole runs in this process: folders, stages, the choice of the best, what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drkl.config import load_config
from drkl.errors import DrklError
from drkl.models.load import load_model
from drkl.models.student import make_student
from drkl.runs import RunFolder
from drkl.teachers.live import LiveTeacher
from drkl.training import checks
from drkl.training.estimate import estimate
from drkl.training.run import Listener
from tests.data.tiny_tokenizers import build
from tests.models import tiny
from tests.training import tiny_runs


def heldout(run: RunFolder) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in run.read_train_log() if "eval_loss" in row}


@pytest.mark.slow
def test_a_run_leaves_what_the_next_stages_read(tmp_path: Path) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path))
    assert {path.name for path in run.root.iterdir()} == {
        "config.yaml", "env.json", "train.jsonl", "student", "checkpoints",
    }  # fmt: skip
    assert run.is_finished()
    assert tiny_runs.steps(run) == [1, 2, 3, 4, 5, 6]
    assert list(heldout(run)) == [2, 4, 6]
    env = run.read_env()
    assert env["data"] == {"train_rows": 38, "heldout_rows": 2, "dropped": {}, "responses_cut": 0}
    assert env["parameters"]["student"] < env["parameters"]["teacher"]
    assert env["steps"] == 6 and env["seconds"] > 0 and env["git_commit"] != ""
    assert str(tmp_path) not in json.dumps(env)
    config, _ = load_config(run.read_config())
    assert config.specs()[0].resolved == run.read_config()


def test_student_is_an_ordinary_folder(tmp_path: Path) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path))
    assert {path.name for path in run.student_path.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not [p for p in run.root.rglob("*") if p.name == "training_args.bin"]
    config = json.loads((run.student_path / "config.json").read_text())
    assert config["use_cache"] is True and config["num_hidden_layers"] == 2
    assert str(tmp_path) not in (run.student_path / "config.json").read_text()
    card = (run.student_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "drkl(gamma=0.5" in card


CARDS: dict[str, dict[str, Any]] = {
    "chat": {},
    "adapter": {"peft": {"r": 2, "target_modules": ["q_proj"], "export": "adapter"}},
    "jinja": {"data": {"template": "a {{ prompt }} there"}},
    "text": {},
    "encoder-decoder": {},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", CARDS)
def test_the_lines_of_the_card_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    values = tiny_runs.config(tmp_path, training={"max_steps": 1}, **CARDS[kind])
    if kind == "adapter":
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = None
        tiny.save(tiny.llama(5, layers=1, eos_token_id=2), tmp_path / "base", tokenizer)
        values["student"] = {"init": "pretrained", "model": str(tmp_path / "base")}
    if kind == "text":
        Path(values["data"]["path"]).write_text("".join(f'{{"text": "w{i} w2 w3"}}\n' for i in range(40)))
    if kind == "encoder-decoder":
        tiny.save(tiny.bart(layers=2, vocab_size=tiny.VOCAB), tmp_path / "teacher")
    run = tiny_runs.train(values)
    code = (run.student_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code.replace("PATH/TO/THIS/FOLDER", str(run.student_path)), {})
    shown = capsys.readouterr().out
    assert shown
    assert ("'role': 'assistant'" in shown) == (kind in ("chat", "adapter"))
    assert ("a Give me three tips. there" in code) == (kind == "jinja")


def test_the_student_moved_and_its_head_stayed_tied(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    run = tiny_runs.train(values)
    student = AutoModelForCausalLM.from_pretrained(run.student_path)
    spec = tiny_runs.specs(values)[0]
    before = make_student(spec.student, values["teacher"]["model"], 0)
    assert not torch.equal(tiny.logits(student), tiny.logits(before))
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    teacher, ours = (AutoTokenizer.from_pretrained(p) for p in (values["teacher"]["model"], run.student_path))
    assert ours.get_vocab() == teacher.get_vocab() and ours.chat_template == teacher.chat_template


@pytest.mark.slow
def test_the_best_weights_are_the_students_and_only_their_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, best = {2: 3.0, 4: 1.0, 6: 4.0, 8: 2.0}, 4
    tiny_runs.plant_heldout_losses(monkeypatch, losses.__getitem__)
    run = tiny_runs.train(tiny_runs.config(tmp_path, training={"max_steps": 8}))
    assert heldout(run) == losses
    assert run.read_env()["best_step"] == best and run.read_env()["best_heldout_loss"] == losses[best]
    assert [path.name for path in run.checkpoints_path.iterdir()] == [f"checkpoint-{best}"]
    saved = run.checkpoints_path / f"checkpoint-{best}" / "model.safetensors"
    kept, ours = load_model(str(saved.parent), "fp32"), load_model(str(run.student_path), "fp32")
    tiny.assert_alike(kept, ours)


def test_early_stop(tmp_path: Path, rising: None) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path, training={"max_steps": 40, "early_stop_patience": 2}))
    assert heldout(run) == {2: 2.0, 4: 4.0, 6: 6.0}
    assert run.is_finished() and run.read_env()["steps"] == 6 and run.read_env()["best_step"] == 2


def test_the_last_step_is_logged_and_measured_whatever_the_intervals(tmp_path: Path) -> None:
    training = {"max_steps": 7, "eval_every": 5, "save_every": 5, "arguments": {"logging_steps": 3}}
    run = tiny_runs.train(tiny_runs.config(tmp_path, training=training))
    assert tiny_runs.steps(run) == [3, 6, 7]
    assert list(heldout(run)) == [5, 7]
    assert "fkl" in run.read_train_log()[-2]


def test_stages_are_complete_runs_and_each_starts_the_next(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES)
    run = tiny_runs.train(values)
    (first,) = run.stages()
    assert first.root == run.root / "stages" / "01-warmup"
    assert first.is_finished() and run.is_finished()
    assert first.read_config()["objective"] == {"name": "fkl"}
    assert tiny_runs.steps(first) == [1, 2, 3, 4]
    # The stage alone, as an ordinary run with the stage's own config, is the same run.
    alone = first.read_config()
    alone["run"] |= {"dir": str(tmp_path / "alone")}
    assert tiny_runs.weights(tiny_runs.train(alone)) == tiny_runs.weights(first)
    # And so is the last stage from that student.
    last = {**values, "stages": [], "student": {"init": "pretrained", "model": str(first.student_path)}}
    last["run"] = {**values["run"], "dir": str(tmp_path / "last")}
    assert tiny_runs.weights(tiny_runs.train(last)) == tiny_runs.weights(run)
    assert run.read_config()["student"]["init"] == "prune"


@pytest.mark.slow
def test_the_same_config_gives_the_same_student(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, training={"max_steps": 3})
    first = tiny_runs.weights(tiny_runs.train(values))
    assert tiny_runs.weights(tiny_runs.train(values, "overwrite")) == first
    other = {**values, "run": {**values["run"], "name": "other", "seed": 4}}
    assert tiny_runs.weights(tiny_runs.train(other)) != first


@pytest.mark.slow
def test_overwrite_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES)
    run = tiny_runs.train(values)
    (run.root / "report.html").write_text("old")
    tiny_runs.train({**values, "stages": []}, "overwrite")
    assert run.stages() == [] and not run.report_path.exists()


def test_without_a_teacher_it_is_plain_fine_tuning(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    values["data"]["eval_path"] = values["data"]["path"]  # what is learnt is what is held out
    tiny_runs.write_rows(tmp_path / "data.jsonl", prompt="w1 w2", response="w3 w4 w5")
    values |= {
        "teacher": None,
        "objective": {"name": "ce"},
        "student": {"init": "pretrained", "model": values["teacher"]["model"]},
    }
    run = tiny_runs.train(values)
    assert run.read_env()["parameters"]["teacher"] is None
    assert not {key for row in run.read_train_log() for key in row} & {"fkl", "eval_fkl", "teacher_entropy"}
    losses = list(heldout(run).values())
    assert losses[-1] < losses[0]
    assert "none (fine-tuning)" in (run.student_path / "README.md").read_text()


def test_ce_beside_a_teacher_is_compared_with_it_on_held_out_rows(tmp_path: Path) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path) | {"objective": {"name": "ce"}})
    assert "eval_fkl" in run.read_train_log()[-1]


@pytest.mark.parametrize(
    "student", [{"init": "random", "layers": 1}, {"init": "random", "config": {"intermediate_size": 8}}]
)
def test_a_random_student(tmp_path: Path, student: dict[str, Any]) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path) | {"student": student})
    assert run.is_finished()


@pytest.mark.slow
def test_bf16_beside_a_teacher_in_fp32(tmp_path: Path) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path, training={"precision": "bf16"}))
    assert run.read_config()["training"]["precision"] == "bf16"
    assert load_model(str(run.student_path), "fp32").dtype == torch.float32
    header = tiny_runs.weights(run)[8:400]
    assert b'"F32"' in header and b"BF16" not in header


@pytest.mark.slow
def test_the_same_batches_spare_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    hidden = LiveTeacher.hidden

    def counted(self: LiveTeacher, batch: Any) -> Any:
        seen.append(batch["input_ids"].shape)
        return hidden(self, batch)

    monkeypatch.setattr(LiveTeacher, "hidden", counted)
    calls = {}
    for name, changes in {"other": {}, "same": {"same_batches": True}}.items():
        values = tiny_runs.config(tmp_path, training={"max_steps": 24, "eval_every": 24, "save_every": 24} | changes)
        values["run"]["name"], values["teacher"]["remember_mb"], values["data"]["max_rows"] = name, 8, 20
        seen.clear()
        tiny_runs.train(values)
        calls[name] = len(seen)
    assert calls["same"] < calls["other"] / 2


@pytest.mark.slow
def test_a_teacher_that_remembers_changes_nothing(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES)
    plain = tiny_runs.train(values)
    remembering = {**values, "run": {**values["run"], "name": "s"}, "teacher": {**values["teacher"], "remember_mb": 8}}
    run = tiny_runs.train(remembering)
    assert tiny_runs.weights(run) == tiny_runs.weights(plain)


@pytest.mark.slow
def test_frozen_embeddings_stay_the_teachers_through_every_stage(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, student={"freeze_embeddings": True}, stages=tiny_runs.STAGES)
    run = tiny_runs.train(values)
    for folder in (*run.stages(), run):
        student = load_model(str(folder.student_path), "fp32")
        assert torch.equal(student.get_input_embeddings().weight, tiny.llama().get_input_embeddings().weight)
        assert not torch.equal(
            student.base_model.layers[0].mlp.up_proj.weight, tiny.llama().model.layers[0].mlp.up_proj.weight
        )


def refused(tmp_path: Path, values: dict[str, Any], mode: Any = "new") -> str:
    before = tiny_runs.tree(tmp_path)
    with pytest.raises(DrklError) as error:
        tiny_runs.train(values, mode)
    assert tiny_runs.tree(tmp_path) == before
    return str(error.value)


@pytest.mark.parametrize("init", ["pretrained", "prune"])
def test_tokenizers_that_differ(tmp_path: Path, init: str) -> None:
    words = [f"w{i}" for i in range(34)]
    tiny.save(tiny.llama(), tmp_path / "other", build(extra=words[::-1]))
    values = tiny_runs.config(tmp_path)
    values["student"] = {"init": init, "model": str(tmp_path / "other")}
    message = refused(tmp_path, values)
    assert "The vocabularies differ" in message and "student 'w33', teacher 'w0'" in message


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    tiny.save(tiny.llama(vocab=40), tmp_path / "teacher")
    assert "has the token id" in (message := refused(tmp_path, values))
    assert "embeddings for ids 0 to 39 only" in message


def test_rows_longer_than_the_context(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    tiny.save(tiny.gpt2(n_positions=12), tmp_path / "teacher")
    assert "the student's context 12. Set data.max_tokens" in refused(tmp_path, values)


@pytest.mark.slow
def test_no_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_runs.config(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    message = refused(tmp_path, values)
    assert "Make room, or put the run elsewhere with run.dir=FOLDER" in message
    # What lies there already needs no new room.
    checkpoint = tmp_path / "runs" / "r" / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(bytes(10**6))
    (tmp_path / "runs" / "r" / "config.yaml").write_text("")
    assert tiny_runs.train(values, "overwrite").is_finished()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "training: .*cosin"),
        ({"gradient_accumulation_steps": 0}, "whole number of at least 1"),
        ({"warmup_steps": -1}, "training.warmup_steps: input should be greater than or equal to 0"),
    ],
)
def test_arguments_that_transformers_refuses(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    values = tiny_runs.config(tmp_path)
    values["training"]["arguments"] = arguments
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refused(tmp_path, values))
    # In a stage too, and before the stages ahead of it are trained.
    values = tiny_runs.config(tmp_path, stages=[*tiny_runs.STAGES, {"name": "b", "training": {"arguments": arguments}}])
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refused(tmp_path, values))


def test_devices_and_formats_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_runs.config(tmp_path, training={"precision": "fp16"})
    assert "fp16, which needs CUDA" in refused(tmp_path, values)
    monkeypatch.setattr(checks, "has_device", lambda name: name != "cuda")
    assert "run.device is 'cuda'" in refused(tmp_path, tiny_runs.config(tmp_path, run={"device": "cuda"}))


def test_a_run_folder_that_exists(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    root = tmp_path / "runs" / "r"
    root.mkdir(parents=True)
    (root / "thesis.tex").write_text("years of work")
    assert "exists. Replace it, resume it, or choose another run.name" in refused(tmp_path, values)
    assert "is no run folder (it has no config.yaml)" in refused(tmp_path, values, "overwrite")
    shutil.rmtree(root)
    (root / "checkpoints").mkdir(parents=True)
    (root / ".lock").write_text("of one that was killed before it began")
    checks.check_folder(RunFolder(root), "new")
    checks.check_folder(RunFolder(root), "overwrite")
    shutil.rmtree(root)
    root.write_text("a file")
    assert "is no folder, so it is not replaced" in refused(tmp_path, values, "overwrite")
    root.unlink()
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    assert "is no folder, so it is not replaced" in refused(tmp_path, values, "overwrite")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    (tmp_path / "runs").write_text("a file")
    assert "Cannot write" in refused(tmp_path, values)


def test_data_of_a_later_stage_is_read_before_the_first_is_trained(tmp_path: Path) -> None:
    stages = [*tiny_runs.STAGES, {"name": "b", "data": {"path": "nowhere.jsonl"}}]
    assert "There is no file 'nowhere.jsonl'" in refused(tmp_path, tiny_runs.config(tmp_path, stages=stages))


@pytest.mark.slow
def test_non_finite_weights_leave_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_runs.config(tmp_path)
    students = []

    def keep(*args: Any) -> Any:
        students.append(make_student(*args))
        return students[-1]

    def poison(step: int, of: int, newest: dict[str, float]) -> None:
        if step == 3:
            with torch.no_grad():
                students[0].model.norm.weight[0] = float("nan")

    monkeypatch.setattr("drkl.training.run.make_student", keep)
    with pytest.raises(DrklError, match=r"at step 4, rows r\d+.*student weight 'model\.norm\.weight'"):
        tiny_runs.train(values, listener=Listener(on_progress=poison))
    run = RunFolder(tmp_path / "runs" / "r")
    assert not run.is_finished() and not run.student_path.exists()
    assert (run.checkpoints_path / "checkpoint-2" / "complete.json").is_file()
    # Had it been a cosmic ray: the run goes on from there.
    assert tiny_runs.train(values, "resume").is_finished()


def test_a_learning_rate_that_blows_up(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, training={"learning_rate": 1e30, "eval_every": 4, "save_every": 4})
    with pytest.raises(DrklError, match=r"not finite at step \d, rows r\d+.*A lower learning rate"):
        tiny_runs.train(values)


@pytest.mark.slow
def test_an_estimate_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES, training={"tokens_per_step": 120})
    before = tiny_runs.tree(tmp_path)
    plan = estimate(tiny_runs.specs(values))
    assert tiny_runs.tree(tmp_path) == before
    assert plan["config"]["run"]["name"] == "r"
    assert plan["parameters"]["teacher"] == sum(p.numel() for p in tiny.llama().parameters())
    assert [stage["name"] for stage in plan["stages"]] == ["01-warmup", "r"]
    for stage in plan["stages"]:
        assert 0 < stage["tokens_per_step"]["trained"] < stage["tokens_per_step"]["input"] <= 120
        assert stage["estimated_memory_gb"] > 0 and stage["estimated_minutes"] >= 0
    # What it foresees is what the run does.
    run = tiny_runs.train(values)
    trained = run.read_train_log()[-2]["num_tokens"] / 6
    assert plan["stages"][1]["tokens_per_step"]["trained"] == pytest.approx(trained, abs=0.1)
    assert run.read_env()["parameters"] == plan["parameters"]


def test_an_estimate_of_a_teacher_that_remembers(tmp_path: Path) -> None:
    training = {"tokens_per_step": 120, "same_batches": True}
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES, training=training)
    live = estimate(tiny_runs.specs(values))["stages"]
    values["teacher"]["remember_mb"] = 500
    kept = estimate(tiny_runs.specs(values))["stages"]
    assert [stage["tokens_per_step"]["input"] for stage in kept] == [s["tokens_per_step"]["input"] for s in live]
    assert live[1]["tokens_per_step"]["through_the_teacher"] == live[1]["tokens_per_step"]["input"]
    # The warm-up's 4 steps are the first of the 6 that follow.
    assert 0 < kept[1]["tokens_per_step"]["through_the_teacher"] < 0.5 * live[1]["tokens_per_step"]["input"]
    states = [stage["memory"]["bytes"]["loss"]["teacher_states"] for stage in (live[0], kept[0])]
    trained = kept[0]["tokens_per_step"]["trained"] * kept[0]["steps"]
    assert states[1] - states[0] == pytest.approx(16 * 4 * trained, abs=16 * 4)  # what there is, and no more


@pytest.mark.slow
def test_an_estimate_of_answers(tmp_path: Path) -> None:
    rollouts = {"share": 1.0, "max_new_tokens": 3}
    values = tiny_runs.config(tmp_path, rollouts=rollouts)

    def planned(**changes: Any) -> dict[str, Any]:
        (stage,) = estimate(tiny_runs.specs(values | {"rollouts": rollouts | changes}))["stages"]
        return stage

    data, answered, half = planned(share=0.0), planned(), planned(share=0.5)
    assert "answers_per_step" not in data and data["steps"] == answered["steps"] == 6
    number = answered["answers_per_step"]["written"]
    assert answered["tokens_per_step"]["trained"] == answered["answers_per_step"]["tokens"] <= 3 * number
    assert half["answers_per_step"]["written"] == pytest.approx(number / 2, abs=0.1)
    between = (data["tokens_per_step"]["trained"] + answered["tokens_per_step"]["trained"]) / 2
    assert half["tokens_per_step"]["trained"] == pytest.approx(between, abs=0.1)
    assert planned(replay=0.75)["answers_per_step"]["written"] == pytest.approx(number / 4, abs=0.1)
    ramp = planned(share={"from": 0, "to": 1, "steps": 3})  # shares 0, 1/3, 2/3, 1, 1 and 1
    assert ramp["answers_per_step"]["written"] == pytest.approx(number * 4 / 6, abs=0.1)
    served = planned(generator="vllm", server="http://127.0.0.1:1")["answers_per_step"]
    assert served["written"] == number and "the server" in served["not_estimated"]
    # The rows of the run's steps are those of the plan.
    lines = tiny_runs.train(values).read_train_log()
    assert sum(line.get("rollout_answers", 0) for line in lines) == pytest.approx(6 * number, abs=0.31)


@pytest.mark.parametrize("source", ["mixed", "teacher"])
def test_an_estimate_of_answers_by_the_teacher(tmp_path: Path, source: str) -> None:
    values = tiny_runs.config(tmp_path, rollouts={"share": 1.0, "source": source})
    (stage,) = estimate(tiny_runs.specs(values))["stages"]
    assert stage["answers_per_step"]["longest"] == 40 and stage["answers_per_step"]["estimated_minutes"] >= 0


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"layers": 9}, "student.layers is 9; the model has 4"),
        ({"init": "pretrained", "model": "/nowhere"}, "There is no folder '/nowhere'"),
    ],
)
def test_an_estimate_refuses_what_a_run_would(tmp_path: Path, student: dict[str, Any], message: str) -> None:
    values = tiny_runs.config(tmp_path) | {"student": student}
    with pytest.raises(DrklError, match=message):
        estimate(tiny_runs.specs(values))
