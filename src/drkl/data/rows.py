"""Turn a data set, a list, a path or tokenised rows into the rows that a model is trained on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drkl.data.classification import LabelledRow, labelled_texts, tokenize_labelled
from drkl.data.config import DataConfig
from drkl.data.examples import Example, load_examples, parse_rows
from drkl.data.examples import read_heldout as heldout_examples
from drkl.data.files import labelled_by_name, rows_at
from drkl.data.formats import NEEDS_NONE
from drkl.data.lengths import NO_LIMIT, Room, fit_lengths
from drkl.data.loading import Wanted, load, with_class_names
from drkl.data.seq2seq import set_languages
from drkl.data.sources import DatasetSource, Source, source_of
from drkl.data.store import Watch
from drkl.data.stored import NotStorable
from drkl.data.tokenize import DropReport, Row, tokenize_examples
from drkl.data.tokenized import tokenized_rows, tokenized_texts
from drkl.data.views import view_of
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_MEMORY_ROWS = 20_000
"""A list or a frame of more rows is tokenised into files, which are removed when the process ends."""
_log = logging.getLogger("drkl")

Rows = Sequence[Row] | Sequence[LabelledRow]


@dataclass(frozen=True)
class Placed:
    """Rows with their places, for errors: a part of a stream."""

    items: Sequence[tuple[str, Any]]


def rows_from(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str] | None = None,
    encoder_decoder: bool = False,
    name: str = "train_dataset",
    row_format: str = "auto",
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    turns: str = "last",
    template: str = "auto",
    room: Room = NO_LIMIT,
    ends: Sequence[int] = (),
    needs_responses: bool = True,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Rows, DropReport]:
    """Return the tokenised rows of a data set, in order, and the account of those that were dropped.

    Args:
        dataset: a ``datasets.Dataset`` (or a ``DatasetDict`` of one split), a list or any other sequence of rows, a
            pandas ``DataFrame``, the path of a file, ``bundled:dolly`` and the like, a folder or id of ``datasets``.
            A row is a mapping with ``prompt`` and ``response`` (or ``completion``; as texts or as lists of messages),
            ``messages``, ``conversations``, ``instruction`` and ``output``, ``text``, ``text`` and ``label`` (for a
            classifier), or is tokenised: ``input_ids`` and unshifted ``labels``. Rows that are `Example`, `Row` or
            `LabelledRow` already are taken as they are. A row's ``id`` is its own, or else its number; ``docs/data.md``
            says which other columns are read.
        tokenizer: the one that both models share.
        classes: a classifier's classes, by number; None for a language model.
        encoder_decoder: whether the language model is one.
        name: what errors call the data set.
        row_format: ``auto``, or one of `DataConfig.format`.
        max_prompt_tokens: rows with a longer prompt are dropped and counted; default 256, or half of a smaller
            ``max_tokens``, or what leaves room for a response.
        max_tokens: prompt and response together; a longer response is cut at its end and counted. Default 512, or the
            models' context.
        turns: ``last`` or ``all`` of the assistant's turns are learnt.
        template: how a prompt is written, as `DataConfig.template`; ``plain`` is the prompt as it is.
        room: the context of the models, which the lengths that are not given fit.
        ends: the ids that the model's own settings list as ends, for chat templates that write none after a turn.
        needs_responses: False where a model answers every row: a row may then be a prompt alone (``prompt``,
            ``messages`` that end with the user's, ``instruction``, ``question`` and the like, ``input_ids`` without
            labels), and its response empty, null or not there.
        teacher_tokenizer: of a teacher that is to read prompts in its own chat template; None where it reads them as
            the student does.

    Raises:
        DrklError: a data set of another kind, a row that is not understood (with its place), or no row left.
    """
    fitted = fit_lengths(max_prompt_tokens, max_tokens, room)
    lengths: dict[str, Any] = {**fitted._asdict(), "room": room}
    if (source := _to_store(dataset, name, row_format)) is not None:
        kind_of_model: dict[str, Any] = {"classes": classes, "encoder_decoder": encoder_decoder, "ends": ends}
        kind_of_model |= {"needs_responses": needs_responses, "teacher_tokenizer": teacher_tokenizer, "room": room}
        with contextlib.suppress(NotStorable):
            watch = Watch(lambda text: _log.warning("Warning: %s", text))
            some = [Wanted(source, row_format)]
            found = load(some, tokenizer, fitted, watch, turns=turns, template=template, **kind_of_model)
            rows: Any = found.rows
            return rows, found.report
    items = list(dataset_items(dataset, name, row_format))
    if not items:
        raise DrklError(f"{name} has no rows.")
    kind = _kind(items)
    if kind is Row or kind is LabelledRow:
        ready = [row for _, row in items]
        if kind is Row and needs_responses and not all(row.response_ids for row in ready):
            alone = next(row.id for row in ready if not row.response_ids)
            raise DrklError(f"{name}: the row {alone!r} has no response. {NEEDS_NONE}")
        return _checked(ready, kind, classes, name, encoder_decoder=encoder_decoder)
    if kind == "tokenised":
        if classes is not None:
            return tokenized_texts(items, tokenizer, classes, max_tokens=fitted.max_tokens)
        lengths["needs_responses"] = needs_responses
        return tokenized_rows(items, tokenizer, encoder_decoder=encoder_decoder, **lengths)
    if kind is Example:
        examples = [example for _, example in items]
    else:
        wanted = row_format if classes is None else "text_label"
        examples = parse_rows(with_class_names(items, classes), name, wanted, needs_responses=needs_responses)
    if classes is not None:
        return tokenize_labelled(labelled_texts(examples), tokenizer, classes, max_tokens=fitted.max_tokens)
    settings: dict[str, Any] = {"turns": turns, "template": template, "encoder_decoder": encoder_decoder, **lengths}
    settings |= {"ends": ends, "needs_responses": needs_responses}
    settings["teacher"] = view_of(teacher_tokenizer, tokenizer, template, encoder_decoder=encoder_decoder)
    return tokenize_examples(examples, tokenizer, **settings)


def _to_store(dataset: Any, name: str, row_format: str) -> Source | None:
    """The source of a data set whose rows go through the cache; None for what is tokenised in memory.

    In memory stay small lists and frames, rows that are tokenised already, and what is no data set.
    """
    datasets = sys.modules.get("datasets")  # before it is imported nothing is of its classes
    source: Source | None = None
    if isinstance(dataset, str | os.PathLike):
        source = source_of(dataset, row_format)
    elif datasets is not None and isinstance(dataset, datasets.Dataset):
        plain = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
        source = DatasetSource(name, plain)
    elif _is_long(dataset):
        source = Source(name, lambda: iter(dataset_items(dataset, name, row_format)), None)
    if source is None:
        return None
    first = source.first()
    if first is None:
        raise DrklError(f"{name} has no rows.")
    is_made = isinstance(first[1], Row | LabelledRow | Example)
    return None if is_made or (isinstance(first[1], Mapping) and "input_ids" in first[1]) else source


def _is_long(dataset: Any) -> bool:
    is_sequence = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping)
    return is_sequence and len(dataset) > IN_MEMORY_ROWS


def dataset_items(dataset: Any, name: str, row_format: str = "auto") -> Iterable[tuple[str, Any]]:
    """Yield ``(place, row)`` of whatever `rows_from` takes as a data set.

    Raises:
        DrklError: something that has no rows, or cannot be read twice.
    """
    if isinstance(dataset, Placed):
        return dataset.items
    if isinstance(dataset, str | os.PathLike):
        return rows_at(dataset, row_format)
    if isinstance(dataset, list | tuple):
        return _numbered(dataset, name)
    import datasets

    splits = datasets.Dataset | datasets.IterableDataset
    if isinstance(dataset, Mapping) and all(isinstance(split, splits) for split in dataset.values()):
        if len(dataset) != 1:
            some = next(iter(dataset), "train")
            raise DrklError(
                f"{name} is a {type(dataset).__name__} with the splits {', '.join(map(str, dataset)) or 'none'}; pass "
                f"one of them, as in {name}[{str(some)!r}]."
            )
        return dataset_items(next(iter(dataset.values())), name, row_format)
    if isinstance(dataset, datasets.Dataset):
        # Plain Python values, unless a transform of the caller's own makes the rows.
        plain = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
        return labelled_by_name(plain, name)
    if type(dataset).__module__.startswith("pandas") and hasattr(dataset, "columns"):
        return _numbered(dataset.astype(object).where(dataset.notna(), None).to_dict("records"), name)
    if isinstance(dataset, Mapping):
        raise DrklError(
            f"{name} is one dict with the keys {', '.join(map(str, dataset)) or 'none'}; expected a list of dicts, one "
            "for each row. A dict of columns becomes one by datasets.Dataset.from_dict."
        )
    if hasattr(dataset, "tolist"):  # an array, or a pandas Series, whose index need not count
        return _numbered(dataset.tolist(), name)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return _numbered([dataset[number] for number in range(len(dataset))], name)
    if hasattr(dataset, "__iter__"):
        raise DrklError(
            f"{name} is a {type(dataset).__name__}, which can be read once and may have no end; every epoch reads the "
            f"rows again. Pass a list of them: list({name}), or the first of a stream: list({name}.take(10_000)). A "
            "datasets.IterableDataset is read as training goes on where it is the train_dataset and args has max_steps."
        )
    raise DrklError(
        f"{name} is a {type(dataset).__name__}; expected a datasets.Dataset, a list of dicts, or the path of a file."
    )


def read_shares(
    config: DataConfig, *, classifier: bool, needs_responses: bool = True
) -> tuple[list[Example], list[Example]]:
    """Read the training and the held-out examples of a data section; for a classifier texts with labels.

    Where ``needs_responses`` is False, they may be prompts alone.
    """
    config = config.model_copy(update={"format": "text_label"}) if classifier else config
    return load_examples(config, needs_responses=needs_responses)


def read_heldout(config: DataConfig, *, classifier: bool) -> list[Example]:
    """Read the held-out examples of a data section alone."""
    return heldout_examples(config.model_copy(update={"format": "text_label"}) if classifier else config)


def make_rows(
    examples: Sequence[Example],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str] | None,
    encoder_decoder: bool = False,
    ends: Sequence[int] = (),
    room: Room = NO_LIMIT,
    needs_responses: bool = True,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Rows, DropReport]:
    """Tokenise one share of `read_shares` with the settings of its section; arguments as for `rows_from`.

    The section's languages are set on the tokenizer.
    """
    for reader in (tokenizer, teacher_tokenizer):
        if reader is not None:
            set_languages(reader, config.src_lang, config.tgt_lang)
    kind: dict[str, Any] = {"classes": classes, "encoder_decoder": encoder_decoder, "ends": ends, "room": room}
    kind |= {"needs_responses": needs_responses, "teacher_tokenizer": teacher_tokenizer}
    return rows_from(examples, tokenizer, name=config.name, **kind, **config.row_settings)


def _numbered(rows: Iterable[Any], name: str) -> Iterable[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _kind(items: Sequence[tuple[str, Any]]) -> Any:
    """Return the kind of the rows: a class of drkl, ``tokenised``, or None for mappings of text. All have one kind."""

    def of(row: Any) -> Any:
        if isinstance(row, Row | LabelledRow | Example):
            return type(row)
        return "tokenised" if isinstance(row, Mapping) and "input_ids" in row else None

    first = of(items[0][1])
    for place, row in items:
        if of(row) != first:
            raise DrklError(f"{place}: a row of another kind than the first one; expected all rows of one kind.")
    return first


def _checked(
    rows: list[Any], kind: type, classes: Sequence[str] | None, name: str, *, encoder_decoder: bool
) -> tuple[Rows, DropReport]:
    """Rows that are ready, if they are those of this kind of model."""
    made_for = "a classifier" if kind is LabelledRow else _language_model(rows[0].encoder_decoder)
    model = "a classifier" if classes is not None else _language_model(encoder_decoder)
    mixed = kind is Row and any(row.encoder_decoder != rows[0].encoder_decoder for row in rows)
    if made_for != model or mixed:
        raise DrklError(f"{name} has rows that were tokenised for {made_for}; the model is {model}.")
    return rows, DropReport(kept=len(rows))


def _language_model(encoder_decoder: bool) -> str:
    return "an encoder-decoder" if encoder_decoder else "a decoder-only model"
