"""Rows that come tokenised, as transformers' trainers take them: ``input_ids`` and unshifted ``labels``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from numbers import Integral
from typing import TYPE_CHECKING, Any

from drkl.data.classification import LabelledRow
from drkl.data.examples import Example, row_ids, written_id
from drkl.data.fields import is_void
from drkl.data.formats import NEEDS_NONE
from drkl.data.lengths import NO_LIMIT, Lengths, Room
from drkl.data.tokenize import DropReport, NothingLeft, Row, longest_row, nothing_left, row_of_spans
from drkl.errors import DrklError
from drkl.losses.common import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Items = Iterable[tuple[str, Any]]


def tokenized_rows(
    items: Items,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_prompt_tokens: int,
    max_tokens: int,
    room: Room = NO_LIMIT,
    needs_responses: bool = True,
) -> tuple[list[Row], DropReport]:
    """Return the usable rows of a language model, in order, and the account of the others.

    A decoder-only model's ``labels`` stand where the token stands in ``input_ids`` (transformers shifts them itself),
    and are -100 where nothing is learnt; the prompt ends at the first label. An encoder-decoder's ``labels`` are the
    target that goes with the source ``input_ids``. Without labels, ``input_ids`` are a prompt alone. Positions
    whose ``attention_mask`` is 0 are padding and left out.

    Args:
        items: ``(place, row)``; errors name the place.
        tokenizer: decodes prompts and responses for display and for text metrics.
        encoder_decoder: which kind of language model.
        max_prompt_tokens: rows with a longer prompt are dropped.
        max_tokens: prompt and response together; a longer response is cut at its end.
        room: a target longer than the decoder's is cut, too.
        needs_responses: whether a prompt alone is refused.

    Raises:
        DrklError: a row whose fields do not go together (with its place), or no row left.
    """
    rows: list[Row] = []
    report = DropReport()
    shortest: int | None = None
    for row_id, place, row in _with_ids(items):
        alone = not needs_responses and is_void(_plain(row.get("labels")))
        read = _prompt_alone if alone else _source_and_target if encoder_decoder else _causal
        ids, spans, is_text = read(place, row)
        reason = None if spans else "no_labels"
        if spans and spans[0][0] == 0:
            reason = "empty_prompt"
        elif spans:
            shortest = spans[0][0] if shortest is None else min(shortest, spans[0][0])
            reason = "prompt_too_long" if spans[0][0] > max_prompt_tokens else None
        if reason is not None:
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
            continue
        if alone:
            example = _example(row_id, tokenizer, ids, spans)
            rows.append(Row(row_id, tuple(ids), (), example, encoder_decoder=encoder_decoder))
            report.prompts_alone += 1
            continue
        limit = longest_row(spans[0][0], max_tokens, room)
        report.responses_cut += spans[-1][1] > limit
        example = _example(row_id, tokenizer, ids, spans)
        tokenised = row_of_spans(example, ids, spans, limit)
        if is_text:  # there is no prompt: a sample goes on from the text's beginning
            num_shown = max(1, min(len(tokenised.all_ids) // 4, max_prompt_tokens))
            example = _example(example.id, tokenizer, tokenised.all_ids, [(num_shown, len(tokenised.all_ids))])
            tokenised = replace(tokenised, example=example, sampling_context=tokenised.all_ids[:num_shown])
        rows.append(replace(tokenised, encoder_decoder=encoder_decoder))
    report.kept = len(rows)
    if not rows:
        raise NothingLeft(report, nothing_left(report, shortest, Lengths(max_prompt_tokens, max_tokens), room))
    return rows, report


def tokenized_texts(
    items: Items, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], *, max_tokens: int
) -> tuple[list[LabelledRow], DropReport]:
    """Return the usable rows of a classifier, in order, and the account of the others.

    ``labels`` (or ``label``) is a class by number or by name. A text of more than ``max_tokens`` is dropped: cut, it
    would lose the special token at its end.

    Raises:
        DrklError: a row whose fields do not go together, an unknown class, or no row left.
    """
    rows: list[LabelledRow] = []
    report = DropReport(what_is_cut="texts")
    for row_id, place, row in _with_ids(items):
        ids, _ = _unpadded(place, row)
        name = "labels" if row.get("labels") is not None else "label"
        value = _plain(row.get(name))
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        label = class_name(value, classes)
        if label not in classes:
            raise DrklError(
                f"{place}: {name} is {value!r}; expected a class by number (0 to {len(classes) - 1}) or by name."
            )
        reason = "empty_text" if not ids else "text_too_long" if len(ids) > max_tokens else None
        if reason is not None:
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
            continue
        text = _decode(tokenizer, ids)
        rows.append(LabelledRow(row_id, tuple(ids), list(classes).index(label), text))
    report.kept = len(rows)
    if not rows:
        raise NothingLeft(report, nothing_left(report, None, Lengths(1, max_tokens)))
    return rows, report


def _with_ids(items: Items) -> list[tuple[str, str, Any]]:
    """``(id, place, row)`` of every row."""
    items = list(items)
    ids = row_ids([(place, written_id(place, row)) for place, row in items])
    return [(row_id, place, row) for row_id, (place, row) in zip(ids, items, strict=True)]


def class_name(label: Any, classes: Sequence[str]) -> Any:
    """Return the name of a class that is given by number; anything else, a class called by a number too, as it is."""
    is_number = isinstance(label, Integral) and not isinstance(label, bool)
    if is_number and abs(label) >= 10**18:  # no class, and Python may refuse to write it
        return label
    if is_number and str(label) not in classes and 0 <= label < len(classes):
        return classes[int(label)]
    return str(label) if is_number else label


Spans = list[tuple[int, int]]


def _causal(place: str, row: Mapping[str, Any]) -> tuple[list[int], Spans, bool]:
    """The tokens of a row, the spans that are learnt, and whether it is a text without a prompt."""
    ids, mask = _unpadded(place, row)
    labels = _ids(place, row, "labels", least=IGNORE_INDEX)
    if len(labels) != len(mask):
        raise DrklError(f"{place}: labels has {len(labels)} entries and input_ids {len(mask)}; expected one for each.")
    if (positions := _plain(row.get("position_ids"))) is not None and positions != list(range(len(positions))):
        raise DrklError(f"{place}: position_ids that do not count from 0 (packed rows) are not supported.")
    for position, (label, counts) in enumerate(zip(labels, mask, strict=True)):
        if label != IGNORE_INDEX and not counts:
            raise DrklError(f"{place}: labels[{position}] is {label}, but attention_mask is 0 there; set it to -100.")
    labels = [label for label, counts in zip(labels, mask, strict=True) if counts]
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORE_INDEX, token):
            raise DrklError(
                f"{place}: labels[{position}] is {label} and input_ids[{position}] {token} (padding left out): labels "
                "are not shifted here, so a label is the token at its own position, or -100 where nothing is learnt."
            )
    learnt = [label != IGNORE_INDEX for label in labels]
    # Nothing predicts the first token: transformers' shift drops its label too.
    is_text = all(learnt)
    return ids, _runs([False, *learnt[1:]]), is_text


def _source_and_target(place: str, row: Mapping[str, Any]) -> tuple[list[int], Spans, bool]:
    source, _ = _unpadded(place, row)
    target = _ids(place, row, "labels", least=IGNORE_INDEX)
    while target and target[-1] == IGNORE_INDEX:
        target.pop()
    if IGNORE_INDEX in target:
        raise DrklError(
            f"{place}: labels[{target.index(IGNORE_INDEX)}] is -100 inside the target; an encoder-decoder learns every "
            "token of the target, and -100 is padding after it."
        )
    if row.get("decoder_input_ids") is not None:
        raise DrklError(f"{place}: decoder_input_ids are made from labels here; remove the column.")
    return source + target, [(len(source), len(source) + len(target))] if target else [], False


def _prompt_alone(place: str, row: Mapping[str, Any]) -> tuple[list[int], Spans, bool]:
    ids, _ = _unpadded(place, row)
    return ids, [(len(ids), len(ids))], False


def _runs(learnt: Sequence[bool]) -> Spans:
    """(start, end) of every run of true values."""
    runs = [[position for position, _ in run] for counts, run in groupby(enumerate(learnt), lambda p: p[1]) if counts]
    return [(run[0], run[-1] + 1) for run in runs]


def _unpadded(place: str, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens that are no padding, and the attention mask."""
    for name in ("completion_mask", "assistant_masks", "loss_mask", "loss_weights"):
        if row.get(name) is not None:
            raise DrklError(
                f"{place}: {name} is not read: labels alone say what is learnt. Set them to -100 where {name} is 0, "
                "and remove the column."
            )
    ids = _ids(place, row, "input_ids", least=0)
    mask = [1] * len(ids) if row.get("attention_mask") is None else _ids(place, row, "attention_mask", least=0)
    if len(mask) != len(ids):
        raise DrklError(f"{place}: attention_mask has {len(mask)} entries and input_ids {len(ids)}.")
    if set(mask) - {0, 1} or len(_runs([bool(counts) for counts in mask])) > 1:
        raise DrklError(f"{place}: attention_mask must be one run of 1 with 0 before or after it (padding).")
    return [token for token, counts in zip(ids, mask, strict=True) if counts], mask


