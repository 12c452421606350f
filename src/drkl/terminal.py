"""The output of the command line: progress bars and tables, none of which is obeyed by a terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from drkl.analysis.topk import TopKProbe
    from drkl.data.survey import Survey
    from drkl.evaluation.bootstrap import Estimate
    from drkl.evaluation.findings import Finding
    from drkl.evaluation.result import Evaluation
    from drkl.reporting.tables import PlainTable
    from drkl.studies.running import Listener as StudyListener
    from drkl.studies.running import Now
    from drkl.training.run import Listener

ON_ANSWERS = ("rollout_loss", "rollout_finished", "rollout_length")
"""Held-out numbers of the student's own answers that are printed."""
BAR = 40
"""Characters of the longest bar of a histogram."""
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls but for tabs and line breaks
    "\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f"  # what reorders or hides other text
    "\ud800-\udfff]"  # halves of a character, which cannot be written
)
WIDE = 120
"""Characters of a terminal that has room for a long progress bar and the numbers beside it."""


class TrainingProgress:
    """A progress bar for the stage that runs, and a line for every held-out loss."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self._console = screen()
        whole, wrapped = Column(no_wrap=True), Column(no_wrap=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(40 if self._console.width >= WIDE else 10, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            # Into lines, where a terminal is narrow.
            TextColumn("{task.fields[numbers]}", markup=False, table_column=wrapped),
            console=self._console,
        )
        self._task: Any = None
        self._fill: Any = None
        self._rows: dict[str, tuple[Any, float]] = {}
        self._last_heldout: Any = None

    def __enter__(self) -> Listener:
        from drkl.training.run import Listener

        self._progress.__enter__()
        return Listener(self._say, self._on_stage, self._on_progress, self._on_fill, self._on_rows)

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _on_stage(self, spec: Any, number: int, of: int) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
        name = spec.folder.name if of == 1 or number < of else f"{spec.folder.name} (last stage)"
        label = f"{name}: {spec.objective.name}"
        self._task = self._progress.add_task(printable(label), total=spec.training.max_steps, numbers="")

    def _on_fill(self, done: int, of: int) -> None:
        if self._fill is None:
            self._fill = self._progress.add_task("the teacher reads", total=of, numbers="")
        self._progress.update(self._fill, completed=done)

    def _on_rows(self, what: str, done: int, of: int) -> None:
        if what not in self._rows:
            self._rows[what] = self._progress.add_task(printable(what), total=of or None, numbers=""), time.monotonic()
        task, started = self._rows[what]
        seconds = time.monotonic() - started
        rate = f"{done / seconds:,.0f} rows/s" if seconds > 1 else ""
        self._progress.update(task, completed=done, total=of or None, numbers=rate)

    def _on_progress(self, step: int, of: int, newest: dict[str, float]) -> None:
        texts = [
            f"{key} {newest[key]:.3f}"
            for key in ("loss", "fkl", "rkl", "rollout_rkl", "rollout_finished")
            if key in newest
        ]
        if "tokens_per_second" in newest:
            texts.append(f"{newest['tokens_per_second']:.0f} tokens/s")
        if "to_write" in newest:
            texts.append(f"writing answers {newest['written']:.0f} of {newest['to_write']:.0f}")
        self._progress.update(self._task, completed=step, total=of, numbers="  ".join(texts))
        heldout = (step, newest.get("eval_loss"))
        if "eval_loss" in newest and heldout[1] != (self._last_heldout or (0, None))[1]:
            self._last_heldout = heldout
            keys = ("loss", "fkl", "rkl", "agreement", "student_entropy", "teacher_entropy", *ON_ANSWERS)
            numbers = "  ".join(f"{k} {newest[f'eval_{k}']:.3f}" for k in keys if f"eval_{k}" in newest)
            self._say(f"  step {step}: held-out {numbers}")


class StudyProgress:
    """A bar for the cells of a study, and one for each that runs; a line for what has happened."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
        self._progress = Progress(*columns, console=screen())
        self._progress.disable = not self._progress.console.is_terminal
        self._cells: Any = None
        self._tasks: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> StudyListener:
        from drkl.studies.running import Listener

        self._progress.__enter__()
        return Listener(self._say, self._on_progress)

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)

    def _say(self, text: str) -> None:
        if self._progress.disable:
            say(text, flush=True)  # into a log, at once
        else:
            self._progress.console.print(text, markup=False)

    def _on_progress(self, now: Now) -> None:
        if self._cells is None:
            self._cells = self._progress.add_task("cells", total=now.of, note="")
        left = "" if now.seconds_left is None else f"{now.seconds_left / 3600:.1f} h left"
        failed = f"{now.failed} failed" if now.failed else ""
        self._progress.update(self._cells, completed=now.done, note=", ".join(filter(None, (failed, left))))
        running = {(name, what): (step, of) for name, what, step, of in now.running}
        for gone in self._tasks.keys() - running.keys():
            self._progress.remove_task(self._tasks.pop(gone))
        for (name, what), (step, of) in running.items():
            total = of if what == "train" else None
            if (name, what) not in self._tasks:
                self._tasks[name, what] = self._progress.add_task(printable(f"{name}: {what}"), total=total, note="")
            self._progress.update(self._tasks[name, what], completed=step)


