"""What a row holds beside texts: tools, tool calls, reasoning, weights, images. Each is kept, obeyed or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from drkl.errors import DrklError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names under which a message has what its author thought."""
TOOL = "tool"
MEDIA = ("images", "image", "audio", "audios", "video", "videos")
WEIGHTS = ("weight", "loss_mask", "train", "trainable", "loss_weight", "loss_multiplier", "sample_weight")
"""Columns and fields of messages that say whether a text is learnt."""
MESSAGE_WEIGHTS = (*WEIGHTS, "training", "loss")
MASKS = ("mask", "train_detail")
"""Fields of messages that say it in a way of their own: which of 0 and 1 is learnt, or which characters."""
OPENING = ("system", "developer")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_response": TOOL,
    "function-response": TOOL,
    "tool_response": TOOL,
    "observation": TOOL,
    "ipython": TOOL,
    "function-call": "function_call",
    "tool_call": "function_call",
}
"""What ShareGPT and its kin call the roles."""


class Message(NamedTuple):
    """A message with ``role`` and text ``content``, and whether it is learnt (None: not said)."""

    fields: dict[str, Any]
    learnt: bool | None


def read_message(place: str, name: str, value: Any, *, sharegpt: bool = False) -> Message:
    """Return a message as chat templates read it; fields that are null are absent.

    A content of text parts is one text, ``from`` and ``value`` are ``role`` and ``content``, and a call's arguments are
    an object also where the row has them as json text. What is neither known nor a weight stays, for the template.

    Args:
        place: where the row is, for errors.
        name: what errors call the message.
        value: the message.
        sharegpt: whether the roles are those of ShareGPT (human, gpt) although they stand in ``role``.

    Raises:
        DrklError: no role or content, images or audio, a weight that is neither 0 nor 1, calls that are none.
    """
    if not isinstance(value, Mapping):
        raise DrklError(f"{place}: {name} must have {_wanted(sharegpt)}; found {kind_of(value)}.")
    fields = {key: item for key, item in value.items() if item is not None}
    if "role" not in fields and "from" in fields:
        sharegpt = True
        fields["role"] = fields.pop("from")
        if "value" in fields:
            fields["content"] = fields.pop("value")
    learnt = _learnt(place, name, fields)
    mask = next((key for key in MASKS if not is_void(fields.get(key))), None)
    if mask is not None:
        raise DrklError(
            f"{place}: {name}.{mask} is not read, and it says what is learnt. Give the message a weight of 0 (not "
            "learnt) or 1 in its place, or remove it."
        )
    for key in MEDIA:
        if key in fields:
            refuse_media(place, f"{name}.{key}", fields.pop(key))
    if "role" not in fields:
        raise DrklError(f"{place}: {name} must have {_wanted(sharegpt)}; found {names_of(value)}.")
    if sharegpt and isinstance(fields["role"], str):
        fields["role"] = ROLES.get(fields["role"].lower(), fields["role"].lower())
    if fields["role"] == "function":
        fields["role"] = TOOL
    check_json(place, name, {key: item for key, item in fields.items() if key != "content"})
    calls = _calls(place, name, fields)
    if calls and is_void(fields.get("content")):
        fields["content"] = ""
    if "content" not in fields:
        if {"content", "value"} & value.keys():
            raise DrklError(f"{place}: {name}.content must be text; found null.{_NULL}")
        raise DrklError(f"{place}: {name} must have {_wanted(sharegpt)}; found {names_of(value)}.")
    text = text_of(place, f"{name}.content", fields.pop("content"))
    extra = {key: without_nulls(item) for key, item in fields.items() if key != "role" and not is_void(item)}
    for key in REASONING:
        if key in extra:
            extra[key] = text_of(place, f"{name}.{key}", extra[key])
    if len({extra[key] for key in REASONING if key in extra}) > 1:
        several = " and ".join(key for key in REASONING if key in extra)
        raise DrklError(f"{place}: {name} has {several}, which say different things. Remove one.")
    return Message({"role": fields["role"], "content": text} | extra | ({"tool_calls": calls} if calls else {}), learnt)


