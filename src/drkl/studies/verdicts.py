"""The comparisons of a study: which cells are paired, what is decided of them, and what came of the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drkl.display import number
from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import Metric
from drkl.evaluation.measured import Resamples, measured
from drkl.evaluation.paired import mostly
from drkl.evaluation.result import SCALED
from drkl.studies.cells import CellResult, Foretold, Verdict
from drkl.studies.definition import SEED, Definition, Prediction, Settings
from drkl.studies.grid import baseline_of, cells_axes, groups_of, model_of, pair_of, same, seed_of
from drkl.studies.statistics import (
    MIN_PAIRS,
    Compared,
    PairedT,
    compared,
    critical_t,
    decide,
    decide_family,
    seeds_needed,
    seeds_to_equal,
)

RESAMPLED = 0
"""Random seed of the resampling of prompts, which all cells have in common."""
NEARLY = 0.01
"""Trained tokens that differ by no more than this share are called equal."""
_SAME = (
    "steps", "tokens", "tokens per step", "rows per step", "selection", "training rows", "held-out rows", "teacher",
)  # fmt: skip
"""The parts of a budget that are compared, and said where they differ."""
_DIGESTS = ("training rows", "held-out rows", "teacher")
_EVALUATED = {
    "tokens": (("evaluated rows",), ("protocol", "template", "suites")),
    "answers": (("evaluated prompts",), None),
    "texts": (("evaluated rows",), ("template",)),
}
"""By what a metric is over: what two cells have to be evaluated on, and the settings they have to share (None: all)."""


@dataclass(frozen=True)
class Asked:
    """A comparison that is to be made."""

    metric: Metric
    axes: Settings
    baseline: Settings
    is_primary: bool

    @property
    def models(self) -> tuple[str, str]:
        """Which model of the cells is compared, and which of the others."""
        return model_of(self.axes), model_of(self.baseline)


@dataclass(frozen=True)
class Pair:
    """Two cells of one seed."""

    seed: int | None
    cell: CellResult
    baseline: CellResult


@dataclass
class Pairing:
    """The pairs of a comparison, and why other seeds have none."""

    asked: Asked
    pairs: list[Pair] = field(default_factory=list)
    left_out: dict[str, list[int | None]] = field(default_factory=dict)
    test: Compared | None = None

    @property
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """The metric of the cells and of their baselines, by seed."""
        key, models = self.asked.metric.key, self.asked.models
        sides = ([p.cell for p in self.pairs], [p.baseline for p in self.pairs])
        cell, baseline = (
            np.array([one.of(model)[key] for one in side], dtype=np.float64)
            for side, model in zip(sides, models, strict=True)
        )
        return cell, baseline

    def compare(self) -> None:
        """Make the paired tests, where there is a pair."""
        if not self.pairs:
            return
        cell, baseline = self.values
        far = [
            self._distances([getattr(pair, side) for pair in self.pairs], model)
            for side, model in zip(("cell", "baseline"), self.asked.models, strict=True)
        ]
        has_ideal = far[0] is not None and far[1] is not None
        self.test = compared(cell, baseline, *(far if has_ideal else (None, None)))

    def _distances(self, cells: Sequence[CellResult], model: str) -> np.ndarray | None:
        metric = self.asked.metric
        far = [metric.distance(one.of(model)[metric.key], one.teacher.get(metric.key)) for one in cells]
        return None if any(value is None for value in far) else np.array(far, dtype=np.float64)


class Judge:
    """Makes the verdicts of a study.

    Args:
        definition: of the study.
        cells: as they were read.
        metrics: those of the study's task by key, as `drkl.studies.metrics.known_metrics` has them.
        prompts: whether the bootstrap over prompts is made too, which takes a second or more for each cell.
    """

    def __init__(
        self,
        definition: Definition,
        cells: Sequence[CellResult],
        metrics: Mapping[str, Metric],
        *,
        prompts: bool = True,
    ) -> None:
        self.definition, self.cells, self.metrics, self.prompts = definition, cells, metrics, prompts
        self._known: dict[tuple[str, str], Resamples | None] = {}

    def verdicts(self) -> list[Verdict]:
        """The primary comparisons in the order of the study's file, then every other by metric and cell."""
        pairings = [self._paired(asked) for asked in self.asked()]
        for pairing in pairings:
            pairing.compare()
        primary = [pairing for pairing in pairings if pairing.asked.is_primary]
        bounds = [self._smallest(pairing) for pairing in primary]
        outcomes, corrected = decide_family([pairing.test for pairing in primary], bounds, len(primary))
        rows = [
            self._row(pairing, outcome, p_holm)
            for pairing, outcome, p_holm in zip(primary, outcomes, corrected, strict=True)
        ]
        for pairing in pairings[len(primary) :]:
            outcome = None if pairing.test is None else decide(pairing.test, None, self._smallest(pairing))
            rows.append(self._row(pairing, outcome, None))
        return rows

    def foretold(self, verdicts: Iterable[Verdict]) -> list[Foretold]:
        """What came of the predictions.

        One came true, or not, once the comparison is decided, or if it was expected to be undecided and no run of it is
        still to come.
        """
        rows = {_key(row.metric, row.axes, row.baseline): row for row in verdicts}
        found = []
        for asked in self.definition.predictions:
            prediction = asked if isinstance(asked, Prediction) else Prediction(text=asked)
            row = None
            if prediction.metric is not None:
                pair = pair_of(self.definition, prediction.cell, prediction.against)
                row = rows.get(_key(prediction.metric, *pair))
            verdict = None if row is None else row.verdict
            found.append(Foretold(prediction, verdict, self._came_true(prediction, row)))
        return found

    def _came_true(self, prediction: Prediction, row: Verdict | None) -> bool | None:
        if row is None or prediction.expect is None:
            return None
        groups = (row.axes, row.baseline)
        cells = [cell for cell in self.cells if any(_is_of(cell, axes) for axes in groups)]
        is_open = row.verdict == "undecided" and (
            prediction.expect != "undecided" or any(cell.state not in ("done", "failed") for cell in cells)
        )
        return None if is_open else row.verdict == prediction.expect

    def asked(self) -> list[Asked]:
        """Every comparison once, the primary ones first; their pairs of cells are compared by all that decides."""
        found: dict[str, Asked] = {}

        def ask(key: str, axes: Settings, baseline: Settings, *, is_primary: bool = False) -> None:
            writes_none = self.metrics[key].of == "answers" and {SCALED} & {model_of(axes), model_of(baseline)}
            if not same(axes, baseline) and not writes_none:
                asked = Asked(self.metrics[key], axes, baseline, is_primary)
                found.setdefault(_key(key, axes, baseline), asked)

        for entry in self.definition.primary:
            ask(entry.metric, *pair_of(self.definition, entry.cell, entry.against), is_primary=True)
        decided = dict.fromkeys([*self.definition.decide, *(entry.metric for entry in self.definition.primary)])
        for key in decided:
            for axes in groups_of(self.definition):
                ask(key, axes, baseline_of(self.definition, axes))
            for entry in self.definition.primary:
                ask(key, *pair_of(self.definition, entry.cell, entry.against))
        for prediction in self.definition.predictions:
            if isinstance(prediction, Prediction) and prediction.metric is not None:
                ask(prediction.metric, *pair_of(self.definition, prediction.cell, prediction.against))
        return list(found.values())

    def _smallest(self, pairing: Pairing) -> float | None:
        return self.definition.smallest_difference.get(pairing.asked.metric.key)

    # Pairs --------------------------------------------------------------------------------------------------------

    def _paired(self, asked: Asked) -> Pairing:
        pairing = Pairing(asked)
        for seed in self.definition.axes.get(SEED, [None]):
            sides = [
                next(one for one in self.cells if _is_of(one, axes) and seed_of(one.axes) == seed)
                for axes in (asked.axes, asked.baseline)
            ]
            pair = Pair(seed, *sides)
            why = next(_why_not(pair, asked), None)
            if why is None:
                pairing.pairs.append(pair)
            else:
                pairing.left_out.setdefault(why, []).append(seed)
        return pairing

    # Rows ---------------------------------------------------------------------------------------------------------

    def _row(self, pairing: Pairing, outcome: np.ndarray | None, p_holm: np.ndarray | None) -> Verdict:
        asked, pairs, test = pairing.asked, pairing.pairs, pairing.test
        many = len(self.definition.primary) if asked.is_primary else 1
        verdict: Any = "undecided" if outcome is None else str(outcome)
        if test is None:
            return Verdict(
                asked.metric.key, asked.axes, asked.baseline, None, None, None, 0, not asked.is_primary, verdict,
                why=_why(pairing, verdict, SEED in self.definition.axes),
            )  # fmt: skip
        by_seed = dict(zip((pair.seed for pair in pairs), pairing.values[0] - pairing.values[1], strict=True))
        is_apart = asked.metric.better in ("zero", "teacher") and test.distance is not None
        return Verdict(
            metric=asked.metric.key,
            axes=asked.axes,
            baseline=asked.baseline,
            difference=float(test.difference.mean),
            interval=_ends(test.difference),
            p_holm=None if p_holm is None else _known(p_holm),
            seeds=len(pairs),
            exploratory=not asked.is_primary,
            verdict=verdict,
            t=_known(test.deciding.t),
            p=_known(test.deciding.p),
            t_needed=critical_t(len(pairs), many) if len(pairs) >= MIN_PAIRS else None,
            seeds_needed=self._needed(pairing, test, many, verdict),
            by_seed={seed: float(value) for seed, value in by_seed.items() if seed is not None},
            prompts_interval=self._over_prompts(pairing) if self.prompts else None,
            budget_differs=tuple(budget_differences(pairs)),
            distance=(float(test.distance.mean), _ends(test.distance)) if is_apart and test.distance else None,
            why=_why(pairing, verdict, SEED in self.definition.axes),
        )

    def _needed(self, pairing: Pairing, test: Compared, comparisons: int, verdict: str) -> int | None:
        """The least number of seeds that would decide it, if they went on as they have."""
        if len(pairing.pairs) < MIN_PAIRS or test.is_still or np.isnan(test.deciding.p):
            return None
        found = []
        if test.distance is not None:
            found.append(seeds_needed(float(test.distance.mean), float(test.distance.sd), comparisons))
        if (smallest := self._smallest(pairing)) is not None:
            found.append(seeds_to_equal(float(test.difference.mean), float(test.difference.sd), smallest))
        least = min((seeds for seeds in found if seeds is not None), default=None)
        return least if verdict == "undecided" or least is None else min(least, len(pairing.pairs))

    def _over_prompts(self, pairing: Pairing) -> Interval | None:
        """The bootstrap over prompts of the mean over seeds; None where the cells do not share their prompts."""
        key, models = pairing.asked.metric.key, pairing.asked.models
        found = [(self._resamples(pair.cell, key), self._resamples(pair.baseline, key)) for pair in pairing.pairs]
        ids = [
            one.ids if one is not None and model in one.values else []
            for pair in found
            for one, model in zip(pair, models, strict=True)
        ]
        if not ids[0] or any(own != ids[0] for own in ids):
            return None
        columns = [cell.values[models[0]] - other.values[models[1]] for cell, other in found if cell and other]
        return mostly(np.mean(columns, axis=0)).interval

    def _resamples(self, cell: CellResult, key: str) -> Resamples | None:
        """A metric of a cell on the resamples that all cells share; None where the files beside eval.json are gone."""
        place = cell.name, key
        if place not in self._known and cell.evaluation is not None:
            try:
                self._known[place] = measured(cell.evaluation, key, seed=RESAMPLED)
            except DrklError:
                self._known[place] = None
        return self._known.get(place)


