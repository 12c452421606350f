"""Prompt and response by every kind of tokenizer: the row reads as the text does, whatever is encoded apart."""

from __future__ import annotations

import itertools
import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drkl.data import Example
from drkl.data.rendering import Writer
from drkl.data.template import encode_last, encode_prompt, encode_turns
from drkl.data.tokenize import tokenize_examples

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
LETTERS = [chr(code) for code in range(33, 127)]
PIECES = ["▁", "he", "▁he", "▁a", "▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BLANKS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: {% else %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
    "{{ m.content }} </s>{% endif %}{% endfor %}"
)


def sentencepiece(
    model: Any, *, normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, **special: bool
) -> Any:
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    return tokenizer


def bpe(**parts: Any) -> Any:
    vocab = {word: number for number, word in enumerate([*SPECIALS, *BYTES, *LETTERS, *PIECES])}
    merges = [("h", "e"), ("▁", "he"), ("▁", "a"), ("▁", "▁")]
    return sentencepiece(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True), **parts)


def unigram(scheme: str, **parts: Any) -> Any:
    words = [(word, -3.0 - number / 100) for number, word in enumerate([*LETTERS, *PIECES, "é", "\n"])]
    model = models.Unigram([*((word, -1.0) for word in SPECIALS), *words], unk_id=0)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return sentencepiece(model, pre_tokenizer=metaspace, decoder=decoders.Metaspace(prepend_scheme=scheme), **parts)


def byte_level(*, prefix: bool = False, **parts: Any) -> Any:
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe", "ĊĊ"]
    model = models.BPE({word: number for number, word in enumerate(words)}, [("h", "e"), ("Ġ", "he"), ("Ċ", "Ċ")])
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return sentencepiece(model, pre_tokenizer=level, decoder=decoders.ByteLevel(), **parts)


def metaspace(scheme: str) -> dict[str, Any]:
    strip = decoders.Sequence([*BLANKS, decoders.Strip(" ", 1, 0)])
    return {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False), "decoder": strip}


BLANK = normalizers.Replace(" ", "▁")
KINDS: dict[str, Any] = {
    "Llama 2": lambda: bpe(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), BLANK]), decoder=metaspace("first")["decoder"]
    ),
    "Gemma": lambda: bpe(normalizer=BLANK, decoder=decoders.Sequence(BLANKS)),
    "metaspace, first": lambda: bpe(**metaspace("first")),
    "metaspace, always": lambda: bpe(**metaspace("always")),
    "metaspace, never": lambda: bpe(**metaspace("never")),
    "unigram": lambda: unigram("always"),
    "unigram, first": lambda: unigram("first"),
    "unigram that drops blanks": lambda: unigram(
        "always",
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
    ),
    "bytes": byte_level,
    "bytes after a blank": lambda: byte_level(prefix=True),
    "bytes in lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "bytes composed": lambda: byte_level(normalizer=normalizers.NFC()),
}
BYTE_LEVEL = [kind for kind in KINDS if kind.startswith("bytes")]


@cache
def tokenizer(kind: str, template: str | None = None, adds_bos: bool = False, **flags: bool) -> Any:
    made = KINDS[kind]()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **special)
    if template == CHAT:
        names = [AddedToken(name, special=True, **flags) for name in ("<|user|>", "<|assistant|>", "<|end|>")]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


def read(tokens: Any, ids: list[int]) -> str:
    return unicodedata.normalize("NFC", tokens.decode(ids, clean_up_tokenization_spaces=False))


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


QUESTIONS = ["Q: ", "Q:", "he", "he \n", "\n\n"]
ANSWERS = ["he said", "  he", " he", "he\n\n", "\nhe", "é", "12 "]


