"""Conversations as text: several chat templates, those that fail, and what they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from drkl.data import DataConfig
from drkl.data.rendering import Writer, date_told, unused_fields
from drkl.data.template import encode_last, encode_prompt, stop_token_ids
from drkl.data.tokenize import DropReport
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import CHATML, build

QUESTION = [{"role": "user", "content": "hi"}]
CONVERSATION = [*QUESTION, {"role": "assistant", "content": "hello"}]
CALL = {"type": "function", "function": {"name": "count", "arguments": {"n": 1}}}
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
THINKER = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def several(**templates: str) -> Any:
    tokenizer = build(CHATML)
    tokenizer.chat_template = templates
    return tokenizer


def test_several_templates_one_of_them_is_the_default() -> None:
    tokenizer = several(default=CHATML, tool_use="TOOLS " + CHATML)
    assert encode_last(tokenizer, CONVERSATION) == encode_last(build(CHATML), CONVERSATION)
    # With tools the tokenizer itself takes this one, and so do we.
    for tools in (None, TOOLS):
        theirs = tokenizer.apply_chat_template(CONVERSATION, tools=tools, tokenize=False)
        assert Writer(tokenizer, tools=tools).conversation(CONVERSATION) == theirs
    assert Writer(tokenizer, "chat:tool_use").prompt(QUESTION).startswith("TOOLS ")


@pytest.mark.parametrize("legacy", [False, True])
def test_several_templates_come_back_from_a_folder(tmp_path: Path, legacy: bool) -> None:
    tokenizer = several(rag=CHATML, tool_use="TOOLS " + CHATML)
    tokenizer.save_pretrained(tmp_path, save_jinja_files=not legacy)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_last(loaded, CONVERSATION, "chat:rag") == encode_last(build(CHATML), CONVERSATION)
    assert stop_token_ids(loaded, "chat:rag") == stop_token_ids(build(CHATML))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "auto",
            r"has 2 chat templates and none is named 'default'. Set data.template to one of chat:rag, chat:tool_use.",
        ),
        ("chat", "none is named 'default'"),
        ("chat:rga", "none is named 'rga'"),
    ],
)
def test_several_templates_without_the_one_that_is_asked_for(template: str, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        encode_prompt(several(rag=CHATML, tool_use=CHATML), QUESTION, template)


def test_a_named_template_where_there_is_one_or_none() -> None:
    with pytest.raises(
        DrklError, match=r"data.template is 'chat:rag', but the tokenizer has one chat template: use chat"
    ):
        encode_prompt(build(CHATML), QUESTION, "chat:rag")
    with pytest.raises(DrklError, match=r"data.template is 'chat:rag', but the tokenizer has no chat template"):
        encode_prompt(build(None), QUESTION, "chat:rag")
    assert DataConfig(path="bundled:dolly", template="chat:rag").template == "chat:rag"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only on Sundays.') }}", "refuses the roles user: Only on Sundays. Change such"),
        ("{{ messages[0].content + 1 }}", "failed on the roles user: TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "failed on the roles user: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed on the roles user: RecursionError"),
        ("{{ messages[5].content }}", "refuses the roles user: list object has no element 5"),
        ("{{ messages.append(1) }}", "refuses the roles user: access to attribute 'append'"),
        ("{{ messages | sort_by_mood }}", "is not valid jinja: No filter named 'sort_by_mood'. Give the tokenizer"),
        ("{% for m in messages %}{{ m.content }}", "is not valid jinja: Unexpected end of template"),
    ],
)  # fmt: skip
def test_a_chat_template_that_fails_is_refused_with_the_way_out(template: str, message: str) -> None:
    with pytest.raises(DrklError, match=f"(?s)The tokenizer's chat template {message}.*data.template"):
        encode_prompt(build(template), QUESTION)


def test_jinja_text_of_the_users_own_is_given_tools_and_arguments() -> None:
    template = "{{ colour }} {{ tools[0].function.name }} {{ prompt }}"
    writer = Writer(build(CHATML), template, None, TOOLS, {"colour": "red"})
    assert writer.prompt(QUESTION) == "red count hi"
    with pytest.raises(DrklError, match=r"data.template failed: UndefinedError: 'colour' is undefined"):
        Writer(build(CHATML), template).prompt(QUESTION)


def test_a_chat_template_in_the_place_of_jinja_text_is_told_from_it() -> None:
    for template in (CHATML, "{% generation %}{{ prompt }}{% endgeneration %}"):
        with pytest.raises(DrklError, match=r"a chat template belongs in the tokenizer, as its chat_template"):
            Writer(build(CHATML), template).prompt(QUESTION)


def test_an_argument_that_is_no_argument_of_a_template() -> None:
    with pytest.raises(DrklError, match=r"chat template failed on the roles user: TypeError: .*tokenize"):
        encode_prompt(build(CHATML), QUESTION, template_kwargs={"tokenize": True})


def test_what_a_template_leaves_out_is_named() -> None:
    messages = [
        {"role": "system", "content": "a"},
        *QUESTION,
        {"role": "assistant", "content": "", "reasoning_content": "b", "tool_calls": [CALL]},
        {"role": "tool", "name": "count", "tool_call_id": "1", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "b"},
    ]
    given: dict[str, Any] = {"tools": TOOLS, "template_kwargs": {"enable_thinking": False}}
    # The reasoning of the first turn counts as written: it is, where that turn is the last.
    assert unused_fields(build(THINKER), messages, **given) == ["enable_thinking"]
    left_out = ["tools", "enable_thinking", "reasoning_content", "tool_calls"]
    assert unused_fields(build(CHATML), messages, **given) == left_out
    assert unused_fields(build(THINKER), messages, "alpaca", **given) == left_out
    only_talk = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
    assert unused_fields(build(only_talk), messages) == ["system", "reasoning_content", "tool_calls", "tool"]
    assert unused_fields(build(CHATML), CONVERSATION) == []
    # What a template insists on, it uses.
    assert unused_fields(build("{{ tools[0].function.name.upper() }}" + THINKER), messages, tools=TOOLS) == []
    mine = "{% for m in messages %}{{ m.content }}{{ m.get('tool_calls') }}{% endfor %}"
    assert unused_fields(build(CHATML), messages, mine, tools=TOOLS) == ["tools", "reasoning_content"]


def test_the_date_is_told_and_said() -> None:
    dated = "{{ strftime_now('%Y') }}" + CHATML
    assert date_told(build(dated)) == "26 July 2024" and date_told(several(a=CHATML, b=dated), "chat:b")
    assert date_told(build(dated), "alpaca") is None and date_told(build(CHATML)) is None
    assert DropReport(3, date="26 July 2024").summary() == (
        "3 of 3 rows kept. The template asks for today's date; it is told 26 July 2024, so that rows never change."
    )


@pytest.mark.parametrize(
    "code", ["%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%A", "%-d/%-m/%y", "%H:%M:%S", "%e %F %D", "%x"]
)
def test_every_way_to_write_the_date(code: str) -> None:
    from datetime import datetime

    for template in (f"{{{{ strftime_now('{code}') }}}}", f"\n  {{{{ strftime_now(format='{code}') }}}}"):
        written = Writer(build(template)).conversation(QUESTION)
        assert written == template.partition("{{")[0] + datetime(2024, 7, 26).strftime(code)
