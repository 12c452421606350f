"""What a data section gives, source by source: counts, lengths, and a row to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drkl.data.classification import load_labelled, tokenize_labelled
from drkl.data.config import DataConfig
from drkl.data.examples import load_examples
from drkl.data.tokenize import DropReport, Row, tokenize_examples
from drkl.errors import DrklError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

BINS = 8
BAR = 40
TRAINED_STYLE = "bold green"


@dataclass(frozen=True)
class Survey:
    """The rows of one source; ``share`` says of which: training or held-out."""

    name: str
    share: str
    weight: float
    rows: list[Row]
    report: DropReport

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Counts by name."""
        report = self.report
        lines = _kept_and_dropped(report)
        if report.documents:
            lines.append(("texts cut into blocks", f"{report.documents:,}"))
        lines.append(("responses cut", f"{report.responses_cut:,}"))
        if self.weight != 1:
            lines.append(("rows an epoch", f"{len(self.rows):,} (weight {self.weight:g})"))
        lines.append(("tokens", f"{sum(len(r.prompt_ids) + len(r.response_ids) for r in self.rows):,}"))
        lines.append(("tokens trained", f"{sum(row.num_trained for row in self.rows):,}"))
        return lines

    @property
    def lengths(self) -> dict[str, list[int]]:
        """Tokens of each row, by what is counted."""
        return {
            "prompt": [len(row.prompt_ids) for row in self.rows],
            "trained": [row.num_trained for row in self.rows],
            "row": [len(row.prompt_ids) + len(row.response_ids) for row in self.rows],
        }


def _kept_and_dropped(report: DropReport) -> list[tuple[str, str]]:
    lines = [("rows kept", f"{report.kept:,} of {report.kept + sum(report.dropped.values()):,}")]
    return lines + [(f"dropped: {reason.replace('_', ' ')}", f"{count:,}") for reason, count in report.dropped.items()]


def survey(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False) -> list[Survey]:
    """Read and tokenise each source of a data section on its own, as a run would; nothing is written.

    Raises:
        DrklError: what a run would refuse too, with the source's name.
    """
    settings = config.row_settings | {"encoder_decoder": encoder_decoder}
    found = []
    heldout = []
    for source in config.all_sources():
        alone = {"sources": (source,), "path": None, "dataset": None, "max_rows": None}
        train, held = load_examples(config.model_copy(update=alone))
        parts = [("training", train)] if config.eval_path is not None else [("training", train), ("held out", held)]
        for share, examples in parts:
            try:
                rows, report = tokenize_examples(examples, tokenizer, **settings)
            except DrklError as error:
                raise DrklError(f"{source.name} ({share}): {error}") from error
            weight = source.weight if share == "training" else 1.0
            found.append(Survey(source.name, share, weight, rows, report))
        heldout = held
    if config.eval_path is not None:
        rows, report = tokenize_examples(heldout, tokenizer, **settings)
        found.append(Survey(config.eval_path, "held out", 1.0, rows, report))
    return found


def histogram(lengths: Sequence[int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """Return ``(from, to, count)`` of at most ``bins`` whole-number bins of equal width, both ends included.

    >>> histogram([1, 2, 2, 9], bins=2)
    [(1, 5, 3), (6, 10, 1)]
    """
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    starts = range(low, high + 1, width)
    return [(a, a + width - 1, sum(a <= length < a + width for length in lengths)) for a in starts]


def runs_of_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the row's text in pieces, each with whether its tokens are trained; special tokens are written out."""
    trained = (True,) * len(row.response_ids) if row.trained is None else row.trained
    marks = [*[False] * len(row.prompt_ids), *trained]
    pieces: list[tuple[list[int], bool]] = []
    for token, mark in zip((*row.prompt_ids, *row.response_ids), marks, strict=True):
        if not pieces or pieces[-1][1] != mark:
            pieces.append(([], mark))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), mark) for ids, mark in pieces]


def print_surveys(
    surveys: Sequence[Survey], tokenizer: PreTrainedTokenizerBase, console: Console, clean: Callable[[str], str]
) -> None:
    """Print every survey: counts, histograms, and a training row with its trained tokens in colour.

    Where the console has no colour, they stand between marks.
    """
    from rich.table import Table
    from rich.text import Text

    for found in surveys:
        console.print(Text(f"\n{clean(found.name)} ({found.share})", style="bold"))
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in found.facts:
            table.add_row(name, Text(value, justify="right"))
        console.print(table)
        for name, lengths in found.lengths.items():
            console.print(_bars(name, lengths, console))
        if found.share == "training":
            console.print(_example(found.rows[0], tokenizer, console, clean), soft_wrap=True)


def _bars(name: str, lengths: Sequence[int], console: Console) -> Table:
    from rich.table import Table

    table = Table(f"{name} tokens", "rows", "", box=None, pad_edge=False)
    bins = histogram(lengths)
    most = max(count for *_, count in bins)
    block = "█" if _is_utf(console) else "#"
    for low, high, count in bins:
        bar = block * max(round(BAR * count / most), int(count > 0))
        table.add_row(str(low) if low == high else f"{low} to {high}", f"{count:,}", bar)
    return table


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, console: Console, clean: Callable[[str], str]) -> Text:
    from rich.text import Text

    colour = console.color_system is not None and not console.no_color
    before, after = ("", "") if colour else ("⟦", "⟧") if _is_utf(console) else ("[[", "]]")
    how = "in colour" if colour else f"between {before} and {after}"
    text = Text(f"row {clean(row.id)}, the trained tokens {how}:\n")
    for piece, trained in runs_of_tokens(row, tokenizer):
        text.append(f"{before}{clean(piece)}{after}" if trained else clean(piece), TRAINED_STYLE if trained else "dim")
    return text


def _is_utf(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def print_labelled(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    console: Console,
    clean: Callable[[str], str],
) -> None:
    """Print what a data section gives a classifier: counts, lengths, rows of each class, and a row.

    Raises:
        DrklError: what a run would refuse too.
    """
    from rich.table import Table
    from rich.text import Text

    names = (config.name, config.eval_path or config.name)
    for name, share, labelled in zip(names, ("training", "held out"), load_labelled(config), strict=True):
        rows, report = tokenize_labelled(labelled, tokenizer, classes, max_tokens=config.max_tokens)
        counts = Counter(row.label for row in rows)
        facts = _kept_and_dropped(report)
        facts += [("texts cut", f"{report.responses_cut:,}"), ("classes", f"{len(counts)} of {len(classes)}")]
        facts += [
            (f"{word} rows: {clean(classes[label])}", f"{count:,}")
            for word, (label, count) in zip(("most", "fewest"), (counts.most_common()[i] for i in (0, -1)), strict=True)
        ]
        console.print(Text(f"\n{clean(name)} ({share})", style="bold"))
        table = Table(show_header=False, box=None, pad_edge=False)
        for fact, value in facts:
            table.add_row(Text(fact), Text(value, justify="right"))
        console.print(table)
        console.print(_bars("text", [row.length for row in rows], console))
        shown = clean(str(tokenizer.decode(list(rows[0].ids), clean_up_tokenization_spaces=False)))
        console.print(Text(f"row {clean(rows[0].id)}: {shown} -> {clean(classes[rows[0].label])}"), soft_wrap=True)
