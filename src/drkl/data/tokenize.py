"""Tokenise examples; those that cannot be used are dropped and counted."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from drkl.data.drafts import Draft, Drafter, with_stand_in
from drkl.data.encoding import TextEncoder, batched
from drkl.data.examples import Example, free_id, hash_of_id
from drkl.data.formats import NEEDS_NONE
from drkl.data.lengths import NO_LIMIT, Lengths, Room, no_prompt_fits
from drkl.data.rendering import date_told
from drkl.data.seq2seq import encode_source, tokens_around
from drkl.data.template import Turns, encode_prompt
from drkl.data.views import TeacherView
from drkl.data.written import has_more
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONS = {
    "prompt_too_long": "prompt longer than max_prompt_tokens",
    "empty_prompt": "empty prompt",
    "empty_response": "empty response",
    "empty_text": "empty text",
    "empty_label": "empty label",
    "no_labels": "no token to learn",
    "weight_0": "weight 0, so no reply to learn",
    "text_too_long": "text longer than max_tokens",
}


@dataclass(frozen=True)
class Row:
    """One example as token ids; ``response_ids`` end with the end of turn unless they were cut.

    A prompt without a response, which a model is to answer, has no ``response_ids``.

    With ``turns: all`` they hold the whole conversation from the first reply on, and ``trained`` marks those that are
    the assistant's; None marks all of them. ``sampling_context`` are the ids after which a model samples the
    ``example``'s response; None stands for ``prompt_ids``.
    """

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    example: Example
    trained: tuple[bool, ...] | None = None
    sampling_context: tuple[int, ...] | None = None
    encoder_decoder: bool = False
    """Whether an encoder reads the prompt and a decoder writes the response."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    """The prompt as the teacher reads it, where that differs from ``prompt_ids``."""
    sampled: bool = False
    """Whether the response was written by a model while training goes on."""

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every token of the row."""
        return self.prompt_ids + self.response_ids

    @property
    def length(self) -> int:
        """Number of positions the models are fed, at most (the last response token is only predicted).

        For an encoder-decoder, the longer of source and target.
        """
        prompt = max(len(self.prompt_ids), len(self.teacher_prompt_ids or ()))
        if self.encoder_decoder:
            return max(prompt, len(self.response_ids))
        return prompt + len(self.response_ids) - 1

    @property
    def for_teacher(self) -> Row:
        """The row as the teacher reads it."""
        if self.teacher_prompt_ids is None:
            return self
        return replace(self, prompt_ids=self.teacher_prompt_ids, sampling_context=None, teacher_prompt_ids=None)

    @property
    def trained_ids(self) -> tuple[int, ...]:
        """The tokens that have a loss, in order."""
        if self.trained is None:
            return self.response_ids
        return tuple(token for token, counts in zip(self.response_ids, self.trained, strict=True) if counts)

    @property
    def num_trained(self) -> int:
        """Number of tokens that have a loss."""
        return len(self.response_ids) if self.trained is None else sum(self.trained)

    @property
    def sampling_ids(self) -> tuple[int, ...]:
        """The ids after which a model samples the example's response."""
        return self.prompt_ids if self.sampling_context is None else self.sampling_context


