"""What a chat template writes around the contents of messages, for templates that write contents as they are.

Such a template writes the same around all conversations of the same roles, so one rendering shows it for all of them.
Whether a template is one is read from its jinja: contents stand only where they are written, by themselves or trimmed,
and nothing that is asked, counted or computed depends on them. Of any other template nothing is known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, nodes

if TYPE_CHECKING:
    from drkl.data.rendering import Messages

_BLANK = "\x1c"
"""A blank that is trimmed, and that no template writes."""
_HOLE = re.compile(f"({_BLANK}?)drkl0content([0-9]+)x({_BLANK}?)")


class Outline:
    """A conversation with holes in the place of its contents.

    Args:
        text: what the template writes where the content of message ``i`` is ``hole(i)``.
    """

    def __init__(self, text: str) -> None:
        first, *rest = _HOLE.split(text)
        self._first = first
        self._pieces: list[tuple[int, bool, str]] = []
        self.is_known = True
        for before, number, after, literal in zip(*(rest[start::4] for start in range(4)), strict=True):
            self.is_known = self.is_known and before == after  # else it trims one side alone
            self._pieces.append((int(number), not before, literal))

    @staticmethod
    def hole(number: int) -> str:
        """The text that stands for a message's content."""
        return f"{_BLANK}drkl0content{number}x{_BLANK}"

    def filled(self, contents: Sequence[str]) -> str:
        """The conversation with these contents."""
        parts = [self._first]
        for number, is_trimmed, literal in self._pieces:
            parts += (contents[number].strip() if is_trimmed else contents[number], literal)
        return "".join(parts)


