"""The report as Markdown (for a README, a pull request) and as csv (one line per number)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from drkl.display import as_number, markdown_text
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import metrics_of
from drkl.reporting import analysis, facts, tables, tradeoff
from drkl.reporting.content import Question, content_of
from drkl.reporting.figures import lines_of
from drkl.reporting.inputs import Run, run_labels
from drkl.reporting.tables import Cell, MetricTable, PlainTable, Row
from drkl.reporting.text import csv_text, markdown_code, markdown_table, markdown_words

COLUMNS = ("run", "model", "suite", "sampling_temperature", "metric", "value", "low", "high", "unit", "direction")
ANSWERS = {"yes": "Yes.", "no": "No.", "undecided": "Undecided.", "not_applicable": "Not applicable."}


def as_markdown(runs: Sequence[Run]) -> str:
    """The findings, the tables with intervals, what the configurations differ on, and the commands."""
    run = runs[0]
    content = content_of(runs, {line.key: line for line, _, _ in lines_of(runs)})
    head, beside = content.headline, content.several
    answer = f" {ANSWERS[head.answer.finding.answer]}" if head.answer else ""
    parts = [f"# {markdown_text(run.title)}", f"**{_title(head.title)}**{answer} {markdown_words(head.text)}"]
    parts.append("\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in facts.facts(run)))
    parts += [f"**{markdown_words(concern)}**" for concern in content.concerns]
    parts += [_question(question) for question in (*content.questions, *content.not_applicable)]
    parts += [markdown_words(note) for note in facts.notes(runs)]
    if beside is not None:
        parts += ["## The runs side by side", *(f"**{markdown_words(notice)}**" for notice in beside.notices)]
        parts.append("\n".join(f"- {markdown_words(text)}" for text in beside.standings))
        parts += _metric_table(beside.table, level=3)
    if run.task != "classification" and (swept := tradeoff.table(runs)).rows:
        parts += ["## Fidelity and diversity over the sampling temperatures", _plain_table(swept)]
    parts += _analysis(run, content.analysis_questions)
    if (table := tables.every_number(run)) is not None:
        parts += [f"## Every number of {markdown_text(run_labels(runs)[0])}", *_metric_table(table, level=3)]
    for table in tables.suite_tables(runs):
        parts += [f"## The suites: {markdown_text(table.title)}", *_metric_table(table, level=3)]
    if beside is not None and beside.differences is not None:
        parts += ["## Configuration keys that differ", _plain_table(beside.differences)]
    if commands := facts.commands(runs):
        parts += ["## How to repeat it", markdown_code(commands)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(text: str) -> str:
    return markdown_text(text if text.endswith("?") else f"{text}.")


def _question(question: Question) -> str:
    answers = [
        f"{markdown_text(answer.label) + ': ' if answer.label else ''}{ANSWERS[answer.finding.answer]} "
        f"{markdown_words(answer.finding.text)}"
        for answer in question.answers
    ]
    if len(answers) == 1:
        return f"**{markdown_text(question.text)}** {answers[0]}"
    return "\n".join([f"**{markdown_text(question.text)}**", "", *(f"- {text}" for text in answers)])


def _analysis(run: Run, questions: Sequence[Question]) -> list[str]:
    section = analysis.section(run)
    answers = [_question(question) for question in questions]
    if section is None:
        return ["## The analysis", *answers] if answers else []
    notice = [markdown_words(section.notice)] if section.notice else []
    return ["## The analysis", *notice, *answers, _plain_table(section.table), markdown_text(section.note)]


def _metric_table(table: MetricTable | None, *, level: int) -> list[str]:
    parts = []
    for group in table.groups if table is not None else ():
        parts += [f"{'#' * level} {markdown_text(group.title)}"] if group.title else []
        heads = [markdown_text(column.title) for column in table.columns] if table is not None else []
        parts.append(markdown_table(["Metric", *heads], [[_metric(row), *map(_cell, row.cells)] for row in group.rows]))
    return parts


def _metric(row: Row) -> str:
    metric = row.metric
    unit = f" ({markdown_text(metric.unit)})" if metric.unit else ""
    symbol = "" if metric.symbol in metric.title else f", {markdown_text(metric.symbol)}"
    return f"{markdown_text(metric.title)}{symbol}{unit} {row.arrow}".strip()


def _cell(cell: Cell) -> str:
    verdict = tables.COMPARED[cell.finding.answer] if cell.finding else ""
    below = ", ".join(part for part in (cell.interval, cell.beside, verdict) if part)
    return _with(f"**{cell.text}**" if cell.best else cell.text, below)


def _with(value: str, below: str) -> str:
    return f"{value} ({below})" if below else value


def _plain_table(table: PlainTable) -> str:
    rows = [
        [markdown_text(cell) if isinstance(cell, str) else _with(*map(markdown_text, cell)) for cell in row]
        for row in table.rows
    ]
    return markdown_table([markdown_text(name) for name in table.head], rows, left=table.names)


def as_csv(runs: Sequence[Run]) -> str:
    """One line per number, in the unit that stands beside it; a temperature only where the number depends on it."""
    labels = run_labels(runs)
    return csv_text(COLUMNS, ([label, *line] for run, label in zip(runs, labels, strict=True) for line in _lines(run)))


def _lines(run: Run) -> Iterator[list[str]]:
    temperature = as_number(run.settings.get("sampling_temperature"))
    evaluation = run.evaluation
    sets = {} if evaluation is None else {"": evaluation.numbers, **evaluation.suites}
    for name, numbers in sets.items():
        for model in numbers.models:
            yield from _values(run, model, name, temperature, numbers.values[model], numbers.intervals.get(model))
    for name, value, ends in analysis.numbers(run.analysis) if run.analysis is not None else ():
        yield ["student", "", "", name, repr(value), *map(repr, ends or ()), *([""] * (2 if ends else 4))]
    for model, points in evaluation.sweep.items() if evaluation is not None else ():
        for point in points:
            at = point.sampling_temperature
            # The numbers at the main temperature stand among the model's own already.
            values = {k: v for k, v in point.values.items() if at != temperature or run.value(model, k) is None}
            yield from _values(run, model, "", at, values, point.intervals, answers_only=True)


def _values(
    run: Run,
    model: str,
    suite: str,
    temperature: float | None,
    values: Mapping[str, Any],
    intervals: Mapping[str, Interval] | None,
    *,
    answers_only: bool = False,
) -> Iterator[list[str]]:
    for key, metric in metrics_of(run.task).items():
        value = values.get(key)
        if value is None or (answers_only and metric.of != "answers"):
            continue
        ends = (intervals or {}).get(key)
        at = f"{temperature:g}" if temperature is not None and metric.of == "answers" else ""
        scaled = [
            "" if number is None else f"{number * metric.scale:.10g}" for number in (value, *(ends or (None, None)))
        ]
        yield [model, suite, at, key, *scaled, metric.unit, metric.better]
