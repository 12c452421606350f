"""The report as Markdown (for a README, a pull request) and as csv (one line per number)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from drkl.display import as_number
from drkl.reporting import analysis, classification, facts, tradeoff
from drkl.reporting.answer import Answer, answer, run_labels
from drkl.reporting.metrics import MODELS, metrics_of, span_of, value_of
from drkl.reporting.record import RunRecord
from drkl.reporting.tables import Cell, Row, metric_groups, run_table, suite_tables
from drkl.reporting.text import clean

COLUMNS = (
    "run", "model", "suite", "sampling_temperature", "metric", "value", "low", "high", "unit", "direction",
)  # fmt: skip
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_COMMANDS = re.compile(r"(`[^`]*`)")


def answer_of(records: Sequence[RunRecord]) -> Answer:
    """The answer in words, of whichever task."""
    make = classification.answer if records[0].task == "classification" else answer
    return make(records[0], records[1:])


def as_markdown(records: Sequence[RunRecord]) -> str:
    """The answer, the tables with intervals, what the configurations differ on, and the commands."""
    record = records[0]
    said = answer_of(records)
    parts = [f"# {_text(record.name)}", f"**{_text(said.verdict)}.** {_words(said.headline)}"]
    parts.append("\n".join(f"- {_text(name)}: {_text(value)}" for name, value in facts.facts(record)))
    parts += [f"**{_text(point.question)}** {_words(point.text)}" for point in said.points]
    if len(records) > 1 and (runs := run_table(records)).rows:
        parts += ["## The runs side by side", *([_words(runs.warning)] if runs.warning else [])]
        parts.append(_metric_table(["Teacher", *runs.labels], runs.rows))
    if record.task != "classification" and (swept := tradeoff.table(records)):
        parts += ["## Fidelity and diversity over the sampling temperatures", _words(tradeoff.verdict(records))]
        rows = [[_text(row.line.title), row.temperature, *(_both(*cell) for cell in row.cells)]
                for row in swept]  # fmt: skip
        parts.append(_table(["Model", "Temperature", "ROUGE-L ↑", "Distinct-2 → T", "Self-BLEU → T"], rows, left=1))
    if (analysed := analysis.section(records)) is not None:
        parts += _analysis(analysed)
    groups = metric_groups(record) if record.evaluation is not None else []
    if groups:
        parts.append(f"## Every number of {_text(run_labels(records)[0])}")
        titles = [record.titles[model] for model in record.models]
        for group in groups:
            parts += [f"### {_text(group.title)}", _metric_table(titles, group.rows)]
    for suites in suite_tables(records):
        parts += [f"## The suites: {_text(suites.title)}", _metric_table(suites.names, suites.rows)]
    if len(records) > 1 and (found := run_table(records).differences):
        parts.append("## On what they differ")
        rows = [[_text(key), *(_text(value) for value in values)] for key, values in found]
        parts.append(_table(["Key", *(_text(label) for label in run_labels(records))], rows, left=len(records) + 1))
    parts += ["## How to repeat it", _code(facts.commands(records))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _analysis(found: analysis.Section) -> list[str]:
    rows = [[_text(cell) for cell in row] for row in found.rows]
    said = [f"**{_text(one.question)}** {_text(one.answer)}. {_words(one.text)}" for one in found.findings]
    return [
        "## Does reverse KL make it too sure?", *([_words(found.notice)] if found.notice else []),
        _words(found.headline), *(f"- {_text(label)}: {_text(headline)}" for label, headline in found.others), *said,
        _table([_text(name) for name in found.head], rows, left=1), _text(found.note),
    ]  # fmt: skip


def _metric_table(titles: Sequence[str], rows: Sequence[Row]) -> str:
    shown = []
    for row in rows:
        unit = f" ({_text(row.metric.unit)})" if row.metric.unit else ""
        symbol = "" if row.metric.symbol in row.metric.title else f", {_text(row.metric.symbol)}"
        name = f"{_text(row.metric.title)}{symbol}{unit} {row.arrow}".strip()
        shown.append([name, *(_cell(cell) for cell in row.cells)])
    return _table(["Metric", *(_text(title) for title in titles)], shown, left=1)


def _cell(cell: Cell) -> str:
    value = f"**{cell.text}**" if cell.best else cell.text
    return _both(value, ", ".join(part for part in (cell.interval, cell.beside) if part))


def _both(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    rule = [":--" if place < left else "--:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _text(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", " ".join(clean(text).split()))


def _words(text: str) -> str:
    """Text of ours with commands in backquotes, which stay."""
    pieces = _COMMANDS.split(" ".join(clean(text).split()))
    return "".join(piece if place % 2 else _SPECIAL.sub(r"\\\1", piece) for place, piece in enumerate(pieces))


def _code(lines: Sequence[str]) -> str:
    text = clean("\n".join(" ".join(line.split("\n")) for line in lines))
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}bash\n{text}\n{fence}"


def as_csv(records: Sequence[RunRecord]) -> str:
    """One line per number, in the unit that stands beside it; a temperature only where the number depends on it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record, label in zip(records, run_labels(records), strict=True):
        for line in _numbers(record):
            writer.writerow([_plain(label), *line])
    return buffer.getvalue()


