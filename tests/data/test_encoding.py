"""Rows that are made many at once are those that are made one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drkl.data import Example
from drkl.data import encoding as encoding_module
from drkl.data.encoding import TextEncoder, batched
from drkl.data.tokenize import tokenize_examples
from drkl.data.views import TeacherView
from drkl.errors import DrklError
from tests.data.test_pieces import CHAT, KINDS, talk, tokenizer
from tests.data.test_seq2seq import like_t5
from tests.data.tiny_tokenizers import CHATML, LLAMA2, build

TEXT = st.lists(
    st.sampled_from(["he", "he said", " ", "\n", "é", "12", "</s>", "<|end|>", "<|user|>", "<|assistant|>\n", "Q: "]),
    max_size=4,
).map("".join)
LENGTHS: dict[str, Any] = {"max_prompt_tokens": 60, "max_tokens": 80}


def outcome(examples: list[Example], tokens: Any, **given: Any) -> Any:
    try:
        return tokenize_examples(examples, tokens, **LENGTHS, **given)
    except DrklError as error:
        return str(error)


def one_by_one(examples: list[Example], tokens: Any, **given: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_module, "AT_ONCE", 1)
        return outcome(examples, tokens, **given)


@given(
    texts=st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=2, max_size=5),
    kind=st.sampled_from(list(KINDS)),
    given_=st.sampled_from(
        [{}, {"turns": "all"}, {"template": "plain"}, {"template": "alpaca", "turns": "all"}, {"encoder_decoder": True}]
    ),
    teacher=st.booleans(),
    needs=st.booleans(),
)
@settings(deadline=None, max_examples=12)
def test_many_at_once_are_the_same_rows(
    texts: list[list[str]], kind: str, given_: dict[str, Any], teacher: bool, needs: bool
) -> None:
    tokens = tokenizer(kind, CHAT)
    examples = [Example(f"{number}", tuple(talk(*some)[len(some) % 2 :])) for number, some in enumerate(texts)]
    examples = [example for example in examples if example.messages]
    made = []
    for way in (outcome, one_by_one):
        view = TeacherView(tokenizer(kind, CHAT, adds_bos=True), encoder_decoder=given_.get("encoder_decoder", False))
        made.append(way(examples, tokens, needs_responses=needs, teacher=view if teacher else None, **given_))
    assert made[0] == made[1]


def test_the_first_row_that_fails_is_named() -> None:
    system = [{"role": "system", "content": "b"}]
    bad = [Example("bad", (*system, *talk("hi", "a"))), Example("worse", (*system, *talk("hi", "b")))]
    fine = [Example(f"{number}", tuple(talk("hi", "a"))) for number in range(3)]
    with pytest.raises(DrklError, match=r"^Row 'bad': The tokenizer's chat template refuses the roles system"):
        tokenize_examples([*fine, *bad], build(LLAMA2), **LENGTHS)
    # The first cannot be encoded, the second not be written.
    vocab = {token: number for number, token in enumerate(["hi", "a", " ", "[", "INST", "]", "/", "<s>", "</s>"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=LLAMA2)
    with pytest.raises(DrklError, match=r"^Row 'strange': The tokenizer cannot encode 'strange '"):
        tokenize_examples([Example("strange", tuple(talk("strange ", "a"))), *bad], tokens, template="plain", **LENGTHS)
    with pytest.raises(DrklError, match=r"^Row 'strange': The tokenizer cannot encode 'strange'"):
        texts = [Example("strange", ({"role": "assistant", "content": "strange"},)), *fine]
        tokenize_examples(texts, tokens, template="plain", **LENGTHS)


def calls_of(tokens: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of a tokenizer's backend."""
    calls: list[list[str]] = []
    backend = tokens.backend_tokenizer

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def encode_batch_fast(self, texts: list[str], **given: Any) -> Any:
            calls.append(texts)
            return backend.encode_batch_fast(texts, **given)

    monkeypatch.setattr(type(tokens), "backend_tokenizer", property(lambda self: Counted()))
    return calls


def test_what_rows_share_is_encoded_once_and_all_of_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = build(CHATML)
    examples = [Example(name, tuple(talk(f"hi {name}", f"hello {name}"))) for name in "abcd"]
    calls = calls_of(tokens, monkeypatch)
    rows, _ = tokenize_examples(examples, tokens, **LENGTHS)
    monkeypatch.undo()
    (texts,) = calls
    assert len(texts) == len(set(texts))
    said = [f"<|im_start|>{who} {name}" for name in "abcd" for who in ("user\nhi", "assistant\nhello")]
    assert sorted(texts) == sorted([*said, "<|im_end|>", "<|im_end|>\n", "<|im_start|>assistant\n"])
    assert len(rows) == 4


def test_a_padding_tokenizer_and_one_of_pairs() -> None:
    examples = [Example(name, tuple(talk(name, "hello there"))) for name in ("hi", "hi a b c")]
    padding = build(CHATML)
    padding.backend_tokenizer.enable_padding()
    padding.backend_tokenizer.enable_truncation(2)
    assert tokenize_examples(examples, padding, **LENGTHS) == tokenize_examples(examples, build(CHATML), **LENGTHS)
    both = [way(examples, like_t5(), encoder_decoder=True) for way in (outcome, one_by_one)]
    assert both[0] == both[1] and not isinstance(both[0], str)


def test_long_items_are_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "AT_ONCE", 3)
    monkeypatch.setattr(encoding_module, "CHARACTERS_AT_ONCE", 5)
    assert list(batched(["a", "b", "c", "d", "e" * 6, "f", "g" * 5, "h"], len)) == [
        ["a", "b", "c"], ["d", "eeeeee"], ["f", "ggggg"], ["h"],
    ]  # fmt: skip
    assert list(batched([], len)) == []


def test_ids_are_kept_until_the_next_texts_are_read() -> None:
    encoder = TextEncoder(build())
    encoder.read([["hi ", "there"], ["a"]])
    assert encoder.ids("hi there") == build()("hi there", add_special_tokens=False)["input_ids"]
    assert encoder.ids("a") is encoder.ids("a")
    encoder.read([])
    assert encoder.ids("a") == build()("a", add_special_tokens=False)["input_ids"]
