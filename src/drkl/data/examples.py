"""Rows of a jsonl file or of a ``datasets`` data set, checked, as conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from drkl.data.config import DataConfig
from drkl.errors import DrklError, did_you_mean
from drkl.runs import read_text

BUNDLED = {"bundled:dolly": "dolly_train.jsonl", "bundled:dolly-eval": "dolly_eval.jsonl"}
MAX_HELD_OUT = 100
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Example:
    """One conversation; its last message is the assistant's and is what is learnt."""

    id: str
    messages: tuple[dict[str, str], ...]

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
        return self.messages[-2]["content"]


def load_examples(config: DataConfig) -> tuple[list[Example], list[Example]]:
    """Return the training rows and the held-out rows.

    Rows with an empty prompt or response are still here: ``tokenize_examples`` drops and counts them.

    Raises:
        DrklError: a file or data set that is missing or unreadable, a bad row (with file:line), no rows at all.
    """
    if config.path is not None:
        train = read_examples(config.path, config.format)
    else:
        assert config.dataset is not None
        train = _read_dataset(config.dataset, config.format)
    if config.eval_path is not None:
        return train[: config.max_rows], read_examples(config.eval_path, config.format)
    train, held_out = hold_out(train)
    return train[: config.max_rows], held_out


def read_examples(path: str, row_format: str = "auto") -> list[Example]:
    """Read one jsonl file, or a bundled one by its name.

    Raises:
        DrklError: see ``load_examples``.
    """
    if path.startswith("bundled:"):
        if path not in BUNDLED:
            raise DrklError(
                f"There is no bundled data {path!r}; there is {', '.join(BUNDLED)}.{did_you_mean(path, BUNDLED)}"
            )
        text = resources.files("drkl.data").joinpath("bundled", BUNDLED[path]).read_text(encoding="utf-8")
    else:
        text = read_text(Path(path).expanduser())
    return parse_rows(_json_lines(text, path), path, row_format)


def parse_rows(rows: Iterable[tuple[str, Any]], source: str, row_format: str = "auto") -> list[Example]:
    """Turn ``(place, value)`` pairs into examples; ``place`` is what an error names, as in ``file:line``.

    Raises:
        DrklError: a bad row, two rows of one id, or no rows.
    """
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DrklError(f"{place}: expected an object with prompt and response, or messages; found {_kind(row)}.")
        messages = _messages(place, row, row_format)
        row_id = _row_id(place, row, number)
        if row_id in seen:
            raise DrklError(f"{place}: the id {row_id!r} was seen before, at {seen[row_id]}; ids must be unique.")
        seen[row_id] = place
        examples.append(Example(row_id, messages))
    if not examples:
        raise DrklError(
            f"{source} has no rows; expected one json object per line, with prompt and response or messages."
        )
    return examples


def hold_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split off 5 % of the rows (1 to 100), picked by a hash of their ids; order is kept on both sides.

    Rows that share a prompt stay on one side, so that no held-out prompt was trained on.

    Raises:
        DrklError: nothing would be left to train on.
    """
    wanted = max(1, min(MAX_HELD_OUT, round(HELD_OUT_SHARE * len(examples))))
    groups: dict[str, list[str]] = {}
    for example in sorted(examples, key=lambda e: hashlib.sha256(e.id.encode()).digest()):
        groups.setdefault(json.dumps(example.prompt_messages), []).append(example.id)
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


def _json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    # split("\n"), not splitlines(): json strings may hold U+2028, U+0085 and the like unescaped.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise DrklError(f"{place}: not valid JSON: {error.msg} (column {error.colno}).") from error
        except RecursionError as error:
            raise DrklError(f"{place}: not valid JSON: nested too deeply.") from error


def _messages(place: str, row: Mapping[str, Any], row_format: str) -> tuple[dict[str, str], ...]:
    if row_format == "messages" or (row_format == "auto" and "messages" in row):
        if "messages" not in row:
            raise DrklError(f"{place}: expected the field messages; found {_fields(row)}.")
        return _conversation(place, row["messages"])
    missing = [name for name in ("prompt", "response") if name not in row]
    if missing:
        other = ", or messages" if row_format == "auto" else ""
        raise DrklError(f"{place}: expected the fields prompt and response{other}; found {_fields(row)}.")
    prompt = _text(place, "prompt", row["prompt"])
    response = _text(place, "response", row["response"])
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def _conversation(place: str, value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DrklError(f"{place}: messages must be a list of {{role, content}} objects; found {_kind(value)}.")
    messages = []
    for index, message in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            found = _fields(message) if isinstance(message, Mapping) else _kind(message)
            raise DrklError(f"{place}: {name} must have role and content; found {found}.")
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


def _row_id(place: str, row: Mapping[str, Any], number: int) -> str:
    value = row.get("id")
    if value is None:
        return f"row-{number}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(place, "id", value)


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in row) if row else "no fields"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _read_dataset(name: str, row_format: str) -> list[Example]:
    try:
        import datasets
    except ImportError as error:
        raise DrklError(
            "data.dataset needs the package datasets (pip install datasets); data.path does not."
        ) from error
    local = Path(name).expanduser()
    where, config_name = (str(local), None) if local.exists() else _split_config(name)
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(where, config_name, split="train")
    # `datasets` raises what its readers raise: OSError, KeyError, ValueError, its own, the network's.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        looked = "found the local folder" if local.exists() else f"no local folder {str(local)!r}, then the hub"
        raise DrklError(
            f"Cannot load the data set {where!r} (config {config_name or 'default'}, split 'train'); looked at: "
            f"{looked}. {type(error).__name__}: {reason} A jsonl file in data.path needs no hub."
        ) from error
    return parse_rows(((f"{name}, row {i}", row) for i, row in enumerate(rows, start=1)), name, row_format)


def _split_config(name: str) -> tuple[str, str | None]:
    where, _, config_name = name.partition(":")
    return where, config_name or None