def _ids(place: str, row: Mapping[str, Any], name: str, *, least: int) -> list[int]:
    values = _plain(row.get(name))
    if values is None:
        raise DrklError(
            f"{place}: expected input_ids and {name}; found {', '.join(map(str, row))}. Labels are a copy of input_ids "
            "with -100 where nothing is learnt (for an encoder-decoder, the tokens of the target)."
            + (f" {NEEDS_NONE}" if name == "labels" else "")
        )
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(v, Integral) for v in values):
        raise DrklError(f"{place}: {name} must be a list of whole numbers, one row at a time; found {values!r:.80}.")
    wrong = next((v for v in values if v < least or least < v < 0), None)
    if wrong is not None:
        allowed = "token ids, or -100 where nothing is learnt" if least else "whole numbers from 0"
        raise DrklError(f"{place}: {name} has {wrong}; expected {allowed}.")
    return [int(value) for value in values]


def _plain(value: Any) -> Any:
    """A tensor or an array as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _example(row_id: str, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], spans: Spans) -> Example:
    """The row as a conversation: what is learnt is the assistant's, what lies before and between is the user's."""
    messages = []
    last = 0
    for start, end in spans:
        messages.append({"role": "user", "content": _decode(tokenizer, ids[last:start])})
        messages.append({"role": "assistant", "content": _decode(tokenizer, ids[start:end])})
        last = end
    return Example(row_id, tuple(messages))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