@pytest.mark.parametrize("template", ["plain", "{{ prompt }} ", "{{ prompt }}\n"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_reads_as_the_text_does(kind: str, template: str) -> None:
    tokens = tokenizer(kind)
    for messages in itertools.starmap(talk, itertools.product(QUESTIONS, ANSWERS)):
        ids, ((start, _),), _ = encode_last(tokens, messages, template)
        assert ids[:start] == encode_prompt(tokens, messages[:1], template)
        assert ids[-1] == tokens.eos_token_id
        text = Writer(tokens, template).prompt(messages[:1]) + messages[1]["content"]
        assert read(tokens, ids[:-1]) == read(tokens, tokens(text, add_special_tokens=False)["input_ids"])


def test_the_blank_before_an_answer_is_learnt_once() -> None:
    tokens = tokenizer("Llama 2")
    ids, ((start, _),), _ = encode_last(tokens, talk("Q: ", "he said"), "plain")
    assert tokens.convert_ids_to_tokens(ids) == ["▁", "Q", ":", "▁", "he", "▁", "s", "a", "i", "d", "</s>"]
    assert start == 4


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
@pytest.mark.parametrize("template", [CHAT, WORDS, INST], ids=["chat", "words", "inst"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_reads_as_the_text_does(kind: str, template: str, flags: dict[str, bool]) -> None:
    if flags and template != CHAT:
        return  # no tokens to set them on
    tokens = tokenizer(kind, template, **flags)
    for question, answer in itertools.product(("he", "he \n"), ("he said", "  he", " he", "he\n\n", "12 ")):
        messages = talk(question, answer, "he he", answer)
        for ids in (encode_last(tokens, messages)[0], encode_turns(tokens, messages)[0]):
            whole = read(tokens, tokens(Writer(tokens).conversation(messages), add_special_tokens=False)["input_ids"])
            assert whole.startswith(read(tokens, ids)) and not whole.removeprefix(read(tokens, ids)).strip()


CHARACTERS = "ab \n\t</s>é\u0301\u00a0\u200d\u2028\x00🙂ﬁＡ▁Ġ"


@given(
    texts=st.lists(st.text(CHARACTERS, max_size=8), min_size=2, max_size=2),
    kind=st.sampled_from(["bytes", "bytes composed"]),
)
@settings(deadline=None)
def test_bytes_come_back_whole(texts: list[str], kind: str) -> None:
    for template, written in (("plain", "".join(texts)), ("> {{ prompt }}\n", f"> {texts[0]}\n{texts[1]}")):
        ids, _, _ = encode_last(tokenizer(kind), talk(*texts), template)
        assert read(tokenizer(kind), ids).removesuffix("</s>") == unicodedata.normalize("NFC", written).removesuffix(
            "</s>"
        )


@pytest.mark.parametrize("kind", ["bytes", "Llama 2"])
@pytest.mark.parametrize(
    ("template", "count"),
    [
        ("plain", 1),
        ("alpaca", 1),
        ("minillm", 0),
        ("{{ prompt }}", 1),
        ("{{ bos_token }}{{ prompt }}", 1),
        ("<s>{{ prompt }}", 1),
    ],
)
def test_a_row_never_has_two_beginnings_or_two_ends(kind: str, template: str, count: int) -> None:
    tokens = tokenizer(kind, adds_bos=True)
    for answer in ("he", "he</s>"):
        ids, _, _ = encode_last(tokens, talk("a", answer), template)
        assert ids.count(1) == count and (ids[0] == 1) == bool(count)
        assert ids.count(2) == 1 and ids[-1] == 2


def test_a_prompt_of_which_the_tokenizer_leaves_nothing_is_dropped() -> None:
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(normalizer=normalizers.Replace("\u200b", "")), eos_token="</s>"
    )
    examples = [Example(text, tuple(talk(text, "he"))) for text in ("a", "\u200b")]
    rows, report = tokenize_examples(examples, tokens, max_prompt_tokens=9, max_tokens=20, template="plain")
    assert [row.id for row in rows] == ["a"] and report.dropped == {"empty_prompt": 1}


def test_a_prompt_that_brings_its_own_beginning() -> None:
    tokens = tokenizer("bytes", adds_bos=True)
    assert encode_last(tokens, talk("<s>he", "a"), "plain") == encode_last(tokens, talk("he", "a"), "plain")
