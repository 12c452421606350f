"""The watched pushes against numpy from each model's own logits; training is the same; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from drkl import make_objective
from drkl.analysis.config import AnalysisConfig
from drkl.analysis.watch import GradientWatch, Probe, summary, watcher
from drkl.data.classification import LabelledRow
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.forward import decoder_start
from drkl.reporting.curves import pushes
from drkl.reporting.inputs import read_run
from drkl.runs import RunFolder
from drkl.teachers.live import LiveTeacher
from drkl.training.run import Listener, distill
from tests.analysis import reference
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_trainer import make_trainer

KEYS = {f"watch_{name}" for name in ("target_push", "tail_push", "raised", "q_t", "p_t", "B", "K", "D")}
MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda seed, layers: tiny.llama(seed, layers=layers, initializer_range=0.4),
    "t5": tiny.t5,
    "bert": lambda seed, layers: tiny_classifiers.make("bert", seed),
}


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return MAKERS[family](1, layers=2).double(), MAKERS[family](2, layers=3).double()


def rows(family: str, count: int = 7) -> list[Row | LabelledRow]:
    """Of every length, so that a batch pads; in one of them the loss leaves tokens out."""
    made: list[Row | LabelledRow] = []
    for i in range(count):
        prompt = tuple(6 + (i * 3 + j) % 50 for j in range(1 + i % 4))
        response = tuple(6 + (i * 7 + j * 5) % 50 for j in range(2 + (i * 3) % 5))
        if family == "bert":
            made.append(LabelledRow(str(i), (1, *prompt, *response, 2), i % 3, ""))
            continue
        trained = tuple(j != 1 for j in range(len(response))) if i == 3 and family == "llama" else None
        made.append(Row(str(i), prompt, response, None, trained, encoder_decoder=family == "t5"))  # type: ignore[arg-type]
    return made


@torch.no_grad()
def plain_logits(model: PreTrainedModel, row: Any) -> tuple[np.ndarray, list[int]]:
    """Logits and observed tokens at the positions that count: one row, no padding, the model's own forward."""
    if isinstance(row, LabelledRow):
        return model(input_ids=torch.tensor([row.ids])).logits.numpy(), [row.label]
    counts = [True] * len(row.response_ids) if row.trained is None else list(row.trained)
    if row.encoder_decoder:
        fed = torch.tensor([[model.config.decoder_start_token_id, *row.response_ids[:-1]]])
        logits = model(input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=fed).logits[0]
    else:
        logits = model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
    return logits.numpy()[counts], [token for token, one in zip(row.response_ids, counts, strict=True) if one]


