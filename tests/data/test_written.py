"""Rows with tools, calls, reasoning and weights through chat templates: what is learnt, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from drkl.data.rows import rows_from
from drkl.data.tokenize import DropReport, Row
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import CHATML, LLAMA2, build

WORDS = ["q", "q2", "x", "because", "f", "g", "7", "1", "2", "CALL", "TOOL", "tool", "think", "{", "}", '"', "<", ">",
         "function", "name", "type", "developer", "DOC", "none", "mode"]  # fmt: skip
ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "7"}
TOOLS = [{"type": "function", "function": {"name": "g"}}]
TALK = [ASK, CALLS, ANSWER, SAY]
BEGIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + CHATML[CHATML.index("{% if add") :]
THOUGHT = "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CALLING = "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
FULL = "{% if tools %}TOOL {{ tools[0].function.name }}\n{% endif %}{% if documents %}DOC {% endif %}{{ mode }}"
FULL += BEGIN + THOUGHT + CALLING + END


def tokenizer(template: str | None = FULL) -> Any:
    return build(template, extra=WORDS)


def rows(messages: list[Any], chat: str | None = FULL, columns: Any = None, **settings: Any) -> tuple[Any, DropReport]:
    row = {"messages": messages, **(columns or {})}
    return rows_from([row], tokenizer(chat), **{"max_prompt_tokens": 200, "max_tokens": 400, **settings})


def text(ids: Any) -> str:
    return "".join(tokenizer().convert_ids_to_tokens(list(ids)))


def test_what_the_row_has_is_what_the_template_writes() -> None:
    columns = {"tools": TOOLS, "documents": [{"title": "a", "text": "b"}], "chat_template_kwargs": {"mode": "x"}}
    messages = [*TALK[:-1], {**SAY, "reasoning_content": "because"}]
    (row,), _ = rows(messages, columns=columns)
    assert text(row.prompt_ids) == (
        'TOOL g\nDOC x<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nCALL f {"x": 1}<|im_end|>\n'
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(row.response_ids) == "<think>because</think>hello<|im_end|>"
    whole = tokenizer().apply_chat_template(
        [ASK, {**CALLS, "content": ""}, *messages[2:]], tools=TOOLS, documents=columns["documents"], mode="x",
        tokenize=False,
    )  # fmt: skip
    assert text(row.all_ids) + "\n" == whole
    # Samples are compared with all of it.
    assert row.example.references[0].replace(" ", "") == "<think>because</think>hello"


def test_a_turn_that_only_calls_is_learnt() -> None:
    (row,), report = rows(TALK[:2])
    assert text(row.response_ids) == 'CALL f {"x": 1}<|im_end|>' and report.kept == 1
    (row,), _ = rows(TALK, turns="all")
    assert text(row.trained_ids) == 'CALL f {"x": 1}<|im_end|>hello<|im_end|>'
    assert text(row.prompt_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_puts_texts_together_is_given_arguments_as_text() -> None:
    template = FULL.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    (row,), _ = rows(TALK, template, turns="all")
    assert text(row.trained_ids) == 'CALL f {"x": 1}<|im_end|>hello<|im_end|>'


def test_a_template_that_would_write_an_object_as_python_does_is_given_json() -> None:
    template = FULL.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
    (row,), _ = rows(TALK, template, turns="all")
    assert text(row.trained_ids) == 'CALL f {"x": 1}<|im_end|>hello<|im_end|>'


def test_a_tool_that_answers_nothing_is_no_empty_prompt() -> None:
    assert rows([ASK, CALLS, {**ANSWER, "content": ""}, SAY])[1].kept == 1


def test_reasoning_of_earlier_turns_may_be_left_out() -> None:
    thought = {**SAY, "reasoning_content": "because"}
    (row,), _ = rows([ASK, thought, ASK, SAY])
    assert "because" not in text(row.all_ids)
    with pytest.raises(DrklError, match="writes the assistant's earlier turns differently"):
        rows([ASK, thought, ASK, thought], turns="all")


def test_two_names_of_one_reasoning() -> None:
    (row,), _ = rows([ASK, {**SAY, "reasoning_content": "because", "reasoning": "because"}])
    assert text(row.response_ids).startswith("<think>because</think>")


ONE_CALL = CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NAME_ALONE = CALLING.replace(" {{ c.function.arguments | tojson }}", "")
CALLS_ALONE = END.replace("m.content", "('' if m.tool_calls else m.content)", 1)
NO_TOOL = "{% for m in messages if m.role != 'tool' and m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"


@pytest.mark.parametrize(
    ("messages", "template", "columns", "what"),
    [
        (TALK, CHATML, {}, "The tokenizer's chat template leaves out tool_calls, which the row has"),
        (TALK[:2], CHATML, {}, "leaves out tool_calls"),
        (TALK, BEGIN + NAME_ALONE + END, {}, "leaves out tool_calls"),
        ([ASK, {**CALLS, "content": "hello"}], BEGIN + CALLING + CALLS_ALONE, {}, "out the content beside tool_calls"),
        ([ASK, {**CALLS, "tool_calls": [CALL, CALL]}], BEGIN + ONE_CALL + END, {}, "leaves out tool_calls"),
        ([ASK, {**SAY, "reasoning_content": "because"}], CHATML, {}, "leaves out reasoning_content"),
        ([ASK, {**SAY, "thinking": "because"}, ASK, SAY], CHATML, {}, "leaves out thinking"),
        ([ASK, {**SAY, "refusal": "no"}], CHATML, {}, "leaves out refusal"),
        ([ASK, SAY], CHATML, {"tools": TOOLS}, "leaves out tools"),
        ([{"role": "system", "content": "a", "tools": TOOLS}, ASK, SAY], CHATML, {}, "leaves out tools"),
        ([ASK, SAY], CHATML, {"documents": [{"text": "x"}]}, "leaves out documents"),
        ([ASK, SAY], CHATML, {"chat_template_kwargs": {"mode": "x"}}, "leaves out mode"),
        (TALK, NO_TOOL + CALLING + END, {}, "leaves out messages of the role 'tool'"),
        ([{"role": "system", "content": "a"}, ASK, SAY], NO_TOOL + END, {}, "leaves out messages of the role 'system'"),
        (TALK, None, {}, "The tokenizer has no chat template, and alpaca leaves out tool_calls"),
        ([ASK, SAY, ANSWER, SAY], None, {}, "alpaca leaves out messages of the role 'tool'"),
        ([ASK, {**SAY, "reasoning": "because"}], None, {}, "alpaca leaves out reasoning"),
        ([ASK, SAY], None, {"tools": TOOLS}, "alpaca leaves out tools"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused(
    messages: list[Any], template: str | None, columns: dict[str, Any], what: str
) -> None:
    with pytest.raises(DrklError, match=f"^Row 'row-1': .*{what}"):
        rows(messages, template, columns)


def test_a_later_row_is_looked_at_too() -> None:
    two = {**CALLS, "tool_calls": [CALL, CALL]}
    data = [{"messages": [ASK, CALLS]}, {"messages": [ASK, CALLS]}, {"messages": [ASK, two]}]
    with pytest.raises(DrklError, match=r"^Row 'row-3': .* leaves out tool_calls"):
        rows_from(data, tokenizer(BEGIN + ONE_CALL + END), max_prompt_tokens=200, max_tokens=400)


def test_templates_of_drkl_and_encoder_decoders_write_texts_alone() -> None:
    for name in ("alpaca", "minillm", "plain", "{{ prompt }}"):
        with pytest.raises(DrklError, match=f"The template '{name}' leaves out tool_calls"):
            rows(TALK, template=name)
    with pytest.raises(DrklError, match="The prompt of an encoder-decoder leaves out tool_calls"):
        rows(TALK, encoder_decoder=True)
    calls = "{% for c in m.get('tool_calls') or [] %} CALL {{ c.function }}{% endfor %}"
    jinja = "{% for m in messages %}" + calls + "{{ m.content }}{% endfor %}"
    assert "CALL" in text(rows(TALK, template=jinja)[0][0].prompt_ids)


def test_a_template_that_refuses_a_role_is_named() -> None:
    with pytest.raises(DrklError, match="refuses the roles user, assistant, tool, assistant: Only user and assistant"):
        rows(TALK, LLAMA2)


WEIGHED = [ASK, {**SAY, "weight": 0}, {**ASK, "content": "a"}, {**SAY, "content": "b"}]


def test_turns_of_weight_0_are_not_learnt() -> None:
    (row,), _ = rows(WEIGHED, turns="all")
    (last,), _ = rows(WEIGHED, turns="last")
    assert text(row.trained_ids) == text(last.response_ids) == "b<|im_end|>"
    assert row.all_ids == last.all_ids and row.prompt_ids == last.prompt_ids
    (row,), report = rows([*WEIGHED, ASK, {**SAY, "content": "c", "train": True}], turns="all")
    assert text(row.trained_ids) == "b<|im_end|>c<|im_end|>" and report.responses_cut == 0
    assert text(row.prompt_ids).endswith(
        "assistant\nhello<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_conversation_ends_with_its_last_learnt_turn() -> None:
    messages = [ASK, {**SAY, "content": "b"}, *WEIGHED[:2]]
    (row,), _ = rows(messages, turns="all")
    assert isinstance(row, Row) and row.example.response == "b" and len(row.example.messages) == 2
    assert text(row.trained_ids) == "b<|im_end|>" and text(row.all_ids).endswith("b<|im_end|>")
    whole = [*messages, ASK, {**SAY, "content": "c"}, *WEIGHED[:2]]
    (row,), _ = rows(whole, turns="all")
    assert row.example.response == "c" and text(row.trained_ids) == "b<|im_end|>c<|im_end|>"
    (cut,), report = rows(whole, turns="all", max_tokens=len(row.all_ids) - 1, max_prompt_tokens=20)
    assert (cut.example.response, report.responses_cut) == ("b", 1)


def test_rows_without_a_learnt_turn_are_dropped_and_counted() -> None:
    tokens = {"max_prompt_tokens": 200, "max_tokens": 400}
    data = [{"messages": WEIGHED[:2]}, {"messages": WEIGHED}, {"messages": [*WEIGHED, *WEIGHED[:2]]}]
    found, report = rows_from(data, tokenizer(), turns="last", **tokens)  # type: ignore[arg-type]
    assert [row.id for row in found] == ["row-2"] and report.dropped == {"weight_0": 2}
    assert "2 dropped (weight 0, so no reply to learn)" in report.summary()
    found, report = rows_from(data, tokenizer(), turns="all", **tokens)  # type: ignore[arg-type]
    assert [row.id for row in found] == ["row-2", "row-3"] and report.dropped == {"weight_0": 1}


def test_where_no_row_has_a_learnt_turn_the_way_out_is_said() -> None:
    with pytest.raises(
        DrklError, match=r"1 weight 0, so no reply to learn\. Give a reply the weight 1, or set data.turns"
    ):
        rows(WEIGHED[:2])


def test_a_turn_of_weight_0_may_be_empty() -> None:
    messages = [ASK, {**SAY, "content": "", "weight": 0}, ASK, SAY]
    assert rows(messages, turns="all")[1].kept == 1


def test_a_data_set_s_nulls_change_nothing() -> None:
    import datasets

    data = [
        {"messages": [ASK, {**CALLS, "content": ""}, ANSWER, SAY], "tools": TOOLS},
        {"messages": WEIGHED, "tools": None},
    ]
    table = datasets.Dataset.from_list(data)
    assert table[1]["messages"][0]["tool_calls"] is None
    for turns in ("last", "all"):
        settings: dict[str, Any] = {"turns": turns, "max_prompt_tokens": 200, "max_tokens": 400}
        assert rows_from(table, tokenizer(), **settings) == rows_from(data, tokenizer(), **settings)
