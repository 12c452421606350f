"""Read yaml and json that anybody may have written: it ends soon, runs nothing, and fails in one way."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from drkl.errors import DrklError

DEEPEST = 100
"""Lists and mappings inside one another in a yaml text."""
MOST_VALUES = 1_000_000
"""Values of a yaml text, each as often as its aliases repeat it."""
LONGEST_NUMBER = 1000
"""Characters of a yaml value that is no text."""
_ENDLESS = (stat.S_ISCHR, stat.S_ISBLK, stat.S_ISFIFO, stat.S_ISSOCK)
_OPENED = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Names of what a shell has opened for this process: `drkl distill <(…)`."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with an end to what a small text can ask for; of two keys of one name neither is taken."""

    _depth = 0

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _count(node, {})
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"more than {DEEPEST} lists and mappings in one another",
                problem_mark=self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"two keys {key.value!r}", problem_mark=key.start_mark)
            seen.add(name)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        is_number = isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] not in ("str", "binary")
        if is_number and len(node.value) > LONGEST_NUMBER:
            problem = f"a value of {len(node.value)} characters that is no text; put text into quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a date of the 99th month
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def _count(node: Any, known: dict[int, int]) -> int:
    """The number of values in a node.

    Args:
        node: of yaml; None for an empty text.
        known: the numbers of nodes that were counted; 0 for one that is being counted, and so holds itself.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if (found := known.get(id(node))) is not None:
        if not found:
            raise yaml.MarkedYAMLError(problem="an alias inside of what it stands for", problem_mark=node.start_mark)
        return found
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    total = 1 + sum(_count(part, known) for part in parts)
    if total > MOST_VALUES:
        problem = f"more than {MOST_VALUES:,} values, each as often as its aliases repeat it"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = total
    return total


def parse_yaml(text: str) -> Any:
    """Return the value of a yaml text; it holds plain values only, and no alias makes it large.

    Raises:
        yaml.YAMLError: it is broken, too deep, too large, holds itself or has two keys of one name in a mapping.
    """
    return yaml.load(text, _Loader)


def parse_json(text: str) -> Any:
    """Return the value of a json text.

    Raises:
        json.JSONDecodeError: it is broken, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error
    except ValueError as error:  # int() refuses more than 4,300 digits
        raise json.JSONDecodeError("a number has too many digits", text, 0) from error


def check_ends(path: str | Path) -> None:
    """Raise DrklError where what lies at a path may have no end, as a device has, or may never begin, as a pipe.

    Args:
        path: of a file; one that is not there is let through, and so is what a shell has opened for this process.

    Raises:
        DrklError: it is a device, a pipe or a socket.
    """
    name = os.fspath(path)
    if name.startswith(_OPENED):
        return
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        return
    if any(is_kind(mode) for is_kind in _ENDLESS):
        raise DrklError(f"{name!r} is a device, a pipe or a socket; expected a file. Write what it gives into a file.")
