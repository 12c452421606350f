"""The table of docs/why.md that `make docs` makes of the studies in studies/drkl/."""

from __future__ import annotations

from statistics import fmean

from drkl.display import ABSENT, number
from scripts.evidence_page import DRKL, FKL, ON_POLICY, RKL, Results, done_cells, variant
from scripts.families_page import markdown

STORY = (
    ("far from its teacher", "instruction", (RKL, DRKL, FKL)),
    ("far, trained on what it writes", "on-policy", (RKL | ON_POLICY, DRKL | ON_POLICY, FKL | ON_POLICY)),
    ("near its teacher", "near-weights", tuple(variant(name) for name in ("rkl", "drkl", "drkl-teacher"))),
)
NAMES = {"drkl-teacher": "drkl, `weight=teacher`"}
COLUMNS = {
    "overconfidence": ("q − p at its own top token, points", 100, 2),
    "rkl": ("reverse KL, nats", 1, 4),
    "fkl": ("forward KL, nats", 1, 4),
    "tail_rkl": ("K, nats", 1, 4),
    "agreement": ("same top token, %", 100, 1),
    "distinct_2": ("Distinct-2", 1, 3),
}
"""Head, factor and digits by metric."""


def parts(results: Results) -> dict[str, str]:
    """Return the table by its name: means over seeds of the objectives for each pair."""
    rows = []
    for title, part, kinds in STORY:
        cells = done_cells(results.by_part.get(part, {"cells": []}))
        for axes in kinds:
            own = [cell["metrics"] for cell in cells if axes.items() <= cell["axes"].items()]
            name = str(axes.get("objective.name") or axes["variant"])
            shown = [
                number(factor * fmean(cell[key] for cell in own), digits) if own else ABSENT
                for key, (_, factor, digits) in COLUMNS.items()
            ]
            rows.append([title, NAMES.get(name, name), str(len(own)), *shown])
    return {"story": markdown(["a student", "objective", "seeds", *(head for head, *_ in COLUMNS.values())], rows)}
