"""Examples to token ids; what cannot be used is dropped, counted and never cut in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drkl.data.apart import encode_source, encode_target
from drkl.data.examples import Example
from drkl.data.template import encode_prompt, encode_response
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONS = {
    "prompt_too_long": "prompt longer than max_prompt_tokens",
    "empty_prompt": "empty prompt",
    "empty_response": "empty response",
}


@dataclass(frozen=True)
class Row:
    """One example as token ids; ``response_ids`` end with the end of turn unless they were cut."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    example: Example
    encoder_decoder: bool = False
    """Whether an encoder reads the prompt and a decoder writes the response."""

    @property
    def length(self) -> int:
        """How many positions the model is fed: the last response token is only predicted.

        Of an encoder-decoder the longer of the two sides.
        """
        if self.encoder_decoder:
            return max(len(self.prompt_ids), len(self.response_ids))
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass
class DropReport:
    """How many rows were kept, how many were dropped for which reason, how many responses were cut."""

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    responses_cut: int = 0

    def summary(self) -> str:
        """Return one sentence for people."""
        total = self.kept + sum(self.dropped.values())
        parts = [f"{self.kept} of {total} rows kept"]
        parts += [f"{count} dropped ({_REASONS[reason]})" for reason, count in self.dropped.items()]
        if self.responses_cut:
            parts.append(f"{self.responses_cut} responses cut at max_tokens")
        return ", ".join(parts) + "."


def tokenize_examples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    encoder_decoder: bool = False,
) -> tuple[list[Row], DropReport]:
    """Return the usable rows, in order, and the account of the others.

    A prompt longer than ``max_prompt_tokens`` drops its row. Where prompt and response together pass ``max_tokens``
    the response is cut at its end, and the end of turn with it. ``encoder_decoder`` rows have the plain prompt and the
    response as the tokenizer encodes texts by itself, without a chat template.

    Raises:
        DrklError: no row is left, or a row that the chat template refuses (with its id).
    """
    if max_tokens <= max_prompt_tokens:
        raise DrklError(f"max_tokens ({max_tokens}) must be larger than max_prompt_tokens ({max_prompt_tokens}).")
    rows: list[Row] = []
    report = DropReport()
    shortest: int | None = None
    for example in examples:
        reason = _empty(example)
        if reason is None:
            try:
                prompt_ids = encode_for(tokenizer, example.prompt_messages, encoder_decoder=encoder_decoder)
                shortest = len(prompt_ids) if shortest is None else min(shortest, len(prompt_ids))
                if len(prompt_ids) > max_prompt_tokens:
                    reason = "prompt_too_long"
                elif encoder_decoder:
                    response_ids = encode_target(tokenizer, example.response)
                else:
                    response_ids = encode_response(tokenizer, example.messages)
            except DrklError as error:
                raise DrklError(f"Row {example.id!r}: {error}") from error
        if reason is not None:
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
            continue
        room = max_tokens - len(prompt_ids)
        report.responses_cut += len(response_ids) > room
        rows.append(Row(example.id, tuple(prompt_ids), tuple(response_ids[:room]), example, encoder_decoder))
    report.kept = len(rows)
    if not rows:
        raise DrklError(_nothing_left(report, max_prompt_tokens, shortest))
    return rows, report


def encode_for(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, encoder_decoder: bool
) -> list[int]:
    """Return the ids after which a model of this kind answers ``messages``."""
    encode = encode_source if encoder_decoder else encode_prompt
    return encode(tokenizer, messages)


def _empty(example: Example) -> str | None:
    if not example.prompt_text.strip():
        return "empty_prompt"
    return None if example.response.strip() else "empty_response"


def _nothing_left(report: DropReport, max_prompt_tokens: int, shortest: int | None) -> str:
    total = sum(report.dropped.values())
    if not total:
        return "The data set has no rows."
    reasons = ", ".join(f"{count} {_REASONS[reason]}" for reason, count in report.dropped.items())
    message = f"None of the {total} rows can be used: {reasons}."
    if "prompt_too_long" in report.dropped:
        message += f" The shortest prompt has {shortest} tokens; raise data.max_prompt_tokens ({max_prompt_tokens})."
    if report.dropped.keys() - {"prompt_too_long"}:
        message += " Fill the empty fields, or use other data."
    return message
