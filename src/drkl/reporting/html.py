"""The report: one HTML file that opens from disk, without a network, and says all without its small script."""

from __future__ import annotations

import re
from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from drkl.errors import DrklError
from drkl.reporting import analysis, classification, facts, figures, plotting, profiles, tradeoff
from drkl.reporting.answer import run_labels
from drkl.reporting.exports import answer_of, as_csv, as_markdown
from drkl.reporting.lines import lines_of
from drkl.reporting.metrics import value_of
from drkl.reporting.record import RunRecord, read_run
from drkl.reporting.samples import sample_table
from drkl.reporting.tables import change_from, metric_groups, run_table, suite_tables
from drkl.reporting.text import clean, clip
from drkl.runs import RunFolder, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

FORMATS = ("html", "md", "csv")
TILES = ("rkl", "fkl", "agreement", "entropy")
TILES_WITHOUT_TEACHER = ("nll", "accuracy", "entropy", "rouge_l")
CLASS_TILES = ("accuracy", "agreement", "ece", "confidence_gap")
CLASS_TILES_WITHOUT_TEACHER = ("accuracy", "macro_f1", "nll", "ece")

# Commands in backquotes; numbers that are results, so neither the 2 of "distinct-2" nor a count of steps.
_MARKED = re.compile(
    r"(`[^`]*`|(?<![\w.-])[+\N{MINUS SIGN}]?\d++(?:,\d{3})*+(?:\.\d+)?+(?:\N{NO-BREAK SPACE}%)?(?![\w-])(?! steps?\b))"
)


def write_report(
    runs: RunFolder | Sequence[RunFolder], output: Path | None = None, *, output_format: str = "html"
) -> Path:
    """Write the report of the first run, compared with the others where there are any.

    Args:
        runs: a run folder, or several; the report tells of the first and sets the trained students of all side by side.
        output: where to write; by default ``report.html`` (``.md``, ``.csv``) in the first run's folder.
        output_format: ``html``; ``md`` for the words and tables; ``csv`` for one line per number.

    Returns:
        The path of the report.

    Raises:
        DrklError: no run or another format was given, runs of different tasks, a file of a run is broken, or the report
            cannot be written.
    """
    folders = [runs] if isinstance(runs, RunFolder) else list(runs)
    if not folders:
        raise DrklError("There is no run to report on; name at least one run folder.")
    check_format(output_format)
    records = [read_run(folder) for folder in folders]
    if len({record.task for record in records}) > 1:
        shown = ", ".join(f"{record.name} ({record.task})" for record in records)
        raise DrklError(f"Runs of different tasks have no number in common: {shown}. Report on them apart.")
    target = output or folders[0].report_path.with_suffix(f".{output_format}")
    text = {"html": render, "md": as_markdown, "csv": as_csv}[output_format](records)
    try:
        write_text(target, text)
    except OSError as error:
        raise DrklError(f"Cannot write the report to {str(target)!r}: {error.strerror}.") from error
    return target


def check_format(name: str) -> None:
    """Refuse a format that there is not.

    Raises:
        DrklError: it is none of ``FORMATS``.
    """
    if name not in FORMATS:
        raise DrklError(f"--format is {name!r}; expected one of {', '.join(FORMATS)}.")


def render(records: Sequence[RunRecord]) -> str:
    """The page as text."""
    record, several = records[0], len(records) > 1
    classifies = record.task == "classification"
    evaluated = record.evaluation is not None
    curves, optimiser = figures.training_curves(record)
    tradeoffs = [] if classifies else tradeoff.pictures(records)
    lines = lines_of(records)
    side_by_side = run_table(records) if several else None
    script = _script()
    context = {
        "record": record,
        "title": record.name,
        "answer": answer_of(records),
        "facts": facts.facts(record),
        "models": record.models,
        "titles": record.titles,
        "subtitles": record.subtitles,
        "tiles": _tiles(record),
        "tradeoffs": tradeoffs,
        "lines": lines,
        "own_lines": lines_of(records[:1]),
        "signs": defaultdict(Markup, {line.key: line.sign for line in lines}),
        "sweep": tradeoff.table(records) if tradeoffs else [],
        "matched": tradeoff.verdict(records) if tradeoffs else "",
        "profiles": [] if classifies else _profiles(records),
        "distributions": (classification if classifies else figures).distributions(record) if evaluated else [],
        "analysis": analysis.section(records),
        "curves": curves,
        "optimiser": optimiser,
        "stages": record.stages,
        "groups": metric_groups(record) if evaluated else [],
        "change_from": change_from(record),
        "suites": suite_tables(records),
        "runs": side_by_side if side_by_side is not None and side_by_side.rows else None,
        "run_figures": figures.run_comparison(records, run_labels(records)) if several else [],
        "samples": classification.prediction_tables(record) if classifies else sample_table(records),
        "data": facts.data_of(record),
        "config": clip(record.config_text, facts.CONFIG_LIMIT),
        "settings": facts.settings_text(record),
        "environment": facts.environment(record),
        "commands": facts.commands(records),
        "script": script,
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
    }
    page = "classification.html.j2" if classifies else "report.html.j2"
    return _environment_for_templates().get_template(page).render(context)


def _script() -> Markup:
    return Markup(files("drkl.reporting").joinpath("templates", "page.js").read_text(encoding="utf-8"))


def _profiles(records: Sequence[RunRecord]) -> list[plotting.Picture]:
    with plotting.plot_style():
        diagram = profiles.reliability(records[0])
    found = [diagram, profiles.tail(records), *profiles.coverage(records)]
    return [picture for picture in found if picture]


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
