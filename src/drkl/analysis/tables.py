"""The tables of ``analysis.json``, computed from the observations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from drkl.analysis.ratios import Ratios, finite_or_none
from drkl.analysis.states import MATCHED, Observed, Pushes
from drkl.evaluation.calibration import EDGES, Bins, bin_of, width_bins

TARGET_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
"""Bins of p_t; in the last one the teacher is almost certain."""
SURE = 0.99
"""The teacher is almost certain where p_t is above this."""
GAMMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
NUM_BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def make_tables(observed: Observed, *, gamma: float, seed: int = 0, evaluation_seed: int = 0) -> dict[str, Any]:
    """Return the tables of ``analysis.json``.

    Every ``{"value", "interval"}`` is a mean over positions with a 95 % bootstrap interval over the rows (null where
    there is none).

    Args:
        observed: the observations.
        gamma: DRKL's constant weight of the tail.
        seed: random seed of the bootstrap.
        evaluation_seed: random seed of the bootstrap of the means that `drkl evaluate` has too, so that both agree.
    """
    return {
        "settings": {
            "gamma": gamma,
            "temperature": observed.temperature,
            "matched": f"|D| <= {MATCHED} nats, D = logit q_t - logit p_t",
            "positions": len(observed.row),
            "rows": observed.num_rows,
            "differentiated": {"evenly": int(observed.sampled.sum()), "matched": int((~observed.sampled).sum())},
            "seed": seed,
            "evaluation_seed": evaluation_seed,
        },
        "counts": {
            "matched": int(observed.matched.sum()),
            "matched_rows": len(np.unique(observed.row[observed.matched])),
            "infinite_K": int(np.isinf(observed.columns["K"]).sum()),
        },
        "totals": _sureness(observed, evaluation_seed) | _totals(observed, gamma, seed),
        "by_target": _by_target(observed, seed),
        "distributions": {name: _distribution(observed.columns[name]) for name in ("B", "K", "D")},
        "gammas": _gammas(observed),
        "objectives": [_objective(observed, seed, name, pushes) for name, pushes in observed.pushes.items()],
        "reliability": _reliability(observed),
    }


def overshoot(p_t: np.ndarray, K: np.ndarray) -> np.ndarray:
    """The distance above p_t at which reverse KL comes to rest with the tail held fixed: sigmoid(logit p_t + K) - p_t.

    = p_t (1 - p_t) (1 - e^-K) / (p_t + (1 - p_t) e^-K), which loses no digits where p_t is near 1.
    """
    above: np.ndarray = p_t * (1 - p_t) * -np.expm1(-K) / (p_t + (1 - p_t) * np.exp(-K))
    return above


def upward_force(observed: Observed) -> np.ndarray:
    """q_t (1 - q_t) K / T `[n]`: the upward force of reverse KL's tail on the target's logit."""
    at = observed.columns
    force: np.ndarray = at["q_t"] * at["rest"] * at["K"] / observed.temperature
    return force


def _sureness(observed: Observed, seed: int) -> dict[str, Any]:
    """The means over all positions that an evaluation has too, and the student's excess over its teacher."""
    at = observed.columns
    gap, teacher_gap = at["confidence"] - at["correct"], at["teacher_confidence"] - at["teacher_correct"]
    means = Ratios(observed.row, observed.num_rows)
    means.mean("confidence", at["confidence"])
    means.mean("teacher_confidence", at["teacher_confidence"])
    means.mean("overconfidence", at["overconfidence"])
    means.mean("accuracy", at["correct"])
    means.mean("teacher_accuracy", at["teacher_correct"])
    means.mean("calibration_gap", gap)
    means.mean("teacher_calibration_gap", teacher_gap)
    means.mean("excess", gap - teacher_gap)
    means.mean("target_gap", at["target_gap"])
    return means.compute(seed)


