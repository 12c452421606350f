"""From what was measured to the sections of ``eval.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drkl.evaluation.answers import AnswerTable
from drkl.evaluation.bootstrap import RESAMPLES, Metrics, intervals
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import ANSWER_KEYS, KEYS, NUM_CALIBRATION_BINS, definitions
from drkl.evaluation.measure import finite, versions
from drkl.evaluation.positions import PROFILE_RANKS, PositionTable, bin_edges


@dataclass
class Measured:
    """What every model did; ``answers`` by model, sampling temperature and suite ("" for the only one)."""

    settings: EvaluationConfig
    row_ids: list[str]
    suites: list[str]
    """The suite of each row."""
    tables: dict[str, PositionTable]
    answers: dict[str, dict[float, dict[str, AnswerTable]]]
    seconds: dict[str, dict[str, float]]
    vocab_size: int

    def main(self, model: str) -> AnswerTable:
        """A model's answers at the main temperature, of all suites."""
        return merged(self.answers[model].get(self.settings.sampling_temperature, {}))


def merged(tables: Mapping[str, AnswerTable]) -> AnswerTable:
    """The tables of several suites as one."""
    whole = AnswerTable()
    for table in tables.values():
        whole.merge(table)
    return whole


def evaluation(
    measured: Measured,
    *,
    gamma: float,
    device: str | torch.device,
    data: Mapping[str, Any] | None,
    facts: Mapping[str, Any] | None,
    num_prompts: int,
) -> dict[str, Any]:
    """``eval.json``."""
    seed = measured.settings.seed
    result: dict[str, Any] = {
        "settings": _describe(measured, gamma, device, data, facts, num_prompts),
        **{name: _table(table.compute() | measured.main(name).compute()) for name, table in measured.tables.items()},
        "intervals": {
            name: _ends(table.intervals(seed) | measured.main(name).intervals(seed))
            for name, table in measured.tables.items()
        },
    }
    sweep = {name: _sweep(measured, name) for name in measured.tables}
    coverage = {name: measured.main(name).coverage() for name in measured.tables}
    optional = {
        "sweep": {name: rows for name, rows in sweep.items() if rows},
        "coverage": {name: found for name, found in coverage.items() if found},
        "tail": _tail(measured),
        "suites": _suites(measured) if set(measured.suites) != {""} else {},
    }
    result |= {name: value for name, value in optional.items() if value}
    result["reliability"] = _reliability(measured)
    counts = {name: table.distributions(measured.vocab_size) for name, table in measured.tables.items()}
    result["distributions"] = {"edges": bin_edges(measured.vocab_size), **counts}
    result["timing"] = _timing(measured)
    return result


def _table(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: finite(values.get(key)) for key in KEYS}


def _ends(found: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {key: found[key] for key in KEYS if key in found}


def _sweep(measured: Measured, name: str) -> list[dict[str, Any]]:
    if not measured.settings.sweep:
        return []
    rows = []
    for temperature in sorted(set(measured.answers[name]) & {*measured.settings.sweep}):
        table = merged(measured.answers[name][temperature])
        values = table.compute()
        rows.append(
            {
                "sampling_temperature": temperature,
                **{key: finite(values.get(key)) for key in ANSWER_KEYS},
                "intervals": _ends(table.intervals(measured.settings.seed)),
            }
        )
    return rows if len(rows) > 1 else []


def _reliability(measured: Measured) -> dict[str, Any]:
    return {
        "edges": [i / NUM_CALIBRATION_BINS for i in range(NUM_CALIBRATION_BINS + 1)],
        **{name: table.reliability() for name, table in measured.tables.items()},
        "mass": {name: table.reliability("mass") for name, table in measured.tables.items()},
    }


def _tail(measured: Measured) -> dict[str, Any]:
    found = {name: table.tail_profile() for name, table in measured.tables.items()}
    known = {name: means for name, means in found.items() if any(mean is not None for mean in means)}
    return {"ranks": list(PROFILE_RANKS), **known} if known else {}


def _suites(measured: Measured) -> dict[str, Any]:
    """Every suite's own numbers: the same tables, of its rows alone."""
    seed = measured.settings.seed
    result: dict[str, Any] = {}
    for suite in dict.fromkeys(measured.suites):
        here = np.array([name == suite for name in measured.suites])
        own: dict[str, Any] = {}
        ends: dict[str, Any] = {}
        size = int(here.sum())
        for name, table in measured.tables.items():
            metrics = _of_rows(table, here)
            values = {key: float(value[0]) for key, value in metrics(np.ones((1, size))).items()}
            answers = measured.answers[name].get(measured.settings.sampling_temperature, {}).get(suite, AnswerTable())
            own[name] = _table({**values, **answers.compute()})
            ends[name] = _ends({**intervals(metrics, size, seed), **answers.intervals(seed)})
        result[suite] = {**own, "intervals": ends}
    return result


def _of_rows(table: PositionTable, here: np.ndarray) -> Metrics:
    """The metrics of some rows alone, as functions of how often each of them counts."""

    def metrics(weights: np.ndarray) -> Mapping[str, np.ndarray]:
        spread = np.zeros((len(weights), len(here)))
        spread[:, here] = weights
        return table.metrics(spread)

    return metrics


def _timing(measured: Measured) -> dict[str, Any]:
    timing: dict[str, Any] = {
        name: {part: round(value, 2) for part, value in seconds.items()} for name, seconds in measured.seconds.items()
    }
    for name, by_temperature in measured.answers.items():
        pools = (pool for tables in by_temperature.values() for table in tables.values() for pool in table.pools)
        answers = sum(pool.num_answers for pool in pools)
        spent = measured.seconds[name]["samples"]
        timing[name]["answers_per_minute"] = round(60 * answers / spent, 1) if spent > 0 else None
    return timing


def _describe(
    measured: Measured,
    gamma: float,
    device: str | torch.device,
    data: Mapping[str, Any] | None,
    facts: Mapping[str, Any] | None,
    num_prompts: int,
) -> dict[str, Any]:
    settings = measured.settings
    suites = [name for name in dict.fromkeys(measured.suites) if name]
    return {
        "task": "generation",
        **settings.model_dump(mode="json"),
        "prompts": num_prompts,
        "seeds": list(settings.all_seeds),
        "gamma": gamma,
        "suites": suites,
        **(facts or {}),
        "data": {**(data or {}), "heldout_rows": len(measured.row_ids)},
        "decoding": "sampling from the whole distribution at sampling_temperature (no top-k, top-p or penalties)",
        "intervals": f"95 %, percentiles of {RESAMPLES} bootstrap resamples of the held-out rows (of the prompts, for "
        "metrics of answers), the same resamples for every model; not of training seeds",
        "device": str(device),
        "versions": versions("rouge-score", "sacrebleu"),
        "definitions": definitions("generation"),
    }
