"""Rows of public formats, each as the conversation that it is."""

from __future__ import annotations

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


def test_a_demanded_format_may_be_met_by_a_public_one() -> None:
    assert messages({"prompt": "q", "completion": "a"}, "prompt_response")[1] == ("assistant", "a")
    assert messages({"prompt": [ASK], "completion": [SAY]}, "messages")[1] == ("assistant", "a")
    assert messages({"text": "t", "prompt": "q", "completion": "a"}, "text") == [("assistant", "t")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "row 1: expected the fields prompt and response.*; found prompt. A prompt alone is not "
         "enough: on-policy distillation.* is not there yet. Add a column response"),
        ({"prompt": [ASK]}, "A prompt alone is not enough"),
        ({"prompt": "q", "answer": "a"}, "found prompt, answer. A prompt alone is not enough"),
        ({"chosen": "a", "rejected": "b"}, r"found chosen, rejected\. Pairs of a chosen .* name it response"),
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