@dataclass
class DropReport:
    """Number of rows kept, of rows dropped by reason, and of responses cut.

    A row of plain text is a block; ``documents`` is the number of texts that were cut into blocks. ``per_epoch`` is the
    number of rows in an epoch after weighting, None where all weights are 1. ``openings`` counts the rows that do not
    have what the prompts end with (such as ``<think>``), by that text; ``date`` is the day that the chat template is
    told is today, if it asks. ``prompts_alone`` of the kept rows have no response, and ``difference`` says where the
    teacher's rendering of a prompt differs from the student's.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    responses_cut: int = 0
    documents: int = 0
    what_is_cut: str = "responses"
    per_epoch: int | None = None
    openings: dict[str, int] = field(default_factory=dict)
    date: str | None = None
    prompts_alone: int = 0
    difference: str | None = None

    def add(self, other: DropReport) -> None:
        """Count what is said of other examples of the same data set too; ``kept`` and what follows of it stay."""
        for ours, theirs in ((self.dropped, other.dropped), (self.openings, other.openings)):
            for name, number in theirs.items():
                ours[name] = ours.get(name, 0) + number
        self.responses_cut += other.responses_cut
        self.prompts_alone += other.prompts_alone

    def summary(self) -> str:
        """Return a sentence for people, and one for each thing that the template does."""
        total = self.kept + sum(self.dropped.values())
        parts = [f"{self.kept} of {total} rows kept"]
        if self.documents:
            parts.append(f"blocks of {self.documents} text(s) among them")
        if self.prompts_alone:
            parts.append(f"{self.prompts_alone} of them without a response")
        parts += [f"{count} dropped ({_REASONS[reason]})" for reason, count in self.dropped.items()]
        if self.responses_cut:
            parts.append(f"{self.responses_cut} {self.what_is_cut} cut at max_tokens")
        if self.per_epoch is not None:
            parts.append(f"{self.per_epoch} an epoch by their weights")
        return " ".join([", ".join(parts) + ".", *self.notes])

    @property
    def notes(self) -> list[str]:
        """What the template does that the rows do not show, in sentences."""
        notes = [
            f"The template's prompts end with {text!r}, which {count} row(s) do not have: these are learnt as the "
            "template writes conversations, and samples follow the whole prompt."
            for text, count in self.openings.items()
        ]
        if self.date:
            notes.append(f"The template asks for today's date; it is told {self.date}, so that rows never change.")
        if self.difference:
            notes.append(self.difference)
        return notes


class NothingLeft(DrklError):
    """No row is left of those that were to be tokenised; ``report`` is the account of them."""

    def __init__(self, report: DropReport, message: str) -> None:
        super().__init__(message)
        self.report = report


def tokenize_examples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    turns: str = "last",
    template: str = "auto",
    encoder_decoder: bool = False,
    room: Room = NO_LIMIT,
    ends: Sequence[int] = (),
    needs_responses: bool = True,
    teacher: TeacherView | None = None,
) -> tuple[list[Row], DropReport]:
    """Return the usable rows, in order, and the account of the others.

    A row with a prompt longer than ``max_prompt_tokens`` is dropped. A response that ends after ``max_tokens`` (prompt
    included) is cut there, and loses its end of turn. With ``turns="all"`` the prompt ends before the first reply; the
    rest of the conversation is the response, in which the assistant's tokens are trained.

    Plain texts come last. They are joined, eos after each, and cut into rows of ``max_tokens``. The prompt of such a
    row is the token before it (bos or eos before the first), so every token is trained once.

    ``encoder_decoder`` rows have the prompt and the last reply as the tokenizer encodes texts by itself; ``turns`` and
    ``template`` are ignored, and a target longer than ``room.decoder`` is cut. The encoder reads the first half of a
    block of plain text and the decoder writes the second (prefix language modelling: Raffel et al. 2020, section
    3.3.1).

    ``ends`` are the ids that the model's own settings list as ends, for templates that write none
    (`drkl.data.ends`).

    Where ``needs_responses`` is False, a conversation without a response is a row too: its prompt, as a model is
    sampled from it. ``teacher`` adds its own rendering of the prompts; a row is dropped where either is too long.

    Raises:
        DrklError: no row is left, or a row that the chat template refuses (with its id).
    """
    settings: dict[str, Any] = {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens, "room": room}
    settings |= {"encoder_decoder": encoder_decoder, "template": template, "teacher": teacher}
    chunk = tokenize_chunk(examples, tokenizer, turns=turns, ends=ends, needs_responses=needs_responses, **settings)
    return finish_rows(chunk, tokenizer, **settings)


@dataclass
class Chunk:
    """Some examples of a data set as rows, and what the end of them all needs (`finish_rows`).

    ``shortest`` is the shortest prompt of a conversation in tokens, None where there is no conversation.
    """

    rows: list[Row] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    report: DropReport = field(default_factory=DropReport)
    shortest: int | None = None

    def drop(self, reason: str) -> None:
        """Count an example that cannot be used."""
        self.report.dropped[reason] = self.report.dropped.get(reason, 0) + 1

    def add(self, made: _Made, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take what became of an example."""
        if made.turns is not None and made.example.is_text:
            self.texts.append(Text(made.example.id, made.example.weight, made.turns.ids))
            return
        if made.turns is not None:
            self.shortest = made.length if self.shortest is None else min(self.shortest, made.length)
        if made.reason is not None or made.row is None or made.turns is None:
            self.drop(str(made.reason))
            return
        self.rows.append(made.row)
        self.report.prompts_alone += made.alone
        self.report.responses_cut += made.cut
        if opening := max(made.turns.openings, key=len):
            text = str(tokenizer.decode(opening, clean_up_tokenization_spaces=False))
            self.report.openings[text] = self.report.openings.get(text, 0) + 1


