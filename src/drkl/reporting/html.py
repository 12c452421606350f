"""The report: one HTML file that opens from disk, without a network and without JavaScript."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup, escape

from drkl.display import as_number
from drkl.errors import DrklError
from drkl.reporting import classification, figures
from drkl.reporting.answer import answer, run_labels
from drkl.reporting.metrics import MODEL_TITLES, value_of
from drkl.reporting.record import RunRecord, read_run
from drkl.reporting.samples import sample_table
from drkl.reporting.tables import change_from, metric_groups, run_table
from drkl.reporting.text import clean, clip, count, duration, magnitude, short
from drkl.runs import RunFolder, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

TILES = ("rkl", "fkl", "agreement", "entropy")
TILES_WITHOUT_TEACHER = ("nll", "accuracy", "entropy", "rouge_l")
CLASS_TILES = ("accuracy", "agreement", "ece", "confidence_gap")
CLASS_TILES_WITHOUT_TEACHER = ("accuracy", "macro_f1", "nll", "ece")
CONFIG_LIMIT = 20_000

# Commands in backquotes; numbers that are results, so neither the 2 of "distinct-2" nor a count of steps.
_MARKED = re.compile(
    r"(`[^`]*`|(?<![\w.-])[+\N{MINUS SIGN}]?\d++(?:,\d{3})*+(?:\.\d+)?+(?:\N{NO-BREAK SPACE}%)?(?![\w-])(?! steps?\b))"
)


def write_report(runs: RunFolder | Sequence[RunFolder], output: Path | None = None) -> Path:
    """Write the page of the first run, compared with the others where there are any.

    Args:
        runs: a run folder, or several; the page tells of the first and sets the trained students of all side by side.
        output: where to write; by default ``report.html`` in the first run's folder.

    Returns:
        The path of the page.

    Raises:
        DrklError: no run was given, runs of different tasks, a file of a run is broken, or the page cannot be written.
    """
    folders = [runs] if isinstance(runs, RunFolder) else list(runs)
    if not folders:
        raise DrklError("There is no run to report on; name at least one run folder.")
    records = [read_run(folder) for folder in folders]
    if len({record.task for record in records}) > 1:
        shown = ", ".join(f"{record.name} ({record.task})" for record in records)
        raise DrklError(f"Runs of different tasks have no number in common: {shown}. Report on them apart.")
    target = output or folders[0].report_path
    page = render(records)
    try:
        write_text(target, page)
    except OSError as error:
        raise DrklError(f"Cannot write the report to {str(target)!r}: {error.strerror}.") from error
    return target


def render(records: Sequence[RunRecord]) -> str:
    """The page as text."""
    record, several = records[0], len(records) > 1
    classifies = record.task == "classification"
    evaluated = record.evaluation is not None
    curves, optimiser = figures.training_curves(record)
    context = {
        "record": record,
        "title": record.name,
        "answer": (classification.answer if classifies else answer)(record, records[1:]),
        "facts": _facts(record),
        "models": record.models,
        "titles": MODEL_TITLES,
        "subtitles": record.subtitles,
        "tiles": _tiles(record),
        "distributions": (classification if classifies else figures).distributions(record) if evaluated else [],
        "curves": curves,
        "optimiser": optimiser,
        "stages": record.stages,
        "groups": metric_groups(record) if evaluated else [],
        "change_from": change_from(record),
        "runs": run_table(records) if several else None,
        "run_figures": figures.run_comparison(records, run_labels(records)) if several else [],
        "samples": classification.prediction_tables(record) if classifies else sample_table(record),
        "data": _data(record),
        "config": clip(record.config_text, CONFIG_LIMIT),
        "settings": _settings(record),
        "environment": _environment(record),
        "commands": _commands(records),
    }
    page = "classification.html.j2" if classifies else "report.html.j2"
    return _environment_for_templates().get_template(page).render(context)


def _environment_for_templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("drkl.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a template prints passes here before it is escaped, so no text can reach the page unclean.
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["numbers"] = emphasise
    return environment


def emphasise(text: str) -> Markup:
    """Escape ``text`` and set its numbers in ``<b>`` and its backquoted commands in ``<code>``."""
    pieces = _MARKED.split(clean(text))
    parts = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            parts.append(escape(piece))
        elif piece.startswith("`"):
            parts.append(Markup("<code>{}</code>").format(piece[1:-1]))
        else:
            parts.append(Markup("<b>{}</b>").format(piece))
    return Markup("").join(parts)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The lines under the title: what was distilled, how, and on what."""
    env, student = record.env, record.section("student")
    parameters = _mapping(env.get("parameters"))
    sizes = {name: as_number(parameters.get(name)) for name in ("student", "teacher")}
    facts = []
    if record.teacher:
        facts.append(("Teacher", record.teacher + _size(sizes["teacher"])))
    layers, init = student.get("layers"), student.get("init", "?")
    made = f"{init}" + (f", {len(layers) if isinstance(layers, list) else layers} layers" if layers else "")
    if init == "pretrained" and student.get("model"):
        made = str(student["model"])
    facts.append(("Student", short(made, 60) + _size(sizes["student"])))
    plan = " \N{RIGHTWARDS ARROW} ".join(
        stage.objective + (f" ({count(stage.end - stage.start, 'step')})" if stage.end > stage.start else "")
        for stage in record.stages
    )
    facts.append(("Objective", plan))
    seconds = [stage.seconds for stage in record.stages if stage.seconds is not None]
    if len(seconds) == len(record.stages):
        device = short(str(env.get("device_name") or env.get("device") or ""), 40)
        facts.append(("Trained in", duration(sum(seconds)) + (f" on {device}" if device else "")))
    started = _date(env.get("started"))
    if started:
        facts.append(("Started", started))
    return facts


