"""Two processes give the gradients of one, in every wrapper; the references are a few lines of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import pair_processes as pair
from tests.training import tiny_runs

ROOT = Path(__file__).parents[2]


def run(folder: Path, which: str) -> list[dict[str, Any]]:
    """What the two processes wrote, by rank: one start for many cases."""
    environment = tiny_runs.environment() | {"PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.models.pair_processes"]
    log = folder / "log.txt"
    with log.open("w") as out:
        started = [
            subprocess.Popen(
                [*command, str(rank), str(folder), which], env=environment, cwd=ROOT, stdout=out, stderr=out
            )
            for rank in range(pair.RANKS)
        ]
        try:
            while all(process.poll() in (None, 0) for process in started) and None in (p.poll() for p in started):
                time.sleep(0.1)
        finally:
            for process in started:
                process.kill()
    codes = [process.wait() for process in started]
    assert codes == [0] * pair.RANKS, log.read_text()[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(pair.RANKS)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("quick"), "quick")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("slow"), "slow")


@cache
def alone(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean reverse KL over the tokens that count of all rows, and its gradients, in one process."""
    student, teacher, batch = pair.make_student(name), pair.make_teacher(name), pair.make_batch(name)
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name in ("t5", "mt5 untied", "bart"):
        base = student
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    with torch.no_grad():
        logp = torch.log_softmax(teacher(**inputs).logits, -1)
    logq = torch.log_softmax(student(**inputs).logits, -1)
    if name in ("gpt2", "llama", "llama untied", "lora"):
        logq, logp, labels = logq[:, :-1], logp[:, :-1], labels[:, 1:]
    loss = (logq.exp() * (logq - logp)).sum(-1)[labels != -100].mean()
    loss.backward()
    return loss.detach(), pair.gradients(student)


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest entry."""
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[key].double() - theirs[key]).abs().max()) for key in theirs) / scale


def assert_gradients(ours: dict[str, Tensor], name: str, tolerance: float = 1e-12) -> None:
    """In float64 a few hundred roundings of 1e-16 are all that another order of the sums may change."""
    assert error(ours, alone(name)[1]) < tolerance


def assert_like_one(found: list[dict[str, Any]], name: str, wrapper: str) -> None:
    loss, _ = alone(name)
    # bf16 has 8 bits: a handful of roundings of half a percent each.
    tolerance = 0.05 if wrapper == "fsdp2 low" else 1e-12
    values = [rank[f"{name} | {wrapper}"] for rank in found]
    for value in values:
        assert_gradients(value["gradients"], name, tolerance)
        for how in ("accumulated", "given"):
            if how in value:
                assert_gradients(value[how], name)
    mean = torch.cat([value["loss"] for value in values]).mean()
    torch.testing.assert_close(mean, loss, rtol=tolerance, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapper"), pair.QUICK)
def test_two_processes_give_the_gradients_of_one(quick: list[dict[str, Any]], name: str, wrapper: str) -> None:
    assert_like_one(quick, name, wrapper)
    assert {"accumulated", "given"} < quick[0][f"{name} | {wrapper}"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapper"), pair.SLOW)
def test_two_processes_give_the_gradients_of_one_in_every_wrapper(
    slow: list[dict[str, Any]], name: str, wrapper: str
) -> None:
    assert_like_one(slow, name, wrapper)


@pytest.mark.slow
@pytest.mark.parametrize("how", pair.WRONG)
def test_the_comparison_sees_a_loss_that_reads_around_the_wrapper(quick: list[dict[str, Any]], how: str) -> None:
    errors = [error(rank[how], alone("llama untied")[1]) for rank in quick]
    assert min(errors) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bare", "There are 2 processes, and nothing around the student averages"),
        ("module", "not its .module"),
        ("parts", "fully_shard was applied to parts of the student"),
        ("divided", "gradient divide factor of its own"),
        ("tie", "shared"),
    ],
)
def test_what_would_be_wrong_is_refused(quick: list[dict[str, Any]], case: str, words: str) -> None:
    for rank in quick:
        assert words in rank["refusals"][case]
