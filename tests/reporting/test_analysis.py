"""What the page, the csv and the Markdown show of an analysis."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from drkl.evaluation.findings import IDS, SHARED
from drkl.kept import student_mark
from drkl.reporting import analysis as drawn
from drkl.reporting import report
from drkl.reporting.analysis import section
from drkl.reporting.exports import as_csv, as_markdown
from drkl.reporting.inputs import read_run
from drkl.runs import read_json, write_json
from tests.analysis.made_states import analysed, teacher_logits
from tests.reporting.conftest import write_pair, write_run


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """An analysis as its file holds it."""
    teacher, labels, generator = teacher_logits()
    student = 0.8 * teacher + generator.normal(size=teacher.shape)
    made: dict[str, Any] = json.loads(json.dumps(analysed(student, teacher, labels, positions=8)[1].to_json()))
    made["settings"] |= {"models": {"teacher": "org/teacher", "student": "models/small"}}
    return made


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without their drawing, which is what takes the time."""
    monkeypatch.setattr(drawn, "to_svg", lambda figure, name, alt: Markup("<svg></svg>"))


def test_text_of_the_file_stays_text_on_the_page(content: dict[str, Any], tmp_path: Path) -> None:
    hostile = json.loads(json.dumps(content))
    hostile["objectives"][0]["objective"] = "<script>alert(1)</script>"
    hostile["findings"][-1]["text"] = "</style><script>\x00"
    hostile["settings"] |= {"models": {"teacher": "<b>t", "student": "s"}, "command": ["drkl", "analyze"]}
    write_json(tmp_path / "analysis.json", hostile)
    page = report(tmp_path).read_text()
    assert "<script>alert" not in page and "</style><script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>t" not in page
    for finding in hostile["findings"]:
        assert page.count(f'data-finding="{finding["id"]}"') == 1


@pytest.mark.usefixtures("sketchy")
def test_the_page_says_whose_analysis_it_shows(content: dict[str, Any], tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "pair")
    write_json(pair.analysis_path, content)
    shown = section(read_run(pair))
    assert shown is not None and shown.notice == ""
    assert shown.note.startswith("models/small beside org/teacher: 320 positions of 40 rows")
    other = content | {"settings": content["settings"] | {"models": {"teacher": "org/teacher", "student": "another"}}}
    write_json(pair.analysis_path, other)
    shown = section(read_run(pair))
    assert shown is not None and shown.notice.startswith("This analysis is of other models than the evaluation")

    run = write_run(tmp_path / "run")
    assert section(read_run(run)) is None
    write_json(run.analysis_path, content | {"timing": {"finished": "2026-01-02T10:00:00+00:00"}})
    for trained, stale in (("2026-01-02T09:00:00+00:00", False), ("2026-01-02T11:00:00+00:00", True)):
        write_json(run.env_path, read_json(run.env_path) | {"finished": trained})
        shown = section(read_run(run))
        assert shown is not None and shown.notice.startswith("The student was trained again") == stale
    assert "The student was trained again" in as_markdown([read_run(run), read_run(pair)])
    env = read_json(run.env_path) | {"student": {"model.safetensors": {"bytes": 1, "xxh3": "a"}}}
    write_json(run.env_path, env)
    for mark, stale in ((student_mark(env), False), ("another", True)):  # whatever the clock says
        settings = content["settings"] | {"student_files": mark}
        write_json(run.analysis_path, content | {"settings": settings, "timing": {"finished": "2026-01-02T10:00:00"}})
        shown = section(read_run(run))
        assert shown is not None and shown.notice.startswith("The student was trained again") == stale


@pytest.mark.usefixtures("sketchy")
def test_an_id_has_one_answer_per_run(content: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_json(run.analysis_path, content)
    read = read_run(run)
    ids = [finding.id for finding in (*read.findings, *read.analysis_findings)]
    assert len(ids) == len(set(ids)) and set(SHARED) < set(ids) <= set(IDS)
    assert [finding.id for finding in read.findings] == [finding.id for finding in read.evaluation.findings]  # type: ignore[union-attr]


@pytest.mark.usefixtures("sketchy")
def test_an_analysis_of_the_format_before(content: dict[str, Any], tmp_path: Path) -> None:
    old = {key: value for key, value in content.items() if key not in ("format", "findings")}
    old["totals"] = {"own_gap" if name == "overconfidence" else name: v for name, v in content["totals"].items()}
    write_json(tmp_path / "analysis.json", old)
    before = read_run(tmp_path)
    write_json(tmp_path / "analysis.json", content)
    now = read_run(tmp_path)
    for ours, theirs in zip(before.findings, now.findings, strict=True):
        assert (ours.id, ours.answer, ours.text) == (theirs.id, theirs.answer, theirs.text)


@pytest.mark.usefixtures("sketchy")
def test_the_csv_has_its_numbers(content: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "analysis.json", content)
    lines = list(csv.DictReader(io.StringIO(as_csv([read_run(tmp_path)]))))
    named = {line["metric"]: line for line in lines}
    one = content["totals"]["overconfidence"]
    line = named["analysis overconfidence"]
    assert np.isclose([float(line[key]) for key in ("value", "low", "high")], [one["value"], *one["interval"]]).all()
    assert line["model"] == "student" and "analysis rkl tail_push" in named
    assert sum(name.startswith("analysis drkl, γ 0.5 ") for name in named) >= 8
