from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from drkl.data.batching import plan_epochs, split_by_cost
from drkl.data.tokenize import DropReport, Row
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import TokenisedRows
from drkl.training.plan import MicroBatches
from drkl.training.trainer import DistillationTrainer
from tests.data.tiny_tokenizers import build
from tests.models import tiny


def rows(count: int) -> list[Row]:
    """The first row's prompt is one token, so that column 0 of its labels counts."""
    made = []
    for i in range(count):
        prompt = tuple(6 + (i * 3 + j) % 50 for j in range(1 + i % 4))
        response = tuple(6 + (i * 7 + j * 5) % 50 for j in range(2 + (i * 3) % 5))
        made.append(Row(f"row-{i}", prompt, response, None))  # type: ignore[arg-type]
    return made


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {name: p.grad.clone() for name, p in model.named_parameters()}


def make_trainer(
    tmp_path: Path,
    data: list[Row],
    *,
    objective: str = "drkl",
    model: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    heldout: list[Row] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    loss: LossConfig | None = None,
    **arguments: Any,
) -> DistillationTrainer:
    settings: dict[str, Any] = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "precision": "fp32",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "learning_rate": 1e-3,
        "tokens_per_step": 1000,
        "seed": 42,
    } | arguments
    settings |= (loss or LossConfig()).model_dump()
    report = DropReport(kept=len(data))
    return DistillationTrainer(
        model or tiny.llama(1, layers=2).double(),
        None if objective == "ce" else (teacher or tiny.llama(9).double()),
        DistillationConfig(output_dir=str(tmp_path), objective=objective, **settings),
        train_dataset=TokenisedRows(data, report),
        eval_dataset=None if heldout is None else TokenisedRows(heldout, report),
        processing_class=build(),
        callbacks=callbacks,
    )


def first_gradients(tmp_path: Path, data: list[Row], parts: int, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    kept = Gradients()
    trainer = make_trainer(tmp_path, data, callbacks=[kept], gradient_accumulation_steps=parts, **changes)
    trainer.train()
    return kept.first, trainer


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 1e-9, "atol": 1e-12}), msg=name)


@pytest.mark.parametrize(
    "objective", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ce", "fkl", "rkl")), "drkl"]
)
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(kd_weight=0.7, temperature=2.0, t2_scaling=True)])
def test_one_times_eight_is_eight_times_one(tmp_path: Path, objective: str, loss: LossConfig) -> None:
    data = rows(8)
    together, one = first_gradients(tmp_path, data, 1, objective=objective, loss=loss)
    apart, eight = first_gradients(tmp_path, data, 8, objective=objective, loss=loss)
    assert len(one.train_dataset) == 1 and len(eight.train_dataset) == 8
    assert max(float(g.abs().max()) for g in together.values()) > 1e-3
    assert_same(together, apart)
    assert one.num_tokens_seen == eight.num_tokens_seen == sum(len(row.response_ids) for row in data)
    assert one.state.log_history[0]["loss"] == pytest.approx(eight.state.log_history[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("count", "parts"), [(3, 8), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 4), (8, 3)))]
)
def test_empty_and_uneven_micro_batches_change_nothing(tmp_path: Path, count: int, parts: int) -> None:
    together, _ = first_gradients(tmp_path, rows(count), 1)
    apart, trainer = first_gradients(tmp_path, rows(count), parts)
    assert [len(trainer.train_dataset[i]) for i in range(parts)].count(0) == max(0, parts - count)
    assert_same(together, apart)


