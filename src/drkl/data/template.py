"""Tokenise conversations: by the tokenizer's chat template, or by one of the templates of ``data.template``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from drkl.data.ends import as_ids, end_of_turn, opening_tag, special_tokens
from drkl.data.rendering import FOLLOW_UP, Writer, instruction_text
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.rendering import Messages

# Digits alone: the same in capitals.
_PROBE = "8406295137084062951370"
_NEXT = "5173840629517384062951"


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
            writes ``bos_token``.
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
    return _encode_from_start(writer, writer.prompt(messages))


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
    The end of turn is the first special token after the text; where the template writes none, the tag of the next turn
    if ``ends`` has it, else an appended eos (see `drkl.data.ends`). The turn begins where
    ``encode_prompt(tokenizer, messages[:-1])`` ends, or where that begins an opening.

    Other arguments are those of `encode_prompt`; ``ends`` are the ids that the model's own settings list as ends.

    Where the tokenizer would merge the end of the prompt with the beginning of the response, the two are encoded
    separately: a generating model sees the prompt alone and could never produce the merged token.

    An answer whose text begins as the opening does goes on after the generation prompt, also where the template would
    leave its reasoning out: that is for earlier turns.

    Raises:
        DrklError: the chat template refuses the conversation, writes the prompt differently once the response follows,
            or leaves the response out, or a part of it; the tokenizer has no eos token and the template ends no turn.
    """
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs, ends)
    return _encode_turns(writer, [_turn(writer, messages, None)])


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
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs, ends)
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            following = messages[index + 1] if index + 1 < len(messages) else None
            turns.append(_turn(writer, messages[: index + 1], turns[-1] if turns else None, following))
    return _encode_turns(writer, turns)


def _encode_turns(writer: Writer, turns: Sequence[_Turn]) -> Turns:
    """Encode the turns of one conversation; eos is put after those that the template does not end."""
    stream = _Stream(writer)
    result = Turns(stream.ids, [], [])
    text = ""
    ended = True
    for turn in turns:
        between = turn.before[len(text) :]
        # Jinja text may write the eos that stands there already.
        stream.add(between if ended else between.removeprefix(writer.tokenizer.eos_token or ""))
        start = len(stream.ids)
        stream.add(turn.reply)
        if not turn.ended and stream.ids[start:][-1:] != [_eos(writer.tokenizer)]:
            stream.end()
        result.spans.append((start, len(stream.ids)))
        prompt = _encode_from_start(writer, turn.before + turn.opening) if turn.opening else []
        result.openings.append(prompt[len(_encode_from_start(writer, turn.before)) :] if turn.opening else [])
        text, ended = turn.before + turn.reply, turn.ended
    return result


def _turn(
    writer: Writer, messages: Messages, previous: _Turn | None, following: Mapping[str, Any] | None = None
) -> _Turn:
    """The last turn of a conversation, the assistant's.

    ``previous`` is the one before it, if that is learnt too, and ``following`` the message after it, if there is one.
    """
    text = previous.before + previous.reply if previous else ""
    kind = writer.kind
    if previous and kind in ("alpaca", "minillm"):
        last = max(i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant")
        prompt = text + FOLLOW_UP.format(instruction=instruction_text(messages[last + 1 : -1]))
    else:
        prompt = writer.prompt(messages[:-1])
    if kind == "chat":
        turn = _chat_turn(writer, messages, prompt, following)
    else:
        turn = _Turn(prompt, messages[-1].get("content") or "")
    if not turn.before.startswith(text):
        what = "chat template" if kind == "chat" else f"template {writer.template!r}"
        raise DrklError(
            f"The {what} writes the assistant's earlier turns differently once others follow, so a conversation cannot "
            "be learnt in one piece: set data.turns: last, or choose another data.template."
        )
    return turn


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str = "auto", ends: Sequence[int] = ()) -> list[int]:
    """Return the ids that end a generated answer: eos, the template's end of turn, and those of ``ends``.

    Args:
        tokenizer: the run's.
        template: as for ``encode_prompt``.
        ends: the ids that a model's own settings list as ends.

    Raises:
        DrklError: as ``encode_response``.
    """
    if Writer(tokenizer, template).kind != "chat":
        taught = _eos(tokenizer)
    else:
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            taught = encode_response(tokenizer, messages, template, ends=ends)[-1]
        except DrklError:  # some templates take no conversation without a system message
            system = {"role": "system", "content": _PROBE}
            taught = encode_response(tokenizer, [system, *messages], template, ends=ends)[-1]
    return list(dict.fromkeys([*as_ids(tokenizer.eos_token_id), taught, *ends]))


