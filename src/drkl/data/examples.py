"""Examples: rows of any source, checked, as conversations or as plain texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from numbers import Integral
from typing import Any

from drkl.data.config import NO_ROWS, DataConfig, SourceConfig
from drkl.data.fields import (
    MEDIA,
    OPENING,
    REASONING,
    ROLES,
    TOOL,
    Message,
    check_columns,
    check_reasoning,
    from_json,
    is_void,
    kind_of,
    plain,
    read_message,
    read_template_kwargs,
    read_tools,
    refuse_media,
    short,
    text_of,
)
from drkl.data.files import dataset_rows, file_rows
from drkl.data.formats import NEEDS_NONE, read_json_messages, shape_of, standard_row
from drkl.errors import DrklError
from drkl.runs import IN_MEMORY

MAX_HELD_OUT = 100
HELD_OUT_SHARE = 0.05
# With fewer plain texts than this, the end of each is held out in place of whole texts.
MANY_TEXTS = 20

Messages = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Example:
    """One conversation, whose last message is the assistant's response, the part to learn.

    A prompt alone, which a model is to answer, has an empty response.
    A plain text is a single message of the assistant. ``label`` is the label of a classified text (and its response),
    ``context_start`` the character of the prompt at which the input begins that the instruction is about, ``weight``
    how often an epoch takes the example. ``references`` are all correct answers where there are several, the response
    among them. A message has ``role`` and ``content``, and what else the chat template is to write (``tool_calls``,
    ``reasoning_content``); ``tools`` and ``template_kwargs`` are given to the template, too. ``unlearnt`` are the
    numbers of the assistant's messages of weight 0, ``shape`` is what the row was in its file.
    """

    id: str
    messages: Messages
    label: str | None = None
    context_start: int | None = None
    weight: float = 1.0
    references: tuple[str, ...] = ()
    tools: tuple[Any, ...] | None = None
    template_kwargs: dict[str, Any] | None = None
    unlearnt: tuple[int, ...] = ()
    shape: str = field(default="", compare=False)

    @property
    def all_references(self) -> tuple[str, ...]:
        """The answers that text metrics compare a sample with."""
        return self.references or (self.response,)

    @property
    def is_text(self) -> bool:
        """Whether this is a plain text, every token of which is learnt."""
        return len(self.messages) == 1

    @property
    def is_prompt_alone(self) -> bool:
        """Whether there is no response to learn: neither a text nor calls of tools."""
        last = self.messages[-1]
        return not self.is_text and not str(last["content"]).strip() and not last.get("tool_calls")

    @property
    def given(self) -> tuple[str, ...]:
        """The names of what the row has beside texts: what its template is given, and ``weight 0``."""
        weighed = bool(self.unlearnt) and not self.shape.startswith("prompt")  # of a prompt nothing is learnt anyway
        names = {"tools": self.tools} | (self.template_kwargs or {}) | ({"weight 0": True} if weighed else {})
        fields = (name for message in self.messages for name in (*REASONING, "tool_calls") if name in message)
        return tuple(dict.fromkeys((*(name for name, value in names.items() if value is not None), *fields)))

    @property
    def prompt_messages(self) -> Messages:
        """All messages but the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The last message's text."""
        return str(self.messages[-1]["content"])

    @property
    def prompt_text(self) -> str:
        """The last user message's text, for display and for text metrics."""
        return "" if self.is_text else str(self.messages[-2]["content"])


def load_examples(config: DataConfig, *, needs_responses: bool = True) -> tuple[list[Example], list[Example]]:
    """Return the training rows and the held-out rows; of a stream the held-out rows alone.

    Rows with an empty prompt or response are still here: ``tokenize_examples`` drops and counts them. Where a model
    answers every row (``needs_responses`` is False), a row may be a prompt alone.

    Raises:
        DrklError: a file or data set that is missing or unreadable, a bad row (with file:line), no rows at all.
    """
    if config.streaming:
        return [], read_heldout(config, needs_responses=needs_responses)
    train: list[Example] = []
    held_out: list[Example] = []
    sources = config.all_sources()
    for number, source in enumerate(sources, start=1):
        rows = read_source(source, needs_responses=needs_responses)
        if len(sources) > 1:  # rows of two files may have the same ids
            rows = [replace(row, id=f"{number}:{row.id}") for row in rows]
        if config.eval_path is None:
            rows, held = hold_out(rows)
            held_out += held
        train += [replace(row, weight=source.weight) for row in rows[: source.max_rows]]
    return train, held_out if config.eval_path is None else read_heldout(config, needs_responses=needs_responses)