def expected(
    student: PreTrainedModel, teacher: PreTrainedModel, data: list[Any], wanted: int, temperature: float
) -> dict[str, float]:
    """What is logged of reverse KL, from its equations."""
    z, y = (np.concatenate([plain_logits(model, row)[0] for row in data]) for model in (student, teacher))
    picks = [i * len(z) // wanted for i in range(wanted)] if len(z) > wanted else list(range(len(z)))
    z, y = z[picks], y[picks]
    found = reference.numbers(z, y, y.argmax(-1), temperature)
    two = found["q_t"] * found["rest_q"] / temperature
    columns = {name: found[name] for name in ("q_t", "p_t", "B", "K", "D")}
    columns |= {"target_push": two * found["D"], "tail_push": -two * found["K"]}
    numbers = {f"watch_{name}": float(column.mean()) for name, column in columns.items()}
    matched = abs(found["D"]) <= 0.25
    if matched.any():
        numbers["watch_matched_push"] = float(columns["tail_push"][matched].mean())
    numbers["watch_raised"] = float((columns["tail_push"] < -1e-4).mean())
    return numbers


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("wanted", [5, 256])
def test_the_numbers_are_those_of_the_models_own_logits(family: str, wanted: int) -> None:
    (student, teacher), data = pair(family), rows(family, 24 if family == "bert" else 7)
    probe = Probe(data, LiveTeacher(teacher), pad_id=0, positions=wanted, decoder_start=decoder_start(student))
    found = GradientWatch(probe, "rkl", every=1, temperature=2.0).measure(student)
    count = len(probe)
    assert count == min(wanted, sum(row.num_trained for row in data))
    assert found == pytest.approx(expected(student, teacher, data, count, 2.0), rel=1e-9)


def test_the_objectives_own_target_is_used() -> None:
    (student, teacher), data = pair("llama"), rows("llama")
    probe = Probe(data, LiveTeacher(teacher), pad_id=0)
    z, y = (np.concatenate([plain_logits(model, row)[0] for row in data]) for model in (student, teacher))
    t = np.array([token for row in data for token in plain_logits(student, row)[1]])
    found = reference.numbers(z, y, t, 1.0)
    watched = GradientWatch(probe, make_objective("drkl", target="label"), every=1).measure(student)
    assert watched["watch_q_t"] == pytest.approx(found["q_t"].mean(), rel=1e-9)
    assert watched["watch_target_push"] == pytest.approx((found["q_t"] * found["rest_q"] * found["D"]).mean(), rel=1e-9)
    assert watched["watch_tail_push"] == pytest.approx(0, abs=1e-12) and watched["watch_raised"] == 0
    only = GradientWatch(probe, "ce", every=1).measure(student)
    assert only["watch_target_push"] == pytest.approx(-found["rest_q"].mean(), rel=1e-9)


def test_a_teacher_in_memory_is_handed_back_as_it_was() -> None:
    (student, teacher), data = pair("llama"), rows("llama")
    teacher.train()
    watch = GradientWatch(Probe(data, teacher, pad_id=0), "rkl", every=1)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    of_live = GradientWatch(Probe(data, LiveTeacher(teacher), pad_id=0), "rkl", every=1)
    assert watch.measure(student) == of_live.measure(student)


def test_only_the_ids_that_both_models_share() -> None:
    student, teacher = tiny.llama(1, vocab=70).double(), tiny.llama(2).double()
    data = rows("llama")
    probe = Probe(data, LiveTeacher(teacher), pad_id=0, vocab_size=60)
    z, y = (np.concatenate([plain_logits(m, row)[0][:, :60] for row in data]) for m in (student, teacher))
    found = GradientWatch(probe, "rkl", every=1).measure(student)
    assert found["watch_K"] == pytest.approx(reference.numbers(z, y, y.argmax(-1), 1.0)["K"].mean(), rel=1e-9)


def test_ids_that_are_one_class() -> None:
    (student, teacher), data = pair("llama"), rows("llama")
    ids = [2, 9, 40]
    probe = Probe(data, LiveTeacher(teacher), pad_id=0, merged_ids=ids)
    z, y = (np.concatenate([plain_logits(model, row)[0] for row in data]) for model in (student, teacher))
    z, y = (np.concatenate([np.delete(x, ids, 1), np.log(np.exp(x[:, ids]).sum(1, keepdims=True))], 1) for x in (z, y))
    found = GradientWatch(probe, "rkl", every=1).measure(student)
    numbers = reference.numbers(z, y, y.argmax(-1), 1.0)
    for name in ("q_t", "B", "K"):
        assert found[f"watch_{name}"] == pytest.approx(numbers[name].mean(), rel=1e-9)


def test_a_push_is_one_only_beyond_rounding_and_a_mean_over_nothing_is_left_out() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    columns = dict.fromkeys(("target_push", "q_t", "p_t", "B", "K"), zero) | {
        "tail_push": torch.tensor([-1e-6, -2e-4, 0.3, -0.1], dtype=torch.float64),
        "D": torch.tensor([0.26, -0.26, 3.0, -3.0], dtype=torch.float64),
    }
    found = summary(columns)
    assert found["watch_raised"] == 0.5 and "watch_matched_push" not in found
    found = summary(columns | {"D": torch.tensor([0.24, -0.26, 3.0, -0.24], dtype=torch.float64)})
    assert found["watch_matched_push"] == pytest.approx((-1e-6 - 0.1) / 2)


class Seen(TrainerCallback):
    """Stands before the watch, where a trainer puts its trackers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append((state.global_step, dict(logs)))


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    trained, losses, random = [], [], []
    for watched in (False, True):
        seen = Seen()
        student = tiny.gpt2(1, layers=2)  # with dropout: its random state counts
        trainer = make_trainer(
            tmp_path, rows("llama"), model=student, teacher=tiny.gpt2(2), callbacks=[seen], max_steps=5,
            logging_steps=2, heldout=rows("llama"), eval_strategy="steps", eval_steps=2, max_grad_norm=1.0,
        )  # fmt: skip
        if watched:
            probe = Probe(rows("llama"), LiveTeacher(tiny.gpt2(2)), pad_id=0)
            watch = GradientWatch(probe, "drkl", every=2)
            watch.attach(trainer)
        torch.manual_seed(11)
        trainer.train()
        random.append(torch.get_rng_state())
        trained.append({name: value.clone() for name, value in student.state_dict().items()})
        clock = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
        lines = [(step, {k: v for k, v in line.items() if k not in clock}) for step, line in seen.lines]
        losses.append([line for line in lines if not KEYS & line[1].keys()])
    # Training and held-out losses at steps 2, 4 and 5, and the summary at the end.
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [2, 2, 4, 4, 5, 5, 5]
    assert torch.equal(*random)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    looks = [(step, line) for step, line in seen.lines if "watch_q_t" in line]
    assert [step for step, _ in looks] == [1, 2, 4, 5]
    assert all(line.keys() - {"epoch", "watch_matched_push"} == KEYS for _, line in looks)
    assert [line["step"] for line in trainer.state.log_history if "watch_q_t" in line] == [1, 2, 4, 5]
    last = {name: value for name, value in looks[-1][1].items() if name != "epoch"}
    assert last == watch.measure(student)


def test_a_look_leaves_the_student_as_it_was() -> None:
    student, teacher = tiny.gpt2(1, layers=2), tiny.gpt2(2)
    watch = GradientWatch(Probe(rows("llama"), LiveTeacher(teacher), pad_id=0), "rkl", every=1)
    student.train()
    student.transformer.h[1].eval()
    modes = [module.training for module in student.modules()]
    seen: list[bool] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.append(module.training)
        torch.rand(3)

    student.transformer.h[0].register_forward_hook(hook)
    state = torch.get_rng_state()
    watch.measure(student)
    assert seen and not any(seen)
    assert [module.training for module in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def plain_trainer(tmp_path: Path, model: Any, callbacks: list[TrainerCallback] | None = None) -> Trainer:
    """transformers' own, on its own loss."""
    data = [{"input_ids": list(range(5, 11)), "labels": list(range(5, 11))} for _ in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=50,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_any_trainer_and_a_lora_student(tmp_path: Path) -> None:
    teacher, base = tiny.llama(2), tiny.llama(1, layers=2)
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = plain_trainer(tmp_path, student)
    watch = GradientWatch(Probe(rows("llama"), LiveTeacher(teacher), pad_id=0), "rkl", every=5)
    watch.attach(trainer)
    trainer.train()
    history = [line for line in trainer.state.log_history if "watch_q_t" in line]
    assert [line["step"] for line in history] == [1, 2]
    merged = student.merge_and_unload()
    y = np.concatenate([plain_logits(teacher, row)[0] for row in rows("llama")])
    z = np.concatenate([plain_logits(merged.eval(), row)[0] for row in rows("llama")])
    assert history[-1]["watch_q_t"] == pytest.approx(
        reference.numbers(z.astype(float), y.astype(float), y.argmax(-1), 1.0)["q_t"].mean(), rel=1e-4
    )


def probe_of(**changes: Any) -> Probe:
    settings: dict[str, Any] = {"rows": rows("llama"), "teacher": LiveTeacher(tiny.llama(2)), "pad_id": 0}
    return Probe(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "no teacher to compare the student with"),
        ({"positions": 0}, "positions is 0; expected at least 1"),
        ({"rows": []}, "The 0 rows to watch have no position"),
        ({"rows": [Row("a", (5,), (6,), None, (False,))]}, "The 1 rows to watch have no position"),  # type: ignore[arg-type]
        ({"decoder_start": 0}, "tokenised for a decoder-only model, but decoder_start is 0, .* an encoder-decoder;"),
        ({"rows": rows("t5")}, "tokenised for an encoder-decoder, but decoder_start is None, .* a decoder-only model;"),
    ],
)
def test_probes_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        probe_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every is 0; expected a number of optimiser steps, at least 1"),
        ({"objective": "rlk"}, "rlk.*Did you mean 'rkl'"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
    ],
)
def test_watches_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        GradientWatch(probe_of(), **({"objective": "rkl", "every": 1} | changes))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_trainers_that_are_refused(tmp_path: Path) -> None:
    watch = GradientWatch(probe_of(), "rkl", every=1)
    with pytest.raises(DrklError, match="The teacher scores 64 tokens and the student 70"):
        watch.attach(plain_trainer(tmp_path, tiny.llama(1, vocab=70)))
    with pytest.raises(DrklError, match=r"not attached to.*watch\.attach\(trainer\)"):
        plain_trainer(tmp_path, tiny.llama(1), [watch]).train()
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(DrklError, match="prompts that peft puts before its input"):
        watch.attach(plain_trainer(tmp_path, get_peft_model(tiny.llama(1), prompts)))