def _chat_turn(writer: Writer, messages: Messages, prompt: str, following: Mapping[str, Any] | None) -> _Turn:
    """The last turn as the chat template writes it; ``prompt`` ends with its generation prompt."""
    tokenizer = writer.tokenizer
    full = writer.conversation(messages)
    head, tail = _around(writer, messages, full)
    cut = len(prompt) if full.startswith(prompt) else min(_num_common(prompt, full), _num_common(prompt, head))
    if _lacks(full[: len(full) - len(tail)], cut, messages[-1].get("content")):
        # What the template leaves out of an answer may be what its generation prompt opens.
        whole = f"{head}{messages[-1]['content']}{tail}"
        if cut == len(prompt) or not whole.startswith(prompt):
            raise DrklError(
                "The chat template leaves out a part of the answer. Put reasoning into the field reasoning_content if "
                "the template writes that, or set data.template to jinja text."
            )
        full, cut = whole, len(prompt)
    before = prompt[: _border(writer, messages, prompt, cut)]
    end = end_of_turn(tokenizer, tail, lambda: _continuation(writer, messages, following))
    reply = full[len(before) : len(full) - len(tail) + end]
    if not end:
        between = _continuation(writer, messages, following) or ""
        tag = opening_tag(tokenizer, between, [*as_ids(tokenizer.eos_token_id), *writer.ends])
        reply, end = reply + tag, len(tag)
    return _Turn(before, reply, ended=end > 0, opening=prompt[len(before) :])


def _continuation(writer: Writer, messages: Messages, following: Mapping[str, Any] | None) -> str | None:
    """What the template writes between the last message and the ``following`` one; None if it refuses.

    Without a following one, one of the user's. This is another rendering of every row, so it is asked for only where
    the template's own end leaves a question.
    """
    after = {**(following or {"role": "user"}), "content": _NEXT}
    try:
        text = writer.conversation([*messages[:-1], {**messages[-1], "content": _PROBE}, after])
    except DrklError:
        return None
    before, found, _ = text.rpartition(_NEXT)
    return before.rpartition(_PROBE)[2] if found and _PROBE in before else None


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
    token = max((token for token in special_tokens(writer.tokenizer) if rest.endswith(token)), key=len, default="")
    return full[: _num_common(full, probe)], full[len(rest) - len(token) :] if token else ""


def _border(writer: Writer, messages: Messages, prompt: str, cut: int) -> int:
    """The character at which the row's prompt ends: ``cut``, or the next place before it where a token ends."""
    if cut == len(prompt):
        return cut
    least = _num_common(prompt, writer.conversation(messages[:-1]))
    ids = _encode_from_start(writer, prompt)
    while cut > least and (part := _encode_from_start(writer, prompt[:cut])) != ids[: len(part)]:
        cut -= 1
    if cut <= least:
        raise DrklError(
            f"The chat template ends a prompt with {prompt[-40:]!r}, but a whole conversation does not go on from "
            "there, so what the student should write after the prompt is undefined. Give the tokenizer another "
            "chat_template, or set data.template to alpaca, plain or jinja text."
        )
    return cut


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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: over-long prompts are dropped and counted by us, not warned about by the tokenizer.
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # what tokenizers raises, for instance for a word without an unknown token
            raise
        raise DrklError(f"The tokenizer cannot encode {text[:60]!r}: {error}.") from error
    return list(ids)


def _encode_from_start(writer: Writer, text: str) -> list[int]:
    """Encode text that begins a sequence; some templates write their own bos, or want none."""
    tokenizer = writer.tokenizer
    ids = _encode(tokenizer, text)
    if tokenizer.bos_token_id is None or writer.kind in ("chat", "minillm") or "bos_token" in writer.template:
        return ids
    adds_bos = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos else ids


class _Stream:
    """Encodes one text piece by piece, each piece to ids of its own.

    Where the tokenizer would merge the beginning of a piece into the piece before, the piece is encoded by itself.
    """

    def __init__(self, writer: Writer) -> None:
        self.ids: list[int] = []
        self._writer = writer
        self._text = ""
        self._whole: list[int] = []

    def add(self, piece: str) -> None:
        """Append the ids of a piece."""
        self._text += piece
        known = self._whole
        self._whole = _encode_from_start(self._writer, self._text)
        if self._whole[: len(known)] == known:
            self.ids += self._whole[len(known) :]
        else:
            self.ids += self._apart(piece)

    def end(self) -> None:
        """Append eos."""
        self.ids.append(_eos(self._writer.tokenizer))
        self._text += str(self._writer.tokenizer.eos_token)
        self._whole = _encode_from_start(self._writer, self._text)

    def _apart(self, piece: str) -> list[int]:
        """The ids of a piece by itself; sentencepiece writes a blank before a text, which the piece does not have."""
        tokenizer = self._writer.tokenizer
        alone = _encode(tokenizer, piece)
        text = _decode(tokenizer, self._whole)
        for context in ("", "\n", "a", "."):
            start, ids = _encode(tokenizer, context), _encode(tokenizer, context + piece)
            if ids[: len(start)] == start and _decode(tokenizer, self.ids + ids[len(start) :]) == text:
                return ids[len(start) :]
        return alone


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DrklError(
            "The tokenizer has no eos token and its template ends no turn with a special token: the student could "
            "never learn to stop. Set the tokenizer's eos_token."
        )
    return int(tokenizer.eos_token_id)
