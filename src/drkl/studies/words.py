"""What a study says in sentences: its state, its verdicts, its predictions and its limits. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from drkl.display import number
from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import Metric
from drkl.reporting.text import count, joined
from drkl.studies.cells import Foretold, Verdict
from drkl.studies.definition import Outcome, Prediction
from drkl.studies.grid import pair_of
from drkl.studies.kinds import Names, has_one_teacher, key_of, metric_of, seeds_of
from drkl.studies.result import Study, finer

SIGNS: dict[Outcome, str] = {"better": "✓", "worse": "✗", "no difference": "=", "undecided": "?"}
"""A sign beside each verdict, which is always written out too."""
_NAMES = ("Brier",)


def show_difference(metric: Metric, value: float | None, ends: Interval | None) -> str:
    """A difference with its sign, to the digits of it and its interval."""
    return finer(metric, value, ends).show(value, signed=True)


def show_ends(metric: Metric, value: float | None, ends: Interval | None) -> str:
    """The interval of a difference in words, to the digits of both; empty where there is none."""
    shown = finer(metric, value, ends)
    return f"{shown.show(ends[0], signed=True)} to {shown.show(ends[1], signed=True)}" if ends else ""


def show_with_ends(metric: Metric, value: float | None, ends: Interval | None) -> str:
    """A difference, and its interval in brackets where there is one."""
    shown = show_ends(metric, value, ends)
    return show_difference(metric, value, ends) + (f" ({shown})" if shown else "")


def in_sentence(title: str) -> str:
    """A metric's title inside a sentence; names keep their capital.

    >>> in_sentence("Reverse KL"), in_sentence("Top-token agreement"), in_sentence("Distinct-2"), in_sentence("ROUGE-L")
    ('reverse KL', 'top-token agreement', 'Distinct-2', 'ROUGE-L')
    """
    first = title.split(" ")[0]
    is_word = first.replace("-", "").isalpha() and first[1:].islower() and first not in _NAMES
    return title[:1].lower() + title[1:] if is_word else title


def state(study: Study) -> str:
    """How many runs are finished, and what the others do."""
    counts = Counter(cell.state for cell in study.cells)
    total, done = len(study.cells), counts.pop("done", 0)
    if not counts:
        return f"All {total} runs are finished." if total > 1 else "Its only run is finished." if total else "No runs."
    other = [f"{many} {'is' if many == 1 else 'are'} {state}" for state, many in counts.items() if state != "failed"]
    failed = [f"{counts['failed']} failed"] if counts["failed"] else []
    return f"{done} of {count(total, 'run')} {'is' if done == 1 else 'are'} finished; {joined([*failed, *other])}."


def headline(study: Study, names: Names, task: str) -> tuple[str, str]:
    """A title and the outcome of the primary comparisons in words."""
    primary = [row for row in study.verdicts if not row.exploratory]
    if not any(cell.state == "done" for cell in study.cells):
        return "Not run yet", "No run has finished, so there is nothing to compare."
    if not primary:
        return "Nothing primary", "The study’s file names no primary comparison, so all that follows is exploratory."
    words = [sentence for verdict in ("better", "worse") for sentence in _decided(study, verdict, names, task)]
    for row in primary:
        if row.verdict == "no difference":
            cell, other = names.against(row.axes, row.baseline)
            words.append(
                f"{cell} and {other} differ in {_title(row, task)} by less than "
                f"{_smallest(study, row, task)}{_in_seeds(row.seeds, study)}."
            )
    undecided = sum(row.verdict == "undecided" for row in primary)
    if undecided == len(primary):
        each = "The only primary comparison is" if undecided == 1 else f"All {undecided} primary comparisons are"
        return "What came out", f"{each} undecided."
    rest = f"{undecided} of the {len(primary)} primary comparisons {'is' if undecided == 1 else 'are'} undecided."
    return "What came out", " ".join([*words, rest] if undecided else words)


def _smallest(study: Study, row: Verdict, task: str) -> str:
    metric, size = metric_of(row.metric, task), study.definition.smallest_difference.get(row.metric)
    unit = {"%": " points", "nats": " nats"}.get(metric.unit, "")
    return "matters" if size is None else f"{size * metric.scale:g}{unit}"


def _title(row: Verdict, task: str) -> str:
    return in_sentence(metric_of(row.metric, task).title)


def _decided(study: Study, verdict: str, names: Names, task: str) -> list[str]:
    """One sentence for each pair of kinds of which one is better, or worse, in some metrics by as many seeds."""
    by_pair: dict[tuple[str, str, int], list[str]] = {}
    for row in study.verdicts:
        if not row.exploratory and row.verdict == verdict:
            by_pair.setdefault((*names.against(row.axes, row.baseline), row.seeds), []).append(_title(row, task))
    return [
        f"{cell} is {verdict} than {other} in {joined(by)}{_in_seeds(seeds, study)}."
        for (cell, other, seeds), by in by_pair.items()
    ]


def _in_seeds(seeds: int, study: Study) -> str:
    """In how many of the study's seeds, where not in all."""
    every = len(seeds_of(study))
    return f", by {seeds} of {every} seeds" if seeds < every else ""


