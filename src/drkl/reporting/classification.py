"""What the page of a classification run has of its own: the answer, the calibration, the texts that went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.display import as_number, number
from drkl.reporting.answer import Answer, Point, run_labels, unevaluated
from drkl.reporting.metrics import Metric, metrics_of, value_of
from drkl.reporting.plotting import COLORS, Picture, new_figure, plot_style, tidy, to_svg
from drkl.reporting.profiles import reliability, reliability_tables
from drkl.reporting.record import RunRecord
from drkl.reporting.tables import interval_of
from drkl.reporting.text import Clipped, clip, count, percent, short

CLOSE = 0.02
"""Of the teacher's accuracy: a student that loses no more is called as good as can be asked of it."""
ROWS = 12
TEXT_LIMIT = 400
METRICS = metrics_of("classification")


@dataclass(frozen=True)
class Said:
    """A model's class for a text, and how sure it is."""

    name: str
    confidence: str
    right: bool


@dataclass(frozen=True)
class Prediction:
    """One text of the table; ``said`` is in the order of the table's models."""

    text: Clipped
    label: str
    said: list[Said]


@dataclass(frozen=True)
class PredictionTable:
    """Texts of one kind."""

    title: str
    lead: str
    models: list[str]
    rows: list[Prediction]


def answer(record: RunRecord, others: Sequence[RunRecord] = ()) -> Answer:
    """What a classification run shows, in words."""
    if record.evaluation is None:
        return unevaluated(record)
    points = [_calibration(record), _confusions(record), _two_classes(record)]
    points += [_comparison([record, *others])] if others else []
    points.append(_trust(record))
    found = [point for point in points if point is not None]
    accuracy, teacher = (_get(record, model, "accuracy") for model in ("after", "teacher"))
    steps = f"After {count(record.num_steps, 'step')}" if record.num_steps else "After training"
    if accuracy is None:
        return Answer("No result", "The evaluation holds no number for the trained student.", points=found)
    text = f"{steps} the student names the right class for {_exact(record, 'accuracy')} of the held-out texts"
    if teacher is None:
        before = _get(record, "before", "accuracy")
        text += (
            f", against {percent(before)} before training" if before is not None else ""
        ) + ". There was no teacher."
        if before is None:
            return Answer(f"{percent(accuracy)} right", text, "neutral", found)
        better = accuracy - before > 0.01
        return Answer("Better" if better else "No better", text, "good" if better else "bad", found)
    text += f", its teacher for {percent(teacher)}."
    if (agreement := _get(record, "after", "agreement")) is not None:
        text += f" The two name the same class for {percent(agreement)}."
    behind = round(teacher - accuracy, 4)
    if behind <= CLOSE:
        verdict = "Within 2 points of its teacher" if behind > -CLOSE else "Better than its teacher"
        return Answer(verdict, text, "good", found)
    return Answer(f"{number(100 * behind, 1)} points behind its teacher", text, "bad", found)


def distributions(record: RunRecord) -> list[Picture]:
    """The reliability diagram, and how often each confidence occurs; student against teacher."""
    tables = reliability_tables(record)
    with plot_style():
        diagram = reliability(record)
        return [diagram, _confidence_picture(record, tables)] if diagram else []


def prediction_tables(record: RunRecord) -> list[PredictionTable]:
    """The texts where student and teacher differ, and those whose label the student finds least likely."""
    has_teacher = any("teacher" in row for row in record.predictions)
    models = ["student", "teacher"] if has_teacher else ["student"]
    tables = []
    differ = [row for row in record.predictions if has_teacher and row.get("student") != row.get("teacher")]
    if differ:
        differ.sort(key=lambda row: -(as_number(row.get("student_confidence")) or 0.0))
        right = Counter(who for row in differ for who in models if row.get(who) == row.get("label"))
        lead = (
            f"They differ on {len(differ):,} of {len(record.predictions):,} texts; of these the teacher is right on "
            f"{right['teacher']:,}, the student on {right['student']:,}. First those of which the student is surest."
        )
        tables.append(_table("Where student and teacher differ", lead, models, differ))
    wrong = [row for row in record.predictions if row.get("student") != row.get("label")]
    if wrong:
        wrong.sort(key=lambda row: -(as_number(row.get("nll")) or 0.0))
        lead = (
            f"The student is wrong on {len(wrong):,} of {len(record.predictions):,} texts. First those to whose label "
            "it gives the least; a label in the data may be the mistake."
        )
        tables.append(_table("The hardest texts", lead, models, wrong))
    return tables


def _table(title: str, lead: str, models: list[str], rows: Sequence[Mapping[str, Any]]) -> PredictionTable:
    shown = []
    for row in rows[:ROWS]:
        said = [
            Said(
                short(str(row.get(who)), 60),
                percent(as_number(row.get(f"{who}_confidence")), 0),
                row.get(who) == row.get("label"),
            )
            for who in models
        ]
        shown.append(Prediction(clip(str(row.get("text", "")), TEXT_LIMIT), short(str(row.get("label")), 60), said))
    more = f" {len(rows) - ROWS:,} more are in `predictions.jsonl`." if len(rows) > ROWS else ""
    return PredictionTable(title, lead + more, models, shown)


