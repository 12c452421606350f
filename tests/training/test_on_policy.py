"""Training on answers that the student, both models or the teacher write."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.models.forward import hidden_states, lm_head
from drkl.runs import RunFolder
from drkl.training.checkpoints import mark_complete, reached_at
from drkl.training.on_policy import check_whole
from tests.models import tiny
from tests.training import tiny_runs
from tests.training.test_resume import assert_equal, comparable, cut_off, kill_at_step, reference
from tests.training.test_trainer import Gradients, assert_same, make_trainer, rows
from tests.training.two_processes import answers_of

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "tokens_per_second", "seconds_generating", "seconds_learning")


def gradients_of(tmp_path: Path, data: list[Row], **arguments: Any) -> tuple[dict[str, torch.Tensor], Any]:
    kept = Gradients()
    arguments = {"rollout_share": 1.0, "rollout_max_new_tokens": 6} | arguments
    trainer = make_trainer(tmp_path, data, callbacks=[kept], **arguments)
    trainer.answers = answers_of(trainer)
    trainer.train()
    return kept.first, trainer


@pytest.mark.slow
def test_share_0_is_the_run_without_a_section(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    plain = tiny_runs.train(values)
    off = {"share": 0.0, "max_new_tokens": 3, "refresh_every": 2}
    also = tiny_runs.train({**values, "run": values["run"] | {"name": "off"}, "rollouts": off})
    assert tiny_runs.weights(plain) == tiny_runs.weights(also)
    assert comparable(plain) == comparable(also)


@pytest.mark.slow
def test_steps_without_answers_are_those_of_a_run_without_them(tmp_path: Path) -> None:
    """As before a ramp rises, bit for bit."""
    ramp = {"from": 0, "to": 1e-9, "steps": 1000}
    weights = []
    for share in (0, ramp):
        model = tiny.llama(1, layers=2)
        trainer = make_trainer(
            tmp_path, rows(12), model=model, teacher=tiny.llama(9), max_steps=2, gradient_accumulation_steps=2,
            tokens_per_step=60, rollout_share=share,
        )  # fmt: skip
        trainer.train()
        weights.append(dict(model.state_dict()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_student_that_equals_its_teacher_has_no_loss(tmp_path: Path) -> None:
    for objective in ("fkl", "rkl", "drkl"):
        model = tiny.llama(9)
        trainer = make_trainer(
            tmp_path, rows(8), model=model, teacher=tiny.llama(9), objective=objective, rollout_share=1.0,
            rollout_max_new_tokens=8,
        )  # fmt: skip
        trainer.train()
        assert abs(trainer.state.log_history[0]["loss"]) <= 1e-6
        assert trainer.state.log_history[0]["rollout_share"] == 1.0


@torch.no_grad()
def reference_loss(student: PreTrainedModel, teacher: PreTrainedModel, made: list[Row], kd_weight: float) -> float:
    """Forward KL, row by row without padding: at each response token of both models' distributions."""
    total, count = 0.0, 0
    for row in made:
        ids = torch.tensor([row.all_ids])
        places = slice(len(row.prompt_ids) - 1, len(row.all_ids) - 1)
        logp = [
            torch.log_softmax(lm_head(m).logits(hidden_states(m, {"input_ids": ids}))[0, places].double(), -1)
            for m in (student, teacher)
        ]
        kl = (logp[1].exp() * (logp[1] - logp[0])).sum(-1)
        nll = -logp[0].gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]
        cross_entropy = torch.zeros_like(nll) if row.sampled else nll
        total += float((kd_weight * kl + (1 - kd_weight) * cross_entropy).sum())
        count += len(row.response_ids)
    return total / count


@pytest.mark.parametrize("kd_weight", [1.0, 0.6])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_loss_is_that_of_the_written_tokens(tmp_path: Path, share: float, kd_weight: float) -> None:
    """Divided once by what was really written; cross-entropy sees the data's responses alone."""
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    trainer = make_trainer(
        tmp_path, rows(9), model=student, teacher=teacher, objective="fkl", rollout_share=share,
        rollout_max_new_tokens=7, loss=LossConfig(kd_weight=kd_weight), learning_rate=1e-30, tokens_per_step=60,
    )  # fmt: skip
    made: list[Row] = []
    assert trainer._on_policy is not None
    step_rows = trainer._on_policy._answered.rows_of
    trainer._on_policy._answered.rows_of = lambda step: made.extend(step_rows(step)) or list(made)  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert {row.sampled for row in made} == ({True} if share == 1 else {True, False})
    assert trainer.num_tokens_seen == sum(len(row.response_ids) for row in made)
    expected = reference_loss(student, teacher, made, kd_weight)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-5)


