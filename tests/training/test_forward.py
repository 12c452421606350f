"""The numbers beside the loss: from the pass that makes it, in the training log and on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import drkl
from drkl.losses import LogitChunk
from drkl.losses.config import LossConfig
from drkl.positions import token_statistics
from drkl.teachers.live import LiveTeacher
from drkl.training.forward import StatisticsSums, means_of
from drkl.training.heldout import HeldOut
from tests.models import tiny
from tests.training.test_trainer import make_trainer, rows

NAMES = {
    "nll": "nll",
    "student_entropy": "entropy",
    "fkl": "fkl",
    "rkl": "rkl",
    "agreement": "agreement",
    "teacher_entropy": "teacher_entropy",
}


def logits(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    student, teacher = (torch.randn(count, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, 11, (count,), generator=generator)


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("size", [1, 4, 5, 50])
def test_every_so_many_positions_however_they_are_cut(every: int, size: int) -> None:
    student, teacher, labels = logits(23)
    sums = StatisticsSums(every)
    for start in range(0, 23, size):
        part = slice(start, start + size)
        sums(LogitChunk(student[part], teacher[part], labels[part], start))
    expected = token_statistics(student[::every], teacher[::every], labels[::every])
    assert int(sums.sums["positions"]) == len(labels[::every])
    assert sums.sums.keys() == {"positions", *NAMES}
    for name, column in NAMES.items():
        torch.testing.assert_close(sums.sums[name], getattr(expected, column).sum())


@pytest.mark.parametrize("ends", [[23], [9, 23], [1, 8, 20, 23]])
def test_the_same_positions_however_a_step_is_cut(ends: list[int]) -> None:
    student, teacher, labels = logits(23)
    sampled = torch.tensor([place % 5 in (1, 2) for place in range(23)])
    whole = StatisticsSums(3, sampled)
    whole(LogitChunk(student, teacher, labels, 0))
    sums: dict[str, float] = {}
    for begin, end in zip([0, *ends], ends, strict=False):
        of_part = StatisticsSums(3, sampled[begin:end], places=torch.arange(begin, end))
        for start in range(begin, end, 4):  # chunks of a part
            part = slice(start, min(start + 4, end))
            of_part(LogitChunk(student[part], teacher[part], labels[part], start - begin))
        for name, value in of_part.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    assert sums == pytest.approx({name: float(value) for name, value in whole.sums.items()}, rel=1e-12)


def test_without_a_teacher_its_sums_are_left_out() -> None:
    student, _, labels = logits(5)
    sums = StatisticsSums()
    sums(LogitChunk(student, None, labels, 0))
    assert sums.sums.keys() == {"positions", "nll", "student_entropy"}


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 4, 50])
def test_sampled_positions_are_summed_apart(every: int, size: int) -> None:
    student, teacher, labels = logits(23)
    sampled = torch.tensor([place % 5 in (1, 2) for place in range(23)])
    sums = StatisticsSums(every, sampled)
    for start in range(0, 23, size):
        part = slice(start, start + size)
        sums(LogitChunk(student[part], teacher[part], labels[part], start))
    totals: dict[str, float] = {}
    for place in range(0, 23, every):
        prefix = "rollout_" if place % 5 in (1, 2) else ""
        at = slice(place, place + 1)
        one = token_statistics(student[at], teacher[at], labels[at])
        totals[f"{prefix}positions"] = totals.get(f"{prefix}positions", 0) + 1
        for name, column in NAMES.items():
            totals[prefix + name] = totals.get(prefix + name, 0.0) + float(getattr(one, column))
    assert sums.sums.keys() == totals.keys()
    for name, value in totals.items():
        assert float(sums.sums[name]) == pytest.approx(value, rel=1e-12), name
    means = means_of({name: float(value) for name, value in sums.sums.items()})
    assert means.keys() == {prefix + name for prefix in ("", "rollout_") for name in NAMES}
    for name, value in means.items():
        prefix = "rollout_" if name.startswith("rollout_") else ""
        assert value == pytest.approx(totals[name] / totals[f"{prefix}positions"], rel=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_the_numbers_of_data_rows_are_the_same_bits_where_nothing_was_sampled(every: int) -> None:
    student, teacher, labels = logits(23)
    plain, marked = StatisticsSums(every), StatisticsSums(every, torch.zeros(23, dtype=torch.bool))
    for start in range(0, 23, 9):
        for sums in (plain, marked):
            part = slice(start, start + 9)
            sums(LogitChunk(student[part], teacher[part], labels[part], start))
    assert plain.sums.keys() == marked.sums.keys()
    assert all(torch.equal(value, marked.sums[name]) for name, value in plain.sums.items())


def test_where_all_was_sampled_there_is_no_number_of_data_rows() -> None:
    student, teacher, labels = logits(6)
    sums = StatisticsSums(sampled=torch.ones(6, dtype=torch.bool))
    sums(LogitChunk(student, teacher, labels, 0))
    assert means_of({name: float(value) for name, value in sums.sums.items()}).keys() == {f"rollout_{n}" for n in NAMES}
    assert means_of({}) == {}


class HeadProducts(TorchDispatchMode):
    """Counts the matrix products that make logits."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.count = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        self.count += func.overloadpacket in products and out.shape[-1] == self.vocab_size
        return out


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(kd_weight=0.0), LossConfig(temperature=2.0, kd_weight=0.7)])
@pytest.mark.parametrize("objective", ["drkl", "ce"])
@pytest.mark.parametrize("vocab_size", [None, 58])
def test_held_out_rows_are_projected_once(objective: str, loss: LossConfig, vocab_size: int | None) -> None:
    """And the distances from a teacher are there whether or not the loss reads it."""
    student, teacher, data = tiny.llama(1, layers=2).double(), tiny.llama(9).double(), rows(9)
    heldout = HeldOut(data, 0, LiveTeacher(teacher), vocab_size=vocab_size)
    with HeadProducts(vocab_size or student.config.vocab_size) as products:
        found = heldout.evaluate(student, drkl.make_objective(objective), loss)
    assert products.count == 2, "one for each model"
    sums = {name: 0.0 for name in NAMES}
    count = 0
    for row in data:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        with torch.no_grad():
            both = [
                model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1, :vocab_size]
                for model in (student, teacher)
            ]
        expected = token_statistics(*both, torch.tensor(row.response_ids))
        count += len(row.response_ids)
        sums = {name: sums[name] + float(getattr(expected, column).sum()) for name, column in NAMES.items()}
    assert found.keys() == {"loss", *NAMES}
    for name, value in sums.items():
        assert found[name] == pytest.approx(value / count, rel=1e-9), name
    if loss.kd_weight == 0 or (objective == "ce" and loss.temperature == 1):
        assert found["loss"] == pytest.approx(found["nll"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["drkl", "ce"])
def test_a_step_that_is_logged_makes_no_further_logits(tmp_path: Path, objective: str) -> None:
    counts = []
    for logging_steps in (1, 3):
        trainer = make_trainer(tmp_path, rows(8), objective=objective, max_steps=4, logging_steps=logging_steps)
        with HeadProducts(tiny.llama(1, layers=2).config.vocab_size) as products:
            trainer.train()
        counts.append(products.count)
    assert counts[0] == counts[1] > 0