@contextmanager
def progress_bars(stream: TextIO | None = None) -> Iterator[Any]:
    """A bar for every part of the work, with the time it took and the time it will take."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    progress = Progress(*columns, console=screen(stream))
    progress.disable = not progress.console.is_terminal
    with progress:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(printable(what), total=total)
            progress.update(tasks[what], completed=done)
            if done >= total and not progress.console.is_terminal:  # a log shows no bars before the end
                say(f"{what}: done", flush=True, file=stream)

        yield on_progress


def print_evaluation(evaluation: Evaluation) -> None:
    """Every metric of every model, the sweep, the suites, and the findings."""
    from rich.table import Table

    from drkl.evaluation.declared import metrics_of

    metrics, models = metrics_of(evaluation.task), evaluation.models
    console = screen()
    table = Table("metric", *models)
    for key, metric in metrics.items():
        values = [evaluation.value(model, key) for model in models]
        if any(value is not None for value in values):
            table.add_row(key, *(metric.show(value) for value in values))
    console.print(table)
    keys = ("rouge_l", "rouge_l_best", "distinct_2", "self_bleu", "repetition")
    if evaluation.sweep:
        swept = Table("sampling temperature", "model", *keys)
        for model, points in evaluation.sweep.items():
            for point in points:
                cells = (metrics[key].show(point.values.get(key)) for key in keys)
                swept.add_row(f"{point.sampling_temperature:g}", model, *cells)
        console.print(swept)
    if evaluation.suites:
        keys = ("rouge_l", "rkl", "fkl", "agreement", "entropy")
        per_suite = Table("suite", "model", *keys)
        for suite, numbers in evaluation.suites.items():
            for model in models:
                per_suite.add_row(suite, model, *(metrics[key].show(numbers.value(model, key)) for key in keys))
        console.print(per_suite)
    if evaluation.scaling is not None:
        console.print(
            f"scaled: the student, {evaluation.scaling.words}. {evaluation.scaling.note}".rstrip(), markup=False
        )
    if note := evaluation.settings.get("teacher_note"):
        console.print(note, markup=False)
    if unanswered := (evaluation.settings.get("data") or {}).get("no_room_for_an_answer"):
        console.print(f"{unanswered} prompts leave no room for an answer in the models' context: none was sampled.")
    print_findings(evaluation.findings)


def print_findings(findings: Iterable[Finding]) -> None:
    """Each question with its answer and the numbers that decide it; what does not apply is left out."""
    console = screen()
    for finding in findings:
        if finding.answer != "not_applicable":
            console.print(f"\n{finding.question} {finding.answer.capitalize()}.", markup=False, style="bold")
            console.print(finding.text, markup=False)
    console.print()


def print_side_by_side(answers: dict[str, list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*answers, show_lines=True)
    for texts in zip(*answers.values(), strict=True):
        table.add_row(*(Text(printable(text)) for text in texts))
    screen().print(table)


def printable(text: str) -> str:
    """A text without what a terminal would obey: control sequences, overrides of the direction of writing."""
    return _OBEYED.sub("\ufffd", text)


def say(*parts: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Print, whoever wrote the text: a file's name, a row of data and an answer may all hold control sequences."""
    stream = sys.stdout if file is None else file
    stream.write(printable(" ".join(map(str, parts))) + end)
    if flush:
        stream.flush()