def test_a_finished_answer_keeps_its_end_and_a_cut_one_gets_none(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(40), rollout_share=1.0, rollout_max_new_tokens=12, tokens_per_step=4000)
    assert trainer._on_policy is not None
    made = trainer._on_policy._answered.rows_of(0)
    stops = set(torch.atleast_1d(torch.tensor(trainer.pair.student.generation_config.eos_token_id)).tolist())
    ends = [row.response_ids[-1] in stops for row in made]
    assert True in ends and False in ends
    for row, ended in zip(made, ends, strict=True):
        assert ended or len(row.response_ids) == 12
        assert not stops & set(row.response_ids[:-1])


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 3}, {"tokens_per_step": 90}, {"rows": 2}])
@pytest.mark.slow
def test_micro_batches_change_no_answer_and_no_gradient(tmp_path: Path, settings: dict[str, Any]) -> None:
    """One step of all rows against the same step cut smaller, by whichever limit."""
    data = rows(12)
    arguments: dict[str, Any] = {"tokens_per_step": None, "per_device_train_batch_size": 12}
    whole, reference = gradients_of(tmp_path, data, **arguments)
    if "rows" in settings:
        arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    elif "tokens_per_step" in settings:
        # Planned by the data's short responses, written longer: cut into more parts than planned.
        short = [Row(row.id, row.prompt_ids, row.response_ids[:1], row.example) for row in data]
        arguments = settings
        data = short
    else:
        arguments |= {"per_device_train_batch_size": 4} | settings
    cut, trainer = gradients_of(tmp_path, data, **arguments)
    assert trainer.num_tokens_seen == reference.num_tokens_seen
    assert_same(cut, whole)


def test_memory_is_bounded_by_what_was_written(tmp_path: Path) -> None:
    """Rows are planned by their short responses; the answers are longer, so a step has more parts."""
    data = [Row(f"r{i}", (6 + i,) * 3, (7,), None) for i in range(12)]  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, data, rollout_share=1.0, rollout_max_new_tokens=20, tokens_per_step=40)
    assert trainer._on_policy is not None
    (batch,), num_tokens = trainer._on_policy.micro_batches(0)
    sizes = [part["input_ids"].numel() for part in batch["parts"]]
    assert len(sizes) > 1 and all(size <= 40 for size in sizes)
    assert sum(int((part["labels"] != -100).sum()) for part in batch["parts"]) == num_tokens


