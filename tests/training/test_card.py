"""The usage in a model card asks the model as it was taught to be asked."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from drkl.data.template import encode_prompt
from drkl.training.card import usage_of
from tests.data.tiny_tokenizers import CHATML, build

QUESTION = [{"role": "user", "content": "Give me three tips."}]
WORDS = ("Give", "me", "three", "tips", "###", "Q")


def with_bos(template: str | None) -> Any:
    tokenizer = build(template, eos="</s>", extra=WORDS)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    "template", ["auto", "alpaca", "minillm", "plain", "Q: {{ prompt }}", "{{ bos_token }}{{ prompt }}"]
)
@pytest.mark.parametrize("make", [with_bos, lambda template: build(template, eos="</s>", extra=WORDS)])
def test_a_student_without_a_chat_template_is_asked_by_text(template: str, make: Any) -> None:
    tokenizer = make(None)
    usage = usage_of("decoder", tokenizer, template)
    calls: list[Any] = []

    def pipe(prompt: str, *, max_new_tokens: int, return_full_text: bool, add_special_tokens: bool = True) -> Any:
        calls.append(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
        assert max_new_tokens == 64 and not return_full_text
        return [{"generated_text": "a"}]

    lines = [line for line in usage.splitlines() if not line.startswith(("from", "pipe ="))]
    exec("\n".join(lines), {"pipe": pipe, "print": str})
    assert calls == [encode_prompt(tokenizer, QUESTION, template)]


def test_a_student_with_a_chat_template_is_asked_by_messages() -> None:
    assert 'pipe([{"role": "user"' in usage_of("decoder", build(CHATML), "auto")
    assert 'pipe("Give me three tips."' in usage_of("decoder", build(CHATML), "plain")
    assert 'pipe("Give me three tips."' in usage_of("decoder", build(CHATML), "{{ messages[1].content }}")
    assert "AutoModelForSeq2SeqLM" in usage_of("encoder_decoder", build(None), "auto")
