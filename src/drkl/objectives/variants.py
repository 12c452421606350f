"""Objectives written as short names, e.g. ``drkl:0.1`` or ``rkl+gjs:0.5@floor``.

NAME[~SKEW][:GAMMA][@WEIGHT]     an objective of the list, with its skew, gamma or tail weight set
TARGET+TAIL[:GAMMA][@WEIGHT]     `decoupled`: one divergence on (target, rest), another on the tail
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from drkl.errors import DrklError
from drkl.objectives import OBJECTIVES, Objective, decoupled, make_objective

PATTERN = re.compile(r"([a-z_]+)(?:\+([a-z_]+))?(?:~([0-9.]+))?(?::([0-9.eE+-]+))?(?:@([a-z]+))?")


@dataclass(frozen=True)
class Variant:
    """An objective and the name it was made from.

    Attributes:
        spec: the name as it was written.
        objective: what it stands for.
        label: the name without its gamma.
        gamma: the objective's gamma; None where it has none, or where its weight replaces it.
    """

    spec: str
    objective: Objective
    label: str
    gamma: float | None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.spec)

    @property
    def title(self) -> str:
        """The label with its gamma, as tables and figures print it."""
        return self.label if self.gamma is None else f"{self.label}, \N{GREEK SMALL LETTER GAMMA} {self.gamma:g}"


def parse_variant(spec: str, gamma: float | None = None) -> Variant:
    """Make the objective that a short name stands for.

    Args:
        spec: see the top of this module.
        gamma: used where the objective has a gamma and ``spec`` sets none; None leaves the objective's default.

    Raises:
        DrklError: a malformed or unknown name, or a parameter that is outside its domain.

    >>> parse_variant("rkl+gjs:0.25").objective.gamma
    0.25
    """
    match = PATTERN.fullmatch(spec)
    if match is None:
        raise DrklError(
            f"There is no objective {spec!r}; expected NAME, drkl:GAMMA, drkl~SKEW, drkl@WEIGHT or F+G:GAMMA, as "
            "rkl+gjs:0.5."
        )
    name, tail, skew, number, weight = match.groups()
    options: dict[str, float | str] = {}
    for option, text, example in (("gamma", number, "drkl:0.1"), ("skew", skew, "drkl~0.1")):
        if text is not None:
            try:
                options[option] = float(text)
            except ValueError:
                raise DrklError(f"{spec!r}: {text!r} is no number; expected a {option}, as in {example}.") from None
    if weight is not None:
        options["weight"] = weight
    replaces_gamma = weight in ("student", "teacher")
    if gamma is not None and (tail is not None or name == "drkl") and not replaces_gamma:
        options.setdefault("gamma", gamma)
    label = name if tail is None else f"{name}+{tail}"
    label += ("" if skew is None else f"~{skew}") + ("" if weight is None else f"@{weight}")
    if skew is not None and (tail is not None or name not in ("drkl", "srkl", "sfkl")):
        raise DrklError(f"{spec!r}: {name if tail is None else 'F+G'} has no skew; drkl, srkl and sfkl have.")
    if tail is not None:
        objective: Objective = decoupled(name, tail, **options)  # type: ignore[arg-type]
    elif options.keys() - {"skew"} and name in OBJECTIVES and name != "drkl":
        raise DrklError(f"{spec!r}: {name} has no gamma and no weight; drkl and F+G have.")
    else:
        objective = make_objective(name, **options)
    return Variant(spec, objective, label, None if replaces_gamma else getattr(objective, "gamma", None))


def parse_variants(specs: Iterable[str], gamma: float | None = None) -> list[Variant]:
    """`parse_variant` of each; an objective that is named twice is kept once.

    >>> [variant.title for variant in parse_variants(["drkl", "drkl:0.5", "rkl"])]
    ['drkl, γ 0.5', 'rkl']
    """
    variants: dict[tuple[str, float | None], Variant] = {}
    for spec in specs:
        variant = parse_variant(spec, gamma)
        variants.setdefault((variant.label, variant.gamma), variant)
    return list(variants.values())