def read_heldout(config: DataConfig, *, needs_responses: bool = True) -> list[Example]:
    """Return the held-out rows alone.

    Raises:
        DrklError: see ``load_examples``.
    """
    if config.eval_path is None:
        return load_examples(config, needs_responses=needs_responses)[1]
    if config.eval_path == NO_ROWS:
        return []
    held_out = read_examples(config.eval_path, config.format, needs_responses=needs_responses)
    chosen = {e.id for e in sorted(held_out, key=lambda e: hash_of_id(e.id))[: config.eval_max_rows]}
    return [example for example in held_out if example.id in chosen]


def read_source(source: SourceConfig, *, needs_responses: bool = True) -> list[Example]:
    """Read all rows of a source.

    Raises:
        DrklError: see ``load_examples``.
    """
    row_format = source.format or "auto"
    if source.path is not None:
        return read_examples(source.path, row_format, needs_responses=needs_responses)
    assert source.dataset is not None
    rows = dataset_rows(source.dataset)
    return parse_rows(rows, source.dataset, row_format, needs_responses=needs_responses)


def read_examples(path: str, row_format: str = "auto", *, needs_responses: bool = True) -> list[Example]:
    """Read one file (jsonl, json, csv, parquet, txt), or a bundled one by its name.

    Raises:
        DrklError: see ``load_examples``.
    """
    check_readable(path)
    return parse_rows(file_rows(path, row_format), path, row_format, needs_responses=needs_responses)


def check_readable(path: str) -> None:
    """Raise DrklError for what stands in a run's record for rows that were passed in memory."""
    if path.startswith(IN_MEMORY):
        raise DrklError(
            f"The rows were passed to the trainer {path.replace(':', ',', 1)}, so they cannot be read again. Go on in "
            "Python: trainer.train(resume_from_checkpoint=True), or drkl.evaluate(student, teacher, rows)."
        )


def parse_rows(
    rows: Iterable[tuple[str, Any]], source: str, row_format: str = "auto", *, needs_responses: bool = True
) -> list[Example]:
    """Turn ``(place, value)`` pairs into examples; errors name the ``place``, as in ``file:line``.

    Where ``needs_responses`` is False, a row may be a prompt alone, and its response empty, null or not there.

    Raises:
        DrklError: a bad row, columns that fit two shapes, two rows of one id, or no rows.
    """
    read = list(each_example(rows, row_format, needs_responses=needs_responses))
    if not read:
        raise DrklError(no_rows(source))
    ids = row_ids([(place, own) for place, own, _ in read])
    return [replace(example, id=row_id) for row_id, (_, _, example) in zip(ids, read, strict=True)]


def no_rows(source: str) -> str:
    """The error for a source without rows."""
    return f"{source} has no rows; expected some, with prompt and response, or messages, or text."


def each_example(
    rows: Iterable[tuple[str, Any]], row_format: str = "auto", *, needs_responses: bool = True
) -> Iterator[tuple[str, str | None, Example]]:
    """Yield the place, the own id (None where it has none) and the example of every row; the example has no id yet.

    The arguments are those of `parse_rows`.

    Raises:
        DrklError: a bad row, or columns that fit two shapes.
    """
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise DrklError(
                f"{place}: expected an object with prompt and response, or messages; found {kind_of(row)}."
                f"{_way_out(row)}"
            )
        row = {name: plain(value) if hasattr(value, "tolist") else value for name, value in row.items()}
        row = read_json_messages(place, row, row_format)
        shape = shape_of(place, row, row_format, needs_responses=needs_responses)
        kind, row = standard_row(row, shape, needs_responses=needs_responses)
        title = f"{shape.title}, as messages" if kind == "messages" and shape.name.startswith("prompt") else shape.title
        own = written_id(place, row)
        yield place, own, _example(place, "", kind, row, title, needs_responses=needs_responses)


def _way_out(row: Any) -> str:
    """How a row that is no object becomes one."""
    if isinstance(row, list | tuple) and row and all(isinstance(message, Mapping) for message in row):
        return ' Write a conversation as {"messages": [...]}.'
    return ' Write a text as {"text": ...}.' if isinstance(row, str) else ""