def moment(value: Any) -> datetime | None:
    """A time as ISO 8601 writes it; one without a zone is taken for UTC."""
    try:
        read = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).astimezone(UTC)


def show_moment(value: Any) -> str:
    """The time to the minute; a text that is no time is left as it is."""
    read = moment(value)
    return read.strftime("%Y-%m-%d %H:%M UTC") if read else str(value)


@dataclass(frozen=True)
class Dated:
    """When the predictions were written, and whether that was before the runs."""

    facts: list[tuple[str, str]]
    text: str
    is_doubtful: bool


def dated(study: Study) -> Dated:
    """What git says of the study's file, beside the start of the first cell."""
    facts = []
    known = study.predicted or {}
    if known.get("commit"):
        facts.append(("In commit", str(known["commit"])[:12]))
    if known.get("date"):
        facts.append(("Committed", show_moment(known["date"])))
    if study.began:
        facts.append(("First run began", show_moment(study.began)))
    if not known.get("commit"):
        text = "The study’s file is in no commit, so nothing shows that it was written before the runs."
        if study.predicted is None:
            text = (
                "Git could not say when the study’s file was committed, so nothing shows that it was before the runs."
            )
        return Dated(facts, text, True)
    written, began = moment(known.get("date")), moment(study.began)
    if known.get("is_changed"):
        text = "The study’s file was changed after that commit: what it says now is not what was committed."
        return Dated(facts, text, True)
    if written is None or began is None:
        return Dated(facts, "No run has begun yet." if study.began is None else "", False)
    if written > began:
        text = "The last commit of the study’s file is later than the start of the first run"
        return Dated(facts, f"{text}{_known_at(written, study)}.", True)
    return Dated(facts, "They were committed before the first run began, and not changed since.", False)


def _known_at(written: datetime, study: Study) -> str:
    """How many runs had begun when the predictions were committed, and how many of these are of other studies."""
    earlier = [cell for cell in study.cells if (began := moment(cell.began)) is not None and began < written]
    if not earlier:
        return ""
    taken = sum(study.is_taken(cell) for cell in earlier)
    of = f", {'all' if taken == len(earlier) else taken} of them from other studies" if taken else ""
    return f": {len(earlier)} of {count(len(study.cells), 'run')} had begun{of}"


def named(study: Study) -> str:
    """Whether the primary comparisons were named before the runs."""
    if "primary" in study.changed:
        return "They were changed after the first run had begun, as the notes below say."
    known = dated(study)
    if not known.is_doubtful and known.text:
        return "These were named before the runs, and they alone decide."
    return "The study’s file names these, and they alone decide; nothing shows that it did so before every run."


@dataclass(frozen=True)
class Told:
    """A prediction, what came out, and whether it held: ``yes``, ``no``, ``undecided`` or ``words``."""

    text: str
    expected: str
    came_out: str
    held: str


HELD = {"yes": "Held", "no": "Did not hold", "undecided": "Undecided", "words": "In words alone"}


def told(study: Study, names: Names, task: str) -> list[Told]:
    """The predictions in the order of the study's file."""
    return [_told(one, study, names, task) for one in study.predictions]


def _told(one: Foretold, study: Study, names: Names, task: str) -> Told:
    asked = one.prediction
    if asked.metric is None or one.unanswered:
        return Told(asked.text, "", one.unanswered or "", "words")
    metric = metric_of(asked.metric, task)
    row = _row_of(asked, study)
    pair = names.against(row.axes, row.baseline) if row else (names.of(asked.cell), names.of(asked.against))
    against = f" against {pair[1]}" if row or asked.against else ""
    expected = f"{pair[0]}{against}: {asked.expect} in {in_sentence(metric.title)}"
    held = "undecided" if one.came_true is None else "yes" if one.came_true else "no"
    if row is None or row.difference is None:
        why = (row.why if row else None) or "There is no such comparison yet."
        return Told(asked.text, expected, f"{(one.verdict or 'undecided').capitalize()}. {why}", held)
    numbers = f"difference {show_with_ends(metric, row.difference, row.interval)}"
    kind = "exploratory" if row.exploratory else "primary"
    came = f"{(one.verdict or row.verdict).capitalize()}: {numbers}, {count(row.seeds, 'seed')}, {kind}."
    return Told(asked.text, expected, came, held)


