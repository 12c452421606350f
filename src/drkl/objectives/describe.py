"""Descriptions of the objectives, for `drkl objectives` and for the table in the docs."""

from __future__ import annotations

import dataclasses
from typing import Any

from drkl.objectives.base import Objective
from drkl.objectives.decoupled import Decoupled
from drkl.objectives.registry import OBJECTIVES

LISTED: dict[str, type[Objective]] = {**OBJECTIVES, Decoupled.name: Decoupled}
"""The objectives by name, and the operator that makes one of any two of them."""


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    dataclass: Any = cls
    return dataclasses.fields(dataclass)


def as_text() -> str:
    """Name, formula, source, and each parameter with its default and meaning."""
    blocks = []
    for name, cls in LISTED.items():
        lines = [name, f"  {cls.formula}", f"  source: {cls.source}"]
        lines += [f"  {field.name}={_default(field)}  {field.metadata.get('help', '')}" for field in _fields(cls)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def as_markdown() -> str:
    """The same as a table."""
    lines = ["| name | value at one position | parameters | source |", "|---|---|---|---|"]
    for name, cls in LISTED.items():
        parameters = "<br>".join(
            f"`{field.name}={_default(field)}` {_cell(field.metadata.get('help', ''))}" for field in _fields(cls)
        )
        lines.append(f"| `{name}` | `{_cell(cls.formula)}` | {parameters} | {_cell(cls.source)} |")
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field[Any]) -> Any:
    return getattr(field.default, "name", field.default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
