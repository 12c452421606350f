"""Examples: rows of any source, checked, as conversations or as plain texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from drkl.data.config import NO_ROWS, DataConfig, SourceConfig
from drkl.data.files import dataset_rows, file_rows
from drkl.data.formats import standard_row
from drkl.errors import DrklError
from drkl.runs import IN_MEMORY

MAX_HELD_OUT = 100
HELD_OUT_SHARE = 0.05
# With fewer plain texts than this, the end of each is held out in place of whole texts.
MANY_TEXTS = 20
UNSUPPORTED = ("tools", "images", "image", "chat_template_kwargs")
"""Columns that change what a model reads, and that nothing here hands to the chat template."""


@dataclass(frozen=True)
class Example:
    """One conversation, whose last message is the assistant's response, the part to learn.

    A plain text is a single message of the assistant. ``label`` is the label of a classified text (and its response),
    ``context_start`` the character of the prompt at which the input begins that the instruction is about, ``weight``
    how often an epoch takes the example. ``references`` are all correct answers where there are several, the response
    among them.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    label: str | None = None
    context_start: int | None = None
    weight: float = 1.0
    references: tuple[str, ...] = ()

    @property
    def all_references(self) -> tuple[str, ...]:
        """The answers that text metrics compare a sample with."""
        return self.references or (self.response,)

    @property
    def is_text(self) -> bool:
        """Whether this is a plain text, every token of which is learnt."""
        return len(self.messages) == 1

    @property
    def prompt_messages(self) -> tuple[dict[str, str], ...]:
        """All messages but the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The last message's text."""
        return self.messages[-1]["content"]

    @property
    def prompt_text(self) -> str:
        """The last user message's text, for display and for text metrics."""
        return "" if self.is_text else self.messages[-2]["content"]


def load_examples(config: DataConfig) -> tuple[list[Example], list[Example]]:
    """Return the training rows and the held-out rows.

    Rows with an empty prompt or response are still here: ``tokenize_examples`` drops and counts them.

    Raises:
        DrklError: a file or data set that is missing or unreadable, a bad row (with file:line), no rows at all.
    """
    train: list[Example] = []
    held_out: list[Example] = []
    sources = config.all_sources()
    for number, source in enumerate(sources, start=1):
        rows = read_source(source)
        if len(sources) > 1:  # rows of two files may have the same ids
            rows = [replace(row, id=f"{number}:{row.id}") for row in rows]
        if config.eval_path is None:
            rows, held = hold_out(rows)
            held_out += held
        train += [replace(row, weight=source.weight) for row in rows[: source.max_rows]]
    return train, held_out if config.eval_path is None else read_heldout(config)


def read_heldout(config: DataConfig) -> list[Example]:
    """Return the held-out rows alone.

    Raises:
        DrklError: see ``load_examples``.
    """
    if config.eval_path is None:
        return load_examples(config)[1]
    if config.eval_path == NO_ROWS:
        return []
    held_out = read_examples(config.eval_path, config.format)
    chosen = {e.id for e in sorted(held_out, key=lambda e: hash_of_id(e.id))[: config.eval_max_rows]}
    return [example for example in held_out if example.id in chosen]


def read_source(source: SourceConfig) -> list[Example]:
    """Read all rows of a source.

    Raises:
        DrklError: see ``load_examples``.
    """
    row_format = source.format or "auto"
    if source.path is not None:
        return read_examples(source.path, row_format)
    assert source.dataset is not None
    return parse_rows(dataset_rows(source.dataset), source.dataset, row_format)


def read_examples(path: str, row_format: str = "auto") -> list[Example]:
    """Read one file (jsonl, json, csv, tsv, parquet, txt), or a bundled one by its name.

    Raises:
        DrklError: see ``load_examples``.
    """
    if path.startswith(IN_MEMORY):
        raise DrklError(
            f"The rows were passed to the trainer {path.replace(':', ',', 1)}, so they cannot be read again. Go on in "
            "Python: trainer.train(resume_from_checkpoint=True), or drkl.evaluate(student, teacher, rows)."
        )
    return parse_rows(file_rows(path, row_format), path, row_format)


