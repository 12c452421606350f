"""The page of a study: one HTML file that opens from disk, without a network. It draws verdicts and makes none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from drkl.display import ABSENT, number, shell_word
from drkl.evaluation.declared import Metric
from drkl.recipes import recipe_names
from drkl.reporting.plotting import Line, Picture
from drkl.reporting.tables import DIRECTIONS, Cell, Column, MetricTable, Row, RowGroup
from drkl.reporting.templating import page_environment
from drkl.reporting.text import clip, short
from drkl.studies import budgets, figures, words
from drkl.studies.cells import Verdict
from drkl.studies.curves import mean_of
from drkl.studies.definition import SEED, VARIANT
from drkl.studies.kinds import Kind, Names, has_one_teacher, key_of, kinds_of, metric_of, seeds_of
from drkl.studies.result import Study, show_p

LONGEST_MESSAGE = 1_500
"""Characters of the message of a cell that failed."""
DEFINITION_LIMIT = 20_000


@dataclass(frozen=True)
class Compared:
    """A comparison as the page shows it."""

    row: Verdict
    metric: Metric
    cell: str
    against: str
    picture: Picture | None = None

    @property
    def sign(self) -> str:
        """The sign beside the verdict."""
        return words.SIGNS[self.row.verdict]

    @property
    def title(self) -> str:
        """The metric inside a sentence."""
        return words.in_sentence(self.metric.title)

    @property
    def way(self) -> tuple[str, str] | None:
        """Which way is better, as an arrow and in words."""
        return DIRECTIONS[self.metric.better] if self.metric.better != "none" else None

    @property
    def t(self) -> str:
        """The magnitude of the t statistic, which has the sign of the distance from the ideal."""
        size = None if self.row.t is None else abs(self.row.t)
        return number(size, 1 if (size or 0) >= 100 else 2)

    @property
    def t_needed(self) -> str:
        """What |t| has to reach at most: a primary comparison may need less, after others are decided."""
        return ABSENT if self.row.t_needed is None else number(self.row.t_needed, 2)

    @property
    def p(self) -> str:
        """The p-value after Holm's correction."""
        return show_p(self.row.p_holm)

    @property
    def style(self) -> str:
        """The verdict as the name of a style."""
        return self.row.verdict.replace(" ", "-")

    @property
    def difference(self) -> str:
        """Mean over seeds, with its sign."""
        return words.show_difference(self.metric, self.row.difference, self.row.interval)

    @property
    def interval(self) -> str:
        """The t interval over seeds."""
        return words.show_ends(self.metric, self.row.difference, self.row.interval)

    @property
    def prompts(self) -> str:
        """The bootstrap interval over prompts."""
        return words.show_ends(self.metric, self.row.difference, self.row.prompts_interval)

    @property
    def unit(self) -> str:
        """The unit of a difference: those of per cent are points."""
        return "" if self.row.difference is None else {"%": "points", "nats": "nats"}.get(self.metric.unit, "")

    @property
    def goal(self) -> str:
        """What the distance is from, for a metric whose ideal is 0 or the teacher's value; empty for others."""
        known = {"zero": "0", "teacher": "the teacher’s"} if self.row.distance is not None else {}
        return known.get(self.metric.better, "")

    @property
    def distance(self) -> str:
        """How much further from its ideal the cell is than what it is compared with."""
        return words.show_with_ends(self.metric, *(self.row.distance or (None, None)))

    @property
    def to_decide(self) -> str:
        """The seeds that would decide it."""
        if self.row.verdict != "undecided":
            return "decided"
        return "not known" if self.row.seeds_needed is None else f"{self.row.seeds_needed:,}"


def as_html(study: Study) -> str:
    """The page as text; the curves are read from the eval.json of the cells."""
    kinds, task = kinds_of(study), study.task
    names, lines = Names(kinds), figures.lines_of(kinds)
    metrics = [metric_of(key, task) for key in _keys(study)]
    primary = [row for row in study.verdicts if not row.exploratory]
    title, outcome = words.headline(study, names, task)
    drawn = [line for line, kind in zip(lines, kinds, strict=False) if kind.evaluations]
    frontier = None if task == "classification" else figures.frontier(kinds, lines)
    template = page_environment("drkl.studies").get_template("study.html.j2")
    return template.render(
        study=study,
        facts=_facts(study, metrics),
        headline=(title, outcome),
        state=words.state(study),
        dated=words.dated(study),
        told=words.told(study, names, task),
        held=words.HELD,
        named=words.named(study),
        primary=[_compared(row, names, task, place) for place, row in enumerate(primary)],
        verdicts=_verdict_table(study, names, metrics, task),
        strips=_strips(kinds, metrics),
        numbers=_means(kinds, lines, metrics),
        lines=[*drawn, lines[-1]] if drawn else [],
        frontier=frontier,
        sweeps=figures.sweep_table(kinds) if frontier else None,
        reliability=[picture for _, picture in figures.reliability(kinds, lines)],
        scaled=figures.scaled_table(kinds, metrics),
        budget=budgets.table(kinds),
        unequal=budgets.unequal(study.verdicts, names),
        unknown=budgets.unknown(study),
        cost=budgets.cost(study, kinds),
        cost_picture=figures.costs(*budgets.timed(kinds)),
        troubles=[(cell, clip(cell.why, LONGEST_MESSAGE)) for cell in study.cells if cell.state != "done" and cell.why],
        unfinished=budgets.unfinished(study),
        not_compared=_not_compared(study, names, task),
        notes=study.notes,
        cells=budgets.every_cell(study),
        limits=words.limits(study),
        runs_before=_runs_before(study),
        file=shell_word(_file(study)),
        definition=clip(_as_yaml(study), DEFINITION_LIMIT),
        environment=budgets.environment(study, kinds),
    )