def guard() -> None:
    """Let warnings, and the traceback of a fault of drkl's own, pass through `say` too."""

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    def show(*error: Any) -> None:
        say("".join(traceback.format_exception(*error)), end="", file=sys.stderr)

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Printable())
    sys.excepthook = show


def screen(stream: TextIO | None = None) -> Console:
    """A console that shows every text as it is: brackets are no markup, and no control sequence is obeyed."""
    from rich.console import Console
    from rich.text import Text

    class Screen(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            plain = settings | {"markup": False, "emoji": False, "highlight": False}
            return super().render_str(printable(text), **plain)

    return Screen(file=stream, highlight=False)


def print_toy(ends: Sequence[Any]) -> None:
    """The end point of each objective, a table for each setting."""
    from rich.table import Table

    metrics = ("q_t", "p_t", "entropy", "agreement", "fkl", "rkl", "tvd")
    for name in dict.fromkeys(end["setting"] for end in ends):
        table = Table("objective", "gamma", *metrics, title=name)
        for end in ends:
            if end["setting"] == name:
                gamma = "" if end["gamma"] == "" else f"{end['gamma']:g}"
                table.add_row(end["objective"], gamma, *(f"{end[key]:.3f}" for key in metrics))
        screen().print(table)


def print_analysis(findings: Iterable[Finding], pushes: PlainTable) -> None:
    """The findings, and every objective's pushes."""
    from rich.table import Table

    print_findings(findings)
    table = Table(*pushes.head, title="Pushes: gradients on the logit of the teacher's top token; negative raises it")
    for row in pushes.rows:
        table.add_row(*(cell if isinstance(cell, str) else cell[0] for cell in row))  # the intervals are in the file
    screen().print(table)


def print_probe(probe: TopKProbe) -> None:
    """What each k keeps: of the teacher's mass, of every objective's value, and of its gradient's direction."""
    from rich.table import Table

    from drkl.analysis.topk import percent

    def cell(estimate: Estimate, show: Callable[[float], str]) -> str:
        if estimate.value is None:
            return "-"
        ends = "" if estimate.interval is None else f" ({show(estimate.interval[0])} to {show(estimate.interval[1])})"
        return (show(estimate.value) + ends).replace(" %", "")

    console = screen()
    console.print(
        f"{probe.positions:,} positions of {probe.rows:,} rows, {probe.vocab_size:,} tokens. Student: {probe.student}. "
        "In brackets 95 % intervals over rows.",
        markup=False,
    )
    several = len({objective.temperature for objective in probe.objectives}) > 1
    masses = Table("k", "bytes a position", "mass, %", "mass of the tail, %", title="Kept of the teacher")
    for kept in probe.masses:
        name = f"{kept.k} at T = {kept.temperature:g}" if several else str(kept.k)
        masses.add_row(name, f"{kept.bytes_per_position:,}", cell(kept.mass, percent), cell(kept.tail_mass, percent))
    masses.add_row("hidden states", f"{probe.hidden_bytes:,}", percent(1.0)[:-2], percent(1.0)[:-2])
    console.print(masses)
    ks = list(dict.fromkeys(kept.k for kept in probe.masses))
    shares = Table("objective", "nats", *(f"k = {k}" for k in ks), title="Kept of the value, %")
    angles = Table("objective", *(f"k = {k}" for k in ks), title="Angle to the exact gradient on the logits, degrees")
    for one in probe.objectives:
        name = f"{one.name} at T = {one.temperature:g}" if several else one.name
        name += " (this run)" if one.own and not one.name.startswith("this run") else ""
        name += " (approximation)" if one.on_classes == "approximation" else ""
        if one.reason is not None:
            console.print(f"{name} cannot be had from k tokens and the rest: {one.reason}", markup=False)
            continue
        nats = "-" if one.value.value is None else f"{one.value.value:.3g}"
        shares.add_row(name, nats, *(cell(one.kept[k].share, percent) for k in ks))
        angles.add_row(name, *(cell(one.kept[k].angle, "{:.2f}".format) for k in ks))
    console.print(shares)
    console.print(angles)
    for sentence in probe.advice():
        console.print(sentence, markup=False)


def print_memory(stages: Sequence[dict[str, Any]]) -> None:
    """The memory of each stage of an estimate as a table, in lines that yaml takes for comments."""
    from drkl.training.memory import Memory

    for stage in stages:
        memory = Memory.from_json(stage["memory"])
        about = f"{memory.processes} process{'es' if memory.processes > 1 else ''}, {memory.device}"
        lines = [f"Memory of {stage['name']}, predicted ({about})", *memory.table().splitlines()]
        say("\n".join(["", *(f"# {line}" for line in [*lines, stage["memory"]["advice"], *memory.notes])]))


def print_surveys(surveys: Sequence[Survey], tokenizer: Any, console: Console | None = None) -> None:
    """Print what sources hold: counts, histograms of lengths, and a row with its trained tokens in colour.

    Where the console has no colour, marks stand around them.
    """
    from rich.table import Table
    from rich.text import Text

    console = screen() if console is None else console
    for survey in surveys:
        console.print(Text(f"\n{printable(survey.name)} ({survey.share})", style="bold"))
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in survey.facts:
            table.add_row(Text(printable(name)), Text(printable(value), justify="right"))
        console.print(table)
        for note in survey.report.notes:
            console.print(Text(printable(note)))
        for name, lengths in survey.lengths.items():
            _print_histogram(name, lengths, console)
        if survey.share == "training" or survey.classes is not None:
            _print_row(survey, tokenizer, console)


def _print_histogram(name: str, lengths: Sequence[int], console: Console) -> None:
    from rich.table import Table

    from drkl.data.survey import histogram

    table = Table(f"{name} tokens", "rows", "", box=None, pad_edge=False)
    bins = histogram(lengths)
    most = max(count for *_, count in bins)
    block = "█" if _is_utf(console) else "#"
    for low, high, count in bins:
        bar = block * max(round(BAR * count / most), int(count > 0))
        table.add_row(str(low) if low == high else f"{low} to {high}", f"{count:,}", bar)
    console.print(table)


def _print_row(survey: Survey, tokenizer: Any, console: Console) -> None:
    from rich.text import Text

    from drkl.data.survey import pieces_of

    row = survey.rows[0]
    colour = console.color_system is not None and not console.no_color
    before, after = ("", "") if colour else ("⟦", "⟧") if _is_utf(console) else ("[[", "]]")
    where = "in colour" if colour else f"between {before} and {after}"
    name = f"row {printable(row.id)}"
    text = Text(f"{name}: " if survey.classes else f"{name}, the trained tokens {where}:\n")
    for piece, trained in pieces_of(row, tokenizer):
        content = f"{before}{printable(piece)}{after}" if trained else printable(piece)
        text.append(content, "bold green" if trained else "" if survey.classes else "dim")
    if survey.classes:
        text.append(f" -> {printable(survey.classes[row.label])}")
    console.print(text, soft_wrap=True)


def _is_utf(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
