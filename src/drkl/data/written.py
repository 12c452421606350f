"""Does a template write all that a row has? What it leaves out is refused by name, never dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drkl.data.examples import Example, Messages
from drkl.data.fields import REASONING, TOOL
from drkl.data.rendering import BESIDE_CALLS, Sign, Writer, unused_fields
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNT = (*REASONING, "tool_calls", "refusal")
"""Fields of a message that are part of what the assistant says."""
GIVEN = (*LEARNT, "tools", "functions", "documents")
"""Fields of a message that change what the models see."""


def has_more(message: Mapping[str, Any]) -> bool:
    """Whether the assistant says more in a message than its content."""
    return any(name in message for name in LEARNT)


def as_written(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    known: set[Sign],
    *,
    encoder_decoder: bool = False,
) -> Example:
    """Return a conversation as its template reads it: the arguments of calls are objects, or else json text.

    Args:
        example: the conversation.
        tokenizer: whose chat template it is.
        template: as ``data.template``; an encoder-decoder has none.
        known: what the template is known to write, as `unused_fields` has it; what is found is added.
        encoder_decoder: whether an encoder reads the prompt.

    Raises:
        DrklError: the template leaves out something that changes what is learnt, or fails.
    """
    roles = {str(message["role"]) for message in example.messages} - {"user", "assistant"}
    has_fields = any(name in message for message in example.messages for name in GIVEN)
    is_plain = not (example.tools or example.template_kwargs or has_fields)
    if is_plain and all((role,) in known for role in roles):
        return example
    template = "plain" if encoder_decoder else template
    writer = Writer(tokenizer, template, example.context_start, example.tools, example.template_kwargs)
    problems = []
    for messages in (example.messages, _with_json_arguments(example.messages)):
        try:
            left_out = _left_out(writer, messages, roles, known)
        except DrklError as error:
            problems.append(error)
            continue
        if not left_out:
            return replace(example, messages=messages)
        where = "The prompt of an encoder-decoder" if encoder_decoder else _name(writer)
        problems.append(
            DrklError(
                f"{where} leaves out {', '.join(left_out)}, which the row has, so the models would not see it. Choose "
                "a tokenizer (or data.template) that writes it, put it into the texts, or remove it from the rows."
            )
        )
    raise problems[0]


def _left_out(writer: Writer, messages: Messages, roles: set[str], known: set[Sign]) -> list[str]:
    """The names of what is left out and changes what is learnt."""
    kwargs = writer.template_kwargs or {}
    unused = unused_fields(
        writer.tokenizer, messages, writer.template, tools=writer.tools, template_kwargs=kwargs, known=known
    )
    names = [name for name in unused if name in {*kwargs, *GIVEN, BESIDE_CALLS, *roles}]
    if TOOL in roles and writer.kind in ("alpaca", "minillm", "plain"):  # they would write it as anyone's text
        names.append(TOOL)
    if not names and (_AS_JSON,) not in known:
        arguments = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
        objects = [str(value) for value in arguments if isinstance(value, Mapping) and value]
        text = (
            (writer.conversation(messages) if writer.kind == "chat" else writer.prompt(messages[:-1]))
            if objects
            else ""
        )
        if any(value in text for value in objects):
            names.append(_AS_JSON)
        elif objects:
            known.add((_AS_JSON,))
    return [f"messages of the role {name!r}" if name in roles else name for name in names]


_AS_JSON = "the arguments of tool_calls as json"
"""What a template that writes an object as Python does, with single quotes, does not write."""


def _with_json_arguments(messages: Messages) -> Messages:
    """Return messages with the arguments of their calls as json text, which some templates put together themselves."""

    def texts(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    calls = ([texts(call) for call in message.get("tool_calls", ())] for message in messages)
    return tuple({**m, "tool_calls": c} if c else m for m, c in zip(messages, calls, strict=True))


def _name(writer: Writer) -> str:
    if writer.kind == "chat":
        return "The tokenizer's chat template"
    return (
        "The tokenizer has no chat template, and alpaca"
        if writer.template == "auto"
        else f"The template {writer.template!r}"
    )
