"""What training logs of each position, by the kernel, against plain sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from drkl.losses import fused
from drkl.losses.kernel_statistics import kernel_statistics
from tests.rounding import rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="no Triton for this system")
from drkl.losses import row_statistics  # noqa: E402

# The interpreter's, of what is infinite on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
ROWS, VOCAB = 5, 37


def by_sums(z: np.ndarray, y: np.ndarray, label: int) -> dict[str, float]:
    def logs(x: np.ndarray) -> list[float]:
        base = max(x)
        return list(x - base - math.log(math.fsum(np.exp(x - base))))

    def mean(a: list[float], b: list[float]) -> float:
        """sum e^a (a - b), infinite where b excludes what a does not."""
        kept = [(s, t) for s, t in zip(a, b, strict=True) if s > -math.inf]
        return math.inf if any(t == -math.inf for _, t in kept) else math.fsum(math.exp(s) * (s - t) for s, t in kept)

    q, p = logs(z), logs(y)
    flat = [0.0] * len(q)
    return {
        "nll": -q[label],
        "student_entropy": -mean(q, flat),
        "rkl": mean(q, p),
        "fkl": mean(p, q),
        "teacher_entropy": -mean(p, flat),
        "agreement": float(np.argmax(z) == np.argmax(y)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_of_each_position(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(row_statistics, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(2 * ROWS, VOCAB, generator=generator).mul(4).to(dtype)[::2] for _ in range(2))
    z[1, 3] = y[1, 3] = y[2, 4] = z[3, 9] = -math.inf  # of both models, of one, of the other
    y[4, [7, 30]] = z[4, [7, 8]] = 20.0  # ties: the first counts
    labels = torch.randint(10, VOCAB, (ROWS,), generator=generator)
    found = kernel_statistics(z.to(DEVICE), y.to(DEVICE), labels.to(DEVICE))
    alone = kernel_statistics(z.to(DEVICE), None, labels.to(DEVICE))
    assert found is not None and alone is not None and list(alone) == ["nll", "student_entropy"]
    for row in range(ROWS):
        expected = by_sums(z[row].double().numpy(), y[row].double().numpy(), int(labels[row]))
        bound = rounding(VOCAB, 40.0, torch.float32)  # of logits as large as 20
        for name, value in expected.items():
            assert float(found[name][row]) == pytest.approx(value, rel=0.0, abs=bound), (name, row)
    assert all(torch.equal(alone[name], found[name]) for name in alone)


def test_where_no_kernel_runs_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ())
    assert kernel_statistics(logits, None, labels) is None
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    assert kernel_statistics(logits.double(), None, labels) is None