def _size(parameters: float | None) -> str:
    return "" if parameters is None else f" \N{MIDDLE DOT} {magnitude(parameters)} parameters"


def _date(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def _tiles(record: RunRecord) -> list[dict[str, Any]]:
    has_distance = value_of(record.evaluation, "after", "rkl") is not None
    keys = TILES if has_distance else TILES_WITHOUT_TEACHER
    if record.task == "classification":
        keys = CLASS_TILES if has_distance else CLASS_TILES_WITHOUT_TEACHER
    tiles = []
    for row in (row for group in metric_groups(record) for row in group.rows):
        picture = figures.bars(record, row.metric.key) if row.metric.key in keys else None
        if picture:
            value = next(cell.text for cell in row.cells if cell.model == "after")
            tiles.append({"row": row, "picture": picture, "value": value, "order": keys.index(row.metric.key)})
    return sorted(tiles, key=lambda tile: tile["order"])


def _data(record: RunRecord) -> list[tuple[str, str]]:
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


def _settings(record: RunRecord) -> str:
    settings = (record.evaluation or {}).get("settings")
    if not isinstance(settings, dict):
        return ""
    return clip(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100), CONFIG_LIMIT).text


def _environment(record: RunRecord) -> list[tuple[str, str]]:
    skip = {"command", "data", "parameters"}
    rows = []
    for key, value in record.env.items():
        if key not in skip and value is not None:
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            rows.append((short(str(key)).replace("_", " "), short(text, 120)))
    return rows


def _commands(records: Sequence[RunRecord]) -> list[str]:
    """The lines that make this page again; names that a shell would take apart are quoted."""
    command = records[0].env.get("command")
    folders = [str(record.run.root) for record in records]
    lines = []
    if isinstance(command, list) and command:
        # The path of the program says where it lay on one machine, which helps nobody.
        lines.append(shlex.join([Path(str(command[0])).name, *(str(word) for word in command[1:])]))
    lines.append(shlex.join(["drkl", "evaluate", folders[0]]))
    lines.append(shlex.join(["drkl", "report", *folders]))
    return lines


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