def hold_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split off 5 % of the rows (1 to 100), picked by a hash of their ids; order is kept on both sides.

    Rows that share a prompt stay on one side, so that no held-out prompt was trained on. Of plain texts, where there
    are fewer than 20, the last 5 % of each are held out instead.

    Raises:
        DrklError: nothing would be left to train on.
    """
    if len(examples) < MANY_TEXTS and all(example.is_text for example in examples):
        return _hold_out_ends(examples)
    wanted = max(1, min(MAX_HELD_OUT, round(HELD_OUT_SHARE * len(examples))))
    groups: dict[str, list[str]] = {}
    for example in sorted(examples, key=lambda example: hash_of_id(example.id)):
        groups.setdefault(json.dumps(example.prompt_messages or example.messages, default=str), []).append(example.id)
    if len(groups) < 2:
        raise cannot_be_split(len(examples), len(groups))
    held: set[str] = set()
    for ids in groups.values():
        if len(held) + len(ids) <= wanted:
            held.update(ids)
    if not held:
        smallest: list[str] = min(groups.values(), key=len)
        held.update(smallest)
    return [e for e in examples if e.id not in held], [e for e in examples if e.id in held]


def cannot_be_split(num_rows: int, num_prompts: int) -> DrklError:
    """The error for rows of which none can be held out."""
    return DrklError(
        f"{num_rows} row(s) with {num_prompts} different prompt(s) cannot be split into training and held-out "
        "rows. Add rows, or set data.eval_path (none: no held-out rows)."
    )


def hash_of_id(row_id: str) -> bytes:
    """Return a hash of a row's id; rows selected in its order do not depend on the order of the file."""
    return hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()