def looks(run: RunFolder) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in run.read_train_log() if "watch_q_t" in row}


def others(run: RunFolder) -> list[dict[str, Any]]:
    """The log without what is watched, and without the clock."""
    lines = [row for row in run.read_train_log() if "watch_q_t" not in row]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in lines]


class Killed(BaseException):
    """No handler in the code catches it."""


@pytest.mark.slow
def test_a_run_in_stages_is_watched_resumed_and_otherwise_the_same(tmp_path: Path) -> None:
    assert watcher(AnalysisConfig()) is None
    stages = [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 2}}]
    values = tiny_runs.config(tmp_path, stages=stages, training={"max_steps": 4})
    plain = tiny_runs.train(values)
    assert not [key for row in plain.read_train_log() for key in row if key.startswith("watch")]
    on_trainer = watcher(AnalysisConfig(watch_every=3, watch_positions=3))
    values["run"]["name"] = "watched"

    def kill(step: int, of: int, newest: dict[str, float]) -> None:
        if (step, of) == (3, 4):
            raise Killed

    with pytest.raises(Killed):
        distill(tiny_runs.specs(values), listener=Listener(on_progress=kill), on_trainer=on_trainer)
    run = distill(tiny_runs.specs(values), mode="resume", on_trainer=on_trainer)
    for ours, theirs, steps in zip((*run.stages(), run), (*plain.stages(), plain), ([1, 2], [1, 3, 4]), strict=True):
        assert list(looks(ours)) == steps
        assert others(ours) == others(theirs)
        assert tiny_runs.weights(ours) == tiny_runs.weights(theirs)
    assert all(row["watch_raised"] == 0 for row in looks(run).values())  # drkl's tail pushes no target
    assert all(row["watch_target_push"] != 0 for row in looks(run).values())


