"""Write how often a study decides falsely, and how often rightly: docs/results/study-errors.csv.

    python -m scripts.study_errors

Each row is 10,000 simulated studies: runs of fkl, rkl and drkl over a few seeds, three correlated metrics, and the six
primary comparisons of drkl against the two others; four more kinds of runs stand beside them. The cells of a seed share
an effect of it; every run adds normal noise with a standard deviation of 1, or of 2 in the cell that is named. `effect`
is how much higher drkl's third metric truly is, in those standard deviations. Five ways to decide:

    t, Holm      `drkl.studies.statistics`, as primary comparisons are decided
    t            the same, each comparison by its own 95 % interval, as those that are not primary
    bootstrap    the 95 % percentiles of the means of resampled seeds; as drkl does NOT decide
    pooled, Holm  t-tests with one variance, pooled over the seven cells (seeds as blocks); as drkl does NOT decide
    t, Holm, looks  the first, after each seed from the third on until something is decided: what it is to add seeds for
                  what the first of them showed

`false_comparisons` is the share of false better or worse among all comparisons of what is equal, `false_studies` that
of the studies with a false one at least (the family-wise error), `power` the share of the true differences that were
found; each with its Monte Carlo error (one standard error).
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtr

from drkl.studies.statistics import ALPHA, Compared, compared, decide, decide_family, holm

ROWS = Path(__file__).resolve().parents[1] / "docs" / "results" / "study-errors.csv"
STUDIES = 10_000
FKL, RKL, DRKL = range(3)
CELLS = 7
"""Those three, and four that no primary comparison is about."""
METRICS = 3
CORRELATION = 0.6
"""Of two metrics of one run."""
SPREADS = {"equal": (1.0, 1.0, 1.0), "drkl doubled": (1.0, 1.0, 2.0), "rkl doubled": (1.0, 2.0, 1.0)}
"""Standard deviation of the runs of fkl, rkl and drkl."""
FAMILY = [(DRKL, baseline, metric) for baseline in (RKL, FKL) for metric in range(METRICS)]
"""Six primary comparisons, which all share the cells of drkl."""
RESAMPLES = 1000
FIRST_LOOK = 3
"""Seeds at the first look, where seeds are added for what was seen."""
HEAD = (
    "way", "seeds", "spread", "effect", "studies", "false_comparisons", "error", "false_studies", "studies_error",
    "power", "power_error",
)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What is true of simulated cells."""

    seeds: int
    spread: tuple[float, float, float] = SPREADS["equal"]
    effects: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """By metric how much higher drkl's value is than those of the others."""

    def draw(self, studies: int, seed: int) -> np.ndarray:
        """Values `[studies, cell, metric, seed]`."""
        generator = np.random.default_rng(seed)
        mix = np.linalg.cholesky(CORRELATION + (1 - CORRELATION) * np.eye(METRICS))
        noise = np.einsum("mk,sckr->scmr", mix, generator.standard_normal((studies, CELLS, METRICS, self.seeds)))
        of_seed = 2 * generator.standard_normal((studies, 1, METRICS, self.seeds))
        spread = np.ones(CELLS)
        spread[: len(self.spread)] = self.spread
        values = 10 + of_seed + noise * spread[None, :, None, None]
        values[:, DRKL] += np.array(self.effects)[None, :, None]
        return np.asarray(values)

    def is_false(self, outcomes: np.ndarray) -> np.ndarray:
        """Which outcomes `[studies, comparisons]` are false: a difference where there is none, or another direction."""
        return np.isin(outcomes, ("better", "worse")) & (outcomes != self._right())

    def is_found(self, outcomes: np.ndarray) -> np.ndarray:
        """Which outcomes are right, `[studies, comparisons that are truly different]`."""
        right = self._right()
        return np.asarray((outcomes == right)[:, right != "undecided"])

    def _right(self) -> np.ndarray:
        effects = np.array([self.effects[metric] for *_, metric in FAMILY])
        return np.where(effects > 0, "worse", np.where(effects < 0, "better", "undecided"))


def family_of(values: np.ndarray) -> list[Compared]:
    """The primary comparisons of values `[studies, cell, metric, seed]`, of metrics of which less is better."""
    pairs = [(values[:, cell, metric], values[:, base, metric]) for cell, base, metric in FAMILY]
    return [compared(cell, base, cell, base) for cell, base in pairs]