def parse_rows(rows: Iterable[tuple[str, Any]], source: str, row_format: str = "auto") -> list[Example]:
    """Turn ``(place, value)`` pairs into examples; errors name the ``place``, as in ``file:line``.

    Rows of public formats that `standard_row` knows are rewritten first, unless plain text or labels are asked for.

    Raises:
        DrklError: a bad row, two rows of one id, or no rows.
    """
    examples: list[Example] = []
    ids: list[tuple[str, str | None]] = []
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise DrklError(f"{place}: expected an object with prompt and response, or messages; found {_kind(row)}.")
        row, own_format = _standardised(place, row, row_format)
        ids.append((place, written_id(place, row)))
        examples.append(_example(place, "", row, own_format))
    if not examples:
        raise DrklError(
            f"{source} has no rows; expected one json object per line, with prompt and response or messages."
        )
    return [replace(example, id=row_id) for example, row_id in zip(examples, row_ids(ids), strict=True)]


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
        groups.setdefault(json.dumps(example.prompt_messages or example.messages), []).append(example.id)
    if len(groups) < 2:
        raise DrklError(
            f"{len(examples)} row(s) with {len(groups)} different prompt(s) cannot be split into training and held-out "
            "rows. Add rows, or set data.eval_path."
        )
    held: set[str] = set()
    for ids in groups.values():
        if len(held) + len(ids) <= wanted:
            held.update(ids)
    if not held:
        smallest: list[str] = min(groups.values(), key=len)
        held.update(smallest)
    return [e for e in examples if e.id not in held], [e for e in examples if e.id in held]


def hash_of_id(row_id: str) -> bytes:
    """Return a hash of a row's id; rows selected in its order do not depend on the order of the file."""
    return hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()


