"""A text is cut only where its ids are cut too."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drkl.data import cuts
from drkl.data.cuts import Cuts, safe_tokens, words_are_apart
from tests.data.test_pieces import CHAT, KINDS, byte_level, tokenizer
from tests.data.tiny_tokenizers import build

TEMPLATE = "<|im_start|> <|im_end|>"


def with_tokens(*tokens: AddedToken) -> Any:
    made = build()
    made.add_tokens(list(tokens))
    return made


def cut_at(tokens: Any, template: str = TEMPLATE) -> set[str]:
    pattern = safe_tokens(tokens, template)
    return set() if pattern is None else set(pattern.findall(f"{template}<s><|im_end|>"))


def test_texts_are_cut_at_the_tokens_that_a_template_writes() -> None:
    assert cut_at(build()) == {"<s>", "<|im_start|>", "<|im_end|>"}
    assert cut_at(build(), "[INST]") == {"<s>", "<|im_end|>"}  # the eos of it
    assert safe_tokens(build(), TEMPLATE).split("a<|im_end|>b") == ["a", "<|im_end|>", "b"]


@pytest.mark.parametrize(
    ("token", "hidden"),
    [
        (AddedToken("<|im_start|>user", normalized=False), {"<|im_start|>"}),
        (AddedToken("x<|im_end|>", normalized=False), {"<|im_end|>"}),
        (AddedToken("hello<|im", normalized=False), {"<|im_start|>", "<|im_end|>"}),
        (AddedToken("user", normalized=False), set()),
        (AddedToken("|>x", normalized=False), set()),  # the token before it is found first
        (AddedToken("x<|im_end|>", normalized=True), set()),  # looked for in what is left
        (AddedToken("user", normalized=False, single_word=True), {"<s>", "<|im_start|>", "<|im_end|>"}),
    ],
)
def test_tokens_that_others_may_hide_are_none_of_them(token: AddedToken, hidden: set[str]) -> None:
    assert cut_at(with_tokens(token)) == {"<s>", "<|im_start|>", "<|im_end|>"} - hidden


def test_tokens_that_take_what_is_before_them_or_are_no_tokens() -> None:
    flags = {"normalized": False, "special": True}
    taking = with_tokens(AddedToken("<|user|>", lstrip=True, **flags), AddedToken("<|bot|>", rstrip=True, **flags))
    assert cut_at(taking, "<|user|><|bot|>") == {"<s>", "<|im_end|>", "<|bot|>"}
    assert safe_tokens(build(split_special_tokens=True), TEMPLATE) is None


TEXTS = st.lists(
    st.sampled_from(["he", " ", "\n", "a", "é", "\u0301", "12", "</s>", "<s>", "<|end|>", "<|user|>", "<|", "'s", "."])
).map("".join)


@given(text=TEXTS, more=TEXTS, kind=st.sampled_from(list(KINDS)), flags=st.sampled_from(["", "rstrip", "lstrip"]))
@settings(deadline=None, max_examples=10)
def test_the_ids_of_the_parts_are_those_of_the_text(text: str, more: str, kind: str, flags: str) -> None:
    tokens = tokenizer(kind, CHAT, **({flags: True} if flags else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "BLOCK", 3)
        cuts._blocks.cache_clear()
        where = Cuts(safe_tokens(tokens, CHAT), words_are_apart(tokens))
        parts, longer = where.parts(text), where.parts(text + more)
        assert "".join(parts) == text
        assert [*parts[:-1], *where.parts(parts[-1] + more)] == longer
        ids = [tokens(part, add_special_tokens=False)["input_ids"] for part in longer]
        assert list(chain(*ids)) == tokens(text + more, add_special_tokens=False)["input_ids"]
    cuts._blocks.cache_clear()


def words(pre_tokenizer: Any, *tokens: AddedToken, **parts: Any) -> bool:
    model = byte_level(**parts)
    model.pre_tokenizer = pre_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    made.add_tokens(list(tokens))
    if words_are_apart(made):
        text = "he said, it's\n\n12 he  's a.b c 'll he"
        where = [i for i in range(1, len(text)) if text[i] == " " and text[i - 1].isalpha()]
        whole = made(text, add_special_tokens=False)["input_ids"]
        for place in where:
            apart = [made(part, add_special_tokens=False)["input_ids"] for part in (text[:place], text[place:])]
            assert list(chain(*apart)) == whole
        return True
    return False


def test_words_are_apart_where_the_split_is_known() -> None:
    level, bare = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(use_regex=False)
    assert words(level) and words(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]))
    for split in cuts.SPLITS:
        by = pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False)
        assert words(pre_tokenizers.Sequence([by, bare]))
    other = pre_tokenizers.Split(Regex(r"[a-z]+ [a-z]+|."), behavior="isolated", invert=False)
    assert not words(pre_tokenizers.Sequence([other, bare])) and not words(bare)
    assert not words(level, AddedToken("he said", normalized=False))
    assert not words(level, AddedToken("he", rstrip=True))
    assert not words_are_apart(tokenizer("Llama 2")) and not words_are_apart(tokenizer("bytes in lower case"))


def test_a_class_that_does_more_with_a_text_is_left_alone() -> None:
    class Louder(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **given: Any) -> Any:
            louder = [f"{one}!" for one in text] if isinstance(text, list) else f"{text}!"
            return super()._encode_plus(louder, *args, **given)

    made = Louder(tokenizer_object=build().backend_tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    assert safe_tokens(made, TEMPLATE) is None
