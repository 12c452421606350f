"""A teacher reads the prompts in its own chat template; the response tokens are the student's."""

from __future__ import annotations

from typing import Any

import pytest

from drkl.data.rows import rows_from
from drkl.data.template import encode_prompt
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import CHATML, LLAMA2, build

LIMITS: dict[str, int] = {"max_prompt_tokens": 60, "max_tokens": 90}
OTHER = CHATML.replace("'<|im_start|>' + message['role'] + '\n'", "'[' + message['role'] + ']'").replace(
    "<|im_start|>assistant\n", "[assistant]"
)
DATA = [{"prompt": "hi", "response": "a b"}, {"prompt": "hello there"}]


def rows(data: Any, tokenizer: Any, teacher: Any, **settings: Any) -> list[Row]:
    found: Any = rows_from(
        data, tokenizer, needs_responses=False, teacher_tokenizer=teacher, **{**LIMITS, **settings}
    )[0]  # fmt: skip
    return list(found)


@pytest.mark.parametrize("template", ["auto", "chat"])
def test_each_is_given_its_own_rendering(template: str) -> None:
    student, teacher = build(), build(OTHER)
    found = rows(DATA, student, teacher, template=template)
    plain: Any = rows_from(DATA, student, needs_responses=False, template=template, **LIMITS)[0]
    for row, alone, words in zip(found, plain, DATA, strict=True):
        ask = [{"role": "user", "content": words["prompt"]}]
        assert row.teacher_prompt_ids == tuple(encode_prompt(teacher, ask)) != row.prompt_ids
        assert (row.prompt_ids, row.response_ids) == (alone.prompt_ids, alone.response_ids)
        assert row.prompt_ids == tuple(encode_prompt(student, ask))
        assert row.length == max(len(row.prompt_ids), len(row.teacher_prompt_ids)) + len(row.response_ids) - 1


def test_where_they_differ_is_said_in_short() -> None:
    _, report = rows_from(DATA, build(), needs_responses=False, teacher_tokenizer=build(OTHER), **LIMITS)
    assert report.difference == (
        "Student and teacher each read the prompts in their own rendering. In row 'row-1' these first differ at "
        "character 0: the student reads '<|im_start|> user \\n hi <', the teacher '[ user ] hi <|im_end|> \\n'."
    )
    assert report.difference in report.summary()
    longer = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n#' }}")
    _, report = rows_from(DATA, build(), needs_responses=False, teacher_tokenizer=build(longer), **LIMITS)
    assert str(report.difference).endswith(": the student reads its end, the teacher ' #'.")


def test_a_response_has_room_after_the_longer_prompt_of_the_two() -> None:
    """Else the row would pass the models' context as the teacher reads it."""
    longer = build(CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n' + 'hi ' * 10 }}"))
    data = [{"prompt": "hi", "response": "a b " * 8}, {"prompt": "hi", "response": "a"}, {"prompt": "hi"}]
    found, report = rows_from(
        data, build(), needs_responses=False, teacher_tokenizer=longer, max_prompt_tokens=30, max_tokens=40
    )
    cut, short, alone = (row for row in found if isinstance(row, Row))
    (plain, *_), _ = rows_from(data, build(), needs_responses=False, max_prompt_tokens=30, max_tokens=90)
    assert isinstance(plain, Row) and cut.teacher_prompt_ids is not None
    assert cut.response_ids == plain.response_ids[: 40 - len(cut.teacher_prompt_ids)] and cut.length == 40 - 1
    assert short.response_ids[-1] == plain.response_ids[-1] and not alone.response_ids
    assert report.responses_cut == 1


@pytest.mark.parametrize("template", ["alpaca", "minillm", "plain", "Q: {{ prompt }} A:"])
def test_other_templates_are_one_rendering(template: str) -> None:
    assert all(row.teacher_prompt_ids is None for row in rows(DATA, build(), build(OTHER), template=template))


def test_one_rendering_is_none() -> None:
    student = build()
    for teacher in (student, build(), build(None)):
        assert all(row.teacher_prompt_ids is None for row in rows(DATA, student, teacher))
    assert rows(DATA, student, None) == rows(DATA, student, build())


def test_the_same_template_may_write_other_special_tokens() -> None:
    student, teacher = build(LLAMA2), build(LLAMA2, eos="</s>")
    assert all(row.teacher_prompt_ids is None for row in rows(DATA, student, teacher))
    teacher.bos_token = "<pad>"
    (row, _) = rows(DATA, student, teacher)
    assert row.teacher_prompt_ids is not None and row.teacher_prompt_ids[0] == teacher.pad_token_id
    assert row.teacher_prompt_ids[1:] == row.prompt_ids[1:] and row.prompt_ids[0] == student.bos_token_id


def test_a_student_without_a_template_and_a_teacher_with_one() -> None:
    (row, _) = rows(DATA, build(None), build())
    ask = [{"role": "user", "content": "hi"}]
    assert row.prompt_ids == tuple(encode_prompt(build(None), ask, "alpaca"))
    assert row.teacher_prompt_ids == tuple(encode_prompt(build(), ask))


def test_a_named_template_is_the_teachers_where_it_has_that_name() -> None:
    student = build()
    student.chat_template = {"default": CHATML, "short": OTHER}
    teacher = build()
    (row, _) = rows(DATA, student, teacher, template="chat:short")
    assert row.teacher_prompt_ids == tuple(encode_prompt(build(), [{"role": "user", "content": "hi"}]))
    teacher.chat_template = {"default": CHATML, "short": LLAMA2}
    (row, _) = rows(DATA, student, teacher, template="chat:short")
    assert row.teacher_prompt_ids == tuple(encode_prompt(build(LLAMA2), [{"role": "user", "content": "hi"}]))


def test_a_prompt_too_long_in_either_rendering_is_dropped() -> None:
    long = CHATML.replace("{% for message", "{{ '# ' * 40 }}{% for message", 1)
    data = [*DATA, {"prompt": "a b c d " * 5}]
    kept, report = rows_from(
        data, build(), needs_responses=False, teacher_tokenizer=build(long), max_prompt_tokens=91, max_tokens=120
    )
    assert (len(kept), report.dropped) == (2, {"prompt_too_long": 1})
    with pytest.raises(DrklError, match="The shortest prompt has 89 tokens"):
        rows(DATA, build(), build(long))


def test_what_the_teachers_template_refuses_names_it() -> None:
    data = [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]
    with pytest.raises(DrklError, match=r"Row 'row-1', as the teacher reads it: .*Only user and assistant roles"):
        rows(data, build(), build(LLAMA2))


def test_several_turns_to_learn_are_refused_in_two_renderings() -> None:
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DrklError, match=r"Row 'row-1' has several turns to learn, .* Set data.turns: last, or"):
        rows([{"messages": turn + turn}], build(), build(OTHER), turns="all")
    (row,) = rows([{"messages": turn + turn}], build(), build(OTHER))
    assert row.teacher_prompt_ids == tuple(encode_prompt(build(OTHER), [*turn, turn[0]]))
    (row,) = rows([{"messages": turn}], build(), build(OTHER), turns="all")
    assert row.teacher_prompt_ids == tuple(encode_prompt(build(OTHER), turn[:1]))


def test_plain_texts_have_one_rendering() -> None:
    (row,) = rows([{"text": "a b c d"}], build(), build(OTHER))
    assert row.teacher_prompt_ids is None and row.sampling_ids
