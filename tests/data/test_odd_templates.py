"""Templates that change what they write, and replies that call tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from drkl.data import Example
from drkl.data.template import encode_last, encode_prompt, encode_turns
from drkl.data.tokenize import tokenize_examples
from drkl.errors import DrklError
from tests.data.test_published_formats import byte_tokenizer

TOKENS = ("<s>", "</s>", "<|user|>", "<|bot|>", "<|tool|>", "<|end|>", "<|call|>")
QUESTION = [{"role": "user", "content": "how many?"}]
REPLY = [{"role": "assistant", "content": 'two\n"or" three'}]


def made(reply: str, prompt: str = "<|bot|>", end: str = "<|end|>") -> Any:
    """A tokenizer whose template writes a reply so."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + reply + end + "{% else %}<|{{ m.role }}|>"
        "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    return byte_tokenizer(template, TOKENS, bos=None, eos="</s>")


def row(tokenizer: Any, messages: list[Any], **given: Any) -> tuple[str, str, str]:
    """What stands before a reply, the reply, and the opening."""
    ids, ((start, end),), (opening,) = encode_last(tokenizer, messages, **given)
    assert end == len(ids)
    before, reply, opened = (tokenizer.decode(part) for part in (ids[:start], ids[start:], opening))
    assert ids[:start] + opening == encode_prompt(tokenizer, messages[:-1], **given)
    return before, reply, opened


BEFORE = "<|user|>how many?<|end|><|bot|>"


@pytest.mark.parametrize(
    ("reply", "learnt"),
    [
        ("<|bot|>{{ m.content | upper }}", 'TWO\n"OR" THREE<|end|>'),
        ("<|bot|>{{ m.content | tojson }}", '"two\\n\\"or\\" three"<|end|>'),
        ("<|bot|>{{ m.content | replace('\n', ' ') | trim }}.", 'two "or" three.<|end|>'),
        ("<|bot|>{{ m.content }} | {{ m.content }}", 'two\n"or" three | two\n"or" three<|end|>'),
        ("<|bot|>({{ m.content | length }}) {{ m.content }}", '(14) two\n"or" three<|end|>'),
        ("<|bot|>\n\n{{ m.content }}\n\n", '\n\ntwo\n"or" three\n\n<|end|>'),
    ],
)
def test_what_a_template_makes_of_an_answer_is_learnt(reply: str, learnt: str) -> None:
    assert row(made(reply), [*QUESTION, *REPLY]) == (BEFORE, learnt, "")


@pytest.mark.parametrize(
    "content", ["{{ m.content[:2] }}", "{{ m.content.split('\n')[-1] }}", "{{ m.content | first }}"]
)
def test_a_template_that_shortens_an_answer_is_refused(content: str) -> None:
    with pytest.raises(
        DrklError, match=r"leaves out a part of the answer. Put reasoning into the field reasoning_content"
    ):
        encode_last(made("<|bot|>" + content), [*QUESTION, *REPLY])


def test_reasoning_that_a_template_strips_without_asking_for_it_is_refused() -> None:
    said = [{"role": "assistant", "content": "<think>one and one</think>two"}]
    stripping = "<|bot|>{{ m.content.split('</think>')[-1] }}"
    with pytest.raises(DrklError, match="leaves out a part of the answer"):
        encode_last(made(stripping), [*QUESTION, *said])
    # Where the prompt opens the tag, a sample has the reasoning, and so has the row.
    learnt = row(made(stripping, prompt="<|bot|><think>"), [*QUESTION, *said])
    assert learnt == (BEFORE + "<think>", "one and one</think>two<|end|>", "")
    assert row(made(stripping, prompt="<|bot|><think>"), [*QUESTION, *REPLY]) == (
        BEFORE,
        'two\n"or" three<|end|>',
        "<think>",
    )


def test_the_prompt_ends_where_a_token_does() -> None:
    closed, opened = "<|bot|></think>{{ m.content }}", "<|bot|><think>"
    # Both begin with <, which is a token by itself; here </ is one.
    assert row(made(closed, opened), [*QUESTION, *REPLY])[0] == BEFORE + "<"
    tokenizer = made(closed, opened)
    tokenizer.add_tokens(["<think>", "</think>"])
    assert row(tokenizer, [*QUESTION, *REPLY]) == (BEFORE, '</think>two\n"or" three<|end|>', "<think>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # The question changes once it is answered, and the header of the answer is another one than the prompt's.
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}<|end|>{% endfor %}",
            "does not go on from there",
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|bot|>{% endif %}",
            "does not go on from there",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "leaves the assistant's last message",
        ),
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|end|>{% endfor %}",
            "leaves out what the user says in message 1",
        ),
        (
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}",
            "leaves out what the user says in message 1",
        ),
    ],
)
def test_a_template_that_contradicts_itself_is_refused(template: str, message: str) -> None:
    with pytest.raises(DrklError, match=f"(?s){message}.*"):
        encode_last(byte_tokenizer(template, TOKENS, bos=None, eos="</s>"), [*QUESTION, *REPLY])