class Text(NamedTuple):
    """A plain text as token ids, to be joined with others and cut into blocks."""

    id: str
    weight: float
    ids: Sequence[int]


def tokenize_chunk(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    turns: str = "last",
    template: str = "auto",
    encoder_decoder: bool = False,
    room: Room = NO_LIMIT,
    ends: Sequence[int] = (),
    needs_responses: bool = True,
    teacher: TeacherView | None = None,
) -> Chunk:
    """Return the rows of some examples, by the rules and with the arguments of `tokenize_examples`.

    Every example is tokenised for itself: the chunks of a data set, put one after the other, are those of the whole.
    """
    if max_tokens <= max_prompt_tokens:
        raise DrklError(f"max_tokens ({max_tokens}) must be larger than max_prompt_tokens ({max_prompt_tokens}).")
    turns = "last" if encoder_decoder else turns
    drafter = Drafter(TextEncoder(tokenizer, template), template, turns, encoder_decoder=encoder_decoder, ends=ends)
    maker = _Maker(drafter, max_prompt_tokens, max_tokens, room, needs_responses=needs_responses, teacher=teacher)
    chunk = Chunk()
    for batch in batched(examples, _num_characters):
        for made in maker.make(batch):
            chunk.add(made, tokenizer)
    return chunk


@dataclass
class _Made:
    """What became of an example: a row, a text's ids, or the reason why it is dropped."""

    example: Example
    alone: bool = False
    reason: str | None = None
    draft: Draft | None = None
    turns: Turns | None = None
    row: Row | None = None
    length: int = 0
    """The tokens of its prompt, as the longer of student and teacher reads it."""
    cut: bool = False


@dataclass
class _Maker:
    """Makes rows of examples, with the arguments of `tokenize_examples`."""

    drafter: Drafter
    max_prompt_tokens: int
    max_tokens: int
    room: Room
    needs_responses: bool
    teacher: TeacherView | None

    def make(self, examples: Sequence[Example]) -> list[_Made]:
        """What becomes of some examples, in order.

        Raises:
            DrklError: as `tokenize_examples`, for the first of them that fails.
        """
        try:
            return self._make(examples)
        except Exception:
            if len(examples) == 1:
                raise
        # Which of them is the first to fail shows where each is made by itself.
        return [made for example in examples for made in self._make([example])]

    def _make(self, examples: Sequence[Example]) -> list[_Made]:
        made = [self._drafted(example) for example in examples]
        if len(made) > 1:
            self.drafter.read([one.draft for one in made if one.draft is not None])
        for one in made:
            if one.draft is not None:
                self._encode(one, one.draft)
        if self.teacher is not None:
            self._add_teacher(self.teacher, [one for one in made if one.row is not None])
        return made

    def _drafted(self, example: Example) -> _Made:
        alone = not self.needs_responses and example.is_prompt_alone
        reason = _empty(example, self.drafter.turns, alone=alone)
        if reason is not None:
            return _Made(example, alone, reason)
        if example.is_text:
            return _Made(example, draft=self.drafter.text(example))
        with _naming(example):
            if alone:
                draft = self.drafter.prompt(with_stand_in(example))
                example = replace(example, messages=(*draft.example.prompt_messages, example.messages[-1]))
                return _Made(example, alone, draft=draft)
            draft = self.drafter.whole(example)
        return _Made(draft.example, draft=draft)

    def _encode(self, made: _Made, draft: Draft) -> None:
        example = made.example
        with _naming(example):
            made.turns = ids, spans, openings = draft.encode()
        if example.is_text:
            return
        made.length = length = spans[0][0] + len(openings[0])
        if not 0 < length <= self.max_prompt_tokens:
            made.reason = _unfit(length)
            return
        encoder_decoder = self.drafter.encoder_decoder
        if made.alone:
            made.row = Row(example.id, tuple(ids), (), example, encoder_decoder=encoder_decoder)
            return
        limit = longest_row(length, self.max_tokens, self.room)
        row = row_of_spans(example, ids, spans, limit, openings)
        row = replace(row, encoder_decoder=True) if encoder_decoder else row
        place = len(_learnt(row.example)) - 1 if self.drafter.turns == "all" else -1
        reply = ids[slice(*spans[place])]
        is_content = draft.replies and _is_content(self.drafter.encoder, row.example, reply, draft.replies[place])
        made.row = row if is_content else _with_written_references(row, self.drafter.encoder.tokenizer, reply)
        made.cut = spans[-1][1] > limit

    def _add_teacher(self, teacher: TeacherView, made: Sequence[_Made]) -> None:
        rows = teacher.add_to([one.row for one in made if one.row is not None])
        for one, row in zip(made, rows, strict=True):
            one.row, cut = _cut_for_teacher(row, self.max_tokens, self.room)
            one.cut = one.cut or cut
            one.length = max(one.length, len(row.teacher_prompt_ids or ()))
            if one.length > self.max_prompt_tokens:
                one.reason = _unfit(one.length)