def check_columns(place: str, row: Mapping[str, Any]) -> None:
    """Raise DrklError for columns that would change what is learnt, and that nothing here can obey."""
    for name in MEDIA:
        if name in row:
            refuse_media(place, f"the column {name!r}", row[name])
    for name in WEIGHTS:
        value = row.get(name)
        if value is None:
            continue
        items = value if isinstance(value, list | tuple) else [value]
        if not all(item in (None, "", "1", "1.0", "true", "True") or (is_number(item) and item == 1) for item in items):
            raise DrklError(
                f"{place}: the column {name!r} is {short(value)}: a row is learnt or it is not, so only 1 (or true) is "
                "read. Remove rows that should not be learnt, give messages a weight of 0 or 1 each, or a source a "
                "weight in data.sources; rename the column if it is no weight."
            )
    if row.get("label") is False:
        raise DrklError(
            f"{place}: the column 'label' is false: an answer that should not be learnt, as for preference training "
            "(KTO), which is not here. Keep the rows with true, or rename the column if it says something else."
        )


def check_reasoning(place: str, name: str, value: Any) -> None:
    """Raise DrklError for a column that has reasoning's name and says only whether or how much there is."""
    if is_number(value) or (isinstance(value, str) and value.strip().lower() in _SWITCHES):
        raise DrklError(
            f"{place}: the column {name!r} is {short(value)}, which is not what the assistant thought. Remove or "
            "rename it; what switches a template's reasoning stands in the column chat_template_kwargs."
        )


_SWITCHES = ("on", "off", "yes", "no", "true", "false", "none", "low", "medium", "high", "0", "1")


def refuse_media(place: str, name: str, value: Any) -> None:
    """Raise DrklError for images and the like: the models here read text."""
    if not is_void(value):
        raise DrklError(
            f"{place}: {name} is not supported: the models read text alone here, so they would not see it. Remove it, "
            "or such rows."
        )


def read_tools(place: str, row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the tools of a row's column ``tools`` (or ``functions``, its old name), each as a json schema.

    Raises:
        DrklError: something else than a list of named functions, or than json text of one.
    """
    name = "functions" if is_void(row.get("tools")) else "tools"
    value = from_json(row.get(name))
    if is_void(value):
        return None
    check_json(place, name, value)
    tools = [without_nulls(from_json(tool)) for tool in value] if isinstance(value, list | tuple) else [None]
    tools = [{"type": "function", "function": t} if isinstance(t, Mapping) and "name" in t else t for t in tools]
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DrklError(
                f"{place}: {name} must be a list of functions, each with a name, as in "
                f'{{"type": "function", "function": {{"name": …}}}}; found {short(value)}.'
            )
    return tuple(tools)


def read_template_kwargs(place: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a row's columns ``chat_template_kwargs`` and ``documents`` give to its chat template, by name.

    Raises:
        DrklError: columns of another kind.
    """
    for name in ("chat_template_kwargs", "documents"):
        check_json(place, name, row.get(name))
    value = from_json(row.get("chat_template_kwargs"))
    if not is_void(value) and not isinstance(value, Mapping):
        raise DrklError(f"{place}: chat_template_kwargs must be an object; found {kind_of(value)}.")
    given = {str(name): item for name, item in without_nulls(value or {}).items() if not is_void(item)}
    reserved = next((name for name in given if name in _RESERVED), None)
    if reserved is not None:
        raise DrklError(
            f"{place}: chat_template_kwargs has {reserved!r}, which drkl gives to the template itself. Remove it."
        )
    documents = from_json(row.get("documents"))
    if not is_void(documents):
        if not isinstance(documents, list | tuple) or not all(isinstance(d, Mapping) for d in documents):
            raise DrklError(
                f"{place}: documents must be a list of objects with title and text, which the chat template is given; "
                f"found {short(documents)}. Rename the column if it is something else."
            )
        given["documents"] = [without_nulls(document) for document in documents]
    return given or None


_RESERVED = (
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "continue_final_message", "sanitize_control_tokens",
)  # fmt: skip


_NULL = ' Remove such rows, or write "": empty ones are dropped and counted.'


def text_of(place: str, name: str, value: Any) -> str:
    """Return a text, or the text of a list of text parts.

    Raises:
        DrklError: anything else, images and audio by name, or half a surrogate pair.
    """
    if isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value):
        value = "".join(_part(place, f"{name}[{number}]", part) for number, part in enumerate(value))
    if not isinstance(value, str):
        raise DrklError(f"{place}: {name} must be text; found {kind_of(value)}.{_NULL if value is None else ''}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DrklError(
            f"{place}: {name} has half a surrogate pair at character {error.start}: not valid text."
        ) from error
    return str(value)