MOMENTS = ("write 3", "write 12", "log r 4", "checkpoint r 4")
REPLAYED = {"share": 0.9, "max_new_tokens": 6, "refresh_every": 3, "replay": 0.4, "replay_memory": 5}


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The losses between the checkpoint and the next line of the log included."""
    training = {"max_steps": 8, "arguments": {"logging_steps": 3}}
    values, whole = reference(tmp_path, rollouts=REPLAYED, training=training)
    cut_off(values, kill_at_step("r", 5))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, moment: str) -> None:
    values = tiny_runs.config(tmp_path, rollouts=REPLAYED, training={"max_steps": 8})
    whole = tiny_runs.train({**values, "run": values["run"] | {"name": "whole"}})
    path = tiny_runs.write_config(values, tmp_path / "config.yaml")
    *words, number = moment.split()
    killed = tiny_runs.call_killed(" ".join(words), int(number), "distill", path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = RunFolder(tmp_path / "runs" / "r")
    assert not run.is_finished()
    resumed = tiny_runs.train(values, "resume" if run.config_path.is_file() else "new")
    skipped = {key: 0 for key in TIMES}
    log = [[row | skipped for row in r.read_train_log()] for r in (resumed, whole)]
    assert log[0] == log[1]
    assert tiny_runs.weights(resumed) == tiny_runs.weights(whole)
    assert any(row["rollout_share"] > 0 for row in whole.read_train_log() if "rollout_share" in row)


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, rows(8), max_steps=2, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, rows(8), max_steps=4, rollout_share=1.0, rollout_max_new_tokens=4)
    with pytest.raises(DrklError, match=r"rollouts\.share: 0\.0 then, 1\.0 now"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer._on_policy is not None
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    with pytest.raises(DrklError, match=r"has no rollouts\.json: its run trained on the data's responses alone"):
        trainer._on_policy.begin(checkpoint)
    path = checkpoint / "rollouts.json"
    for text in ('{"answers": {}}', '{"written_to": 3, "pen', "[]"):
        path.write_text(text)
        before = tiny_runs.tree(tmp_path)
        with pytest.raises(DrklError, match=r"rollouts\.json' does not hold the answers of a run .*Remove that check"):
            trainer._on_policy.begin(checkpoint)
        assert tiny_runs.tree(tmp_path) == before, "what is refused is left as it is"


def test_a_checkpoint_whose_answers_were_changed_is_refused(tmp_path: Path) -> None:
    settings = {"rollout_share": 1.0, "rollout_max_new_tokens": 4, "rollout_refresh_every": 2, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "tokens_per_step": 30}
    path = tmp_path / "checkpoints" / "checkpoint-1" / "rollouts.json"
    trainer = make_trainer(tmp_path, rows(8), max_steps=2, **settings)
    trainer.train()
    text = path.read_text()
    for change in ({"row": 1}, {"token_ids": []}, {"token_ids": [5, 99999]}, {"row": 8}):
        state = json.loads(text)
        state["pending"][0][2] |= change
        path.write_text(json.dumps(state))
        mark_complete(path.parent, reached_at(path.parent))
        with pytest.raises(DrklError, match=r"does not hold the answers of a run .*it was changed after it was writ"):
            trainer.train(resume_from_checkpoint=path.parent)


@pytest.mark.slow
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = {"rollout_share": 1.0, "rollout_refresh_every": 3, "save_strategy": "steps", "save_steps": 1}
    settings |= {"tokens_per_step": 30, "max_steps": 4}
    make_trainer(tmp_path, rows(8), rollout_max_new_tokens=6, **settings).train()
    other = make_trainer(tmp_path, rows(8), rollout_max_new_tokens=2, **settings)
    with pytest.raises(DrklError, match=r"rollouts\.max_new_tokens: 6 then, 2 now\. Put them back as they were"):
        other.train(resume_from_checkpoint=True)


def test_sampling_leaves_torch_s_random_numbers_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(8), rollout_share=1.0, rollout_max_new_tokens=4)
    assert trainer._on_policy is not None
    before = torch.get_rng_state()
    trainer._on_policy.micro_batches(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "accumulation"), [(8, 1), (9, 2), (1, 1)])
def test_two_processes_take_the_step_that_one_takes(tmp_path: Path, count: int, accumulation: int) -> None:
    environment = tiny_runs.environment()
    environment["PYTHONPATH"] += f":{ROOT}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "tests" / "training" / "two_processes.py"), tmp_path, count, accumulation, "1.0"]
    done = subprocess.run([*launch, *map(str, script)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    alone, trainer = gradients_of(tmp_path, rows(count), max_steps=3)
    assert found["world"] == 2
    flipped = sum(a != b for a, b in zip(found["answers"], trainer.answers, strict=True))
    assert (len(trainer.answers), flipped) == (3 * count, 0), (
        "rounding may decide otherwise; with these models it does not"
    )
    assert found["tokens"] == trainer.num_tokens_seen
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert_same(found["gradients"], alone)
    ours = dict(trainer.student.state_dict())
    assert_same(found["weights"], {name: ours[name] for name in found["weights"]})


@pytest.mark.slow
def test_lora_and_encoder_decoder(tmp_path: Path) -> None:
    lora = tiny_runs.config(
        tmp_path, student={"init": "pretrained", "model": str(tmp_path / "teacher"), "layers": None},
        peft={"r": 4, "export": "adapter"}, rollouts={"share": 1.0, "max_new_tokens": 5},
    )  # fmt: skip
    run = tiny_runs.train(lora)
    assert run.is_finished() and (run.student_path / "adapter_model.safetensors").is_file()
    folder = tmp_path / "t5"
    folder.mkdir()
    tiny.save(tiny.t5(), folder / "teacher")
    tiny_runs.write_rows(folder / "data.jsonl")
    t5 = tiny_runs.config(folder, rollouts={"share": 1.0, "max_new_tokens": 5, "refresh_every": 2})
    run = tiny_runs.train(t5)
    assert run.is_finished()
    assert all(row["rollout_share"] == 1 for row in run.read_train_log() if "rollout_share" in row)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss": {"kd_weight": 0.0}}, "kd_weight is 0 and rollout_share is not"),
    ({"objective": {"name": "ce"}}, "Objective 'ce' compares with no teacher"),
    ({"objective": {"name": "drkl", "target": "label"}}, "the label is the sampled token"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_what_makes_no_sense_on_answers_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    values = tiny_runs.config(tmp_path, rollouts={"share": 1.0, "max_new_tokens": 4}) | section
    with pytest.raises(DrklError, match=message):
        tiny_runs.train(values)


@pytest.mark.slow
def test_the_log_holds_the_seconds_and_the_share(tmp_path: Path) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path, rollouts={"share": 1.0, "max_new_tokens": 4}))
    lines = [json.loads(line) for line in run.train_log_path.read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        assert line["rollout_share"] == 1 and line["seconds_generating"] > 0 and line["seconds_learning"] > 0
    assert not [line for line in comparable(run) if "seconds" in line]


@pytest.mark.slow
def test_equal_runs_are_equal(tmp_path: Path) -> None:
    """Two whole runs in different processes, and the comparison of resumed runs can tell them apart."""
    values = tiny_runs.config(tmp_path, rollouts={"share": 1.0, "max_new_tokens": 4, "replay": 0.3})
    runs = [tiny_runs.train({**values, "run": values["run"] | {"name": name}}) for name in ("a", "b")]
    other = tiny_runs.train({**values, "run": values["run"] | {"name": "c", "seed": 4}})
    assert tiny_runs.weights(runs[0]) == tiny_runs.weights(runs[1]) != tiny_runs.weights(other)


@pytest.mark.parametrize(("fsdp", "stage", "name"), [(True, None, "FSDP"), (False, 3, "DeepSpeed ZeRO-3")])
def test_a_student_in_pieces_is_refused(fsdp: bool, stage: int | None, name: str) -> None:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    trainer = SimpleNamespace(is_fsdp_enabled=fsdp, accelerator=SimpleNamespace(state=state))
    with pytest.raises(DrklError, match=f"{name} cuts the student's weights over the processes"):
        check_whole(trainer)
    check_whole(SimpleNamespace(is_fsdp_enabled=False, accelerator=SimpleNamespace(state=SimpleNamespace())))


def test_progress_tells_how_many_answers_are_written(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float]] = []
    trainer = make_trainer(tmp_path, rows(6), rollout_share=1.0, rollout_max_new_tokens=4)
    trainer.on_progress(lambda step, of, new: seen.append((step, new.get("written", -1), new.get("to_write", -1))))
    trainer.train()
    assert (0, 6, 6) in seen and seen[-1][0] == 1


@pytest.mark.slow
def test_training_again_samples_again(tmp_path: Path) -> None:
    """Of prompts alone: answers of the first training would leave nothing to train on in the second."""
    data = [Row(row.id, row.prompt_ids, (), None) for row in rows(6)]  # type: ignore[arg-type]
    model = tiny.llama(1, layers=2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path, data, model=model, teacher=tiny.llama(9), max_steps=2, tokens_per_step=30, rollout_share=1.0,
        rollout_max_new_tokens=5, rollout_refresh_every=2, rollout_replay=0.3,
    )  # fmt: skip
    found = []
    for _ in range(2):
        model.load_state_dict(start)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert_same(*found)


def test_each_step_keeps_its_texts_once(tmp_path: Path) -> None:
    """Also where a whole evaluation comes before the first step, or after the last."""
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "rollout_share": 1.0, "rollout_max_new_tokens": 3}
    for name, first in (("run", False), ("start", True)):
        trainer = make_trainer(tmp_path / name, rows(4), heldout=rows(2), eval_on_start=first, **evaluates)
        assert trainer.evaluate()["eval_rollout_answers"] == 2
        trainer.train()
        trainer.evaluate()
        assert [line["step"] for line in trainer.run.read_rollouts()] == [0, 0, 1, 1]
        lines = [line["step"] for line in trainer.run.read_train_log() if "eval_rollout_loss" in line]
        assert lines == [0, 1, 1], "the evaluation that was asked for last is logged, as any other"
