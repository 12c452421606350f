"""Rows of public formats, each as the conversation that it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from drkl.data.examples import parse_rows
from drkl.data.formats import SUMMARISE
from drkl.errors import DrklError

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def messages(row: dict[str, Any], row_format: str = "auto") -> list[tuple[str, str]]:
    (example,) = parse_rows([("rows, row 1", row)], "rows", row_format)
    return [(message["role"], message["content"]) for message in example.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [ASK], "completion": [SAY]},
        {"prompt": [ASK], "completion": "a"},
        {"prompt": "q", "completion": [SAY]},
        {"prompt": [ASK], "response": [SAY]},
        {"messages": [ASK, SAY]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "output": "a"},
        {"prompt": "q", "response": ["a", "b"]},
        {"prompt": "q", "response": "a", "tools": None, "images": [], "chat_template_kwargs": {}},
        {"prompt": "q", "response": "a", "output": "another column", "completion_tokens": 3, "extra": object()},
    ],
)
def test_one_question_and_answer(row: dict[str, Any]) -> None:
    assert messages(row) == [("user", "q"), ("assistant", "a")]


def test_a_conversation_whose_prompt_has_several_turns() -> None:
    system = {"role": "system", "content": "s"}
    row = {"prompt": [system, ASK, SAY, ASK], "completion": [SAY], "id": 7}
    (example,) = parse_rows([("rows, row 1", row)], "rows")
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert example.id == "7"


def test_the_ids_of_public_rows_are_kept() -> None:
    rows = [
        {"source": ["One.", "Two."], "target": ["t"], "paper_id": "P"},
        {"instruction": "q", "output": "a", "id": 3},
    ]
    found = parse_rows([(f"row {i}", row) for i, row in enumerate(rows)], "rows")
    assert [example.id for example in found] == ["P", "3"]
    assert found[0].prompt_text == f"{SUMMARISE}\n\nOne. Two."


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "pair": ("prompt and response", {"prompt": "q", "response": "a"}),
    "trl": ("prompt and completion (TRL)", {"prompt": "q", "completion": "a"}),
    "trl messages": ("prompt and completion (TRL), as messages", {"prompt": [ASK], "completion": [SAY]}),
    "openai": ("messages (OpenAI)", {"messages": [ASK, SAY]}),
    "ultrachat": ("messages (OpenAI)", {"prompt": "q", "prompt_id": "x", "messages": [ASK, SAY]}),
    "parts": (
        "messages (OpenAI)",
        {"messages": [{**ASK, "content": [{"type": "text", "text": "q"}]}, {**SAY, "content": [{"text": "a"}]}]},
    ),
    "json text": ("messages (OpenAI)", {"messages": json.dumps([ASK, SAY])}),
    "lists": ("messages (OpenAI)", {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}),
    "sharegpt": (
        "conversations (ShareGPT)",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": ""},
    ),
    "sharegpt with roles": ("conversations (ShareGPT)", {"conversations": [{**ASK, "role": "human"}, SAY]}),
    "lmsys": ("conversations (ShareGPT)", {"conversation": [ASK, SAY], "model": "m"}),
    "alpaca": ("instruction and output (Alpaca)", {"instruction": "q", "input": "", "output": "a"}),
    "minillm": ("instruction and output (Alpaca)", {"instruction": "q", "prompt": "# q", "input": "", "output": "a"}),
    "minillm's prompt": ("prompt and output (MiniLLM)", {"prompt": "q", "output": "a"}),
    "dolly": ("instruction and response (Dolly)", {"instruction": "q", "context": "", "response": "a", "category": ""}),
    "the other columns are null": (
        "prompt and response",
        {"prompt": "q", "response": "a", "messages": None, "text": "", "completion": None, "conversations": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_told_by_their_columns(name: str) -> None:
    title, row = SHAPES[name]
    (example,) = parse_rows([("rows, row 1", row)], "rows")
    assert example.shape == title and example.messages == (ASK, SAY)


def test_a_text_and_a_text_with_a_label() -> None:
    rows = [{"text": "t"}, {"text": "t", "label": "l"}, {"text": "t", "label": None}, {"text": "t", "timestamp": 3}]
    examples = parse_rows([(f"row {i}", row) for i, row in enumerate(rows)], "rows")
    assert [example.shape for example in examples] == ["text", "text and label", "text", "text"]


def test_a_context_is_an_input() -> None:
    for row in (
        {"instruction": "q", "input": "i", "output": "a", "context": "another column"},
        {"instruction": "q", "context": "i", "response": "a"},
    ):
        (example,) = parse_rows([("row 1", row)], "rows")
        assert (example.prompt_text, example.context_start) == ("q\n\ni", 3)


def test_a_system_message_and_earlier_turns_stand_in_columns() -> None:
    system, before = ("system", "s"), [("user", "h"), ("assistant", "r")]
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["h", "r"]]}
    assert messages(row) == [system, *before, ("user", "q"), ("assistant", "a")]
    assert messages({"prompt": "q", "response": "a", "system_prompt": "s"})[0] == system
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert messages({"conversations": turns, "system": "s"})[0] == system
    same = [{"role": "system", "content": "s"}, ASK, SAY]
    assert messages({"messages": same, "system": "s"}) == [system, ("user", "q"), ("assistant", "a")]


TWO = [
    ("messages", {"messages": [ASK, SAY]}),
    ("conversations", {"conversations": [{**ASK, "content": "c"}, SAY]}),
    ("prompt_response", {"prompt": "pq", "response": "a"}),
    ("prompt_completion", {"prompt": "pq", "completion": "a"}),
    ("instruction", {"instruction": "i", "output": "a"}),
    ("text_label", {"text": "t", "label": "l"}),
    ("text", {"text": "t"}),
]


@pytest.mark.parametrize("one", TWO, ids=[name for name, _ in TWO])
@pytest.mark.parametrize("other", TWO, ids=[name for name, _ in TWO])
def test_columns_of_two_shapes_are_refused_and_the_format_decides(
    one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    if one[0] == other[0] or {one[0], other[0]} == {"text", "text_label"}:
        return
    row = one[1] | other[1]
    with pytest.raises(
        DrklError, match=r"^rows, row 1: the columns fit two shapes: .*, and .*\. Set data\.format to"
    ) as e:
        messages(row)
    assert one[0] in str(e.value) and other[0] in str(e.value)
    for name, own in (one, other):
        assert messages(row, name) == messages(own, name)


def test_a_demanded_format_may_be_met_by_a_public_one() -> None:
    assert messages({"prompt": "q", "completion": "a"}, "prompt_response")[1] == ("assistant", "a")
    assert messages({"prompt": [ASK], "completion": [SAY]}, "messages")[1] == ("assistant", "a")
    assert messages({"text": "t", "prompt": "q", "completion": "a"}, "text") == [("assistant", "t")]
    for name in ("prompt_response", "prompt_completion", "instruction"):
        assert messages({"prompt": "q", "response": "a"}, name) == messages({"instruction": "q", "output": "a"}, name)
    assert messages({"messages": [ASK, SAY]}, "conversations") == messages({"conversations": [ASK, SAY]}, "messages")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "row 1: expected the fields prompt and response.*; found prompt. A prompt alone is "
         r"enough only where the student writes every response: rollouts.share: 1 \(in Python rollout_share=1\). Else "
         "add a column response"),
        ({"prompt": [ASK]}, "A prompt alone is enough only where"),
        ({"prompt": "q", "answer": "a"}, "found prompt, answer. A prompt alone is enough only where"),
        ({"chosen": "a", "rejected": "b"}, r"found chosen, rejected\. Pairs of a chosen .* name it response"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "Pairs of a chosen and a rejected answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "'label' is false: an answer that should not be"),
        ({"question": "q", "answer": "a"}, "If question is what is asked and answer the answer, name the columns"),
        ({"query": "q", "response": "a"}, "If query is what is asked and response the answer"),
        ({"document": "q", "summary": "a"}, "If document is what is asked and summary the answer"),
        ({"question": "q", "answers": {"text": ["a"]}}, "found question, answers\\. Rename the columns"),
        ({"instruction": "q", "output": "a", "response": "b"}, r"two shapes: .*Alpaca\), and .*Dolly\)\. Remove the"),
        ({"conversation": [{"input": "q", "output": "a"}]}, r"conversation\[0\] must have from and value \(or role and "
         r"content\); found input, output"),
        ({"conversations": ["q", "a"]}, r"conversations\[0\] must have from and value .*; found text"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].content must be text; found null"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, r"conversations\[0\] has the role 'assistant', expected"),
        ({"conversations": []}, "conversations must be a list of {from, value} objects; found an empty list"),
        ({"messages": [{"role": "system", "content": "x"}, ASK, SAY], "system": "s"}, "the column 'system' and the "
         "first message are two different system messages"),
        ({"prompt": "q", "response": "a", "history": "long ago"}, "history must be a list of pairs .* 'long ago'"),
        ({"messages": [{"role": "system", "content": "x"}, ASK, SAY], "history": [["h", "r"]]}, "stands before"),
        ({"messages": [ASK]}, "the last message has the role 'user'"),
        ({"prompt": "q", "completion": None}, "response must be text; found null"),
        ({"prompt": "q", "completion": []}, "response must be text; found an empty list"),
        ({"prompt": [], "completion": "a"}, "prompt must be text; found an empty list"),
        ({"prompt": [ASK], "completion": [ASK]}, r"messages\[1\] has the role 'user', expected 'assistant'"),
        ({"messages": [ASK, SAY], "images": [b"png"]}, "the column 'images' is not supported"),
        ({"prompt": "q", "completion": "a", "image": object()}, "the column 'image' is not supported"),
    ],
)  # fmt: skip
def test_what_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        messages(row)


def test_nothing_of_a_prompt_is_learnt() -> None:
    row = {"prompt": [ASK, SAY, ASK], "completion": [SAY, ASK, SAY]}
    (example,) = parse_rows([("a:1", row)], "a")
    assert example.unlearnt == (1,) and example.given == ()
    (example,) = parse_rows([("a:1", {"prompt": [ASK, {**SAY, "weight": 1}, ASK], "response": "b"})], "a")
    assert example.unlearnt == ()
    old = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, ASK]
    (example,) = parse_rows([("a:1", {"prompt": old, "completion": [SAY]})], "a")
    assert example.unlearnt == (1,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Prompt": "q", "response": "a"}, "found Prompt, response. Column names are read as they are written"),
        ({"prompt": "q", " response": "a"}, "found prompt, ' response'. Column names are read as they are written"),
        (ASK, r'found role, content\. That is one message; a row is a conversation: \{"messages"'),
        ([ASK, SAY], r'found a list\. Write a conversation as \{"messages"'),
        ("once upon a time", r'found text\. Write a text as \{"text"'),
        ({"query": "q", "answers": "[]"}, "found query, answers. Rename the columns, or write the rows anew"),
        ({"messages": "[{'role': 'user'}]"}, "found text. Write it as json, with double quotes"),
        ({"conversations": []}, "found an empty list. Remove such rows"),
        (
            {"input_ids": [1], "labels": [1]},
            "found input_ids, labels. Rows that are tokenised already are read in Python",
        ),
        ({"messages": [ASK, SAY], "reasoning": "on"}, "'reasoning' is 'on', which is not what the assistant thought"),
        ({"prompt": "q", "response": "a", "thinking": True}, "'thinking' is True, which is not what the assistant"),
        (
            {"messages": [{"role": "human", "content": "q"}, SAY]},
            "Call the roles system, user, assistant and tool; in a",
        ),
        ({"messages": [ASK, ASK, SAY]}, "take turns. Remove or join messages"),
        ({"messages": [ASK, SAY, ASK]}, "the response to learn. Remove what follows the last response"),
        ({"prompt": "q", "response": None}, 'found null. Remove such rows, or write "": empty ones are dropped'),
        ({"id": 1.0, "prompt": "q", "response": "a"}, "id must be text or a whole number; found 1.0. Write it as text"),
    ],
)
def test_refusals_name_the_way_out(row: Any, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        parse_rows([("a:1", row)], "a")


def test_messages_of_a_pair_may_be_json_text() -> None:
    prompt, answer = json.dumps([ASK, SAY, ASK]), json.dumps([SAY])
    expected = [("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")]
    for row in ({"prompt": prompt, "completion": answer}, {"prompt": prompt, "response": [SAY]}):
        assert messages(row) == expected
    assert messages({"prompt": "q", "completion": answer}) == expected[:2]
    alone = {"prompt": prompt, "response": "a"}
    with pytest.raises(DrklError, match="row 1: the prompt is json text of messages"):
        messages(alone)
    assert messages(alone, "messages") == expected
    assert messages(alone, "prompt_response") == [("user", prompt), ("assistant", "a")]
    assert messages({"prompt": '[{"x": 1}]', "response": "[1]"}) == [("user", '[{"x": 1}]'), ("assistant", "[1]")]
    assert messages({"prompt": prompt, "messages": [ASK, SAY], "response": ""}) == expected[:2]


def test_a_context_is_the_input_of_an_instruction_whatever_the_answer_is_called() -> None:
    for name in ("output", "response"):
        assert messages({"instruction": "q", "context": "c", name: "a"})[0] == ("user", "q\n\nc")
