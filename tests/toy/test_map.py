"""The map of a toy sweep: every cell is there, says its number, and is the darker the farther it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from drkl.toy.map import FAR, HIGH, LOW, METRICS, _color, _number, can_map, write_map

Row = dict[str, object]


def end(setting: str, objective: str, gamma: float | str, **values: float) -> Row:
    numbers = {"target_error": 0.12, "entropy": 3.0, "agreement": 0.34, "tvd": 0.56} | values
    return {"setting": setting, "objective": objective, "gamma": gamma} | numbers


ENDS = [
    *(end("cold", "drkl", gamma) for gamma in (0.1, 1.0)),
    end("cold", "rkl", "", entropy=0.5, agreement=0.78),
    *(end("warm", "drkl", gamma) for gamma in (0.1, 1.0)),
    end("elsewhere", "drkl", 0.1, tvd=0.91),
]
TEACHERS = {"cold": ("random", 2.0), "warm": ("warm", 2.0)}


def test_every_cell_is_drawn_with_its_number_the_same_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / "once.svg", tmp_path / "twice.svg"]
    for path in paths:
        write_map(ENDS, TEACHERS, path)
    text = paths[0].read_text()
    assert text == paths[1].read_text() and text.startswith("<?xml")
    # Text is drawn as paths, and each stands in a comment before them.
    shown = re.findall(r"<!-- (.*?) -->", text)
    assert [shown.count(number) for number in (".12", "+1.0", "−1.5", ".34", ".78", ".56")] == [5, 4, 1, 4, 1, 5]
    assert "rkl tail, random start" in shown and "rkl tail, warm start" in shown
    assert not any("fkl" in words for words in shown) and ".91" not in shown
    assert {"γ 0.1", "γ 1", "not decoupled"} <= set(shown)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_farther_from_the_teacher_is_darker(metric: object) -> None:
    steps = [0.0, 0.5, 1.0, 2.0, 4.0] if metric.best is None else [  # type: ignore[attr-defined]
        metric.best + share * (metric.worst - metric.best) for share in (0, 0.25, 0.5, 1)  # type: ignore[attr-defined]
    ]  # fmt: skip
    shades = [sum(_color(metric, step)[:3]) for step in steps]  # type: ignore[arg-type]
    assert shades == sorted(shades, reverse=True) and shades[0] > shades[-1] + 1


def test_a_signed_error_has_two_colours() -> None:
    entropy = next(metric for metric in METRICS if metric.best is None)
    other = next(metric for metric in METRICS if metric.best is not None)
    for metric, value, color in ((entropy, -9.0, LOW), (entropy, 9.0, HIGH), (other, 9.0, FAR)):
        assert _color(metric, value)[:3] == pytest.approx(to_rgb(color), abs=1e-6)
    assert [_number(entropy, value) for value in (-0.04, 0.34, -1.26, 10.0)] == ["0", "+.3", "−1.3", "+10.0"]
    assert [_number(other, value) for value in (0.0, 0.418, 0.999, 1.0)] == ["0", ".42", "1", "1"]


def test_one_objective_in_one_setting_is_no_map() -> None:
    assert not can_map([end("cold", "drkl", 0.1), end("cold", "rkl", ""), end("warm", "rkl", "")])
    assert can_map(ENDS[:2]) and can_map([ENDS[0], ENDS[3]])
