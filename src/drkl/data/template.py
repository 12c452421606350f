"""Tokenise conversations: by the tokenizer's chat template, or by one of the templates of ``data.template``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from drkl.data.rendering import FOLLOW_UP, Writer
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.rendering import Messages

_PROBE = "drkl0content0probe"


class Turns(NamedTuple):
    """A conversation's ids, and the (start, end) of every assistant turn in them, its end of turn included."""

    ids: list[int]
    spans: list[tuple[int, int]]


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
) -> list[int]:
    """Return the ids of the last message, the assistant's, up to and including its end of turn.

    ``encode_prompt(tokenizer, messages[:-1]) + encode_response(tokenizer, messages)`` is the templated conversation up
    to the end of turn; what the template writes after that (often a newline) is left out. The end of turn is the
    tokenizer's eos where the template writes it, else the first special token after the text, else an appended eos.

    Where the tokenizer would merge the end of the prompt with the beginning of the response, the two are encoded
    separately: a generating model sees the prompt alone and could never produce the merged token.

    Raises:
        DrklError: the chat template refuses the conversation, does not begin it with its own generation prompt, or
            leaves the response out; the tokenizer has no eos token and the template ends no turn.
    """
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs)
    prompt = writer.prompt(messages[:-1])
    text, ended = _response_text(writer, prompt, messages)
    ids = _encode_pieces(writer, [prompt, text], begins=True)[1]
    return ids if ended else [*ids, _eos(tokenizer)]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Turns:
    """Return the ids of a whole conversation, which ends with the assistant's message, and the assistant's turns.

    Each turn has the ids that ``encode_response`` gives for the conversation up to there. Where a template writes no
    end of turn, eos is put after every turn of the assistant. In alpaca and minillm a later user message is a further
    ``### Instruction:``.

    Raises:
        DrklError: as ``encode_response``; a template that writes an earlier turn differently once others follow it.
    """
    writer = Writer(tokenizer, template, context_start, tools, template_kwargs)
    runs: list[list[str]] = [[]]  # pieces of text, broken where an eos that is no text comes between
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    text = ""
    ended = True
    for index, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        prompt = _prompt_before(writer, messages[:index], text)
        between = prompt[len(text) :]
        if not ended and tokenizer.eos_token and between.startswith(tokenizer.eos_token):
            runs[-1][-1] += tokenizer.eos_token
            between, ended = between.removeprefix(tokenizer.eos_token), True
        if not ended:
            runs.append([])
        reply, ended = _response_text(writer, prompt, messages[: index + 1])
        runs[-1] += [between, reply]
        text = prompt + reply
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, run in enumerate(runs):
        for place, piece in enumerate(_encode_pieces(writer, run, begins=number == 0)):
            if place % 2:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        if number < len(runs) - 1 or not ended:
            ids.append(_eos(tokenizer))
            spans[-1] = (spans[-1][0], len(ids))
    return Turns(ids, spans)


def _prompt_before(writer: Writer, messages: Messages, text: str) -> str:
    """The prompt of a turn, which continues the ``text`` of the turns before it."""
    kind = writer.kind
    if text and kind in ("alpaca", "minillm"):
        return text + FOLLOW_UP.format(instruction=messages[-1]["content"])
    prompt = writer.prompt(messages)
    if not prompt.startswith(text):
        what = "chat template" if kind == "chat" else f"template {writer.template!r}"
        raise DrklError(
            f"The {what} writes the assistant's earlier turns differently once others follow, so a conversation cannot "
            "be learnt in one piece: set data.turns: last, or choose another data.template."
        )
    return prompt


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a generated response: eos, and the template's end of turn if that is another token.

    Raises:
        DrklError: as ``encode_response``.
    """
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    last = encode_response(tokenizer, messages)[-1]
    eos = tokenizer.eos_token_id
    return [last] if eos is None or eos == last else [eos, last]


def _response_text(writer: Writer, prompt: str, messages: Messages) -> tuple[str, bool]:
    """Return the text from the prompt's end to the end of turn, and whether it holds the end of turn."""
    if writer.kind != "chat":
        return messages[-1]["content"], False
    full = writer.conversation(messages)
    if not full.startswith(prompt):
        raise DrklError(
            f"The chat template ends a prompt with {prompt[-40:]!r}, but a whole conversation does not go on from "
            "there, so what the student should write after the prompt is undefined. Give the tokenizer another "
            "chat_template, or none for the Alpaca template."
        )
    # A placeholder shows what follows the content, which may itself contain anything, special tokens too.
    probe = writer.conversation([*messages[:-1], {**messages[-1], "content": _PROBE}])
    _, placeholder, suffix = probe.rpartition(_PROBE)
    if not placeholder or not full.endswith(suffix):
        raise DrklError("The chat template leaves the assistant's last message out; there is nothing to train on.")
    content = full[len(prompt) : len(full) - len(suffix)]
    end = _end_of_turn(writer.tokenizer, suffix)
    return content + suffix[:end], end > 0


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, suffix: str) -> int:
    """Return the offset in ``suffix`` just past the token that ends the turn; 0 if none does."""
    eos = tokenizer.eos_token
    if eos and eos in suffix:
        return suffix.index(eos) + len(eos)
    specials = {str(token) for token in tokenizer.all_special_tokens}
    specials |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    hits = [(suffix.index(token), -len(token)) for token in specials if token in suffix]
    if not hits:
        return 0
    start, negative_length = min(hits)
    return start - negative_length


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


def _encode_pieces(writer: Writer, pieces: Sequence[str], *, begins: bool) -> list[list[int]]:
    """Encode pieces of one text as they stand in it, each with its own ids.

    Where the tokenizer would merge the beginning of a piece into the piece before, the piece is encoded by itself.
    """

    def encode(text: str) -> list[int]:
        return _encode_from_start(writer, text) if begins else _encode(writer.tokenizer, text)

    separate = [encode(pieces[0]), *(_encode(writer.tokenizer, piece) for piece in pieces[1:])]
    if [token for ids in separate for token in ids] == encode("".join(pieces)):
        return separate
    result: list[list[int]] = []
    before: list[int] = []
    text = ""
    for piece, alone in zip(pieces, separate, strict=True):
        text += piece
        ids = encode(text)
        result.append(ids[len(before) :] if ids[: len(before)] == before else alone)
        before = ids
    return result


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DrklError(
            "The tokenizer has no eos token and its template ends no turn with a special token: the student could "
            "never learn to stop. Set the tokenizer's eos_token."
        )
    return int(tokenizer.eos_token_id)
