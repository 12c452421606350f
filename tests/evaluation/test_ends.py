"""Answers end where each model ends them, and metrics are of those answers."""

from __future__ import annotations

import pytest

import drkl
from tests.data.tiny_tokenizers import CHATML, build
from tests.models.chains import chain

PHI3 = CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}</s>{% else %}")
ROWS = [{"prompt": text, "response": "hello"} for text in ("hi", "a b", "c", "d")]
SETTINGS = {"prompts": 4, "samples_per_prompt": 2, "max_new_tokens": 6, "sweep": []}


@pytest.mark.slow
def test_each_model_ends_its_answers_its_own_way() -> None:
    tokenizer = build(PHI3, eos="</s>", extra=["<stop>"])
    own = tokenizer.convert_tokens_to_ids("there")
    teacher = chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>", "<|im_end|>": "\n"})
    student = chain(tokenizer, {"\n": "hello", "hello": "there", "there": "\n"})
    student.generation_config.eos_token_id = [2, own]
    found = drkl.evaluate(student, teacher, ROWS, tokenizer, **SETTINGS)
    for name in ("teacher", "student"):
        numbers = found.numbers.values[name]
        assert (numbers["ended"], numbers["answer_tokens"], numbers["rouge_l"]) == (1.0, 2.0, 100.0)
    student.generation_config.eos_token_id = 2
    running_on = drkl.evaluate(student, teacher, ROWS, tokenizer, **SETTINGS).numbers.values
    assert running_on["student"]["ended"] == 0.0 and running_on["teacher"]["ended"] == 1.0


def test_tokenised_rows_end_answers_where_they_end_turns() -> None:
    tokenizer = build(None, eos="</s>")
    ids = tokenizer.convert_tokens_to_ids(["hi", "\n", "hello", "<|im_end|>"])
    rows = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]}]
    model = chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>", "<|im_end|>": "\n"})
    found = drkl.evaluate(model, None, rows, tokenizer, **SETTINGS)
    assert found.numbers.values["student"]["ended"] == 1.0