def _num_characters(example: Example) -> int:
    return sum(len(message["content"]) for message in example.messages)


def _unfit(length: int) -> str:
    """Why a prompt of so many tokens is dropped; the tokenizer leaves nothing of some texts."""
    return "prompt_too_long" if length else "empty_prompt"


@contextmanager
def _naming(example: Example) -> Iterator[None]:
    try:
        yield
    except DrklError as error:
        raise DrklError(f"Row {example.id!r}: {error}") from error


def finish_rows(
    chunk: Chunk,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    template: str = "auto",
    encoder_decoder: bool = False,
    room: Room = NO_LIMIT,
    teacher: TeacherView | None = None,
) -> tuple[list[Row], DropReport]:
    """Return the rows of a whole data set and the account of the others, with the arguments of `tokenize_examples`.

    Args:
        chunk: all examples of the data set.
    """
    rows, report = chunk.rows, chunk.report
    report.date = date_told(tokenizer, template) if rows and not encoder_decoder else None
    for weight in dict.fromkeys(text.weight for text in chunk.texts):
        blocks = _blocks([text for text in chunk.texts if text.weight == weight], tokenizer, max_tokens)
        numbered = number_blocks(blocks, len(rows), {row.id for row in rows})
        rows += block_rows(numbered, tokenizer, max_prompt_tokens, encoder_decoder=encoder_decoder)
    report.documents = len(chunk.texts)
    report.kept = len(rows)
    if not rows:
        raise NothingLeft(report, nothing_left(report, chunk.shortest, Lengths(max_prompt_tokens, max_tokens), room))
    if teacher is not None and (other := next((row for row in rows if row.teacher_prompt_ids), None)) is not None:
        report.difference = teacher.difference(other, tokenizer)
    if any(row.example.weight != 1 for row in rows):
        rows = weigh(rows)
        report.per_epoch = len(rows)
        if not rows:
            raise DrklError("The weights of data.sources leave no row; raise one of them.")
    return rows, report


def encode_for(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    template: str = "auto",
    *,
    encoder_decoder: bool,
) -> list[int]:
    """Return the ids after which a model answers ``messages``; an encoder-decoder ignores ``template``."""
    return encode_source(tokenizer, messages) if encoder_decoder else encode_prompt(tokenizer, messages, template)


def weigh(rows: Sequence[Row]) -> list[Row]:
    """Repeat every row as often as its example's weight says; the ids of repeated rows end in ``#2`` and so on.

    With a fraction, as in 1.5, that share of the rows is repeated once more, selected by a hash of their ids.

    >>> rows = [Row(name, (1,), (2,), Example(name, (), weight=1.5)) for name in "abcd"]
    >>> [row.id for row in weigh(rows)]
    ['a', 'b', 'c', 'd', 'b#2', 'd#2']
    """
    share: dict[str, int] = {}
    for weight in dict.fromkeys(row.example.weight for row in rows):
        group = [row.id for row in rows if row.example.weight == weight]
        share |= dict.fromkeys(group, int(weight))
        share |= dict.fromkeys(taken_once_more(group, weight), int(weight) + 1)
    repeated = []
    for copy in range(max(share.values(), default=0)):
        chosen = [row for row in rows if share[row.id] > copy]
        repeated += chosen if not copy else [replace(row, id=free_id(f"{row.id}#{copy + 1}", share)) for row in chosen]
    return repeated


