from __future__ import annotations

import pytest

from drkl.data import Example
from drkl.data.tokenize import DropReport, tokenize_examples
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import LLAMA2, build


def example(row_id: str, prompt: str, response: str, system: str | None = None) -> Example:
    head = ({"role": "system", "content": system},) if system else ()
    return Example(row_id, (*head, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}))


# ChatML costs a prompt 8 tokens besides its content.
SHORT, EXACT, LONG = "hi", "a b", "a b c"


def test_rows_and_account() -> None:
    examples = [
        example("kept", SHORT, "hello"),
        example("exact", EXACT, "hello"),
        example("long", LONG, "hello"),
        example("no prompt", " \n", "hello"),
        example("no response", SHORT, ""),
        example("cut", SHORT, "a b c d"),
    ]
    rows, report = tokenize_examples(examples, build(), max_prompt_tokens=11, max_tokens=15)
    assert [row.id for row in rows] == ["kept", "exact", "cut"]
    assert [row.example for row in rows] == [examples[0], examples[1], examples[5]]
    assert report == DropReport(3, {"prompt_too_long": 1, "empty_prompt": 1, "empty_response": 1}, responses_cut=1)
    assert report.summary() == (
        "3 of 6 rows kept, 1 dropped (prompt longer than max_prompt_tokens), 1 dropped (empty prompt), "
        "1 dropped (empty response), 1 responses cut at max_tokens."
    )


def test_a_response_is_cut_at_its_end_and_the_prompt_never() -> None:
    tokenizer = build()
    (whole,), _ = tokenize_examples([example("a", SHORT, "a b c d")], tokenizer, max_prompt_tokens=13, max_tokens=99)
    (cut,), report = tokenize_examples([example("a", SHORT, "a b c d")], tokenizer, max_prompt_tokens=13, max_tokens=15)
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.response_ids == whole.response_ids[: 15 - len(cut.prompt_ids)]
    assert tokenizer.eos_token_id not in cut.response_ids and whole.response_ids[-1] == tokenizer.eos_token_id
    assert report.responses_cut == 1
    (fits,), report = tokenize_examples(
        [example("a", SHORT, "a b c d")], tokenizer, max_prompt_tokens=13, max_tokens=whole.length + 1
    )
    assert (fits, report.responses_cut) == (whole, 0)


def test_length_is_what_the_model_is_fed() -> None:
    (row,), _ = tokenize_examples([example("a", "hi", "hello")], build(), max_prompt_tokens=20, max_tokens=30)
    assert row.length == len(row.prompt_ids) + len(row.response_ids) - 1


def test_all_dropped_says_why_and_what_to_change() -> None:
    examples = [example("1", LONG, "hello"), example("2", f"{LONG} d", "hello"), example("3", SHORT, " ")]
    with pytest.raises(DrklError) as caught:
        tokenize_examples(examples, build(), max_prompt_tokens=12, max_tokens=30)
    assert str(caught.value) == (
        "None of the 3 rows can be used: 2 prompt longer than max_prompt_tokens, 1 empty response. The shortest prompt "
        "has 13 tokens; raise data.max_prompt_tokens (12). Fill the empty fields, or use other data."
    )
    with pytest.raises(DrklError, match="The data set has no rows"):
        tokenize_examples([], build(), max_prompt_tokens=12, max_tokens=30)


def test_a_refused_conversation_is_named() -> None:
    with pytest.raises(DrklError, match=r"Row 'bad': The tokenizer's chat template refuses the roles system, user"):
        tokenize_examples([example("bad", "hi", "a", system="b")], build(LLAMA2), max_prompt_tokens=12, max_tokens=30)


def test_limits_that_leave_no_response() -> None:
    with pytest.raises(DrklError, match=r"max_tokens \(12\) must be larger than max_prompt_tokens \(12\)"):
        tokenize_examples([example("a", "hi", "a")], build(), max_prompt_tokens=12, max_tokens=12)


def test_long_prompts_are_counted_without_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build(model_max_length=8)
    with pytest.raises(DrklError, match="1 prompt longer"):
        tokenize_examples([example("a", "a " * 50, "a")], tokenizer, max_prompt_tokens=12, max_tokens=30)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