def _part(place: str, name: str, part: Mapping[str, Any]) -> str:
    kind = part.get("type") or "text"
    if kind not in ("text", "input_text", "output_text"):
        refuse_media(place, f"{name}, a part of type {kind!r},", part)
    return text_of(place, f"{name}.text", part.get("text"))


def _learnt(place: str, name: str, fields: dict[str, Any]) -> bool | None:
    """Take the weights out of a message's fields, and return what they say together."""
    said = {key: fields.pop(key) for key in MESSAGE_WEIGHTS if key in fields}
    for key, value in said.items():
        if not is_number(value) or value not in (0, 1):
            raise DrklError(
                f"{place}: {name}.{key} is {short(value)}; expected 0 (or false: not learnt) or 1. Every learnt token "
                "counts alike, so a fraction is not supported."
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise DrklError(f"{place}: {name} has {' and '.join(said)}, which say different things. Remove one.")
    return bool(next(iter(said.values()))) if said else None


def _calls(place: str, name: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Take the calls of tools out of a message's fields; `function_call` is OpenAI's and ShareGPT's older way."""
    role = fields["role"]
    calls = from_json(fields.pop("tool_calls", None))
    old = fields.pop("function_call", None)
    if role == "function_call":  # ShareGPT: the message is the call
        fields["role"], old = "assistant", fields.pop("content", None)
    if is_void(calls) and not is_void(old):
        calls = from_json(old)
        calls = [calls] if isinstance(calls, Mapping) else calls
    if is_void(calls):
        return []
    if fields["role"] != "assistant":
        raise DrklError(f"{place}: {name} has tool_calls and the role {role!r}; only the assistant calls tools.")
    if not isinstance(calls, list | tuple):
        raise DrklError(f"{place}: {name}.tool_calls must be a list; found {kind_of(calls)}.")
    return [_call(place, f"{name}.tool_calls[{number}]", call) for number, call in enumerate(calls)]


def _call(place: str, name: str, value: Any) -> dict[str, Any]:
    call = without_nulls(from_json(value))
    if isinstance(call, Mapping) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DrklError(
            f'{place}: {name} must be a call, as in {{"type": "function", "function": {{"name": …, "arguments": …}}}}; '
            f"found {short(value)}."
        )
    arguments = from_json(function.get("arguments", function.get("parameters", {})))
    return {"type": "function", **call, "function": {"name": function["name"], "arguments": without_nulls(arguments)}}


def check_json(place: str, name: str, value: Any) -> None:
    """Raise DrklError for what a template could not write: half a surrogate pair, a number of thousands of digits."""
    if value is None or (type(value) is dict and all(map(_is_ascii, value)) and all(map(_is_ascii, value.values()))):
        return  # as most values are
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise DrklError(f"{place}: {name} has half a surrogate pair: not valid text.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DrklError(f"{place}: {name} cannot be written as json: {error}.") from error


def _is_ascii(value: Any) -> bool:
    return type(value) is str and value.isascii()


def from_json(value: Any) -> Any:
    """Return what json text of an object or a list says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null: a column of `datasets` has every field of all rows."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def is_void(value: Any) -> bool:
    """Whether a field says nothing: it is null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not value)


def plain(value: Any) -> Any:
    """Return arrays and tensors, and those inside of lists and objects, as lists and numbers."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def is_number(value: Any) -> bool:
    """Whether a value is a number, or true or false."""
    return isinstance(value, int | float)


def names_of(row: Mapping[str, Any]) -> str:
    """Return the names of an object's fields, for errors."""
    # A blank beside a name would not be seen.
    names = [repr(name) if isinstance(name, str) and name != name.strip() else str(name) for name in row]
    return ", ".join(names) or "no fields"


def kind_of(value: Any) -> str:
    """Return what a value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def short(value: Any) -> str:
    """Return a value as it is written, its beginning if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return kind_of(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _wanted(sharegpt: bool) -> str:
    return "from and value (or role and content)" if sharegpt else "role and content"
