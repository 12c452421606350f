"""Tokenise conversations: by the tokenizer's chat template, or by one of the templates of ``data.template``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from drkl.data.ends import as_ids, end_of_turn, opening_tag
from drkl.errors import DrklError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Messages = Sequence[Mapping[str, str]]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
MINILLM_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
FOLLOW_UP = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
NAMES = ("auto", "chat", "alpaca", "minillm", "plain")
_PROBE = "drkl0content0probe"
_NEXT = "drkl0next0probe"


class Turns(NamedTuple):
    """A conversation's ids, and the (start, end) of every assistant turn in them, its end of turn included."""

    ids: list[int]
    spans: list[tuple[int, int]]


def check_template(template: str) -> None:
    """Raise DrklError unless a template is a name of ``NAMES`` or a jinja template.

    Raises:
        DrklError: an unknown name, or jinja that does not parse (with its line).
    """
    if template in NAMES:
        return
    if "{{" not in template and "{%" not in template:
        raise DrklError(
            f"there is no template {template!r}; expected {', '.join(NAMES)}, or jinja text with {{{{ prompt }}}} or "
            f"messages in it.{did_you_mean(template, NAMES)}"
        )
    _compiled(template)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
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
        messages: ``{"role", "content"}``, first to last.
        template: a name of ``NAMES``, or jinja text.
        context_start: the character at which the input of a single user message begins, which minillm separates from
            the instruction.

    Raises:
        DrklError: the template refuses the conversation, or is unknown.
    """
    return _encode_from_start(tokenizer, _prompt_text(tokenizer, messages, template, context_start), template)


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    ends: Sequence[int] = (),
) -> list[int]:
    """Return the ids of the last message, the assistant's, up to and including its end of turn.

    ``encode_prompt(tokenizer, messages[:-1]) + encode_response(tokenizer, messages)`` is the templated conversation up
    to the end of turn; what the template writes after that (often a newline) is left out. The end of turn is the
    first special token after the text; where the template writes none, the tag of the user's next turn if ``ends`` has
    it, else an appended eos (see `drkl.data.ends`). ``ends`` are the ids that the model's own settings list as ends.

    Where the tokenizer would merge the end of the prompt with the beginning of the response, the two are encoded
    separately: a generating model sees the prompt alone and could never produce the merged token.

    Raises:
        DrklError: the chat template refuses the conversation, does not begin it with its own generation prompt, or
            leaves the response out; the tokenizer has no eos token and the template ends no turn.
    """
    prompt = _prompt_text(tokenizer, messages[:-1], template, context_start)
    text, ended = _response_text(tokenizer, prompt, messages, template)
    closing = "" if ended else _closing(tokenizer, messages, template, ends)
    ids = _encode_pieces(tokenizer, [prompt, text + closing], template, begins=True)[1]
    return ids if ended or closing else [*ids, _eos(tokenizer)]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    context_start: int | None = None,
    ends: Sequence[int] = (),
) -> Turns:
    """Return the ids of a whole conversation, which ends with the assistant's message, and the assistant's turns.

    Each turn has the ids that ``encode_response`` gives for the conversation up to there. Where a template writes no
    end of turn, eos is put after every turn of the assistant. In alpaca and minillm a later user message is a further
    ``### Instruction:``.

    Raises:
        DrklError: as ``encode_response``; a template that writes an earlier turn differently once others follow it.
    """
    runs: list[list[str]] = [[]]  # pieces of text, broken where an eos that is no text comes between
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    text = ""
    ended = True
    for index, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        prompt = _prompt_before(tokenizer, messages[:index], template, context_start, text)
        between = prompt[len(text) :]
        if not ended and (tag := opening_tag(tokenizer, between, [*as_ids(tokenizer.eos_token_id), *ends])):
            runs[-1][-1] += tag
            between, ended = between.removeprefix(tag), True
        if not ended:
            runs.append([])
        reply, ended = _response_text(tokenizer, prompt, messages[: index + 1], template)
        runs[-1] += [between, reply]
        text = prompt + reply
    if not ended and (tag := _closing(tokenizer, messages[: last + 1], template, ends)):
        runs[-1][-1] += tag
        ended = True
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, run in enumerate(runs):
        for place, piece in enumerate(_encode_pieces(tokenizer, run, template, begins=number == 0)):
            if place % 2:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        if number < len(runs) - 1 or not ended:
            ids.append(_eos(tokenizer))
            spans[-1] = (spans[-1][0], len(ids))
    return Turns(ids, spans)


def _prompt_before(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str, context_start: int | None, text: str
) -> str:
    """The prompt of a turn, which continues the ``text`` of the turns before it."""
    kind = _kind(tokenizer, template)
    if text and kind in ("alpaca", "minillm"):
        return text + FOLLOW_UP.format(instruction=messages[-1]["content"])
    prompt = _prompt_text(tokenizer, messages, template, context_start)
    if not prompt.startswith(text):
        what = "chat template" if kind == "chat" else f"template {template!r}"
        raise DrklError(
            f"The {what} writes the assistant's earlier turns differently once others follow, so a conversation cannot "
            "be learnt in one piece: set data.turns: last, or choose another data.template."
        )
    return prompt


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str = "auto", ends: Sequence[int] = ()) -> list[int]:
    """Return the ids that end a generated answer: eos, the template's end of turn, and those of ``ends``.

    Args:
        tokenizer: the run's.
        template: as for ``encode_prompt``.
        ends: the ids that a model's own settings list as ends.

    Raises:
        DrklError: as ``encode_response``.
    """
    if _kind(tokenizer, template) != "chat":
        taught = _eos(tokenizer)
    else:
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            taught = encode_response(tokenizer, messages, template, ends=ends)[-1]
        except DrklError:  # some templates take no conversation without a system message
            system = {"role": "system", "content": _PROBE}
            taught = encode_response(tokenizer, [system, *messages], template, ends=ends)[-1]
    return list(dict.fromkeys([*as_ids(tokenizer.eos_token_id), taught, *ends]))


def _kind(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    if template == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat" and not tokenizer.chat_template:
        raise DrklError(
            "data.template is 'chat', but the tokenizer has no chat template; use alpaca, minillm, plain or jinja text."
        )
    check_template(template)
    return template if template in NAMES else "jinja"


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str, context_start: int | None
) -> str:
    kind = _kind(tokenizer, template)
    if kind == "chat":
        return _render(tokenizer, messages, add_generation_prompt=True)
    instruction, context = instruction_text(messages), ""
    if kind in ("minillm", "jinja") and context_start is not None and len(messages) == 1:
        context = instruction[context_start:]
        instruction = instruction[:context_start].removesuffix("\n\n")
    if kind == "jinja":
        words = {"prompt": instruction_text(messages), "instruction": instruction, "input": context}
        return _render_jinja(tokenizer, template, messages, words)
    if kind == "plain":
        return instruction
    return (
        MINILLM_INPUT.format(instruction=instruction, input=context)
        if context
        else ALPACA.format(instruction=instruction)
    )


def instruction_text(messages: Messages) -> str:
    """Return a single message's text; else all turns, after ``User:`` or ``Assistant:`` (a system message bare)."""
    if len(messages) == 1:
        return messages[0]["content"]
    names = {"user": "User: ", "assistant": "Assistant: "}
    return "\n\n".join(names.get(m["role"], "") + m["content"] for m in messages)


