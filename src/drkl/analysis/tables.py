"""From what was observed to the tables of ``analysis.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from drkl.analysis.diagnosis import diagnosis
from drkl.analysis.ratios import Ratios, finite_or_none
from drkl.analysis.states import MATCHED, Observed, Pushes
from drkl.evaluation.calibration import EDGES, Bins, bin_of, width_bins

TARGET_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
"""Bins of p_t; the last one holds what the teacher is all but certain of."""
SURE = 0.99
GAMMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
NUM_BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Setup:
    """What the tables need besides the observations."""

    gamma: float
    """DRKL's constant weight of the tail."""
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def analysis(observed: Observed, setup: Setup) -> dict[str, Any]:
    """What ``analysis.json`` holds.

    Every ``{"value", "interval"}`` is a mean over positions with a 95 % bootstrap interval over the rows (null where
    there is none).
    """
    tables: dict[str, Any] = {
        "settings": {
            **setup.facts,
            "gamma": setup.gamma,
            "temperature": observed.temperature,
            "matched": f"|D| <= {MATCHED} nats, D = logit q_t - logit p_t",
            "positions": len(observed.row),
            "rows": observed.num_rows,
            "differentiated": {"evenly": int(observed.sampled.sum()), "matched": int((~observed.sampled).sum())},
            "seed": setup.seed,
        },
        "counts": {
            "matched": int(observed.matched.sum()),
            "matched_rows": len(np.unique(observed.row[observed.matched])),
            "infinite_K": int(np.isinf(observed.columns["K"]).sum()),
        },
        "totals": _totals(observed, setup),
        "by_target": _by_target(observed, setup.seed),
        "distributions": {name: _distribution(observed.columns[name]) for name in ("B", "K", "D")},
        "gammas": _gammas(observed),
        "objectives": [_objective(observed, setup.seed, name, found) for name, found in observed.pushes.items()],
        "reliability": _reliability(observed),
    }
    headline, answers = diagnosis(tables)
    return {"headline": headline, "diagnosis": answers, **tables}


def overshoot(p_t: np.ndarray, K: np.ndarray) -> np.ndarray:
    """How far above p_t reverse KL comes to rest with the tail held fixed: sigmoid(logit p_t + K) - p_t.

    = p_t (1 - p_t) (1 - e^-K) / (p_t + (1 - p_t) e^-K), which loses no digits where p_t is near 1.
    """
    above: np.ndarray = p_t * (1 - p_t) * -np.expm1(-K) / (p_t + (1 - p_t) * np.exp(-K))
    return above


def upward_force(observed: Observed) -> np.ndarray:
    """q_t (1 - q_t) K / T `[n]`: reverse KL's tail on the target's logit, upwards."""
    at = observed.columns
    force: np.ndarray = at["q_t"] * at["rest"] * at["K"] / observed.temperature
    return force


def _totals(observed: Observed, setup: Setup) -> dict[str, Any]:
    """Over all positions, and over those where the target is matched."""
    at, matched, sure = observed.columns, observed.matched, observed.columns["p_t"] > SURE
    tail = at["rest"] * at["K"]
    losses = {"rkl": at["B"] + tail, "drkl": at["B"] + setup.gamma * at["K"]}
    found = Ratios(observed.row, observed.num_rows)
    for name in ("confidence", "teacher_confidence", "own_gap"):
        found.mean(name, at[name])
    found.mean("accuracy", at["correct"])
    found.mean("teacher_accuracy", at["teacher_correct"])
    gap, teacher_gap = at["confidence"] - at["correct"], at["teacher_confidence"] - at["teacher_correct"]
    found.mean("calibration_gap", gap)
    found.mean("teacher_calibration_gap", teacher_gap)
    found.mean("excess", gap - teacher_gap)
    found.mean("target_gap", at["target_gap"])
    found.mean("target_above", at["target_gap"] > 0)
    found.mean("K", at["K"])
    found.ratio("tail_share", tail, losses["rkl"])
    found.mean("matched", matched)
    found.mean("matched_p_t", at["p_t"], matched)
    found.mean("matched_K", at["K"], matched)
    found.mean("matched_outweighs", at["K"] > np.abs(at["D"]), matched)
    found.mean("matched_force", upward_force(observed), matched)
    found.mean("matched_overshoot", overshoot(at["p_t"], at["K"]), matched)
    found.mean("stronger", at["rest"] < setup.gamma)
    found.mean("weaker", at["rest"] > setup.gamma)
    found.ratio("tail_force_ratio", setup.gamma * at["tail_slope"], at["rest"] * at["tail_slope"])
    found.mean("sure", sure)
    for name, loss in losses.items():
        found.ratio(f"sure_{name}", np.where(sure, loss, 0.0), loss)
    return found.compute(setup.seed)