def _get(record: RunRecord, model: str, key: str) -> float | None:
    return value_of(record.evaluation, model, key)


def _exact(record: RunRecord, key: str) -> str:
    metric = METRICS[key]
    shown = percent(_get(record, "after", key)) if metric.unit == "%" else metric.show(_get(record, "after", key))
    interval = interval_of(record, "after", metric)
    return f"{shown} ({interval})" if interval else shown


def _calibration(record: RunRecord) -> Point | None:
    ece, gap = (_get(record, "after", key) for key in ("ece", "calibration_gap"))
    if ece is None or gap is None:
        return None
    word = "surer" if gap > 0 else "less sure"
    verdict = "It is about as sure as it is right" if abs(gap) < 0.01 else f"It is {word} than it is right"
    text = f"{verdict}: mean confidence minus accuracy is {number(gap, 3, signed=True)}, its calibration error "
    text += f"{_exact(record, 'ece')}."
    teacher_ece, teacher_gap = (_get(record, "teacher", key) for key in ("ece", "calibration_gap"))
    if teacher_ece is not None and teacher_gap is not None:
        text += f" The teacher's are {number(teacher_gap, 3, signed=True)} and {number(teacher_ece, 3)}."
    if (against := _get(record, "after", "confidence_gap")) is not None:
        side = "above" if against > 0 else "below"
        text += f" Its mean confidence is {number(abs(against), 3)} {side} the teacher's."
    return Point("Is the student overconfident?", text)


def _confusions(record: RunRecord) -> Point | None:
    pairs = Counter(
        (short(str(row.get("label")), 40), short(str(row.get("student")), 40))
        for row in record.predictions
        if row.get("label") != row.get("student")
    )
    if not pairs:
        return None
    shown = "; ".join(f"{label} as {said} ({times})" for (label, said), times in pairs.most_common(3))
    return Point("What does it mix up most?", f"{shown}.")


def _two_classes(record: RunRecord) -> Point | None:
    classes = (record.evaluation or {}).get("classes")
    if not isinstance(classes, list) or len(classes) != 2 or record.objective not in ("drkl", "dkd"):
        return None
    return Point(
        "Two classes?",
        "Then the tail is one class and its divergence K is 0: every unskewed drkl equals rkl here, so this run cannot "
        "show what decoupling does.",
    )


def _comparison(records: Sequence[RunRecord]) -> Point:
    labels = run_labels(records)
    parts = []
    for key, name in (("accuracy", "Accuracy"), ("ece", "calibration error"), ("agreement", "agreement")):
        values = [(label, _get(record, "after", key)) for label, record in zip(labels, records, strict=True)]
        shown = [f"{label} {_shown(METRICS[key], value)}" for label, value in values if value is not None]
        if shown:
            parts.append(f"{name}: {', '.join(shown)}")
    text = "; ".join(parts) + "." if parts else "The runs have no number in common."
    return Point("And the runs next to each other?", text)


def _shown(metric: Metric, value: float) -> str:
    return metric.show(value) + ("\N{NO-BREAK SPACE}%" if metric.unit == "%" else "")


def _trust(record: RunRecord) -> Point:
    rows = _get(record, "after", "num_rows")
    basis = "one training seed" if rows is None else f"{count(rows, 'held-out text')} and one training seed"
    return Point(
        "How far to trust this?",
        f"The numbers rest on {basis}. The intervals say what other texts would change, not what another seed would.",
    )


def _confidence_picture(record: RunRecord, tables: Mapping[str, Any]) -> Picture:
    figure, ax = new_figure(356, 300)
    tidy(ax)
    for model in ("teacher", "after"):
        if model not in tables:
            continue
        rows = [row[1] for row in tables[model]]
        edges = [*(row[0] for row in tables[model]), 1.0]
        style: dict[str, Any] = {"color": COLORS[model], "linewidth": 2}
        if model == "teacher":
            style = {"facecolor": COLORS[model], "edgecolor": COLORS[model], "fill": True, "alpha": 0.16}
        ax.stairs([100 * value / sum(rows) for value in rows], edges, **style)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, None)
    ax.set_xlabel("confidence (max q)")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    shown = ", ".join(
        f"{record.titles[model]} {METRICS['confidence'].show(_get(record, model, 'confidence'))}"
        for model in ("teacher", "after") if model in tables
    )  # fmt: skip
    alt = f"Histogram of confidence over held-out texts. Means: {shown}."
    caption = "share of held-out texts" + ("; the teacher is filled" if "teacher" in tables else "")
    return Picture(to_svg(figure, "confidence", alt), "Probability of the top class", caption, alt)