def _row_of(asked: Prediction, study: Study) -> Verdict | None:
    """The comparison that a prediction is about; None where its settings do not say which."""
    try:
        pair = pair_of(study.definition, asked.cell, asked.against or study.definition.baseline)
    except DrklError:
        return None
    wanted = (asked.metric, *map(key_of, pair))
    rows = [row for row in study.verdicts if (row.metric, key_of(row.axes), key_of(row.baseline)) == wanted]
    return rows[0] if rows else None


def limits(study: Study) -> list[str]:
    """What the verdicts do not say, each in a sentence or two."""
    rows, every = study.verdicts, len(seeds_of(study))
    seeds = max((row.seeds for row in rows), default=0)
    primary = [row for row in rows if not row.exploratory]
    exploratory = [row for row in rows if row.exploratory]
    said = [
        "The intervals of the differences are t intervals over seeds: they hold the held-out rows and prompts fixed. "
        "Other prompts could give other differences.",
        "The bootstrap intervals over prompts, beside them, hold the seeds fixed: they say what other prompts would "
        "change, not what other seeds would. No interval here covers both.",
    ]
    if seeds < 2:
        there = "There are fewer than two seeds" if every < 2 else "No comparison has two seeds yet"
        said.append(f"{there}, so nothing is decided: what one seed gives, another may undo.")
    else:
        said.append(
            f"There are {seeds} seeds. That few decide only differences that are large beside what a seed changes; "
            "“undecided” is no sign that two objectives are equal. The seeds that would decide are named as if mean "
            "and spread stayed as they are: about half of all studies of so many seeds decide."
        )
    if fewer := sum(0 < row.seeds < every for row in rows):
        said.append(
            f"{count(fewer, 'comparison')} {'has' if fewer == 1 else 'have'} fewer pairs than the study has seeds. "
            "Where a run failed, or has no number of a metric, leaving its seed out favours the side that failed."
        )
    said += _cost_of_holm(primary, exploratory)
    if study.has_more_seeds:
        said.append(
            "Seeds were added after the first run had begun. If that was for what the first of them showed, "
            "differences are found by chance more often than these p-values and intervals say."
        )
    if exploratory:
        text = (
            f"{count(len(exploratory), 'comparison')} {'is' if len(exploratory) == 1 else 'are'} exploratory, without "
        )
        known = [row for row in exploratory if row.p is not None and metric_of(row.metric, study.task).better != "none"]
        by_chance = number(0.05 * len(known), 1)
        more = f": if nothing differed at all, about {by_chance} would still be called better or worse" if known else ""
        said.append(f"{text}a correction{more}.")
    if not has_one_teacher(study.cells):
        said.append(
            "The teacher is not the same in all cells, or was not measured on the same rows: each verdict is by the "
            "cell’s own, and what is of all cells together shows none."
        )
    if not study.definition.smallest_difference:
        said.append("No smallest difference was set, so “no difference” is never said.")
    said.append("All of this is of one recipe: its teacher, its student, its data and its budget.")
    return said


def _cost_of_holm(primary: Sequence[Verdict], exploratory: Sequence[Verdict]) -> list[str]:
    needed = [row.t_needed for row in primary if row.t_needed is not None]
    if not needed or len(primary) < 2:
        return []
    text = (
        f"Holm’s correction over {count(len(primary), 'primary comparison')} keeps the chance of any false “better” or "
        f"“worse” among them at 5\N{NO-BREAK SPACE}%, if the number of seeds was fixed before anything was looked at. "
        f"It has its price: |t| has to reach {number(max(needed), 1)} at worst"
    )
    alone = {row.seeds: row.t_needed for row in exploratory if row.t_needed is not None}
    worst = next(row for row in primary if row.t_needed == max(needed))
    if worst.seeds in alone:
        text += f", where one comparison by itself needs {number(alone[worst.seeds], 1)}"
    return [f"{text}, at {count(worst.seeds, 'seed')}."]