def _response_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, messages: Messages, template: str
) -> tuple[str, bool]:
    """Return the text from the prompt's end to the end of turn, and whether it holds the end of turn."""
    if _kind(tokenizer, template) != "chat":
        return messages[-1]["content"], False
    full = _render(tokenizer, messages, add_generation_prompt=False)
    if not full.startswith(prompt):
        raise DrklError(
            f"The chat template ends a prompt with {prompt[-40:]!r}, but a whole conversation does not go on from "
            "there, so what the student should write after the prompt is undefined. Give the tokenizer another "
            "chat_template, or none for the Alpaca template."
        )
    # A placeholder shows what follows the content, which may itself contain anything, special tokens too.
    probe = _render(tokenizer, [*messages[:-1], {**messages[-1], "content": _PROBE}], add_generation_prompt=False)
    _, placeholder, suffix = probe.rpartition(_PROBE)
    if not placeholder or not full.endswith(suffix):
        raise DrklError("The chat template leaves the assistant's last message out; there is nothing to train on.")
    content = full[len(prompt) : len(full) - len(suffix)]
    end = end_of_turn(tokenizer, suffix, lambda: _continuation(tokenizer, messages))
    return content + suffix[:end], end > 0


def _closing(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str, ends: Sequence[int]) -> str:
    """What ends the last turn where the template writes no end after it: the next turn's tag, or nothing."""
    if _kind(tokenizer, template) != "chat":
        return ""
    between = _continuation(tokenizer, messages) or ""
    return opening_tag(tokenizer, between, [*as_ids(tokenizer.eos_token_id), *ends])


def _continuation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """What the template writes between the assistant's last message and a next one of the user's; None if it refuses.

    Another rendering of every row, so it is asked for only where the template's own end leaves a question.
    """
    replaced = [*messages[:-1], {**messages[-1], "content": _PROBE}, {"role": "user", "content": _NEXT}]
    try:
        text = _render(tokenizer, replaced, add_generation_prompt=False)
    except DrklError:
        return None
    before, found, _ = text.rpartition(_NEXT)
    return before.rpartition(_PROBE)[2] if found and _PROBE in before else None


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DrklError(f"The tokenizer's chat template refuses the roles {roles}: {error}") from error
    assert isinstance(text, str)
    return text


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise DrklError(f"data.template is not valid jinja (line {error.lineno}): {error.message}") from error


def _render_jinja(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, words: Mapping[str, str]
) -> str:
    compiled = _compiled(template)
    tokens = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    try:
        text = compiled.render(messages=[dict(m) for m in messages], **words, **tokens)
    # A template is the user's code: it may fail in any way.
    except Exception as error:
        raise DrklError(
            f"data.template failed: {type(error).__name__}: {error}. It is given messages, prompt, instruction, input, "
            "bos_token and eos_token."
        ) from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: over-long prompts are dropped and counted by us, not warned about by the tokenizer.
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # what tokenizers raises, for instance for a word without an unknown token
            raise
        raise DrklError(f"The tokenizer cannot encode {text[:60]!r}: {error}.") from error
    return list(ids)


def _encode_from_start(tokenizer: PreTrainedTokenizerBase, text: str, template: str) -> list[int]:
    """Encode text that begins a sequence; some templates write their own bos, or want none."""
    ids = _encode(tokenizer, text)
    if tokenizer.bos_token_id is None or _kind(tokenizer, template) in ("chat", "minillm") or "bos_token" in template:
        return ids
    adds_bos = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos else ids


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], template: str, *, begins: bool
) -> list[list[int]]:
    """Encode pieces of one text as they stand in it, each with its own ids.

    Where the tokenizer would merge the beginning of a piece into the piece before, the piece is encoded by itself.
    """

    def encode(text: str) -> list[int]:
        return _encode_from_start(tokenizer, text, template) if begins else _encode(tokenizer, text)

    separate = [encode(pieces[0]), *(_encode(tokenizer, piece) for piece in pieces[1:])]
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
