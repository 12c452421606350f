"""Do the tokenizers of two models agree?"""

from __future__ import annotations

import pytest

from drkl.errors import DrklError
from drkl.models.pair import shared_tokens
from tests.data.tiny_tokenizers import build
from tests.models import tiny


def test_the_same_tokens_pass() -> None:
    tokens = tiny.tokenizer()
    assert shared_tokens(tokens, tiny.tokenizer(), "a", "b") == (max(tokens.get_vocab().values()) + 1, False)


def test_tokens_that_differ_are_named() -> None:
    student, teacher = build(extra=["x", "y"]), build(extra=["y", "x"])
    with pytest.raises(DrklError) as error:
        shared_tokens(student, teacher, "small", "large")
    where = student.get_vocab()["x"]
    assert f"{where}: student 'x', teacher 'y'" in str(error.value)
    assert "'small'" in str(error.value) and "'large'" in str(error.value)


def test_a_tokenizer_that_goes_on_where_the_other_ends_shares_its_beginning() -> None:
    short, long = build(extra=["x"]), build(extra=["x", "y", "z"])
    count = max(short.get_vocab().values()) + 1
    assert shared_tokens(short, long, "a", "b") == shared_tokens(long, short, "a", "b") == (count, True)


def test_tokenizers_that_both_go_on_differ() -> None:
    with pytest.raises(DrklError, match=r"student 'y', teacher 'z'"):
        shared_tokens(build(extra=["x", "y", "w"]), build(extra=["x", "z"]), "a", "b")