def test_a_classifier_and_cross_entropy_alone(tmp_path: Path) -> None:
    tiny_classifiers.save(tiny_classifiers.make("bert"), tmp_path / "teacher")
    lines = [{"id": str(i), "text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = tiny_runs.config(
        tmp_path, task="classification", loss={"kd_weight": 0.0, "temperature": 3.0}, training={"max_steps": 2}
    )
    values["data"].pop("max_prompt_tokens")
    run = distill(tiny_runs.specs(values), on_trainer=watcher(AnalysisConfig(watch_every=1)))
    for line in looks(run).values():
        # Of cross-entropy at temperature 1: q_t - 1 on the label's logit.
        assert line["watch_target_push"] == pytest.approx(line["watch_q_t"] - 1, rel=1e-5)
        assert line["watch_tail_push"] == 0


@pytest.mark.slow
def test_the_command_line_watches_what_the_config_says(cli: Cli, tmp_path: Path) -> None:
    config = tiny_runs.write_config(tiny_runs.config(tmp_path, training={"max_steps": 1}), tmp_path / "c.yaml")
    done = cli("distill", config, "analysis.watch_every=1", "analysis.watch_positions=4", "objective.name=rkl")
    assert done.code == 0, done.err
    run = RunFolder(tmp_path / "runs" / "r")
    assert run.read_config()["analysis"] == {"watch_every": 1, "watch_positions": 4}
    assert list(looks(run)) == [1] and all(line["watch_tail_push"] < 0 for line in looks(run).values())
    picture = pushes(read_run(run))
    assert picture is not None and picture.title == "What pushes the target"
