"""What is said of a run's memory."""

from __future__ import annotations

import pytest

from drkl.errors import DrklError
from drkl.training.memory import MOMENTS, PARTS, Memory, check_processes

GB = 10**9
MEMORY = Memory(
    2,
    "cpu",
    {
        "loss": {"student_weights": 2 * GB, "activations": 5 * GB, "optimiser": 4 * GB},
        "update": {"student_weights": 2 * GB, "gradients": 2 * GB, "optimiser": 4 * GB},
    },
    {"rows": 4, "tokens": 10, "positions": 30},
    ("one note",),
)


def test_the_peak_is_the_largest_sum() -> None:
    assert (MEMORY.peak, MEMORY.peak_bytes, MEMORY.largest) == ("loss", 11 * GB, "activations")
    assert MEMORY.total("update") == 8 * GB


def test_json_and_back() -> None:
    values = MEMORY.to_json()
    assert values["bytes"]["loss"]["sum"] == values["peak_bytes"] == 11 * GB
    assert Memory.from_json(values) == MEMORY


def test_the_table_has_every_part_and_the_sum() -> None:
    first, *parts, total = MEMORY.table().splitlines()
    assert first.startswith("GB of each process") and first.endswith("loss  update")
    assert [line.split("  ")[0] for line in parts] == [
        PARTS[name] for name in ("student_weights", "gradients", "optimiser", "activations")
    ]
    assert total.split() == ["sum", "11.0", "8.0"]
    assert len({len(line) for line in (first, total)}) == 1


@pytest.mark.parametrize(
    ("available", "words"),
    [
        (None, "The most at once is 11.0 GB: loss. The largest part is: activations, 5.0 GB."),
        (30 * GB, "The most at once is 11.0 GB: loss; this machine has 30.0 GB."),
        (20 * GB, "in each of 2 processes, and this machine has 20.0 GB: it does not fit. The largest part is: "
                  "activations, 5.0 GB. What shrinks it: training.gradient_checkpointing=true"),
    ],
)  # fmt: skip
def test_advice(available: int | None, words: str) -> None:
    assert words in MEMORY.advice(available)


def test_every_part_can_be_advised_on() -> None:
    for part in PARTS:
        memory = Memory(1, "cuda", {"loss": {part: GB}}, {})
        assert "What shrinks it: " in memory.advice(GB // 2) and "a CUDA device here" in memory.advice(GB // 2)
    assert MEMORY.moments.keys() <= MOMENTS.keys()


def test_a_number_of_processes() -> None:
    check_processes(None)
    check_processes(1)
    with pytest.raises(DrklError, match="processes is 0; expected a whole number of at least 1"):
        check_processes(0)