def _keys(study: Study) -> list[str]:
    """The metrics that are decided on, in the order of the study's file."""
    return list(dict.fromkeys([*study.definition.decide, *(row.metric for row in study.verdicts)]))


def _file(study: Study) -> str:
    """The study's file, as the command named it that began the study; else a name for the definition on the page."""
    command = study.made.get("command")
    words_of = [str(word) for word in command] if isinstance(command, list) else []
    named = [word for word in words_of if word.endswith((".yaml", ".yml")) and not word.startswith("-")]
    return named[0] if named else f"{study.definition.name}.yaml"


def _runs_before(study: Study) -> list[str]:
    """The shipped recipes whose runs the study's teachers come from."""
    models = [one.evaluation.settings.get("models") for one in study.cells if one.evaluation is not None]
    named = dict.fromkeys(
        Path(str(own["teacher"])).parts for own in models if isinstance(own, dict) and "teacher" in own
    )
    known = recipe_names()
    return [parts[1] for parts in named if parts[:1] == ("runs",) and known.keys() & parts[1:2]]


def _as_yaml(study: Study) -> str:
    asked = study.definition.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(asked, sort_keys=False, allow_unicode=True, width=100)


def _facts(study: Study, metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """The lines under the title: what is varied, how often, and what is decided."""
    asked, seeds = study.definition, seeds_of(study)
    rows = [("Base", asked.base)]
    for key, values in asked.axes.items():
        if key != SEED:
            rows.append((key, ", ".join(short(str(value)) for value in values)))
    if asked.variants:
        rows.append((VARIANT, ", ".join(short(name, 60) for name in asked.variants)))
    rows.append(("Seeds", ", ".join(map(str, seeds)) if seeds else "one, of the base"))
    rows.append(("Runs", str(len(study.cells))))
    rows.append(("Baseline", ", ".join(f"{key}={value}" for key, value in asked.baseline.items())))
    rows.append(("Decided on", ", ".join(words.in_sentence(metric.title) for metric in metrics)))
    return [(name, short(text, 600)) for name, text in rows]


def _compared(row: Verdict, names: Names, task: str, place: int | None = None) -> Compared:
    metric = metric_of(row.metric, task)
    picture = None if place is None else figures.difference(row, metric, place)
    return Compared(row, metric, *names.against(row.axes, row.baseline), picture)


@dataclass(frozen=True)
class VerdictTable:
    """A row for each metric, a column for each pair of kinds; None where there is no such comparison."""

    columns: list[tuple[str, str]]
    rows: list[tuple[Metric, str, str, list[Compared | None]]]


def _verdict_table(study: Study, names: Names, metrics: Sequence[Metric], task: str) -> VerdictTable | None:
    found = {
        (row.metric, key_of(row.axes), key_of(row.baseline)): _compared(row, names, task) for row in study.verdicts
    }
    pairs = list(dict.fromkeys(key[1:] for key in found))
    heads = [next((one.cell, one.against) for key, one in found.items() if key[1:] == pair) for pair in pairs]
    rows = []
    for metric in metrics:
        cells = [found.get((metric.key, *pair)) for pair in pairs]
        if any(cells):
            rows.append((metric, *DIRECTIONS[metric.better], cells))
    is_known = any(row.difference is not None for row in study.verdicts)
    return VerdictTable(heads, rows) if is_known else None


def _teacher(kinds: Sequence[Kind], key: str) -> float | None:
    """The teacher's value, mean over the cells that it was measured beside; None where these have different ones."""
    if not has_one_teacher(cell for kind in kinds for cell in kind.cells):
        return None
    values = [cell.teacher[key] for kind in kinds for cell in kind.cells if cell.teacher.get(key) is not None]
    mean = mean_of(values)
    return mean.value if mean else None


def _strips(kinds: Sequence[Kind], metrics: Sequence[Metric]) -> list[Picture]:
    pictures = [
        figures.strip(kinds, metric, _teacher(kinds, metric.key), place) for place, metric in enumerate(metrics)
    ]
    return [picture for picture in pictures if picture]


def _means(kinds: Sequence[Kind], lines: Sequence[Line], metrics: Sequence[Metric]) -> MetricTable | None:
    """The mean of every kind over its seeds, beside the teacher's value."""
    rows = []
    for metric in metrics:
        teacher = _teacher(kinds, metric.key)
        means = [mean_of(kind.values(metric.key)) for kind in kinds]
        shown = metric.fine_enough(teacher, *(mean.value for mean in means if mean))
        cells = [Cell(shown.show(teacher), teacher, style="of-teacher")]
        for mean in means:
            span = mean.interval if mean else None
            ends = f"{shown.show(span[0])} to {shown.show(span[1])}" if span else ""
            cells.append(Cell(shown.show(mean.value if mean else None), mean.value if mean else None, ends))
        if any(cell.value is not None for cell in cells[1:]):
            rows.append(Row(metric, *DIRECTIONS[metric.better], cells))
    columns = [Column("Teacher", sign=lines[-1].sign)]
    columns += [Column(line.title, sign=line.sign) for line in lines[:-1]]
    return MetricTable("Means over seeds", columns, [RowGroup("", "", rows)]) if rows else None


def _not_compared(study: Study, names: Names, task: str) -> list[tuple[str, str]]:
    """Why comparisons are not decided where it is not the interval that says so; those alike in one line."""
    by_why: dict[str, list[str]] = {}
    for row in study.verdicts:
        if row.why:
            one = _compared(row, names, task)
            by_why.setdefault(row.why, []).append(
                f"{one.cell} against {one.against}: {words.in_sentence(one.metric.title)}"
            )
    return [(short("; ".join(which), 400), why) for why, which in by_why.items()]