def taken_once_more(ids: Sequence[str], weight: float) -> list[str]:
    """The ids of the rows of a weight, given all of theirs, that its fraction repeats once more."""
    more = round((weight - int(weight)) * len(ids))
    return sorted(ids, key=hash_of_id)[:more] if more else []


def longest_row(prompt: int, max_tokens: int, room: Room) -> int:
    """The tokens of a row that are kept, by those of its prompt: a target has to fit its decoder."""
    return min(max_tokens, prompt + room.decoder) if room.separate and room.decoder is not None else max_tokens


def _cut_for_teacher(row: Row, max_tokens: int, room: Room) -> tuple[Row, bool]:
    """The row with what is left of its response after the teacher's prompt too, and whether that is less."""
    prompt = len(row.teacher_prompt_ids or ())
    left = max(0, longest_row(prompt, max_tokens, room) - prompt)
    if not prompt or len(row.response_ids) <= left:
        return row, False
    return replace(row, response_ids=row.response_ids[:left]), True


def _is_content(encoder: TextEncoder, example: Example, reply: Sequence[int], text: str) -> bool:
    """Whether a reply surely reads as the response's content alone; ``text`` is what the template writes of it."""
    if has_more(example.messages[-1]) or not encoder.keeps_bytes(text):
        return False
    end = encoder.special_texts.get(reply[-1], "") if reply else ""
    return text.removesuffix(end).strip() == example.response.strip()