def _hold_out_ends(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        text = example.response
        place = int(len(text) * (1 - HELD_OUT_SHARE))
        # Between paragraphs, lines or words, in this order.
        cut = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, place // 2, place)) > 0), place)
        parts = [text[:cut], text[cut:].lstrip()]
        if not all(part.strip() for part in parts):
            raise DrklError(f"The text {example.id!r} is too short to hold out its end. Set data.eval_path.")
        for rows, row_id, part in ((train, example.id, parts[0]), (held_out, f"{example.id}-end", parts[1])):
            rows.append(replace(example, id=row_id, messages=({"role": "assistant", "content": part},)))
    return train, held_out


def _standardised(place: str, row: Mapping[str, Any], row_format: str) -> tuple[Mapping[str, Any], str]:
    """A row with the fields of one format, and that format."""
    given = row
    own = _format_of(row) if row_format == "auto" else row_format
    if own not in ("text", "text_label"):
        _check_supported(place, row)
        if own == "auto" or not _has_fields(row, own):
            row = standard_row(row)
            own = _format_of(row) if row_format == "auto" else row_format
    missing = [name for name in sorted(_FIELDS.get(own, {"prompt", "response"})) if name not in row]
    if missing:
        alone = "prompt" in row and "response" not in row and own in ("auto", "prompt_response")
        raise DrklError(f"{place}: expected {_EXPECTED[own]}; found {_fields(given)}.{_PROMPT_ALONE if alone else ''}")
    return row, own


def _example(place: str, row_id: str, row: Mapping[str, Any], row_format: str) -> Example:
    if row_format == "messages":
        return Example(row_id, _conversation(place, row["messages"]))
    if row_format == "text":
        return Example(row_id, ({"role": "assistant", "content": _text(place, "text", row["text"])},))
    if row_format == "text_label":
        label = _label(place, row["label"])
        return Example(row_id, _pair(_text(place, "text", row["text"]), label), label=label)
    prompt, response = (_text(place, name, row[name]) for name in ("prompt", "response"))
    context_start = _context_start(place, row, prompt)
    if row.get("input"):
        context_start = len(prompt) + 2
        prompt += f"\n\n{_text(place, 'input', row['input'])}"
    references = _references(place, row, response)
    return Example(row_id, _pair(prompt, response), context_start=context_start, references=references)


def _format_of(row: Mapping[str, Any]) -> str:
    """The first format whose fields a row has; ``auto`` where it has none, or half of a pair."""
    row_format = next((name for name in _FIELDS if _has_fields(row, name)), "auto")
    # Half of a pair is a mistake, whatever stands beside it.
    return "auto" if row_format == "text" and {"prompt", "response"} & row.keys() else row_format


def _has_fields(row: Mapping[str, Any], row_format: str) -> bool:
    pair = row_format == "prompt_response" and any(isinstance(row.get(name), list) for name in ("prompt", "response"))
    return _FIELDS[row_format] <= row.keys() and not pair


def _check_supported(place: str, row: Mapping[str, Any]) -> None:
    """Raise DrklError for columns that only a chat template could use: training without them would be another task."""
    for name in UNSUPPORTED:
        value = row.get(name)
        if value is not None and (not hasattr(value, "__len__") or len(value)):
            raise DrklError(
                f"{place}: the column {name!r} is not supported: a row is its text alone here, so the models would not "
                f"see it. Remove the column ({name}), or such rows."
            )


_FIELDS = {
    "messages": {"messages"},
    "prompt_response": {"prompt", "response"},
    "text_label": {"text", "label"},
    "text": {"text"},
}
"""The fields of each format; auto takes the first that fits."""
_EXPECTED = {
    "auto": "the fields prompt and response, or messages, or text (with label or without), or prompt and completion, "
    "or instruction and output",
    "messages": "the field messages",
    "prompt_response": "the fields prompt and response",
    "text_label": "the fields text and label",
    "text": "the field text",
}


_PROMPT_ALONE = (
    " A prompt alone is not enough: on-policy distillation, in which the student writes the responses, is not there "
    "yet. Add a column response (or completion), or messages that end with the assistant's."
)


def _pair(prompt: str, response: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def _references(place: str, row: Mapping[str, Any], response: str) -> tuple[str, ...]:
    value = row.get("references")
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not value:
        raise DrklError(f"{place}: references must be a list of texts, not empty; found {_kind(value)}.")
    references = tuple(_text(place, f"references[{i}]", text) for i, text in enumerate(value))
    return references if response in references else (response, *references)


def _label(place: str, value: Any) -> str:
    if _is_whole_number(value):
        return _number(place, "label", value)
    return _text(place, "label", value)


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


def _conversation(place: str, value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DrklError(f"{place}: messages must be a list of {{role, content}} objects; found {_kind(value)}.")
    messages = []
    for index, message in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            fields = _fields(message) if isinstance(message, Mapping) else _kind(message)
            raise DrklError(f"{place}: {name} must have role and content; found {fields}.")
        if message.get("tool_calls"):
            raise DrklError(f"{place}: {name} has tool_calls, which are not supported: a message is its content alone.")
        messages.append({"role": message["role"], "content": _text(place, f"{name}.content", message["content"])})
    _check_roles(place, [message["role"] for message in messages])
    return tuple(messages)


def _check_roles(place: str, roles: list[Any]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    for index, role in enumerate(turns, start=len(roles) - len(turns)):
        expected = "user" if (index - len(roles) + len(turns)) % 2 == 0 else "assistant"
        if role != expected:
            raise DrklError(
                f"{place}: messages[{index}] has the role {role!r}, expected {expected!r}: after an optional system "
                "message, user and assistant take turns."
            )
    if roles[-1] != "assistant":
        raise DrklError(
            f"{place}: the last message has the role {roles[-1]!r}; it must be the assistant's, the response to learn."
        )


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DrklError(f"{place}: {name} must be text; found {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DrklError(
            f"{place}: {name} has half a surrogate pair at character {error.start}: not valid text."
        ) from error
    return value


def written_id(place: str, row: Mapping[str, Any]) -> str | None:
    """Return a row's own ``id`` as text, or None where it has none; csv has "" for none."""
    value = row.get("id")
    if value is None or value == "":
        return None
    return _number(place, "id", value) if _is_whole_number(value) else _text(place, "id", value)


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
            raise DrklError(f"{place}: the id {own[:99]!r} was seen before, at {places[own]}; ids must be unique.")
        if own is not None:
            places[own] = place
    ids = []
    for number, (_, own) in enumerate(written, start=1):
        made_up = f"row-{number}"
        while made_up in places:
            made_up += "'"
        ids.append(made_up if own is None else own)
    return ids


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, Integral) and type(value) is not bool


def _number(place: str, name: str, value: Any) -> str:
    """A whole number as text."""
    try:
        return str(value)
    except ValueError as error:  # Python writes no more than 4,300 digits
        raise DrklError(f"{place}: {name} is a number of too many digits; write it as text.") from error


def _fields(row: Mapping[str, Any]) -> str:
    # A blank beside a name would not be seen.
    names = [repr(name) if isinstance(name, str) and name != name.strip() else str(name) for name in row]
    return ", ".join(names) or "no fields"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
