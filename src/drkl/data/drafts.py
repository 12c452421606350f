"""An example as the texts that its ids are made of: those of many examples are encoded at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from drkl.data.encoding import TextEncoder
from drkl.data.pieces import encode_from_start
from drkl.data.rendering import Sign, Writer, instruction_text
from drkl.data.seq2seq import target_ids
from drkl.data.template import Conversation, Turns, prompt_alone
from drkl.data.written import as_written

if TYPE_CHECKING:
    from drkl.data.examples import Example


class Draft(NamedTuple):
    """An example as its template reads it, the texts to encode, and what makes ids of them."""

    example: Example
    encode: Callable[[], Turns]
    texts: Sequence[Sequence[str]] = ()
    sources: Sequence[str] = ()
    targets: Sequence[str] = ()
    replies: Sequence[str] = ()
    """What is written of each learnt turn, without an eos that is put after it; none where texts are not kept."""


@dataclass
class Drafter:
    """Writes examples for one tokenizer.

    Args:
        encoder: encodes the texts.
        template: as ``data.template``.
        turns: ``last`` or ``all`` of the assistant's turns are learnt.
        encoder_decoder: whether an encoder reads the prompt.
        ends: the ids that the model's own settings list as ends.
        known: what the template is known to write, as `as_written` has it.
    """

    encoder: TextEncoder
    template: str = "auto"
    turns: str = "last"
    encoder_decoder: bool = False
    ends: Sequence[int] = ()
    known: set[Sign] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._plain = Writer(self.encoder.tokenizer, self.template, shared=self.encoder)

    def whole(self, example: Example) -> Draft:
        """A conversation and the turns in it that are learnt.

        Raises:
            DrklError: as `as_written`, `encode_last` and `encode_turns`; `Draft.encode` raises as the last two.
        """
        example = self._as_written(example)
        if self.encoder_decoder:
            source, target = instruction_text(example.prompt_messages), example.response
            return Draft(example, partial(self._pair, source, target), sources=[source], targets=[target])
        make = Conversation.whole if self.turns == "all" else Conversation.last
        talk = make(self._writer(example), example.messages)
        learnt: Sequence[int] = [0]
        if self.turns == "all":
            spoken = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
            learnt = [place for place, index in enumerate(spoken) if index not in example.unlearnt]
        replies = [talk.turns[place].reply for place in learnt]
        return Draft(example, partial(self._turns, talk, learnt), texts=talk.texts, replies=replies)

    def prompt(self, answered: Example) -> Draft:
        """The prompt of an example, after which nothing is learnt; its response is read by templates that need one.

        Raises:
            DrklError: as `as_written` and `prompt_alone`.
        """
        answered = self._as_written(answered)
        if self.encoder_decoder:
            return self.source(answered)
        writer = self._writer(answered)
        text = prompt_alone(writer, answered.prompt_messages)
        return Draft(answered, lambda: _nothing_after(encode_from_start(writer, text)), texts=[[text]])

    def text(self, example: Example) -> Draft:
        """A plain text, in which there are no turns."""
        text = example.response
        return Draft(example, lambda: Turns(self.encoder.ids(text), [], []), texts=[[text]])

    def source(self, example: Example) -> Draft:
        """The prompt of an example as an encoder reads it."""
        text = instruction_text(example.prompt_messages)
        return Draft(example, lambda: _nothing_after(self.encoder.framed(text).ids), sources=[text])

    def read(self, drafts: Sequence[Draft]) -> None:
        """Encode what these drafts need at once."""
        self.encoder.read(
            (text for draft in drafts for text in draft.texts),
            sources=(text for draft in drafts for text in draft.sources),
            targets=(text for draft in drafts for text in draft.targets),
        )

    def _as_written(self, example: Example) -> Example:
        tokenizer = self.encoder.tokenizer
        return as_written(example, tokenizer, self.template, self.known, encoder_decoder=self.encoder_decoder)

    def _writer(self, example: Example) -> Writer:
        given = (example.context_start, example.tools, example.template_kwargs)
        if given == (None, None, None):
            return self._plain
        return replace(self._plain, context_start=given[0], tools=given[1], template_kwargs=given[2])

    def _pair(self, source: str, target: str) -> Turns:
        ids = self.encoder.framed(source).ids
        ids, start = ids + target_ids(self.encoder, target), len(ids)
        return Turns(ids, [(start, len(ids))], [[]])

    def _turns(self, talk: Conversation, learnt: Sequence[int]) -> Turns:
        ids, spans, openings = talk.encode(self.ends)
        return Turns(ids, [spans[place] for place in learnt], [openings[place] for place in learnt])


def with_stand_in(example: Example) -> Example:
    """A prompt alone with a response in its place, for templates that write no empty ones."""
    return replace(example, messages=(*example.prompt_messages, {"role": "assistant", "content": "0"}))


def _nothing_after(ids: list[int]) -> Turns:
    return Turns(ids, [(len(ids), len(ids))], [[]])