def by_family(values: np.ndarray) -> np.ndarray:
    """The outcome of every primary comparison, `[studies, comparisons]`."""
    outcomes, _ = decide_family(family_of(values))
    return np.stack([outcome for outcome in outcomes if outcome is not None], axis=-1)


def by_interval(values: np.ndarray) -> np.ndarray:
    """The outcome of every comparison by its own interval."""
    return np.stack([decide(one) for one in family_of(values)], axis=-1)


def by_bootstrap(values: np.ndarray) -> np.ndarray:
    """What percentiles of the means over resampled seeds would say."""
    seeds = values.shape[-1]
    weights = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    outcomes = []
    for cell, base, metric in FAMILY:
        low, high = np.percentile((values[:, cell, metric] - values[:, base, metric]) @ weights.T, (2.5, 97.5), axis=-1)
        outcomes.append(np.where(low > 0, "worse", np.where(high < 0, "better", "undecided")))
    return np.stack(outcomes, axis=-1)


def by_pooled_variance(values: np.ndarray) -> np.ndarray:
    """What t-tests would say with one variance for all cells: what is left beyond the effects of cell and seed."""
    cells, seeds = values.shape[1], values.shape[-1]
    residuals = values - values.mean(1, keepdims=True) - values.mean(-1, keepdims=True)
    residuals += values.mean((1, 3), keepdims=True)
    degrees = (cells - 1) * (seeds - 1)
    variance = (residuals**2).sum((1, 3)) / degrees  # [studies, metric]
    t = np.stack(
        [
            (values[:, cell, metric] - values[:, base, metric]).mean(-1) / np.sqrt(2 * variance[:, metric] / seeds)
            for cell, base, metric in FAMILY
        ],
        axis=-1,
    )
    p = holm(2 * stdtr(degrees, -np.abs(t)))
    return np.where(p > ALPHA, "undecided", np.where(t > 0, "worse", "better"))


def by_looking(values: np.ndarray) -> np.ndarray:
    """What a study says that looks after every seed, and ends once a comparison is decided or its seeds are out."""
    outcomes = by_family(values[..., :FIRST_LOOK])
    for seeds in range(FIRST_LOOK + 1, values.shape[-1] + 1):
        goes_on = ~np.isin(outcomes, ("better", "worse")).any(-1)
        outcomes[goes_on] = by_family(values[goes_on][..., :seeds])
    return outcomes


WAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "t, Holm": by_family,
    "t": by_interval,
    "bootstrap": by_bootstrap,
    "pooled, Holm": by_pooled_variance,
    "t, Holm, looks": by_looking,
}


SEEDS = {"t, Holm, looks": (5, 10)}
"""How many seeds there are, or are at most, by the way; 3 and 5 for others."""


def row_of(way: str, seeds: int, spread: str, effect: float) -> dict[str, Any]:
    """A row of the table."""
    truth = Truth(seeds, SPREADS[spread], (0.0, 0.0, effect))
    outcomes = WAYS[way](truth.draw(STUDIES, seed=seeds))
    row: dict[str, Any] = {"way": way, "seeds": seeds, "spread": spread, "effect": f"{effect:g}", "studies": STUDIES}
    false = truth.is_false(outcomes)
    of_nulls = false[:, [truth.effects[metric] == 0 for *_, metric in FAMILY]]
    row["false_comparisons"], row["error"] = _rate(of_nulls)
    row["false_studies"], row["studies_error"] = _rate(np.asarray(false.any(-1)))
    if effect:
        row["power"], row["power_error"] = _rate(truth.is_found(outcomes))
    return row


def _rate(found: np.ndarray) -> tuple[str, str]:
    """A mean and its standard error over studies, whose comparisons are not independent."""
    by_study = np.asarray(found.mean(-1) if found.ndim > 1 else found)
    return f"{by_study.mean():.4f}", f"{by_study.std() / np.sqrt(len(by_study)):.4f}"


def main() -> None:
    """Write the rows."""
    cases = [
        (way, seeds, spread, effect)
        for way in WAYS
        for seeds, spread, effect in product(SEEDS.get(way, (3, 5)), SPREADS, (0.0, 2.0, 4.0, 8.0))
    ]
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEAD, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(row_of(*case) for case in cases)


if __name__ == "__main__":
    main()
