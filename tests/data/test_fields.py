"""What rows hold beside texts: kept for the template, obeyed, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from drkl.data.examples import Example, parse_rows
from drkl.errors import DrklError

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "arguments": {"x": 1}}
CALL = {"type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ANSWER = {"role": "tool", "content": "7"}


def read(row: dict[str, Any]) -> Example:
    (example,) = parse_rows([("rows, row 1", row)], "rows")
    return example


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [ASK, {**SAY, **fields}]}


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "one ", "image_url": None}, {"type": "input_text", "text": "two"}, {"text": " 3"}]
    assert read({"messages": [{**ASK, "content": parts}, SAY]}).prompt_text == "one two 3"
    assert read({"prompt": [{**ASK, "content": parts}], "completion": "a"}).prompt_text == "one two 3"


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        FUNCTION,
        {"function": FUNCTION},
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}, "index": None},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_are_objects_however_they_were_written(call: Any, content: dict[str, Any]) -> None:
    row = {"messages": [ASK, {"role": "assistant", "tool_calls": [call], **content}, ANSWER, SAY]}
    example = read(row)
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert example.given == ("tool_calls",)


def test_older_ways_to_call() -> None:
    old = {"messages": [ASK, {"role": "assistant", "content": None, "function_call": FUNCTION},
                        {"role": "function", "name": "f", "content": "7"}, SAY]}  # fmt: skip
    turns = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "7"),
        ("gpt", "a"),
    ]
    sharegpt = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    for row in (old, sharegpt):
        _, call, answer, _ = read(row).messages
        assert call == {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert (answer["role"], answer["content"]) == ("tool", "7")


def test_fields_that_are_null_are_absent_and_others_stay() -> None:
    message = {**SAY, "reasoning_content": "r", "tool_calls": None, "name": None, "stamp": 3}
    assert read({"messages": [ASK, message]}).messages[1] == {**SAY, "reasoning_content": "r", "stamp": 3}
    assert read(assistant(tool_calls=[], images=[], refusal="", weight=None)).messages == (ASK, SAY)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_reasoning_beside_a_pair_is_the_response_s(name: str) -> None:
    example = read({"prompt": "q", "response": "a", name: "because"})
    assert example.messages[1] == {**SAY, name: "because"} and example.given == (name,)
    assert read({"prompt": "q", "response": "a", name: ""}).messages[1] == SAY


@pytest.mark.parametrize(
    "tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL]), json.dumps([TOOL["function"]]), [json.dumps(TOOL)]]
)
@pytest.mark.parametrize("row", [{"messages": [ASK, SAY]}, {"prompt": "q", "response": "a"}])
def test_tools_are_schemas(tools: Any, row: dict[str, Any]) -> None:
    assert read({**row, "tools": tools}).tools == (TOOL,)
    assert read({**row, "functions": [TOOL["function"]]}).tools == (TOOL,)
    assert read({**row, "tools": []}).tools is None


def test_what_a_template_is_given() -> None:
    document = {"title": "t", "text": "x"}
    row = {"messages": [ASK, SAY], "chat_template_kwargs": {"thinking": False, "no": None}, "documents": [document]}
    assert read(row).template_kwargs == {"thinking": False, "documents": [document]}
    assert read({"messages": [ASK, SAY], "chat_template_kwargs": '{"a": 1}'}).template_kwargs == {"a": 1}
    assert read({"messages": [ASK, SAY], "chat_template_kwargs": {}, "documents": []}).template_kwargs is None


@pytest.mark.parametrize("name", ["weight", "loss_mask", "train", "trainable", "training", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (0.0, 1.0), (False, True)])
def test_weights_of_messages(name: str, no: Any, yes: Any) -> None:
    turns = [{**ASK, name: no}, {**SAY, name: no}, ASK, {**SAY, name: yes}, {**ASK, name: None}, SAY]
    example = read({"messages": turns, "system": "s"})
    assert example.unlearnt == (2,) and example.given == ("weight 0",)
    assert all(set(message) == {"role", "content"} for message in example.messages)


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (assistant(content=[{"type": "text", "text": "a"}, IMAGE]), r"messages\[1\]\.content\[1\], a part of type "
         "'image_url', is not supported: the models read text alone"),
        (assistant(content=[{"type": "input_audio", "input_audio": {}}]), "a part of type 'input_audio', is not"),
        (assistant(content=[{"type": "text"}]), r"messages\[1\]\.content\[0\]\.text must be text; found null"),
        (assistant(images=["x.png"]), r"messages\[1\]\.images is not supported"),
        (assistant(audio={"id": "x"}), r"messages\[1\]\.audio is not supported"),
        ({"text": "t", "image": {"bytes": b"x"}}, "the column 'image' is not supported"),
        ({"prompt": "q", "response": "a", "videos": ["x.mp4"]}, "the column 'videos' is not supported"),
        (assistant(weight=0.5), r"messages\[1\]\.weight is 0\.5; expected 0 .* a fraction"),
        (assistant(weight=10**5000), r"messages\[1\]\.weight is a number; expected 0"),
        (assistant(loss_mask=[0, 1]), r"messages\[1\]\.loss_mask is \[0, 1\]; expected 0"),
        (assistant(train="no"), r"messages\[1\]\.train is 'no'; expected 0"),
        (assistant(weight=1, train=False), r"messages\[1\] has weight and train, which say different things"),
        ({"messages": [{**ASK, "weight": 1}, SAY]}, "is to be learnt by its weight, but its role is 'user'"),
        ({"prompt": "q", "response": "a", "weight": 0.3}, "the column 'weight' is 0.3: a row is learnt or it is not"),
        ({"messages": [ASK, SAY], "loss_mask": [0, 1]}, r"the column 'loss_mask' is \[0, 1\]"),
        ({"prompt": "q", "response": "a", "train": False}, "the column 'train' is False"),
        (assistant(reasoning="r", thinking="t"), r"messages\[1\] has reasoning and thinking, which say different"),
        (assistant(reasoning_content=["r"]), r"messages\[1\]\.reasoning_content must be text; found a list"),
        (assistant(content=[], tool_calls=[{"name": "f", "arguments": {"x": "\ud83d"}}]), "half a surrogate pair: not"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"x": 10**5000}}]), "messages.* cannot be written as json"),
        ({"messages": [ASK, SAY], "tools": [{"name": "f", "deep": deep(2000)}]}, "tools cannot be written as json"),
        ({"messages": [ASK, SAY], "documents": [{"text": "\ud83d"}]}, "documents has half a surrogate pair"),
        (assistant(tool_calls=[1]), r"messages\[1\]\.tool_calls\[0\] must be a call, as in .*; found 1"),
        (assistant(tool_calls="f(x)"), r"messages\[1\]\.tool_calls must be a list; found text"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, SAY]}, r"messages\[0\] has tool_calls and the role 'user'"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, r"\[1\]\.content must be text; found null"),
        ({"messages": [ASK, ANSWER, SAY]}, r"messages\[1\] has the role 'tool', expected 'assistant'"),
        ({"messages": [ASK, {"role": "developer", "content": "d"}, SAY]}, r"messages\[1\] has the role 'developer'"),
        ({"messages": [ASK, {"role": ["assistant"], "content": "d"}]}, r"messages\[1\] has the role \['assistant'\]"),
        ({"messages": [ASK, SAY], "tools": "search"}, "tools must be a list of functions, .*; found 'search'"),
        ({"messages": [ASK, SAY], "tools": [{"description": "d"}]}, "tools must be a list of functions"),
        ({"messages": [ASK, SAY], "documents": ["d"]}, r"documents must be a list of objects with title and text"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": "x"}, "chat_template_kwargs must be an object; found text"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which drkl"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=f"^rows, row 1: .*{message}"):
        read(row)


def test_weights_of_one_and_addresses_of_images_beside_a_text_pass() -> None:
    assert (
        read({"prompt": "q", "response": "a", "weight": 1.0, "loss_mask": [1, 1], "train": "true"}).messages[1] == SAY
    )
    assert read({"text": "t", "image": "https://example.org/x.png", "tools": ["t"]}).is_text


@pytest.mark.parametrize("name", ["loss_weight", "loss_multiplier"])
def test_other_names_of_a_weight(name: str) -> None:
    assert read({"messages": [ASK, {**SAY, name: 0}, ASK, SAY]}).unlearnt == (1,)
    with pytest.raises(DrklError, match=rf"messages\[1\]\.{name} is 0\.5; expected 0"):
        read({"messages": [ASK, {**SAY, name: 0.5}]})
    with pytest.raises(DrklError, match=rf"the column '{name}' is 0: a row is learnt or it is not"):
        read({"messages": [ASK, SAY], name: 0})


@pytest.mark.parametrize("field", [{"mask": 1}, {"mask": 0}, {"train_detail": [{"train": False}]}])
def test_masks_of_another_kind_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(DrklError, match=rf"messages\[1\]\.{next(iter(field))} is not read, and it says what is learnt"):
        read({"messages": [ASK, {**SAY, **field}]})