def test_only_the_last_question_of_a_conversation_is_not_enough() -> None:
    last = "{{ messages[-2 if messages[-1].role == 'assistant' else -1].content }}<|bot|>"
    template = last + "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}<|end|>{% endif %}"
    tokenizer = byte_tokenizer(template, TOKENS, bos=None, eos="</s>")
    assert row(tokenizer, [*QUESTION, *REPLY])[0] == "how many?<|bot|>"
    with pytest.raises(DrklError, match="leaves out what the user says in message 1"):
        encode_last(tokenizer, [*QUESTION, *REPLY, {"role": "user", "content": "sure?"}, *REPLY])


CALLS = [
    {"id": "abcdefghi", "type": "function", "function": {"name": "count", "arguments": {"of": "apples"}}},
    {"id": "jklmnopqr", "type": "function", "function": {"name": "count", "arguments": {"of": "pears"}}},
]
JSON = [json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]}) for call in CALLS]
EACH = "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
TOOL_FORMATS = {
    # Hermes, Qwen 2.5: content and calls.
    "hermes": (
        "<|bot|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
        + EACH
        + "\n</tool_call>{% endfor %}",
        "<|end|>",
        "".join(f"\n<tool_call>\n{text}\n</tool_call>" for text in JSON) + "<|end|>",
    ),
    # Llama 3.1: content or one call, which ends in a token of its own.
    "either": (
        "<|bot|>{% if m.tool_calls %}{% for c in m.tool_calls %}" + EACH + "{% endfor %}<|call|>"
        "{% else %}{{ m.content }}<|end|>{% endif %}",
        "\n",
        "".join(JSON) + "<|call|>",
    ),
    # gpt-oss: the name stands before, and the newline that follows is no part of the reply.
    "header": (
        "<|bot|>{% if m.tool_calls %}{% set c = m.tool_calls[0] %} to={{ c.function.name }}<|user|>"
        "{{ m.tool_calls | map(attribute='function.arguments') | list | tojson }}<|call|>{% else %}{{ m.content }}"
        "<|end|>{% endif %}",
        "",
        ' to=count<|user|>[{"of": "apples"}, {"of": "pears"}]<|call|>',
    ),
    # GLM: nothing ends a turn.
    "unended": (
        "<|bot|>{{ m.content }}{% for c in m.tool_calls or [] %}" + EACH + "{% endfor %}",
        "",
        "".join(JSON) + "</s>",
    ),
}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_calls_of_tools_are_learnt_as_they_are_written(name: str) -> None:
    reply, end, learnt = TOOL_FORMATS[name]
    tokenizer = made(reply, end=end)
    calls = {"role": "assistant", "content": "", "tool_calls": CALLS}
    assert row(tokenizer, [*QUESTION, calls]) == (BEFORE, learnt, "")
    answers = [{"role": "tool", "name": "count", "tool_call_id": call["id"], "content": "2"} for call in CALLS]
    ids, spans, _ = encode_turns(tokenizer, [*QUESTION, calls, *answers, {"role": "assistant", "content": "four"}])
    last = "four</s>" if name == "unended" else "four<|end|>"
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == [learnt, last]


def test_a_sample_is_compared_with_what_the_template_writes() -> None:
    tokenizer = made("<|bot|><think></think>{{ m.content }}")
    example = Example("x", (*QUESTION, *REPLY), references=("two", 'two\n"or" three'))
    (kept,), _ = tokenize_examples([example], tokenizer, max_prompt_tokens=90, max_tokens=200)
    assert kept.example.all_references == ("<think></think>two", '<think></think>two\n"or" three')
    (kept,), _ = tokenize_examples([example], made("<|bot|> {{ m.content }} "), max_prompt_tokens=90, max_tokens=200)
    assert kept.example == example


def test_the_report_counts_the_rows_without_the_opening() -> None:
    tokenizer = made("<|bot|>{{ m.content }}", prompt="<|bot|><think>\n")
    opened = [{"role": "assistant", "content": "<think>\nhm</think>two"}]
    examples = [Example(str(i), (*QUESTION, *(opened if i else REPLY))) for i in range(2)]
    rows, report = tokenize_examples(examples, tokenizer, max_prompt_tokens=90, max_tokens=200)
    assert report.openings == {"<think>\n": 1}
    assert report.summary() == (
        "2 of 2 rows kept. The template's prompts end with '<think>\\n', which 1 row(s) do not have: these are learnt "
        "as the template writes conversations, and samples follow the whole prompt."
    )
    assert [row.sampling_ids == row.prompt_ids for row in rows] == [False, True]
    assert rows[0].sampling_ids == rows[1].sampling_ids


def test_reasoning_that_is_written_until_an_answer_follows() -> None:
    thought = "{% if m.thinking and messages[-1].role != 'assistant' %}{{ m.thinking }}{% endif %}"
    tokenizer = made("<|bot|>" + thought + "{{ m.content }}")
    earlier = {"role": "assistant", "content": "one", "thinking": "hm"}
    with pytest.raises(
        DrklError, match=r"does not go on from there.* Or remove the reasoning from the earlier messages"
    ):
        encode_last(tokenizer, [*QUESTION, earlier, *QUESTION, *REPLY])
    del earlier["thinking"]
    assert row(tokenizer, [*QUESTION, earlier, *QUESTION, *REPLY])[0].count("one") == 1