class Outlines:
    """The outlines of what one template writes, by the roles of the messages.

    Args:
        render: what writes a conversation, with or without a generation prompt.
    """

    def __init__(self, render: Callable[[Messages, bool], str]) -> None:
        self._render = render
        self._known: dict[tuple[Any, ...], Outline] = {}

    def text(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Return a conversation as the template writes it; rendered by itself where it has more than contents.

        Raises:
            DrklError: as ``render``.
        """
        if not all(len(message) == 2 and type(message.get("content")) is str for message in messages):
            return self._render(messages, add_generation_prompt)
        key = (add_generation_prompt, *(message.get("role") for message in messages))
        if not all(type(role) is str for role in key[1:]):
            return self._render(messages, add_generation_prompt)
        if key not in self._known:
            holes = [{**message, "content": Outline.hole(number)} for number, message in enumerate(messages)]
            self._known[key] = Outline(self._render(holes, add_generation_prompt))
        outline = self._known[key]
        if not outline.is_known:
            return self._render(messages, add_generation_prompt)
        return outline.filled([message["content"] for message in messages])


@lru_cache(maxsize=64)
def writes_contents_alone(template: str) -> bool:
    """Whether a chat template writes contents as they are or trimmed, and does nothing else with them."""
    if _BLANK in template or "drkl0content" in template:
        return False
    try:
        # As transformers reads chat templates.
        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        return _Reader(environment.parse(template)).is_plain
    except (TemplateError, RecursionError):
        return False


class _Reader:
    """Reads a template's jinja: which names hold the messages, one message or a content, and what is done with them."""

    def __init__(self, template: nodes.Template) -> None:
        self._lists, self._messages, self._contents = {"messages"}, set[str](), set[str]()
        sizes = None
        while sizes != (sizes := (len(self._lists), len(self._messages), len(self._contents))):
            self._read_names(template)
        names = [*self._lists, *self._messages, *self._contents]
        self.is_plain = len(names) == len(set(names)) and "loop" not in names and self._is_plain(template)

    def _read_names(self, template: nodes.Template) -> None:
        for loop in template.find_all(nodes.For):
            if isinstance(loop.target, nodes.Name) and self._is_list(loop.iter):
                self._messages.add(loop.target.name)
        for assignment in template.find_all(nodes.Assign):
            target, value = assignment.target, assignment.node
            if not isinstance(target, nodes.Name):
                continue
            if self._is_list(value):
                self._lists.add(target.name)
            elif self._is_message(value):
                self._messages.add(target.name)
            elif self._is_content(value) or any(map(self._is_content, value.find_all(nodes.Expr))):
                self._contents.add(target.name)

    def _is_list(self, value: nodes.Node) -> bool:
        if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice):
            return self._is_list(value.node) and self._is_free(value.arg)
        return isinstance(value, nodes.Name) and value.name in self._lists

    def _is_message(self, value: nodes.Node) -> bool:
        if isinstance(value, nodes.Getitem) and not isinstance(value.arg, nodes.Slice):
            return self._is_list(value.node) and self._is_free(value.arg)
        return isinstance(value, nodes.Name) and value.name in self._messages

    def _is_content(self, value: nodes.Node) -> bool:
        if isinstance(value, nodes.Getattr | nodes.Getitem) and _field(value) == "content":
            return self._is_message(value.node)
        return isinstance(value, nodes.Name) and value.name in self._contents

    def _is_plain(self, node: nodes.Node) -> bool:
        """Whether a statement does no more with contents than to write them."""
        if isinstance(node, nodes.Output):
            return all(map(self._is_written, node.nodes))
        if isinstance(node, nodes.For):
            is_messages = self._is_list(node.iter) and isinstance(node.target, nodes.Name)
            free = [] if is_messages else [node.iter]
            free += [] if node.test is None else [node.test]
            body = [*node.body, *node.else_]
            return not node.recursive and all(map(self._is_free, free)) and all(map(self._is_plain, body))
        if isinstance(node, nodes.If):
            return self._is_free(node.test) and all(map(self._is_plain, [*node.body, *node.elif_, *node.else_]))
        if isinstance(node, nodes.Assign):
            is_named = isinstance(node.target, nodes.Name)
            if is_named and (self._is_list(node.node) or self._is_message(node.node) or self._is_written(node.node)):
                return True
            return isinstance(node.target, nodes.Name | nodes.NSRef) and self._is_free(node.node)
        if isinstance(node, nodes.Template):
            return all(map(self._is_plain, node.body))
        return isinstance(node, nodes.Break | nodes.Continue)

    def _is_written(self, value: nodes.Node) -> bool:
        """Whether a value may be contents put together with other texts."""
        if isinstance(value, nodes.Add | nodes.Concat):
            return all(map(self._is_written, value.iter_child_nodes()))
        if isinstance(value, nodes.CondExpr):
            results = [value.expr1] if value.expr2 is None else [value.expr1, value.expr2]
            return self._is_free(value.test) and all(map(self._is_written, results))
        inner = _untrimmed(value)
        # What a name holds may be a content with something before it, of which a blank content would be trimmed too.
        is_content = self._is_content(inner) and (value is inner or not isinstance(inner, nodes.Name))
        return is_content or self._is_free(value)

    def _is_free(self, value: nodes.Node) -> bool:
        """Whether a value is the same whatever the contents are."""
        if isinstance(value, nodes.Name):
            return value.name not in {*self._lists, *self._messages, *self._contents, "loop"}
        if isinstance(value, nodes.Getattr | nodes.Getitem) and (field := _field(value)) is not None:
            if self._is_message(value.node):
                return field != "content" and not hasattr(dict, field)
            if isinstance(value.node, nodes.Name) and value.node.name == "loop":
                return field in _PLACES
        if isinstance(value, nodes.Filter) and value.node is not None and self._is_list(value.node):
            return value.name in ("length", "count")
        if isinstance(value, nodes.Filter) and value.name == "random":
            return False
        if isinstance(value, nodes.Test) and self._is_content(value.node):
            return value.name in _OF_TYPES
        if isinstance(value, nodes.Call):
            known = isinstance(value.node, nodes.Getattr) or getattr(value.node, "name", None) in _FUNCTIONS
            return known and all(map(self._is_free, value.iter_child_nodes()))
        return isinstance(value, _COMPUTED) and all(map(self._is_free, value.iter_child_nodes()))


_PLACES = ("index", "index0", "revindex", "revindex0", "first", "last", "length")
"""What a loop knows besides its items."""
_FUNCTIONS = ("namespace", "range", "raise_exception")
_OF_TYPES = ("defined", "undefined", "none", "string", "mapping", "number", "boolean")
"""Tests of what something is; a content is text."""
_COMPUTED = (
    nodes.Const, nodes.TemplateData, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Compare,
    nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div,
    nodes.FloorDiv, nodes.Mod, nodes.Concat, nodes.CondExpr, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair,
    nodes.Keyword,
)  # fmt: skip


def _field(value: nodes.Node) -> str | None:
    """The name of the field that an expression takes of something, if it is one name."""
    if isinstance(value, nodes.Getattr):
        return value.attr
    if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Const) and isinstance(value.arg.value, str):
        return value.arg.value
    return None


def _untrimmed(value: nodes.Node) -> nodes.Node:
    """What is trimmed, at both ends and of all blanks; a value that is not is itself."""
    if isinstance(value, nodes.Filter) and value.name == "trim" and value.node is not None:
        return value if value.args or value.kwargs else value.node
    if isinstance(value, nodes.Call) and isinstance(value.node, nodes.Getattr) and value.node.attr == "strip":
        return value if value.args or value.kwargs else value.node.node
    return value
