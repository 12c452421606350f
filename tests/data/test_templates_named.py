"""The templates of ``data.template`` beside the tokenizer's own."""

from __future__ import annotations

import pytest

from drkl.config import load_config
from drkl.data import DataConfig, Example
from drkl.data.examples import parse_rows
from drkl.data.rendering import ALPACA
from drkl.data.template import encode_prompt, encode_response, encode_turns
from drkl.data.tokenize import tokenize_examples
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import CHATML, build

MINILLM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nhi there\n\n### Input:\na b\n\n"
    "### Response:\n"
)
EXTRA = (MINILLM + ALPACA).translate(str.maketrans(".,:", "   ")).split()


def tokenizer(template: str | None = CHATML):  # type: ignore[no-untyped-def]
    return build(template, eos="</s>", extra=[*EXTRA, ",", "{", "}"])


def text(tokens, ids: list[int]) -> str:  # type: ignore[no-untyped-def]
    return "".join(tokens.convert_ids_to_tokens(ids))


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_minillm_to_the_letter() -> None:
    tokens = tokenizer()
    (example,) = parse_rows([("f:1", {"prompt": "hi there\n\na b", "response": "c", "context_start": 10})], "f")
    (same,) = parse_rows([("f:1", {"prompt": "hi there", "input": "a b", "response": "c"})], "f")
    assert example == same
    rows, _ = tokenize_examples([example], tokens, max_prompt_tokens=200, max_tokens=300, template="minillm")
    assert text(tokens, list(rows[0].prompt_ids)) == MINILLM
    assert text(tokens, list(rows[0].response_ids)) == "c</s>"
    assert text(tokens, encode_prompt(tokens, user("hi"), "minillm")) == ALPACA.format(instruction="hi")


def test_minillm_has_no_bos_and_alpaca_has() -> None:
    from tokenizers.processors import TemplateProcessing

    tokens = tokenizer(None)
    tokens.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert text(tokens, encode_prompt(tokens, user("hi"), "alpaca")).startswith("<s>Below")
    assert text(tokens, encode_prompt(tokens, user("hi"), "minillm")).startswith("Below")
    assert text(tokens, encode_prompt(tokens, user("hi"), "{{ bos_token }}{{ prompt }}")) == "<s>hi"


def test_names_are_obeyed_whatever_the_tokenizer_has() -> None:
    tokens = tokenizer()
    assert text(tokens, encode_prompt(tokens, user("hi"), "plain")) == "hi"
    assert text(tokens, encode_prompt(tokens, user("hi"), "alpaca")) == ALPACA.format(instruction="hi")
    assert encode_prompt(tokens, user("hi"), "chat") == encode_prompt(tokens, user("hi"))
    with pytest.raises(DrklError, match=r"data\.template is 'chat', but the tokenizer has no chat template"):
        encode_prompt(tokenizer(None), user("hi"), "chat")


def test_jinja_text() -> None:
    tokens = tokenizer()
    messages = [*user("hi"), {"role": "assistant", "content": "hello"}]
    assert text(tokens, encode_prompt(tokens, messages[:1], "a {{ prompt }}\n")) == "a hi\n"
    assert text(tokens, encode_response(tokens, messages, "a {{ prompt }}\n")) == "hello</s>"
    each = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}\n{% endfor %}assistant:"
    longer = [*messages, *user("a"), {"role": "assistant", "content": "b"}]
    ids, spans, _ = encode_turns(tokens, longer, each)
    assert text(tokens, ids) == "user:hi</s>\nassistant:hello</s>\nuser:a</s>\nassistant:b</s>"
    assert [text(tokens, ids[a:b]) for a, b in spans] == ["hello</s>", "b</s>"]
    with pytest.raises(DrklError, match="writes the assistant's earlier turns differently once others follow"):
        encode_turns(tokens, longer, "{{ messages[-1].content }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ promt }}", "data.template failed: UndefinedError: 'promt' is undefined"),
        ("{{ ().__class__.__bases__ }}", "data.template failed: SecurityError"),
        ("{{ messages.append(1) }}", "data.template failed: SecurityError"),
        ("{{ 1 / 0 }}", "data.template failed: ZeroDivisionError"),
    ],
)
def test_jinja_is_strict_and_has_no_way_out(template: str, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        encode_prompt(tokenizer(), user("hi"), template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("alpacca", "there is no template 'alpacca'; .* Did you mean 'alpaca'"),
        ("{% for m in messages %}", r"data.template is not valid jinja \(line 1\)"),
    ],
)
def test_a_bad_template_is_refused_with_the_config(template: str, message: str) -> None:
    with pytest.raises(DrklError, match=f"data.template: .*{message}"):
        load_config({"data": {"path": "bundled:dolly", "template": template}})


def test_a_model_of_plain_text_goes_on_from_a_prompt() -> None:
    assert DataConfig(path="a.txt", format="text").prompt_template == "plain"
    assert DataConfig(path="a.txt", format="text", template="alpaca").prompt_template == "alpaca"
    assert DataConfig(path="a").prompt_template == "auto"


@pytest.mark.parametrize("value", [0, 99, "x", True])
def test_a_context_outside_the_prompt(value: object) -> None:
    with pytest.raises(DrklError, match=r"f:1: context_start must be where in the prompt \(of 5 characters\)"):
        parse_rows([("f:1", {"prompt": "hi\n\na", "response": "r", "context_start": value})], "f")


def test_an_example_keeps_what_it_read() -> None:
    (example,) = parse_rows([("f:1", {"text": "t", "label": 3, "id": "x"})], "f")
    pair = ({"role": "user", "content": "t"}, {"role": "assistant", "content": "3"})
    assert example == Example("x", pair, label="3")