def _key(metric: str, axes: Settings, baseline: Settings) -> str:
    return repr((metric, sorted(axes.items(), key=str), sorted(baseline.items(), key=str)))


def _is_of(cell: CellResult, axes: Settings) -> bool:
    return all(same(cell.axes[key], value) for key, value in cells_axes(axes).items())


def _known(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ends(test: PairedT) -> Interval | None:
    low, high = _known(test.low), _known(test.high)
    return None if low is None or high is None else (low, high)


# Why not --------------------------------------------------------------------------------------------------------------


def _why_not(pair: Pair, asked: Asked) -> Iterator[str]:
    """Why two cells are no pair for a comparison."""
    metric = asked.metric
    for name, one in (("cell", pair.cell), ("baseline", pair.baseline)):
        if one.state != "done":
            has = "has failed" if one.state == "failed" else f"is {one.state}"
            yield f"the {name} {has}"
    for name, one, model in zip(("cell", "baseline"), (pair.cell, pair.baseline), asked.models, strict=True):
        if one.of(model).get(metric.key) is None:
            of = "" if model == "student" else f" of its {model} student"
            yield f"the {name} has no {metric.key}{of}: it is undefined, infinite or was not measured"
        elif metric.better == "teacher" and one.teacher.get(metric.key) is None:
            yield f"the {name} has no teacher's {metric.key}, which is the ideal"
    if pair.cell.start is None or pair.baseline.start is None:
        yield "it is not known whether the two began from the same weights"
    elif pair.cell.start != pair.baseline.start:
        yield "the two began from other weights"
    parts, names = _EVALUATED[metric.of]
    for part in parts:
        digests = [one.budget.get(part) for one in (pair.cell, pair.baseline)]
        if digests[0] != digests[1] and None not in digests:
            yield f"the two were evaluated on other {part.removeprefix('evaluated ')}"
    settings = [one.budget.get("sampling") or {} for one in (pair.cell, pair.baseline)]
    for key in settings[0] if names is None else names:
        if settings[0].get(key) != settings[1].get(key):
            yield f"the two were evaluated with another {key}"


def _why(pairing: Pairing, verdict: str, has_seeds: bool) -> str | None:
    """What stands in the way of a verdict, and the seeds that are left out of one."""
    test, pairs = pairing.test, len(pairing.pairs)
    said = [
        why if seeds == [None] else f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}: {why}"
        for why, seeds in pairing.left_out.items()
    ]
    left_out = [f"Left out: {'; '.join(said)}."] if said else []
    found = []
    if verdict != "undecided":
        return " ".join(left_out) or None
    if not has_seeds:
        found.append("The study has no axis run.seed: one run of each kind decides nothing.")
    elif pairs < MIN_PAIRS:
        found.append(f"A verdict takes {MIN_PAIRS} seeds or more; there {'is' if pairs == 1 else 'are'} {pairs}.")
    elif test is not None and test.is_still:
        found.append("Neither side changes with the seed, so that the seeds replicate nothing.")
    elif test is not None and test.distance is None:
        found.append("The metric has no better side.")
    elif test is not None and np.isnan(test.deciding.p):
        found.append("The difference is the same in every seed: nothing tells how far it varies.")
    return " ".join([*found, *left_out]) or None


def budget_differences(pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield what is another in the budgets of a cell and of its baseline, with both values in the first such seed."""
    for part in _SAME:
        for pair in pairs:
            one, other = pair.cell.budget.get(part), pair.baseline.budget.get(part)
            if one == other or (part == "tokens" and _is_near(one, other)):
                continue
            what = "others" if part in _DIGESTS else f"{_shown(one)} and {_shown(other)}"
            of = "" if pair.seed is None else f" (seed {pair.seed})"
            yield f"{part}: {what}{of}"
            break


def _is_near(one: Any, other: Any) -> bool:
    return bool(one and other and abs(one - other) <= NEARLY * max(one, other))


def _shown(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value, 0) if float(value).is_integer() else str(value)
    return "not known" if value is None else str(value)
