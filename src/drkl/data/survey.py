"""Summarise a data section source by source: counts, lengths, and rows to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drkl.data.classification import LabelledRow
from drkl.data.config import NO_ROWS, DataConfig
from drkl.data.lengths import NO_LIMIT, Room
from drkl.data.rows import make_rows, read_shares
from drkl.data.streams import SAMPLE_ROWS, RowStream, stream_of
from drkl.data.tokenize import DropReport, Row
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 8


@dataclass(frozen=True)
class Survey:
    """The rows of one source.

    Args:
        name: the source.
        share: ``training`` or ``held out``.
        weight: how often an epoch takes its rows.
        rows: its usable rows; a classifier's are `LabelledRow`.
        report: the account of the others.
        classes: a classifier's classes, by number; None for a language model.
        shapes: how many rows came in which shape.
        given: how many rows have what a chat template is given besides texts (``tools``, ``tool_calls``), or replies
            that are not trained.
    """

    name: str
    share: str
    weight: float
    rows: Sequence[Any]
    report: DropReport
    classes: Sequence[str] | None = None
    shapes: Mapping[str, int] = field(default_factory=dict)
    given: Mapping[str, int] = field(default_factory=dict)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Counts by name."""
        report = self.report
        several = len(self.shapes) > 1
        facts = [("format", f"{shape}: {n:,}" if several else shape) for shape, n in self.shapes.items()]
        facts += [("rows kept", f"{report.kept:,} of {report.kept + sum(report.dropped.values()):,}")]
        facts += [(f"dropped: {reason.replace('_', ' ')}", f"{n:,}") for reason, n in report.dropped.items()]
        if report.documents:
            facts.append(("texts cut into blocks", f"{report.documents:,}"))
        if report.prompts_alone:
            facts.append(("rows without a response", f"{report.prompts_alone:,}"))
        facts += [(f"rows with {name}", f"{n:,}") for name, n in self.given.items()]
        facts.append((f"{report.what_is_cut} cut", f"{report.responses_cut:,}"))
        if self.classes is not None:
            return facts + self._class_counts(self.classes)
        if self.weight != 1:
            facts.append(("rows an epoch", f"{len(self.rows):,} (weight {self.weight:g})"))
        facts.append(("tokens", f"{sum(len(row.all_ids) for row in self.rows):,}"))
        if report.prompts_alone < report.kept:
            facts.append(("tokens trained", f"{sum(row.num_trained for row in self.rows):,}"))
        return facts

    def _class_counts(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        counts = Counter(row.label for row in self.rows).most_common()
        ends = [
            (f"{word} rows: {classes[label]}", f"{count:,}")
            for word, (label, count) in zip(("most", "fewest"), (counts[0], counts[-1]), strict=True)
        ]
        return [("classes", f"{len(counts)} of {len(classes)}"), *ends]

    @property
    def lengths(self) -> dict[str, list[int]]:
        """Tokens of each row, by the part that is counted."""
        if self.classes is not None:
            return {"text": [row.length for row in self.rows]}
        prompts = {"prompt": [len(row.prompt_ids) for row in self.rows]}
        if any(row.teacher_prompt_ids for row in self.rows):
            prompts["teacher's prompt"] = [len(row.teacher_prompt_ids or row.prompt_ids) for row in self.rows]
        whole = [row for row in self.rows if row.response_ids]
        if not whole:
            return prompts
        return prompts | {
            "trained": [row.num_trained for row in whole],
            "row": [len(row.all_ids) for row in whole],
        }


def survey(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str] | None = None,
    encoder_decoder: bool = False,
    ends: Sequence[int] = (),
    room: Room = NO_LIMIT,
    needs_responses: bool = True,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Survey]:
    """Read and tokenise each source of a data section on its own, as a run would; nothing is written.

    The arguments are those of `rows_from`.

    Raises:
        DrklError: whatever a run would refuse, with the source's name.
    """
    surveys = []
    kind: dict[str, Any] = {"classes": classes, "encoder_decoder": encoder_decoder, "ends": ends, "room": room}
    kind |= {"needs_responses": needs_responses, "teacher_tokenizer": teacher_tokenizer}

    def add(name: str, share: str, examples: Any, weight: float = 1.0, stream: RowStream | None = None) -> None:
        rows: Any
        try:
            if stream is not None:
                rows, report = stream.sample()
                examples = [row.example for row in rows if isinstance(row, Row)]
            else:
                rows, report = make_rows(examples, config, tokenizer, **kind)
        except DrklError as error:
            raise DrklError(f"{name} ({share}): {error}") from error
        shapes = Counter(example.shape for example in examples)
        given = Counter(name for example in examples for name in example.given)
        surveys.append(Survey(name, share, weight, rows, report, classes, shapes, given))

    heldout = None
    for source in config.all_sources():
        alone = {"sources": (source,), "path": None, "dataset": None, "max_rows": None}
        train, heldout = read_shares(
            config.model_copy(update=alone), classifier=classes is not None, needs_responses=needs_responses
        )
        if config.streaming:
            stream = stream_of(config.model_copy(update=alone), tokenizer, **kind)
            add(source.name, f"training: its first {SAMPLE_ROWS:,} rows", [], stream=stream)
        else:
            add(source.name, "training", train, source.weight)
        if config.eval_path is None:
            add(source.name, "held out", heldout)
    if config.eval_path not in (None, NO_ROWS):
        add(config.eval_path, "held out", heldout)
    return surveys


def histogram(lengths: Sequence[int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """Return ``(from, to, count)`` of at most ``bins`` whole-number bins of equal width, both ends included.

    >>> histogram([1, 2, 2, 9], bins=2)
    [(1, 5, 3), (6, 10, 1)]
    """
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    starts = range(low, high + 1, width)
    return [(a, a + width - 1, sum(a <= length < a + width for length in lengths)) for a in starts]


def pieces_of(row: Row | LabelledRow, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the row's text in pieces, each with whether its tokens are trained; special tokens are written out."""
    if isinstance(row, LabelledRow):
        return [(str(tokenizer.decode(list(row.ids), clean_up_tokenization_spaces=False)), False)]
    trained = (True,) * len(row.response_ids) if row.trained is None else row.trained
    marks = [*[False] * len(row.prompt_ids), *trained]
    pieces: list[tuple[list[int], bool]] = []
    for token, mark in zip((*row.prompt_ids, *row.response_ids), marks, strict=True):
        if not pieces or pieces[-1][1] != mark:
            pieces.append(([], mark))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), mark) for ids, mark in pieces]
