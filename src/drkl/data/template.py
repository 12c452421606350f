"""Tokenise conversations: by the tokenizer's chat template, or by one of the templates of ``data.template``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from drkl.data.ends import as_ids, end_of_turn, opening_tag
from drkl.data.fields import REASONING
from drkl.data.pieces import Stream, encode_from_start, eos_of
from drkl.data.rendering import FOLLOW_UP, Writer, instruction_text
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.rendering import Messages

# Digits alone: the same in capitals.
_PROBE = "8406295137084062951370"
_NEXT = "5173840296251738402962"


class Turns(NamedTuple):
    """A conversation's ids, and the (start, end) of every assistant turn in them, its end of turn included.

    ``openings`` has for each turn what the template's generation prompt goes on with after ``ids[:start]`` and the
    conversation does not, such as ``<think>``: a model samples the turn after both.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    openings: list[list[int]]


class _Turn(NamedTuple):
    """A turn as text: all before it, what is learnt, whether that has the end of turn, and the opening."""

    before: str
    reply: str
    ended: bool = False
    opening: str = ""


class Conversation(NamedTuple):
    """A conversation as text, the assistant's turns in it, and who writes it; ``messages`` end with the last turn."""

    writer: Writer
    messages: Messages
    turns: list[_Turn]

    @classmethod
    def last(cls, writer: Writer, messages: Messages) -> Conversation:
        """One of which the last turn is learnt.

        Raises:
            DrklError: as `encode_last`.
        """
        return cls(writer, messages, [_turn(writer, messages, None)])

    @classmethod
    def whole(cls, writer: Writer, messages: Messages) -> Conversation:
        """One of which all turns are learnt.

        Raises:
            DrklError: as `encode_turns`.
        """
        turns: list[_Turn] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                last = messages[: index + 1]
                turns.append(_turn(writer, last, turns[-1] if turns else None))
        return cls(writer, last, turns)

    @property
    def texts(self) -> list[list[str]]:
        """What `encode` is going to encode, or most of it, as `TextEncoder.read` has it."""
        eos = self.writer.tokenizer.eos_token or ""
        pieces: list[str] = []
        said = ""
        for turn in self.turns:
            pieces += (turn.before[len(said) :], turn.reply, "" if turn.ended else eos)
            said = turn.before + turn.reply
        return [pieces, *([turn.before, turn.opening] for turn in self.turns if turn.opening)]

    def encode(self, ends: Sequence[int] = ()) -> Turns:
        """Encode the turns; eos is put after those that nothing ends.

        Raises:
            DrklError: as `encode_last`.
        """
        writer, turns = self.writer, self.turns
        stream = Stream(writer)
        result = Turns(stream.ids, [], [])
        eos = as_ids(writer.tokenizer.eos_token_id)
        text = ""
        for turn, following in zip_longest(turns, turns[1:]):
            stream.add(turn.before[len(text) :])
            start = len(stream.ids)
            text = turn.before + turn.reply
            closing = ""
            if not turn.ended:
                after = following.before[len(text) :] if following else _continuation(writer, self.messages, text)
                closing = opening_tag(writer.tokenizer, after or "", [*eos, *ends])
            stream.add(turn.reply + closing)
            text += closing
            if not (turn.ended or closing or stream.ids[start:][-1:] == eos):
                stream.end()
            result.spans.append((start, len(stream.ids)))
            result.openings.append(_opening_ids(writer, turn))
        return result


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids after which the model answers ``messages`` (which end with the user's).

    ``chat`` is the tokenizer's chat template with its generation prompt, ``alpaca`` and ``minillm`` the instruction
    template of that name, ``plain`` the user's text as it is; ``auto`` is chat where the tokenizer has a chat
    template, else alpaca. Outside chat and jinja, the instruction of a longer conversation is all of its turns, each
    after ``User:`` or ``Assistant:`` (a system message stands first, bare). Jinja text is rendered in a sandbox with
    ``messages``, ``prompt`` (the instruction), ``instruction`` and ``input``, ``bos_token`` and ``eos_token``.

    Args:
        tokenizer: its bos stands first where it adds one itself, except in chat, minillm and in jinja text that
            writes ``bos_token``; never twice.
        messages: ``{"role", "content"}``, first to last, and other fields, which a chat template and jinja text are
            given too.
        template: a name of ``NAMES``, ``chat:NAME`` for one of several chat templates, or jinja text.
        context_start: the character at which the input of a single user message begins, which minillm separates from
            the instruction.
        tools: what a chat template or jinja text is given as ``tools``: json schemas.
        template_kwargs: what it is given besides, by name.

    Raises:
        DrklError: the template refuses the conversation, fails, or is unknown.
    """
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs)
    return encode_from_start(writer, writer.prompt(messages))


def prompt_alone(writer: Writer, messages: Messages) -> str:
    """Return the text of a prompt of the data without a response.

    Raises:
        DrklError: as `encode_prompt`; the chat template leaves out what a message says.
    """
    text = writer.prompt(messages)
    if writer.kind == "chat":
        _check_written(writer, messages, text)
    return text


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
) -> list[int]:
    """Return the ids of the last message, the assistant's, up to and including its end of turn.

    They are those of the turn in `encode_last`, which has the same arguments.

    Raises:
        DrklError: as `encode_last`.
    """
    given: dict[str, Any] = {"context_start": context_start, "tools": tools, "template_kwargs": template_kwargs}
    given["ends"] = ends
    ids, ((start, _),), _ = encode_last(tokenizer, messages, template, **given)
    return ids[start:]


def encode_last(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
) -> Turns:
    """Return the ids of a conversation up to the end of its last turn, the assistant's, which is the only span.

    They are the conversation as the template writes it, without what it writes after the end of turn (often a newline).
    The end of turn is the first special token after the text; where the template writes none, the tag of the user's
    next turn if ``ends`` has it, else an appended eos (see `drkl.data.ends`). The turn begins where
    ``encode_prompt(tokenizer, messages[:-1])`` ends, or where that begins an opening.

    Where the tokenizer would merge the end of the prompt with the beginning of the response, the two are encoded
    separately: a generating model sees the prompt alone and could never produce the merged token.

    An answer whose text begins as the opening does goes on after the generation prompt, also where the template would
    leave its reasoning out: that is for earlier turns.

    ``ends`` are the ids that the model's own settings list as ends; the other arguments are those of `encode_prompt`.

    Raises:
        DrklError: the chat template refuses the conversation, writes the prompt differently once the response follows,
            or leaves the response out, or a part of it; the tokenizer has no eos token and the template ends no turn.
    """
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs)
    return Conversation.last(writer, messages).encode(ends)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
) -> Turns:
    """Return the ids of a whole conversation, which ends with the assistant's message, and the assistant's turns.

    Each turn has the ids that `encode_last` gives for the conversation up to there. Where a template writes no
    end of turn, eos is put after every turn of the assistant. In alpaca and minillm a later user message is a further
    ``### Instruction:``.

    Raises:
        DrklError: as `encode_last`; a template that writes an earlier turn differently once others follow it.
    """
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs)
    return Conversation.whole(writer, messages).encode(ends)


def _opening_ids(writer: Writer, turn: _Turn) -> list[int]:
    if not turn.opening:
        return []
    before = encode_from_start(writer, turn.before)
    return encode_from_start(writer, turn.before + turn.opening)[len(before) :]


def _turn(writer: Writer, messages: Messages, previous: _Turn | None) -> _Turn:
    """The last turn of a conversation, the assistant's; ``previous`` is the one before it, if that is learnt too."""
    text = previous.before + previous.reply if previous else ""
    kind = writer.kind
    if previous and kind in ("alpaca", "minillm"):
        last = max(i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant")
        prompt = text + FOLLOW_UP.format(instruction=instruction_text(messages[last + 1 : -1]))
    else:
        prompt = writer.prompt(messages[:-1])
    turn = _chat_turn(writer, messages, prompt) if kind == "chat" else _Turn(prompt, messages[-1].get("content") or "")
    if not turn.before.startswith(text):
        what = "chat template" if kind == "chat" else f"template {writer.template!r}"
        raise DrklError(
            f"The {what} writes the assistant's earlier turns differently once others follow, so a conversation cannot "
            "be learnt in one piece: set data.turns: last, or choose another data.template."
        )
    return turn


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str = "auto", ends: Sequence[int] = ()) -> list[int]:
    """Return the ids that end a generated answer: eos, the template's end of turn, and those of ``ends``.

    Rows of another template end with eos, but the end of a turn in the tokenizer's chat template, which an instruct
    model may write there all the same, ends an answer too.

    Args:
        tokenizer: the run's.
        template: as for ``encode_prompt``.
        ends: the ids that a model's own settings list as ends.

    Raises:
        DrklError: as ``encode_response``.
    """
    if Writer(tokenizer, template).kind == "chat":
        taught = [_chat_end(tokenizer, template, ends)]
    else:
        taught = [eos_of(tokenizer)]
        if tokenizer.chat_template:
            with suppress(DrklError):  # it writes no row here
                taught.append(_chat_end(tokenizer, "auto", ends))
    return list(dict.fromkeys([*as_ids(tokenizer.eos_token_id), *taught, *ends]))


def _chat_end(tokenizer: PreTrainedTokenizerBase, template: str, ends: Sequence[int]) -> int:
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        return encode_response(tokenizer, messages, template, ends=ends)[-1]
    except DrklError:  # some templates take no conversation without a system message
        system = {"role": "system", "content": _PROBE}
        return encode_response(tokenizer, [system, *messages], template, ends=ends)[-1]


def _chat_turn(writer: Writer, messages: Messages, prompt: str) -> _Turn:
    """The last turn as the chat template writes it; ``prompt`` ends with its generation prompt."""
    _check_written(writer, messages[:-1], prompt)
    full = writer.conversation(messages)
    head, tail = _around(writer, messages, full)
    cut = len(prompt) if full.startswith(prompt) else min(_num_common(prompt, full), _num_common(prompt, head))
    if _lacks(full.removesuffix(tail), cut, messages[-1].get("content")):
        # What the template leaves out of an answer may be what its generation prompt opens.
        whole = f"{head}{messages[-1]['content']}{tail}"
        if cut == len(prompt) or not whole.startswith(prompt):
            raise DrklError(
                "The chat template leaves out a part of the answer. Put reasoning into the field reasoning_content if "
                "the template writes that, or set data.template to jinja text."
            )
        full, cut = whole, len(prompt)
    before = prompt[: _border(writer, messages, prompt, cut)]
    said = full.removesuffix(tail)
    end = end_of_turn(writer.encoder, tail, lambda: _continuation(writer, messages, said))
    reply = said[len(before) :] + tail[:end]
    return _Turn(before, reply, ended=end > 0, opening=prompt[len(before) :])


def _check_written(writer: Writer, messages: Messages, prompt: str) -> None:
    """Raise DrklError where the prompt does not depend on a message at all."""
    for place, message in enumerate(messages):
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or content.strip() in prompt:
            continue
        try:
            changed = writer.prompt([*messages[:place], {**message, "content": _PROBE}, *messages[place + 1 :]])
        except DrklError:
            continue  # a template that refuses the placeholder reads it
        if changed == prompt:
            raise DrklError(
                f"The chat template leaves out what the {message['role']} says in message {place + 1}, so the models "
                "would not see it. Give the tokenizer another chat_template, or set data.template to alpaca, plain or "
                "jinja text."
            )


def _around(writer: Writer, messages: Messages, full: str) -> tuple[str, str]:
    """What the chat template writes before the last message's content and after it."""
    # A placeholder shows it: the content itself may contain anything, special tokens too. Some templates write either
    # content or calls of tools.
    last = messages[-1]
    said = {"role": last["role"]} if last.get("tool_calls") else last
    probe = writer.conversation([*messages[:-1], {**said, "content": _PROBE}])
    head, placeholder, tail = probe.rpartition(_PROBE)
    if placeholder and full.endswith(tail):
        return head, tail
    if probe == full:
        raise DrklError("The chat template leaves the assistant's last message out; there is nothing to train on.")
    # The end depends on the message, as where calls of tools end in a token of their own.
    rest = full.rstrip()
    token = max((token for token in writer.encoder.special_tokens if rest.endswith(token)), key=len, default="")
    return full[: _num_common(full, probe)], full[len(rest) - len(token) :] if token else ""


def _border(writer: Writer, messages: Messages, prompt: str, cut: int) -> int:
    """The character at which the row's prompt ends: ``cut``, or the next place before it where a token ends."""
    if cut == len(prompt):
        return cut
    least = _num_common(prompt, writer.conversation(messages[:-1]))
    ids = encode_from_start(writer, prompt)
    while cut > least and (part := encode_from_start(writer, prompt[:cut])) != ids[: len(part)]:
        cut -= 1
    if cut <= least:
        raise DrklError(
            f"The chat template ends a prompt with {prompt[-40:]!r}, but a whole conversation does not go on from "
            "there, so what the student should write after the prompt is undefined. Give the tokenizer another "
            "chat_template, or set data.template to alpaca, plain or jinja text."
            + (_REASONED if any(_is_reasoned(message) for message in messages[:-1]) else "")
        )
    return cut


_REASONED = (
    " Or remove the reasoning from the earlier messages, and the content beside their tool_calls: some templates write "
    "these only as long as no answer follows."
)


def _is_reasoned(message: Mapping[str, Any]) -> bool:
    return any(message.get(name) for name in REASONING) or bool(message.get("tool_calls") and message.get("content"))


def _num_common(text: str, other: str) -> int:
    """The number of characters that two texts begin with alike."""
    length = min(len(text), len(other))
    return next((place for place in range(length) if text[place] != other[place]), length)


def _lacks(text: str, start: int, content: Any) -> bool:
    """Whether a part of the content is neither in a text nor, written in another way, in what follows ``start``."""
    if not isinstance(content, str):
        return False
    wanted, written = "".join(content.split()), "".join(text[start:].split())
    return len(written) < len(wanted) and wanted not in "".join(text.split())


def _continuation(writer: Writer, messages: Messages, said: str) -> str | None:
    """What the template writes between the assistant's last message and a next one; None if it refuses.

    The next one is the user's, or a tool's where the message calls tools; ``said`` is all text up to the end of the
    calls. Another rendering of every row, so it is asked for only where the template's own end leaves a question.
    """
    if writer.kind != "chat":
        return None
    last = messages[-1]
    calls = last.get("tool_calls")
    spoken = last if calls else {**last, "content": _PROBE}
    try:
        text = writer.conversation([*messages[:-1], spoken, {"role": "tool" if calls else "user", "content": _NEXT}])
    except DrklError:
        return None
    before, found, _ = text.rpartition(_NEXT)
    start = before.find(said) + len(said) if calls else before.rfind(_PROBE) + len(_PROBE)
    return before[start:] if found and before[:start].endswith(said if calls else _PROBE) else None
