"""Conversations as token ids: the tokenizer's chat template, or the Alpaca template where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Messages = Sequence[Mapping[str, str]]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_PROBE = "drkl0content0probe"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the ids after which the model answers ``messages`` (which end with the user's).

    With a chat template: that template and its generation prompt. Without one: the Alpaca template; its instruction
    is the user's text, and of a longer conversation all turns, each after ``User:`` or ``Assistant:`` (a system
    message stands first, bare).

    Raises:
        DrklError: the chat template refuses the conversation.
    """
    return _encode_from_start(tokenizer, _prompt_text(tokenizer, messages))


def encode_response(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the ids of the last message, the assistant's, ended by the token that ends its turn.

    ``encode_prompt(tokenizer, messages[:-1]) + encode_response(tokenizer, messages)`` is what the template gives for
    the whole conversation, up to the end of turn: whatever it writes after that (often a newline) is left out. The
    end of turn is the tokenizer's eos where the template writes it, else the first special token after the text,
    else eos, appended.

    Where the tokenizer would merge the prompt's end with the response's beginning, the two are encoded apart: a
    generating model sees the prompt alone, so the merged token could never be produced.

    Raises:
        DrklError: the chat template refuses the conversation, does not begin it with its own generation prompt, or
            leaves the response out; the tokenizer has no eos token and the template ends no turn.
    """
    prompt = _prompt_text(tokenizer, messages[:-1])
    text, ended = _response_text(tokenizer, prompt, messages)
    prompt_ids = _encode_from_start(tokenizer, prompt)
    ids = _encode_from_start(tokenizer, prompt + text)
    ids = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else _encode(tokenizer, text)
    return ids if ended else [*ids, _eos(tokenizer)]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids at which a generated response is over: eos, and the template's end of turn if that is another.

    Raises:
        DrklError: as ``encode_response``.
    """
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    last = encode_response(tokenizer, messages)[-1]
    eos = tokenizer.eos_token_id
    return [last] if eos is None or eos == last else [eos, last]


def _prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    if tokenizer.chat_template:
        return _render(tokenizer, messages, add_generation_prompt=True)
    return ALPACA.format(instruction=_instruction(messages))


def _instruction(messages: Messages) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    names = {"user": "User: ", "assistant": "Assistant: "}
    return "\n\n".join(names.get(m["role"], "") + m["content"] for m in messages)


def _response_text(tokenizer: PreTrainedTokenizerBase, prompt: str, messages: Messages) -> tuple[str, bool]:
    """Return the text from the prompt's end to the end of turn, and whether it holds the end of turn."""
    if not tokenizer.chat_template:
        return messages[-1]["content"], False
    full = _render(tokenizer, messages, add_generation_prompt=False)
    if not full.startswith(prompt):
        raise DrklError(
            f"The chat template ends a prompt with {prompt[-40:]!r}, but a whole conversation does not go on from "
            "there, so what the student should write after the prompt is undefined. Give the tokenizer another "
            "chat_template, or none for the Alpaca template."
        )
    # What follows the content is found with a stand-in: the content itself may hold anything, special tokens too.
    probe = _render(tokenizer, [*messages[:-1], {**messages[-1], "content": _PROBE}], add_generation_prompt=False)
    _, found, suffix = probe.rpartition(_PROBE)
    if not found or not full.endswith(suffix):
        raise DrklError("The chat template leaves the assistant's last message out; there is nothing to train on.")
    content = full[len(prompt) : len(full) - len(suffix)]
    end = _end_of_turn(tokenizer, suffix)
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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: over-long prompts are dropped and counted by us, not warned about by the tokenizer.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)


def _encode_from_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text that begins a sequence: chat templates write their own bos, the Alpaca template does not."""
    ids = _encode(tokenizer, text)
    if tokenizer.chat_template or tokenizer.bos_token_id is None:
        return ids
    adds_bos = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos else ids


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DrklError(
            "The tokenizer has no eos token and its template ends no turn with a special token: the student could "
            "never learn to stop. Set the tokenizer's eos_token."
        )
    return int(tokenizer.eos_token_id)