def _hold_out_ends(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    held_out: list[Example] = []
    ids = {example.id for example in examples}
    for example in examples:
        text = example.response
        place = int(len(text) * (1 - HELD_OUT_SHARE))
        # Between paragraphs, lines or words, in this order.
        cut = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, place // 2, place)) > 0), place)
        parts = [text[:cut], text[cut:].lstrip()]
        if not all(part.strip() for part in parts):
            raise DrklError(f"The text {example.id!r} is too short to hold out its end. Set data.eval_path.")
        for rows, row_id, part in (
            (train, example.id, parts[0]),
            (held_out, free_id(f"{example.id}-end", ids), parts[1]),
        ):
            rows.append(replace(example, id=row_id, messages=({"role": "assistant", "content": part},)))
    return train, held_out


def _example(
    place: str, row_id: str, kind: str, row: Mapping[str, Any], title: str, *, needs_responses: bool = True
) -> Example:
    if kind in ("text", "text_label"):
        for name in MEDIA:  # a text is an image's address, perhaps
            refuse_media(place, f"the column {name!r}", None if isinstance(row.get(name), str) else row.get(name))
    if kind == "text":
        return Example(row_id, ({"role": "assistant", "content": text_of(place, "text", row["text"])},), shape=title)
    if kind == "text_label":
        label = _label(place, row["label"])
        return Example(row_id, _pair(text_of(place, "text", row["text"]), label), label=label, shape=title)
    check_columns(place, row)
    context_start: int | None = None
    references: tuple[str, ...] = ()
    unlearnt: tuple[int, ...] = ()
    if kind == "messages":
        messages, unlearnt = _conversation(place, row, needs_responses=needs_responses)
    else:
        if not needs_responses and is_void(row["response"]):
            row = {**row, "response": ""}
        messages, context_start = _prompt_and_response(place, row)
        references = _references(place, row, messages[-1]["content"])
    messages, moved = _with_columns(place, row, messages)
    example = Example(
        row_id,
        messages,
        context_start=context_start,
        references=references,
        tools=read_tools(place, row),
        template_kwargs=read_template_kwargs(place, row),
        unlearnt=tuple(index + moved for index in unlearnt),
        shape=title,
    )
    if needs_responses or not example.is_prompt_alone:
        return example
    # Reasoning without an answer is none.
    return replace(example, messages=(*example.prompt_messages, _NO_RESPONSE))


_NO_RESPONSE = {"role": "assistant", "content": ""}


def _prompt_and_response(place: str, row: Mapping[str, Any]) -> tuple[Messages, int | None]:
    """The two messages of a pair, and where in the first its input begins."""
    prompt = text_of(place, "prompt", row["prompt"])
    try:
        response = text_of(place, "response", row["response"])
    except DrklError as error:
        raise (DrklError(f"{error} {NEEDS_NONE}") if row["response"] is None else error) from None
    context_start = _context_start(place, row, prompt)
    if row.get("input"):
        context_start = len(prompt) + 2
        prompt += f"\n\n{text_of(place, 'input', row['input'])}"
    return _pair(prompt, response), context_start


def _with_columns(place: str, row: Mapping[str, Any], messages: Messages) -> tuple[Messages, int]:
    """Messages with what other columns say of them, and by how many places they moved.

    ``system`` (or ``system_prompt``) stands first, ``history`` has earlier turns as in LLaMA-Factory, and a reasoning
    and calls of tools are the last message's.
    """
    beside = {name: row[name] for name in (*REASONING, "tool_calls", "function_call") if not is_void(row.get(name))}
    for column in beside.keys() & set(REASONING):
        check_reasoning(place, column, beside[column])
    if beside:
        last = read_message(place, "the response", {**messages[-1], **beside}).fields
        messages = (*messages[:-1], {**messages[-1], **last})
    before: Messages = ()
    if not is_void(row.get("history")):
        before = _history(place, row["history"])
    name = "system" if not is_void(row.get("system")) else "system_prompt"
    if not is_void(row.get(name)):
        system = text_of(place, name, row[name])
        if messages[0]["role"] not in OPENING:
            before = ({"role": "system", "content": system}, *before)
        elif messages[0]["content"] != system:
            raise DrklError(
                f"{place}: the column {name!r} and the first message are two different system messages. Remove one."
            )
    if before and before[-1]["role"] != "system" and messages[0]["role"] in OPENING:
        raise DrklError(f"{place}: the column 'history' stands before a system message. Write the turns as messages.")
    return (*before, *messages), len(before)


_RENAME = "Rename the column if it is something else."


def _history(place: str, value: Any) -> Messages:
    """Earlier turns, as pairs of what the user and the assistant said."""
    value = from_json(value)
    pairs = value if isinstance(value, list | tuple) else [None]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise DrklError(
            f"{place}: history must be a list of pairs of a prompt and its response; found {short(value)}. {_RENAME}"
        )
    texts = [text_of(place, f"history[{i}]", text) for i, pair in enumerate(pairs) for text in pair]
    return tuple(message for turn in zip(texts[::2], texts[1::2], strict=True) for message in _pair(*turn))


def _pair(prompt: str, response: str) -> Messages:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def _references(place: str, row: Mapping[str, Any], response: str) -> tuple[str, ...]:
    value = row.get("references")
    if is_void(value):
        return ()
    if not isinstance(value, list) or not value:
        raise DrklError(f"{place}: references must be a list of texts, not empty; found {kind_of(value)}. {_RENAME}")
    references = tuple(text_of(place, f"references[{i}]", text) for i, text in enumerate(value))
    return references if response in references or not response else (response, *references)


def _label(place: str, value: Any) -> str:
    if _is_whole_number(value):
        return _number(place, "label", value)
    return text_of(place, "label", value)


def _context_start(place: str, row: Mapping[str, Any], prompt: str) -> int | None:
    value = row.get("context_start")
    if value is None or value == "":
        return None
    try:
        start = int(value)  # csv has text only
    except (TypeError, ValueError):
        start = -1
    if isinstance(value, bool) or not 0 < start < len(prompt):
        raise DrklError(
            f"{place}: context_start must be where in the prompt (of {len(prompt)} characters) its input begins; found "
            f"{value!r}."
        )
    return start


def _conversation(
    place: str, row: Mapping[str, Any], *, needs_responses: bool = True
) -> tuple[Messages, tuple[int, ...]]:
    """The messages of a row, and the numbers of the assistant's that are not learnt.

    Where no response is needed and the last message is none, an empty one is added.
    """
    value = row["messages"]
    column = "conversations" if value is row.get("conversations") else "messages"
    column = "conversation" if value is row.get("conversation") else column
    value = _as_list(from_json(value))
    if not isinstance(value, list | tuple) or not value:
        what = "{from, value}" if column != "messages" else "{role, content}"
        way_out = " Write it as json, with double quotes." if isinstance(value, str) else " Remove such rows."
        raise DrklError(f"{place}: {column} must be a list of {what} objects; found {kind_of(value)}.{way_out}")
    if not needs_responses and len(value) > 1 and _is_null(value[-1]):
        value = value[:-1]
    read = [
        read_message(place, f"{column}[{index}]", message, sharegpt=column != "messages")
        for index, message in enumerate(value)
    ]
    messages = tuple(message.fields for message in read)
    _check_roles(place, column, messages)
    if messages[-1]["role"] != "assistant":
        if needs_responses or messages[-1]["role"] in OPENING:
            raise _ends_otherwise(place, messages[-1]["role"], needs_responses=needs_responses)
        messages = (*messages, _NO_RESPONSE)
        read.append(Message(_NO_RESPONSE, None))
    for index, (fields, learnt) in enumerate(read):
        if learnt and fields["role"] != "assistant":
            raise DrklError(
                f"{place}: {column}[{index}] is to be learnt by its weight, but its role is {fields['role']!r}; only "
                "the assistant's messages are learnt. Remove the weight."
            )
    return messages, tuple(i for i, (f, learnt) in enumerate(read) if f["role"] == "assistant" and learnt is False)


def _as_list(value: Any) -> Any:
    """A list of objects also where `datasets` has it as an object of lists."""
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, message, strict=True)) for message in zip(*columns, strict=True)]


