from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drkl.data.classification import LabelledRow
from drkl.data.collate import collate, each_row, teacher_inputs
from drkl.data.tokenize import Row
from drkl.errors import Halted
from drkl.losses import IGNORE_INDEX
from drkl.training.spare import halves, positions_of
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny
from tests.training.test_trainer import make_trainer, rows

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. See documentation for more")


class Small:
    """A student for whose passes there is room up to a number of positions, and an error for larger ones."""

    def __init__(
        self, tmp_path: Path, room: int, error: Exception = GPU, *, late: bool = True, **arguments: Any
    ) -> None:
        self.fed: list[int] = []
        self._room, self._error, self._late, self._armed = room, error, late, False
        self.student = tiny.llama(1, layers=2).double()
        settings: dict[str, Any] = {"max_steps": 3, "tokens_per_step": 60, "max_grad_norm": 1.0} | arguments
        self.trainer: DistillationTrainer = make_trainer(tmp_path, rows(12), model=self.student, **settings)
        self.student.register_forward_pre_hook(self._forward, with_kwargs=True)
        self.student.model.embed_tokens.weight.register_hook(self._backward)

    def _forward(self, module: Any, given: Any, words: dict[str, Any]) -> None:
        self.fed.append(words["input_ids"].numel())
        self._armed = self.fed[-1] > self._room
        if self._armed and not self._late:
            raise self._error

    def _backward(self, gradient: Tensor) -> Tensor:
        if self._armed:
            raise self._error
        return gradient

    def train(self) -> dict[str, Tensor]:
        self.trainer.train()
        return {name: weight.detach().clone() for name, weight in self.student.named_parameters()}


WAYS = [{}, {"gradient_accumulation_steps": 2}, {"padding_free": True}]


@pytest.mark.parametrize("settings", [way if not way else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_step_that_runs_out_of_memory_is_the_same_in_halves(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    whole = Small(tmp_path / "whole", 1000, **settings)
    weights = whole.train()
    small = Small(tmp_path / "small", 24 if settings.get("gradient_accumulation_steps") else 36, **settings)
    found = small.train()
    assert len(small.fed) > len(whole.fed)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(small.trainer.state.log_history, whole.trainer.state.log_history, strict=True):
        for name in ("loss", "num_tokens", "fkl"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-6)
    assert "It is done again in halves" in caplog.text


@pytest.mark.slow
def test_from_the_second_time_on_batches_are_cut_before_they_are_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = Small(tmp_path, 30, late=False, max_steps=4, logging_steps=10)
    small.train()
    assert small.fed == [36, 18, 18, 54, 27, 27, 27, 27, 24, 24]
    assert caplog.text.count("It is done again in halves") == 2
    assert "From now on batches of 36 positions or more are cut before they are tried." in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "error", "settings", "why"),
    [
        (8, GPU, {}, "Halves of it do not fit either"),
        (1, GPU, {"gradient_accumulation_steps": 12}, "It cannot be cut: it is one row"),
        (30, MemoryError(), {}, "Only on a GPU is a step done again in halves"),
    ],
)
def test_a_step_that_cannot_be_done_says_its_numbers(
    tmp_path: Path, room: int, error: Exception, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(Halted, match=f"^Step 1 ran out of memory.*{why}") as caught:
        Small(tmp_path, room, error, **settings).train()
    text = str(caught.value)
    numbers = "1 row, 6 positions" if "one row" in why else "6 rows, 36 positions"
    assert f"{numbers} with padding and a longest row of 6, and the vocabulary 64 tokens" in text
    assert "student's weights 0 MB" in text and text.endswith("There is no checkpoint yet.")
    assert ("gradient_accumulation_steps=2" in text) == ("one row" not in why) and "data.max_tokens" in text


def test_the_update_may_run_out_of_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise GPU

    trainer = make_trainer(tmp_path, rows(3))
    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(Halted, match=r"beside the passes of a step .*optim=adafactor.*There is no checkpoint yet\.$"):
        trainer.train()


def some(count: int = 5, **changes: Any) -> list[Row]:
    return [Row(r.id, r.prompt_ids, r.response_ids, None, **changes) for r in rows(count)]  # type: ignore[arg-type]


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "padded": lambda: collate(some(), pad_id=0),
    "packed": lambda: collate(some(), pad_id=0, packed=True),
    "own rendering": lambda: collate(some(teacher_prompt_ids=(7, 8, 9)), pad_id=0),
    "packed, own rendering": lambda: collate(some(teacher_prompt_ids=(7, 8, 9)), pad_id=0, packed=True),
    "encoder-decoder": lambda: collate(some(encoder_decoder=True), pad_id=0, decoder_start=1),
    "classifier": lambda: collate([LabelledRow(f"r{i}", (5,) * (1 + i), i % 2, "") for i in range(5)], pad_id=0),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_halves_have_the_rows_of_the_whole(kind: str) -> None:
    batch = BATCHES[kind]()
    keep = batch["labels"] != IGNORE_INDEX
    batch |= {"places": torch.arange(int(keep.sum())) + 7, "sampled": keep.clone()}
    parts = halves(batch)
    assert [row for part in parts for row in part["row_ids"]] == batch["row_ids"] and len(parts) == 2
    assert torch.equal(torch.cat([part["places"] for part in parts]), batch["places"])
    assert max(map(positions_of, parts)) < positions_of(batch)
    lines = [read_of(part) for part in parts]
    assert [*lines[0], *lines[1]] == read_of(batch)
    while len(batch["row_ids"]) > 1:
        batch = halves(batch)[0]
    assert len(halves(batch)) == 1


def read_of(batch: dict[str, Any]) -> list[Any]:
    """Of each row what both models read, padding aside, and what is kept and learnt there."""
    batch = dict(batch)
    theirs, kept = teacher_inputs(batch)
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "places"}
    own = each_row(inputs, batch["labels"] != IGNORE_INDEX)
    pairs = zip(own, each_row(theirs, kept), strict=True)
    return [[[[ids.tolist() for ids in read], keep.nonzero().tolist()] for read, keep in pair] for pair in pairs]