def _by_target(observed: Observed, seed: int) -> list[dict[str, Any]]:
    """For each bin of p_t: how many positions, how many of them matched, and how reverse KL's tail pushes there."""
    at, matched = observed.columns, observed.matched
    bins = bin_of(at["p_t"], TARGET_EDGES)
    force, above = upward_force(observed), overshoot(at["p_t"], at["K"])
    rows = []
    for number, (low, high) in enumerate(pairwise(TARGET_EDGES)):
        here = bins == number
        both = here & matched
        found = Ratios(observed.row, observed.num_rows)
        found.mean("p_t", at["p_t"], both)
        found.mean("K", at["K"], both)
        found.mean("outweighs", at["K"] > np.abs(at["D"]), both)
        found.mean("force", force, both)
        found.mean("rests_at", at["p_t"] + above, both)
        found.mean("force_anywhere", force, here)
        found.mean("K_anywhere", at["K"], here)
        counts = {"positions": int(here.sum()), "matched": int(both.sum())}
        rows.append({"from": low, "to": high, **counts, **found.compute(seed)})
    return rows


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles and a histogram between the 0.5 and 99.5 % quantile; what lies outside is counted at its ends."""
    known = values[np.isfinite(values)]
    result: dict[str, Any] = {"infinite": len(values) - len(known), "mean": None, "quantiles": {}, "histogram": None}
    if not len(known):
        return result
    low, high = np.quantile(known, (0.005, 0.995))
    low = min(float(low), 0.0)
    high = max(float(high), low + 1e-6)
    edges = np.linspace(low, high, NUM_BINS + 1)
    counts = np.bincount(bin_of(known, edges.tolist()), minlength=NUM_BINS)
    return result | {
        "mean": finite_or_none(known.mean()),
        "quantiles": {
            f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(known, QUANTILES), strict=True)
        },
        "histogram": {"edges": edges.tolist(), "positions": counts.tolist()},
    }


def _gammas(observed: Observed) -> list[dict[str, Any]]:
    """For each gamma: the share of positions whose tail DRKL supervises harder than reverse KL does, and how much."""
    rest, slope = observed.columns["rest"], observed.columns["tail_slope"]
    under = (rest * slope).sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return [
            {
                "gamma": gamma,
                "stronger": float((rest < gamma).mean()),
                "weaker": float((rest > gamma).mean()),
                "tail_force_ratio": finite_or_none(gamma * slope.sum() / under),
            }
            for gamma in GAMMAS
        ]


def _objective(observed: Observed, seed: int, name: str, found: Pushes) -> dict[str, Any]:
    """One objective's pushes, forces and loss, on positions taken evenly and on matched ones."""
    row, even, matched = observed.row[observed.at], observed.sampled, observed.matched[observed.at]
    sure = observed.columns["p_t"][observed.at] > SURE
    ratios = Ratios(row, observed.num_rows)
    ratios.mean("value", found.value, even)
    for where, kind in ((even, ""), (matched, "matched_")):
        ratios.mean(f"{kind}target_push", found.target_push, where)
        ratios.mean(f"{kind}tail_push", found.tail_push, where)
        ratios.mean(f"{kind}push", found.target_push + found.tail_push, where)
    ratios.mean("target_force", found.target_force, even)
    ratios.mean("tail_force", found.tail_force, even)
    ratios.ratio("sure", np.where(even & sure, found.value, 0.0), np.where(even, found.value, 0.0))
    return {"objective": name, "closed_form_gap": found.closed_form_gap, **ratios.compute(seed)}


def _reliability(observed: Observed) -> dict[str, Any]:
    at, unit = observed.columns, np.zeros(len(observed.row), dtype=np.int64)
    tables: dict[str, Any] = {"edges": EDGES}
    for name, kind in (("teacher", "teacher_"), ("student", "")):
        confidence, correct = at[f"{kind}confidence"], at[f"{kind}correct"]
        bins = Bins.of(width_bins(confidence), confidence, correct, unit, 1)
        counts = dict(zip(("tokens", "confidence", "accuracy"), bins.reliability(), strict=True))
        tables[name] = {**counts, "ece": finite_or_none(bins.ece(np.ones((1, 1)))[0])}
    return tables