def _plain(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{clean(text)}" if text.startswith(("=", "+", "-", "@", "\t")) else clean(text)


def _numbers(record: RunRecord) -> Iterator[list[str]]:
    evaluation = record.evaluation or {}
    temperature = as_number(record.settings.get("sampling_temperature"))
    intervals = evaluation.get("intervals")
    for model in record.models:
        yield from _values(record, model, "", temperature, evaluation[model], span_table(intervals, model))
    suites = evaluation.get("suites")
    for name, suite in suites.items() if isinstance(suites, Mapping) else ():
        for model in MODELS:
            values = suite.get(model) if isinstance(suite, Mapping) else None
            if isinstance(values, Mapping):
                spans = span_table(suite.get("intervals"), model)
                yield from _values(record, model, _plain(str(name)), temperature, values, spans)
    if record.analysis is not None:
        model = "student" if record.is_pair else "after"
        for name, number, ends in analysis.numbers(record.analysis):
            span = ("", "") if ends is None else (repr(ends[0]), repr(ends[1]))
            yield [model, "", "", _plain(name), repr(number), *span, "", ""]
    if not isinstance(evaluation.get("sweep"), Mapping):
        return
    for model in record.models:
        for row in tradeoff.sweep_rows(record, model):
            at = as_number(row.get("sampling_temperature"))
            # What the model's own numbers say already is not said twice.
            known = {key for key in row if at == temperature and value_of(evaluation, model, key) is not None}
            values = {key: value for key, value in row.items() if key not in known}
            yield from _values(record, model, "", at, values, row.get("intervals"), swept=True)


def span_table(intervals: Any, model: str) -> Any:
    """The intervals of one model."""
    return intervals.get(model) if isinstance(intervals, Mapping) else None


def _values(
    record: RunRecord,
    model: str,
    suite: str,
    temperature: float | None,
    values: Mapping[str, Any],
    spans: Any,
    *,
    swept: bool = False,
) -> Iterator[list[str]]:
    shown_model = "student" if record.is_pair and model == "after" else model
    for metric in metrics_of(record.task).values():
        value = as_number(values.get(metric.key))
        if value is None or (swept and metric.of != "answers"):
            continue
        span = span_of(spans, metric.key) or (None, None)
        at = f"{temperature:g}" if temperature is not None and metric.of == "answers" else ""
        scaled = ["" if one is None else f"{one * metric.scale:.10g}" for one in (value, *span)]
        yield [shown_model, suite, at, metric.key, *scaled, metric.unit, metric.better]