def _with_written_references(row: Row, tokenizer: PreTrainedTokenizerBase, reply: Sequence[int]) -> Row:
    """A row whose samples are compared with all that the template writes of a reply: calls, reasoning, tags."""
    example = row.example
    content = example.response.strip()
    written = str(tokenizer.decode(list(reply), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
    if has_more(example.messages[-1]):
        references = (written, *example.references)
    elif content and written != content and written.endswith(content):
        references = tuple(written.removesuffix(content) + text for text in example.all_references)
    else:
        return row
    return replace(row, example=replace(example, references=references))


def row_of_spans(
    example: Example,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    max_tokens: int,
    openings: Sequence[Sequence[int]] = (),
) -> Row:
    """Return the row of a tokenised conversation.

    Args:
        example: the conversation.
        ids: all of its tokens.
        spans: the tokens to learn, as (start, end) of each of the assistant's turns; the first starts before
            ``max_tokens``.
        max_tokens: the row ends there.
        openings: for each turn what a model is given besides the ids before it; nothing by default.
    """
    # The beginning of a user's turn at the end would have no loss.
    end = max(min(end, max_tokens) for start, end in spans if start < max_tokens)
    prompt_ids, response_ids = tuple(ids[: spans[0][0]]), tuple(ids[spans[0][0] : end])
    openings = openings or [()] * len(spans)
    # Sampled is the last turn that was not cut; if that is not the last one, the conversation ends with it.
    num_complete = max(1, sum(stop <= end for _, stop in spans))
    replies = _learnt(example)
    if num_complete < len(spans) or (replies and replies[-1] + 1 < len(example.messages)):
        example = replace(example, messages=example.messages[: replies[num_complete - 1] + 1])
    if len(spans) == 1:
        context = (*prompt_ids, *openings[0]) if openings[0] else None
        return Row(example.id, prompt_ids, response_ids, example, sampling_context=context)
    trained = [False] * len(ids)
    for start, stop in spans:
        trained[start:stop] = [True] * (stop - start)
    context = (*ids[: spans[num_complete - 1][0]], *openings[num_complete - 1])
    return Row(example.id, prompt_ids, response_ids, example, tuple(trained[len(prompt_ids) : end]), context)


def _blocks(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[tuple[Text, list[int]]]:
    """Cut the texts, joined by eos, into blocks that overlap by one token; each with the text that it begins in."""
    begin, eos = around_texts(tokenizer)
    stream = [begin]
    owners = [0]
    for number, text in enumerate(texts):
        stream += [*text.ids, eos]
        owners += [number] * (len(text.ids) + 1)
    starts = range(0, len(stream) - 1, max_tokens - 1)
    return [(texts[owners[start + 1]], stream[start : start + max_tokens]) for start in starts]


def around_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the token before the first of joined texts, and the one after each.

    Raises:
        DrklError: the tokenizer has no eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DrklError("Plain text is joined with the tokenizer's eos token, and it has none. Set its eos_token.")
    return eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id, eos


def number_blocks(
    blocks: Iterable[tuple[Text, list[int]]], first: int, taken: Container[str]
) -> Iterator[tuple[str, Text, list[int]]]:
    """Yield each block of texts with an id that is not ``taken`` by another row; the first has the number ``first``."""
    for number, (text, ids) in enumerate(blocks, start=first):
        yield free_id(f"{text.id}/{number}", taken), text, ids


def block_rows(
    blocks: Iterable[tuple[str, Text, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    encoder_decoder: bool,
) -> list[Row]:
    """Return the rows of numbered blocks; an encoder-decoder reads the first half and learns the second."""
    if not encoder_decoder:
        return [_continuation(*block, tokenizer, max_prompt_tokens) for block in blocks]
    around = tokens_around(tokenizer), tokens_around(tokenizer, target=True)
    halves = (_half(*block, tokenizer, max_prompt_tokens, around) for block in blocks)
    return [row for row in halves if row is not None]


def _continuation(
    block_id: str, text: Text, ids: list[int], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> Row:
    """The row of a decoder-only model, which learns every token of a block but the first."""
    # A sample continues the beginning of the block.
    num_shown = max(1, min(len(ids) // 4, max_prompt_tokens))
    block = _text_example(text, block_id, tokenizer, ids[:num_shown], ids[num_shown:])
    return Row(block.id, tuple(ids[:1]), tuple(ids[1:]), block, sampling_context=tuple(ids[:num_shown]))


def _half(
    block_id: str,
    text: Text,
    block_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    around: tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]],
) -> Row | None:
    """The row of an encoder-decoder; None where a block is too short to have two halves."""
    (before, after), (begin, _) = around  # the stream has an end where a text ends, and only there
    ids = block_ids[1:]
    half = min(len(ids) // 2, max_prompt_tokens - len(before) - len(after))
    if half < 1:
        return None
    block = _text_example(text, block_id, tokenizer, ids[:half], ids[half:])
    return Row(block.id, (*before, *ids[:half], *after), (*begin, *ids[half:]), block, encoder_decoder=True)


def _text_example(
    text: Text, block_id: str, tokenizer: PreTrainedTokenizerBase, beginning: list[int], rest: list[int]
) -> Example:
    """A block as a conversation, for display and for sampling."""
    texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in (beginning, rest)]
    messages = ({"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]})
    return Example(block_id, messages, weight=text.weight)


def _empty(example: Example, turns: str, *, alone: bool = False) -> str | None:
    if example.is_text:
        return None if example.response.strip() else "empty_text"
    # A tool may well answer nothing.
    if example.messages[-2]["role"] == "user" and not example.prompt_text.strip():
        return "empty_prompt"
    if alone:
        return None
    replies = _learnt(example)
    if turns == "last":
        replies = replies[-1:] if replies[-1:] == [len(example.messages) - 1] else []
    if not replies:
        return "weight_0"
    checked = [example.messages[index] for index in replies]
    return None if all(reply["content"].strip() or reply.get("tool_calls") for reply in checked) else "empty_response"


def _learnt(example: Example) -> list[int]:
    """The numbers of the assistant's messages that are learnt where all turns are."""
    return [
        index
        for index, message in enumerate(example.messages)
        if message["role"] == "assistant" and index not in example.unlearnt
    ]


def nothing_left(report: DropReport, shortest: int | None, lengths: Lengths, room: Room = NO_LIMIT) -> str:
    """Return the error for a data set of which no row is left; ``shortest`` is its shortest prompt."""
    total = sum(report.dropped.values())
    if not total:
        return "The data set has no rows."
    reasons = ", ".join(f"{count} {_REASONS[reason]}" for reason, count in report.dropped.items())
    message = f"None of the {total} rows can be used: {reasons}."
    if shortest is not None and "prompt_too_long" in report.dropped:
        message += no_prompt_fits(shortest, lengths, room)
    if "weight_0" in report.dropped:
        message += " Give a reply the weight 1, or set data.turns: all if an earlier one has it."
    if report.dropped.keys() - {"prompt_too_long", "weight_0"}:
        message += " Fill the empty fields, or use other data."
    if report.dropped.keys() == {"empty_response"}:
        message += f" {NEEDS_NONE}"
    return message