def _totals(observed: Observed, gamma: float, seed: int) -> dict[str, Any]:
    """The other means over all positions, and over those where the target is matched."""
    at, matched, sure = observed.columns, observed.matched, observed.columns["p_t"] > SURE
    tail = at["rest"] * at["K"]
    losses = {"rkl": at["B"] + tail, "drkl": at["B"] + gamma * at["K"]}
    means = Ratios(observed.row, observed.num_rows)
    means.mean("target_above", at["target_gap"] > 0)
    means.mean("K", at["K"])
    means.ratio("tail_share", tail, losses["rkl"])
    means.mean("matched", matched)
    means.mean("matched_p_t", at["p_t"], matched)
    means.mean("matched_K", at["K"], matched)
    means.mean("matched_outweighs", at["K"] > np.abs(at["D"]), matched)
    means.mean("matched_force", upward_force(observed), matched)
    means.mean("matched_overshoot", overshoot(at["p_t"], at["K"]), matched)
    means.mean("stronger", at["rest"] < gamma)
    means.mean("weaker", at["rest"] > gamma)
    means.ratio("tail_force_ratio", gamma * at["tail_slope"], at["rest"] * at["tail_slope"])
    means.mean("sure", sure)
    for name, loss in losses.items():
        means.ratio(f"sure_{name}", np.where(sure, loss, 0.0), loss)
    return means.compute(seed)


def _by_target(observed: Observed, seed: int) -> list[dict[str, Any]]:
    """For each bin of p_t: positions, matched positions, and the force of reverse KL's tail there."""
    at, matched = observed.columns, observed.matched
    bins = bin_of(at["p_t"], TARGET_EDGES)
    force, above = upward_force(observed), overshoot(at["p_t"], at["K"])
    rows = []
    for number, (low, high) in enumerate(pairwise(TARGET_EDGES)):
        inside = bins == number
        both = inside & matched
        means = Ratios(observed.row, observed.num_rows)
        means.mean("p_t", at["p_t"], both)
        means.mean("K", at["K"], both)
        means.mean("outweighs", at["K"] > np.abs(at["D"]), both)
        means.mean("force", force, both)
        means.mean("rests_at", at["p_t"] + above, both)
        means.mean("force_anywhere", force, inside)
        means.mean("K_anywhere", at["K"], inside)
        counts = {"positions": int(inside.sum()), "matched": int(both.sum())}
        rows.append({"from": low, "to": high, **counts, **means.compute(seed)})
    return rows


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles, and a histogram from the 0.5 % to the 99.5 % quantile whose end bins include what is beyond."""
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
    """For each gamma: at which shares of the positions DRKL's force on the tail exceeds reverse KL's, or is weaker."""
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


def _objective(observed: Observed, seed: int, name: str, pushes: Pushes) -> dict[str, Any]:
    """One objective's loss, pushes and forces at evenly spaced positions, and its pushes at matched positions."""
    row, even, matched = observed.row[observed.at], observed.sampled, observed.matched[observed.at]
    sure = observed.columns["p_t"][observed.at] > SURE
    means = Ratios(row, observed.num_rows)
    means.mean("value", pushes.value, even)
    for where, kind in ((even, ""), (matched, "matched_")):
        means.mean(f"{kind}target_push", pushes.target_push, where)
        means.mean(f"{kind}tail_push", pushes.tail_push, where)
        means.mean(f"{kind}push", pushes.target_push + pushes.tail_push, where)
    means.mean("target_force", pushes.target_force, even)
    means.mean("tail_force", pushes.tail_force, even)
    means.ratio("sure", np.where(even & sure, pushes.value, 0.0), np.where(even, pushes.value, 0.0))
    return {"objective": name, "closed_form_gap": pushes.closed_form_gap, **means.compute(seed)}


def _reliability(observed: Observed) -> dict[str, Any]:
    """Accuracy by confidence, of both models."""
    at, unit = observed.columns, np.zeros(len(observed.row), dtype=np.int64)
    tables: dict[str, Any] = {"edges": EDGES}
    for name, kind in (("teacher", "teacher_"), ("student", "")):
        confidence, correct = at[f"{kind}confidence"], at[f"{kind}correct"]
        bins = Bins.of(width_bins(confidence), confidence, correct, unit, 1)
        counts = dict(zip(("tokens", "confidence", "accuracy"), bins.reliability(), strict=True))
        tables[name] = {**counts, "ece": finite_or_none(bins.ece(np.ones((1, 1)))[0])}
    return tables