_AFTER = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user", TOOL),
    TOOL: ("assistant", TOOL, "user"),
}
"""Who may speak after whom; a tool answers the assistant's calls."""


def _check_roles(place: str, column: str, messages: Messages) -> None:
    before = "start"
    for index, message in enumerate(messages):
        role = message["role"]
        if index == 0 and role in OPENING:
            continue
        if role not in _AFTER[before]:
            raise DrklError(
                f"{place}: {column}[{index}] has the role {role!r}, expected {_AFTER[before][0]!r}: after an optional "
                f"system message, user and assistant take turns. {_roles_way_out(role)}"
            )
        before = role


def _ends_otherwise(place: str, role: str, *, needs_responses: bool) -> DrklError:
    message = f"{place}: the last message has the role {role!r}; it must be the assistant's, the response to learn"
    if not needs_responses:
        return DrklError(f"{message}, or the user's (or a tool's), which the student answers. Remove such rows.")
    alone = "" if role in OPENING else f" {NEEDS_NONE}"
    return DrklError(f"{message}. Remove what follows the last response, or such rows.{alone}")


def _is_null(message: Any) -> bool:
    """Whether a message is the assistant's and says nothing, not even as an empty text."""
    if not isinstance(message, Mapping):
        return False
    role = str(message.get("role") or message.get("from")).lower()
    says = ("content", "value", "tool_calls", "function_call")
    return ROLES.get(role, role) == "assistant" and all(is_void(message.get(name)) for name in says)


def _roles_way_out(role: Any) -> str:
    if role in (*OPENING, "user", "assistant", TOOL):
        return "Remove or join messages, or remove such rows."
    return (
        "Call the roles system, user, assistant and tool; in a column called conversations they may be ShareGPT's "
        "(human, gpt)."
    )


def written_id(place: str, row: Mapping[str, Any]) -> str | None:
    """Return a row's own ``id`` as text, or None where it has none; csv has "" for none."""
    value = row.get("id")
    if value is None or value == "":
        return None
    if _is_whole_number(value):
        return _number(place, "id", value)
    if not isinstance(value, str):
        raise DrklError(
            f"{place}: id must be text or a whole number; found {short(value)}. Write it as text, or remove the column "
            "id: rows without one are numbered."
        )
    return text_of(place, "id", value)


def row_ids(written: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return the ids of rows, in order, from their places and own ids; a row without one is called ``row-N``.

    Where that is another row's own, marks are added to it.

    >>> row_ids([("a:1", "row-2"), ("a:2", None), ("a:3", None)])
    ['row-2', "row-2'", 'row-3']

    Raises:
        DrklError: two rows have the same id of their own.
    """
    places: dict[str, str] = {}
    for place, own in written:
        if own is not None and own in places:
            raise DrklError(
                f"{place}: the id {short(own)} was seen before, at {places[own]}; ids must be unique. Change one, or "
                "remove the column id: rows without one are numbered."
            )
        if own is not None:
            places[own] = place
    made_up = (free_id(f"row-{number}", places) for number in count(1))
    return [name if own is None else own for name, (_, own) in zip(made_up, written, strict=False)]


def free_id(wanted: str, taken: Container[str]) -> str:
    """Return an id, with as many marks after it as make it new."""
    while wanted in taken:
        wanted += "'"
    return wanted


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, Integral) and type(value) is not bool


def _number(place: str, name: str, value: Any) -> str:
    """A whole number as text."""
    try:
        return str(value)
    except ValueError as error:  # Python writes no more than 4,300 digits
        raise DrklError(f"{place}: {name} is a number of too many digits; write it as text.") from error
