"""What a report says about a run beside its numbers: what was distilled, on what, where, and by which commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from drkl.display import as_number
from drkl.reporting.record import RunRecord
from drkl.reporting.text import clip, count, duration, magnitude, short

CONFIG_LIMIT = 20_000


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """The lines under the title: what was distilled, how, and on what."""
    env, student = record.env, record.section("student")
    parameters = _mapping(env.get("parameters"))
    sizes = {name: as_number(parameters.get(name)) for name in ("student", "teacher")}
    rows = []
    if record.teacher:
        rows.append(("Teacher", record.teacher + _size(sizes["teacher"])))
    if record.is_pair:
        return [*rows, ("Student", record.subtitles["after"] or "student"), *_measured(record)]
    layers, init = student.get("layers"), student.get("init", "?")
    made = f"{init}" + (f", {len(layers) if isinstance(layers, list) else layers} layers" if layers else "")
    if init == "pretrained" and student.get("model"):
        made = str(student["model"])
    rows.append(("Student", short(made, 60) + _size(sizes["student"])))
    plan = " \N{RIGHTWARDS ARROW} ".join(
        stage.objective + (f" ({count(stage.end - stage.start, 'step')})" if stage.end > stage.start else "")
        for stage in record.stages
    )
    rows.append(("Objective", plan))
    seconds = [stage.seconds for stage in record.stages if stage.seconds is not None]
    if len(seconds) == len(record.stages):
        device = short(str(env.get("device_name") or env.get("device") or ""), 40)
        rows.append(("Trained in", duration(sum(seconds)) + (f" on {device}" if device else "")))
    started = _date(env.get("started"))
    if started:
        rows.append(("Started", started))
    return rows


def _measured(record: RunRecord) -> list[tuple[str, str]]:
    """How an outside pair was evaluated."""
    rows = []
    for key, title in (("protocol", "Protocol"), ("suites", "Suites")):
        said = record.settings.get(key)
        if said:
            rows.append((title, short(", ".join(map(str, said)) if isinstance(said, list) else str(said), 80)))
    return rows


def _size(parameters: float | None) -> str:
    return "" if parameters is None else f" \N{MIDDLE DOT} {magnitude(parameters)} parameters"


def _date(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def data_of(record: RunRecord) -> list[tuple[str, str]]:
    """Where the rows came from, and how many were left out."""
    if record.is_pair:
        known = _mapping(record.settings.get("data"))
        filled = {key: value for key, value in known.items() if value not in (None, [], {})}
        return [(short(str(key)).replace("_", " "), short(str(value), 120)) for key, value in filled.items()]
    data = _mapping(record.env.get("data"))
    rows = []
    for key, title in (("train_rows", "Training rows"), ("heldout_rows", "Held-out rows")):
        if as_number(data.get(key)) is not None:
            rows.append((title, count(data[key], "row").removesuffix(" rows").removesuffix(" row")))
    dropped = {str(k): v for k, v in _mapping(data.get("dropped")).items() if as_number(v)}
    if "dropped" in data:
        reasons = ", ".join(f"{short(reason).replace('_', ' ')}: {number:,}" for reason, number in dropped.items())
        rows.append(("Rows dropped", reasons or "none"))
    if as_number(data.get("responses_cut")) is not None:
        what = "Texts" if record.task == "classification" else "Answers"
        rows.append((f"{what} cut at the end", f"{data['responses_cut']:,}"))
    section = record.section("data")
    sources = section.get("sources")
    places = [place for place in sources if isinstance(place, dict)] if isinstance(sources, list) else []
    names = [place.get("path") or place.get("dataset") for place in places or [section]]
    source = ", ".join(str(name) for name in names if name)
    return [("Source", short(source, 80)), *rows] if source else rows


def settings_text(record: RunRecord) -> str:
    """How it was evaluated, as yaml."""
    if not record.settings:
        return ""
    # The command stands among the commands, without the path of the program.
    shown = {key: value for key, value in record.settings.items() if key != "command"}
    return clip(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100), CONFIG_LIMIT).text


def environment(record: RunRecord) -> list[tuple[str, str]]:
    """Versions and the machine."""
    skip = {"command", "data", "parameters"}
    rows = []
    known = record.env or ({"versions": record.settings.get("versions")} if record.is_pair else {})
    for key, value in known.items():
        if key not in skip and value is not None:
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            rows.append((short(str(key)).replace("_", " "), short(text, 120)))
    return rows


def commands(records: Sequence[RunRecord]) -> list[str]:
    """The lines that make this page again; names that a shell would take apart are quoted."""
    lines = []
    for record in records:
        made = record.settings.get("command") if record.is_pair else record.env.get("command")
        lines += _line(made)
        if not record.is_pair:
            lines.append(shlex.join(["drkl", "evaluate", str(record.run.root)]))
        if record.analysis is not None:
            lines += _line(_mapping(record.analysis.get("settings")).get("command"))
    lines.append(shlex.join(["drkl", "report", *(str(record.run.root) for record in records)]))
    return list(dict.fromkeys(lines))


def _line(command: Any) -> list[str]:
    if not isinstance(command, list) or not command:
        return []
    # The path of the program says where it lay on one machine, which helps nobody.
    return [shlex.join([Path(str(command[0])).name, *(str(word) for word in command[1:])])]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