@pytest.mark.slow
def test_float32_too(tmp_path: Path) -> None:
    together, _ = first_gradients(tmp_path, rows(8), 1, model=tiny.llama(1), teacher=tiny.llama(9))
    apart, _ = first_gradients(tmp_path, rows(8), 8, model=tiny.llama(1), teacher=tiny.llama(9))
    assert_same(together, apart, rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_the_mean_over_response_tokens(tmp_path: Path) -> None:
    data = rows(8)
    ours, _ = first_gradients(tmp_path, data, 2, objective="ce")
    model = tiny.llama(1, layers=2).double()
    total = torch.zeros((), dtype=torch.float64)
    for row in data:  # no padding, no batches, plain cross-entropy of every response token
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
        for place in range(len(row.prompt_ids), ids.shape[1]):
            total = total - logp[place - 1, ids[0, place]]
    (total / sum(len(row.response_ids) for row in data)).backward()
    assert_same(ours, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_every_step_sees_the_same_rows_however_it_is_cut() -> None:
    data = rows(40)
    steps = next(plan_epochs([row.length for row in data], tokens_per_step=40, seed=3))[:7]
    whole, cut = MicroBatches(data, steps, 1), MicroBatches(data, steps, 4)
    assert len(whole) == 7 and len(cut) == 28
    for step in range(7):
        assert [row for part in range(4) for row in cut[4 * step + part]] == whole[step]


def test_statistics_are_of_this_model_and_its_teacher(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(8), objective="fkl", heldout=rows(8), eval_strategy="steps", eval_steps=1)
    trainer.train()
    line, heldout = trainer.state.log_history[0], trainer.state.log_history[1]
    assert line["fkl"] == pytest.approx(line["loss"], rel=1e-5)
    assert heldout["eval_fkl"] == pytest.approx(heldout["eval_loss"], rel=1e-5)
    expected = {"nll", "student_entropy", "fkl", "rkl", "agreement", "teacher_entropy"}
    assert expected <= line.keys() and {f"eval_{key}" for key in expected} <= heldout.keys()
    assert line["num_tokens"] == sum(len(row.response_ids) for row in rows(8)) and line["tokens_per_second"] > 0


def test_without_a_teacher_there_is_nothing_of_one_in_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(8), objective="ce", heldout=rows(4), eval_strategy="steps", eval_steps=1)
    trainer.train()
    keys = {key.removeprefix("eval_") for line in trainer.state.log_history for key in line}
    assert not keys & {"fkl", "rkl", "agreement", "teacher_entropy"}
    assert {"nll", "student_entropy"} <= keys


def poison(model: PreTrainedModel, name: str) -> PreTrainedModel:
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[3] = float("nan")
    return model


@pytest.mark.parametrize(
    ("whose", "weight", "fault"),
    [
        ("teacher", "model.norm.weight", "1 of 16 numbers in the teacher weight 'model.norm.weight'"),
        ("teacher", "lm_head.weight", "1 of 1024 numbers in the teacher weight 'lm_head.weight'"),
        ("student", "model.layers.1.mlp.up_proj.weight", "in the student weight 'model.layers.1.mlp.up_proj.weight'"),
    ],
)
def test_a_loss_that_is_no_number_names_the_tensor(tmp_path: Path, whose: str, weight: str, fault: str) -> None:
    models = {"student": tiny.llama(1), "teacher": tiny.llama(9, tie_word_embeddings=False)}
    trainer = make_trainer(tmp_path, rows(3), model=models["student"], teacher=models["teacher"])
    poison(models[whose], weight)
    with pytest.raises(DrklError) as error:
        trainer.train()
    assert "The loss became nan at step 1, rows" in str(error.value)
    assert all(f"row-{i}" in str(error.value) for i in range(3))
    assert fault in str(error.value)


def test_hidden_states_that_overflow_are_named(tmp_path: Path) -> None:
    student = tiny.gpt2(1)
    with torch.no_grad():
        student.transformer.h[0].mlp.c_fc.weight.fill_(3e38)
    trainer = make_trainer(tmp_path, rows(3), model=student, teacher=tiny.llama(9))
    with pytest.raises(DrklError, match=r"numbers in the student hidden states"):
        trainer.train()


def test_a_gradient_that_is_no_number_stops_before_the_step(tmp_path: Path) -> None:
    student = tiny.llama(1)
    student.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    before = tiny.logits(student)
    trainer = make_trainer(tmp_path, rows(3), model=student, teacher=tiny.llama(9), max_grad_norm=1.0)
    with pytest.raises(DrklError, match=r"gradient is not finite at step 1, rows row-.*model\.norm\.weight") as error:
        trainer.train()
    assert "though the loss is" in str(error.value)
    assert torch.equal(tiny.logits(student), before)


def test_a_held_out_loss_that_is_no_number_names_the_tensor_too(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            poison(model, "model.norm.weight")

    trainer = make_trainer(
        tmp_path, rows(3), heldout=rows(2), callbacks=[Poison()], eval_strategy="steps", eval_steps=1
    )
    with pytest.raises(DrklError) as error:
        trainer.train()
    assert "After step 1 the held-out loss is not finite, rows row-" in str(error.value)
    assert "student weight 'model.norm.weight'" in str(error.value)


@pytest.mark.parametrize(
    ("failure", "expected", "words"),
    [
        (
            OSError(28, ""),
            DrklError,
            r"Cannot write the checkpoint of step 1 .*: No space left .*then resume",
        ),
        (RuntimeError("it is sharded"), DrklError, r"^Cannot make the checkpoint of step 1: it is sharded$"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), RuntimeError, "Connection closed"),
    ],
)
def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, failure: Exception, expected: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, output_dir: str) -> None:
        raise failure

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    trainer = make_trainer(tmp_path, rows(3), save_strategy="steps", save_steps=1)
    with pytest.raises(expected, match=words):
        trainer.train()
    assert not (tmp_path / "checkpoints" / "checkpoint-1").exists()


def test_checkpoints_are_marked_and_rotated(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(8), max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-5"]
    tokens = sum(len(row.response_ids) for row in rows(8))
    marker = json.loads((tmp_path / "checkpoints" / "checkpoint-5" / "complete.json").read_text())
    assert len(marker.pop("plan")) == 64
    assert marker.pop("fed") == {"fed": 0, "tokens": 0, "room": 0}
    assert (marker.pop("skipped"), marker.pop("skipped_in_row"), marker.pop("texts")) == (0, 0, None)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < {*marker.pop("files")}
    assert len(marker.pop("xxh3")) == 32
    marker = {name: value for name, value in marker.items() if name != "inputs" and value is not False}
    assert marker == {"step": 5, "num_tokens": 5 * tokens, "logged_step": 5, "loss_sums": [0.0]}
    assert not list(tmp_path.rglob("training_args.bin"))


def test_every_step_sees_the_same_rows_cut_into_parts_of_like_cost() -> None:
    data = rows(40)
    steps = next(plan_epochs([row.length for row in data], tokens_per_step=60, seed=3))[:5]
    whole, cut = MicroBatches(data, steps, 1), MicroBatches(data, steps, 3, alike=True)
    assert len(cut) == 15
    for step in range(5):
        parts = [cut[3 * step + part] for part in range(3)]
        assert [row for part in parts for row in part] == whole[step]
        assert parts == [[whole[step][i] for i in part] for part in split_by_cost([r.length for r in whole[step]], 3)]
