"""Does a template write all that a row has? What it leaves out is refused by name, never dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drkl.data.examples import Example, Messages
from drkl.data.fields import REASONING
from drkl.data.rendering import unused_fields
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNT = (*REASONING, "tool_calls", "refusal")
"""Fields of a message that are part of what the assistant says."""


def has_more(message: Mapping[str, Any]) -> bool:
    """Whether the assistant says more in a message than its content."""
    return any(name in message for name in LEARNT)


def as_written(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    known: set[str],
    *,
    encoder_decoder: bool = False,
) -> Example:
    """Return a conversation as its template reads it: the arguments of calls are objects, or else json text.

    Args:
        example: the conversation.
        tokenizer: whose chat template it is.
        template: as ``data.template``; an encoder-decoder has none.
        known: the roles that the template is known to write; others are added once they are.
        encoder_decoder: whether an encoder reads the prompt.

    Raises:
        DrklError: the template leaves out something that changes what is learnt, or fails.
    """
    roles = {str(message["role"]) for message in example.messages} - {"user", "assistant"}
    is_plain = not (example.tools or example.template_kwargs or any(map(has_more, example.messages)))
    if is_plain and roles <= known:
        return example
    given: dict[str, Any] = {"tools": example.tools, "template_kwargs": example.template_kwargs}
    checked = {"tools", *(example.template_kwargs or ()), *LEARNT, *roles}
    problem: DrklError | None = None
    for messages in (example.messages, with_json_arguments(example.messages)):
        try:
            unused = unused_fields(tokenizer, messages, "plain" if encoder_decoder else template, **given)
        except DrklError as error:
            problem = problem or error
            continue
        left_out = [name for name in unused if name in checked]
        if not left_out:
            known |= roles
            return replace(example, messages=messages)
        where = "An encoder-decoder reads texts alone" if encoder_decoder else _name(tokenizer, template)
        problem = problem or _left_out(left_out, roles, where)
        if "tool_calls" not in left_out:
            break
    assert problem is not None
    raise problem


def with_json_arguments(messages: Messages) -> Messages:
    """Return messages with the arguments of their calls as json text, which some templates put together themselves."""

    def texts(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return tuple(
        {**message, "tool_calls": [texts(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    )


def _name(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    is_chat = template.startswith("chat") or (template == "auto" and tokenizer.chat_template)
    name = "The tokenizer's chat template" if is_chat else f"The template {template!r}"
    return "The tokenizer has no chat template, and alpaca" if template == "auto" and not is_chat else name


def _left_out(names: list[str], roles: set[str], where: str) -> DrklError:
    what = [f"messages of the role {name!r}" if name in roles else name for name in names]
    return DrklError(
        f"{where} does not write {', '.join(what)}, which the row has, so the models would not see it. Choose a "
        f"tokenizer (or data.template) that does, write it into the texts, or remove it from the rows."
    )
