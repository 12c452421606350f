"""The report: one HTML file that opens from disk, without a network, and says everything without its small script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drkl.errors import DrklError
from drkl.evaluation.result import Evaluation
from drkl.reporting import analysis, curves, facts, figures, rollouts, samples, tables, tradeoff
from drkl.reporting.content import content_of
from drkl.reporting.exports import as_csv, as_markdown
from drkl.reporting.inputs import Run, read_run, unique_names
from drkl.reporting.templating import page_environment
from drkl.reporting.text import clip
from drkl.reporting.together import trained_together
from drkl.runs import RunFolder, write_text

TILES = {
    ("generation", True): ("rkl", "fkl", "agreement", "entropy"),
    ("generation", False): ("nll", "accuracy", "entropy", "rouge_l"),
    ("classification", True): ("accuracy", "agreement", "ece", "confidence_gap"),
    ("classification", False): ("accuracy", "macro_f1", "nll", "ece"),
}
"""The large numbers, by task and by whether there is a teacher."""
Source = str | Path | RunFolder | Evaluation


def report(
    runs: Source | Sequence[Source], path: str | Path | None = None, *, output_format: str | None = None
) -> Path:
    """Write a report of one evaluation, or of several side by side.

    Args:
        runs: run folders, folders of evaluated pairs, and evaluations in memory, mixed; a single one or a sequence. The
            report tells of the first and compares the others with it.
        path: the file to write. Default: ``report.html`` (``.md``, ``.csv``) in the first run's folder.
        output_format: ``html``; ``md`` for the words and tables; ``csv`` for one line per number. Default: what the
            ending of ``path`` says, else ``html``.

    Returns:
        The path of the report.

    Raises:
        DrklError: there is no run, the format is unknown, the runs are of different tasks, a file of a run is
            malformed, there is no folder to write to, or the report cannot be written.
    """
    sources = [runs] if isinstance(runs, Source) else list(runs)
    if not sources:
        raise DrklError("There is no run to report on; name at least one run folder or evaluation.")
    ending = "" if path is None else Path(path).suffix.removeprefix(".")
    chosen = checked_format(output_format or (ending if ending in FORMATS else "html"))
    read = unique_names(read_run(source) for source in sources)
    if len({run.task for run in read}) > 1:
        tasks = ", ".join(f"{run.title} ({run.task})" for run in read)
        raise DrklError(f"Runs of different tasks have no number in common: {tasks}. Report on each task by itself.")
    if path is None and read[0].folder is None:
        raise DrklError("This evaluation is only in memory: name the file to write the report to.")
    folder = read[0].folder
    target = folder.report_path.with_suffix(f".{chosen}") if path is None and folder is not None else Path(str(path))
    write_text(target, FORMATS[chosen](read))
    return target


def checked_format(name: str) -> str:
    """Return the name of a format.

    Raises:
        DrklError: it is none of ``FORMATS``.
    """
    if name not in FORMATS:
        raise DrklError(f"The report's format is {name!r}; expected one of {', '.join(FORMATS)}.")
    return name


def as_html(runs: Sequence[Run]) -> str:
    """The page as text."""
    run = runs[0]
    classifies = run.task == "classification"
    drawn_lines = figures.lines_of(runs)
    lines = {line.key: line for line, _, _ in drawn_lines}
    training, optimiser = curves.training_curves(run)
    tradeoffs = [] if classifies else tradeoff.pictures(runs)
    template = page_environment().get_template("report.html.j2")
    return template.render(
        run=run,
        **vars(content_of(runs, lines)),
        notes=facts.notes(runs),
        facts=facts.facts(run),
        tiles=_tiles(run),
        lines=[*lines.values()],
        own_lines=[line for line, _, _ in figures.lines_of([run])],
        run_figures=figures.run_dots(runs) if len(runs) > 1 else [],
        tradeoffs=tradeoffs,
        sweep=tradeoff.table(runs),
        confidence=figures.confidence(run),
        profiles=[] if classifies else figures.profiles(runs),
        analysis=analysis.section(run),
        together=trained_together(runs),
        curves=training,
        optimiser=optimiser,
        rollouts=rollouts.section(run) if len(runs) == 1 else None,
        every_number=tables.every_number(run),
        suites=tables.suite_tables(runs),
        samples=None if classifies else samples.sample_table(runs, lines),
        predictions=samples.prediction_tables(run) if classifies else [],
        data=facts.data_of(run),
        config=clip(run.config_text, facts.CONFIG_LIMIT),
        settings=facts.settings_text(run),
        environment=facts.environment(run),
        commands=facts.commands(runs),
    )


FORMATS: Mapping[str, Callable[[Sequence[Run]], str]] = {"html": as_html, "md": as_markdown, "csv": as_csv}


def _tiles(run: Run) -> list[dict[str, Any]]:
    """The large numbers with their bars."""
    table = tables.every_number(run)
    rows = {row.metric.key: row for group in (table.groups if table else ()) for row in group.rows}
    tiles = []
    for key in TILES[run.task, run.value("student", "rkl") is not None]:
        picture = figures.bars(run, rows[key].metric) if key in rows else None
        if picture:
            value = rows[key].metric.show(run.value("student", key))
            tiles.append({"row": rows[key], "picture": picture, "value": value})
    return tiles
