"""Rows and batches of an encoder-decoder, against lists written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer

from drkl.data import Example
from drkl.data.collate import IGNORE_INDEX, collate, collate_sources
from drkl.data.seq2seq import encode_source, encode_target, languages, set_languages, take_languages, tokens_around
from drkl.data.tokenize import Row, encode_for, tokenize_examples
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import build

EXAMPLE = Example("a", ({"role": "user", "content": "hi there"}, {"role": "assistant", "content": "a b"}))
N = IGNORE_INDEX


def like_t5():
    """eos after every text, as T5's tokenizer has it."""
    tokenizer = build(eos="</s>")
    eos = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[eos])
    return tokenizer


def row(row_id: str, prompt: tuple[int, ...], response: tuple[int, ...]) -> Row:
    return Row(row_id, prompt, response, EXAMPLE, encoder_decoder=True)


def test_the_decoder_is_fed_what_it_has_written_so_far() -> None:
    batch = collate([row("x", (11, 12, 4), (21, 4)), row("y", (14,), (23, 24, 4))], pad_id=0, decoder_start=1)
    assert batch["input_ids"].tolist() == [[11, 12, 4], [14, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[1, 21, 0], [1, 23, 24]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[21, 4, N], [23, 24, 4]]
    assert batch["row_ids"] == ["x", "y"] and "position_ids" not in batch


def test_eos_is_learnt_where_it_is_the_padding_and_the_start() -> None:
    batch = collate([row("x", (11,), (21, 4)), row("y", (11,), (4,))], pad_id=4, decoder_start=4)
    assert batch["labels"].tolist() == [[21, 4], [4, N]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_no_rows_give_one_ignored_position() -> None:
    batch = collate([], pad_id=7, decoder_start=1)
    assert batch["labels"].tolist() == [[N]]
    assert batch["attention_mask"].tolist() == batch["decoder_attention_mask"].tolist() == [[1]]


def test_rows_of_the_other_kind_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="rows of the other kind"):
        collate([row("x", (1,), (2,))], pad_id=0)


def test_sources_are_padded_at_the_right() -> None:
    batch = collate_sources([[5], [6, 7]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 0], [6, 7]]


@pytest.mark.parametrize("make", [like_t5, build])
def test_texts_are_encoded_as_the_tokenizer_does_by_itself(make) -> None:
    tokenizer = make()
    (made,), report = tokenize_examples([EXAMPLE], tokenizer, max_prompt_tokens=8, max_tokens=20, encoder_decoder=True)
    own_end = ["</s>"] if make is like_t5 else []
    assert tokenizer.convert_ids_to_tokens(list(made.prompt_ids)) == ["hi", " ", "there", *own_end]
    assert tokenizer.convert_ids_to_tokens(list(made.response_ids)) == ["a", " ", "b", tokenizer.eos_token]
    assert made.encoder_decoder and made.length == 4 and report.kept == 1
    assert encode_for(tokenizer, EXAMPLE.prompt_messages, encoder_decoder=True) == list(made.prompt_ids)


def test_a_longer_conversation_is_read_turn_by_turn() -> None:
    tokenizer = build()
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = "a\n\nUser: hi\n\nAssistant: b\n\nUser: c"
    assert encode_source(tokenizer, messages) == tokenizer(text)["input_ids"]


def test_a_cut_response_loses_its_end() -> None:
    (made,), report = tokenize_examples([EXAMPLE], like_t5(), max_prompt_tokens=4, max_tokens=6, encoder_decoder=True)
    assert len(made.response_ids) == 2 and report.responses_cut == 1


def test_a_tokenizer_without_eos() -> None:
    with pytest.raises(DrklError, match="no eos token"):
        encode_target(build(eos=None), "a")


def test_of_a_conversation_the_last_reply_alone_is_learnt() -> None:
    messages = tuple(
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)
    )
    limits = {"max_prompt_tokens": 30, "max_tokens": 40}
    rows = [
        tokenize_examples([Example("x", messages)], like_t5(), **limits, **more, encoder_decoder=True)[0][0]
        for more in ({}, {"turns": "all", "template": "alpaca"})
    ]
    assert rows[0] == rows[1] and rows[0].trained is None and rows[0].num_trained == len(rows[0].response_ids)
    assert rows[0].sampling_ids == rows[0].prompt_ids == tuple(encode_source(like_t5(), messages[:3]))


def test_of_plain_text_the_encoder_reads_the_first_half_of_a_block() -> None:
    tokenizer = like_t5()
    texts = [Example(name, ({"role": "assistant", "content": text},)) for name, text in (("x", "a b c d"), ("y", "hi"))]

    def rows(max_tokens: int) -> list[tuple[list[str], list[str]]]:
        found, report = tokenize_examples(
            texts, tokenizer, max_prompt_tokens=3, max_tokens=max_tokens, encoder_decoder=True
        )
        assert report.documents == 2 and report.kept == len(found) and all(row.encoder_decoder for row in found)
        assert [row.id[1:] for row in found] == [f"/{i}" for i in range(len(found))]
        tokens = tokenizer.convert_ids_to_tokens
        return [(tokens(list(row.prompt_ids)), tokens(list(row.response_ids))) for row in found]

    # The stream is a _ b _ c _ d </s> hi </s>; an end is learnt only where a text ends.
    assert rows(6) == [(["a", " ", "</s>"], ["b", " ", "c"]), ([" ", "d", "</s>"], ["</s>", "hi", "</s>"])]
    first, *others = rows(5)
    assert first == (["a", " ", "</s>"], ["b", " "])
    assert others == [(["c", " ", "</s>"], ["d", "</s>"]), (["hi", "</s>"], ["</s>"])]


PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{c}", -1.0) for c in "abcd")]


def translator(kind: str, **languages: str):
    """Tokenizers that write a language: mBART after eos, mBART-50 and NLLB before the text."""
    if kind == "nllb":
        return NllbTokenizer(vocab={piece: number for number, (piece, _) in enumerate(PIECES)}, **languages)
    return (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=list(PIECES), **languages)


@pytest.mark.parametrize("kind", ["mbart", "mbart-50", "nllb"])
def test_a_translation_has_one_end_and_the_languages_that_are_set(kind: str) -> None:
    source, target = ("eng_Latn", "ron_Latn") if kind == "nllb" else ("en_XX", "ro_RO")
    tokenizer = translator(kind)
    set_languages(tokenizer, source, target)
    words = tokenizer.convert_ids_to_tokens(tokenizer("a b", add_special_tokens=False)["input_ids"])
    before = [] if kind == "mbart" else [target]
    found = [tokenizer.convert_ids_to_tokens(encode_target(tokenizer, text)) for text in ("a b", "a b</s>")]
    assert found[0] == [*before, *words, "</s>"] and found[1].count("</s>") == 2
    read = tokenizer.convert_ids_to_tokens(encode_source(tokenizer, EXAMPLE.prompt_messages))
    assert (read[-1] if kind == "mbart" else read[0]) == source and target not in read
    begin, after = tokens_around(tokenizer, target=True)
    assert tokenizer.convert_ids_to_tokens([*begin, *after]) == (
        ["</s>", target] if kind == "mbart" else [target, "</s>"]
    )


def test_languages_are_kept_where_the_tokenizer_is_saved(tmp_path: Path) -> None:
    tokenizer = translator("mbart-50")
    set_languages(tokenizer, None, "ro_RO")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_target(again, "a") == encode_target(tokenizer, "a")
    assert again.convert_ids_to_tokens(encode_target(again, "a"))[0] == "ro_RO"
    set_languages(build(), None, None)


@pytest.mark.parametrize("kind", ["mbart", "mbart-50"])
def test_languages_are_taken_from_another_tokenizer_as_far_as_they_are_known(kind: str) -> None:
    tokenizer = translator(kind, src_lang="en_XX", tgt_lang="ro_RO")
    take_languages(tokenizer, translator("mbart-50", src_lang="de_DE", tgt_lang="fr_XX"))
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("de_DE", "fr_XX")
    assert tokenizer.convert_tokens_to_ids("de_DE") in tokenizer("a")["input_ids"]
    for other in (translator("nllb", src_lang="eng_Latn", tgt_lang="ron_Latn"), build()):
        take_languages(tokenizer, other)
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("de_DE", "fr_XX")
    take_languages(build(), tokenizer)


def test_languages_that_mean_nothing_are_refused() -> None:
    with pytest.raises(DrklError, match=r"data\.tgt_lang is 'ro_RO', but the \w+ has no languages"):
        set_languages(build(), None, "ro_RO")
    for kind, code, near in (("mbart", "en_X", "en_XX"), ("nllb", "ron_Lat", "ron_Latn")):
        with pytest.raises(DrklError, match=rf"data\.src_lang is '{code}', which .* does not know.*mean '{near}'"):
            set_languages(translator(kind), code, None)
    assert languages(build()) == {} and languages(translator("nllb"))["ron_Latn"] > 7


def test_a_tokenizer_that_needs_a_target_language() -> None:
    class Needs:
        tgt_lang = None
        eos_token_id = 2

        def __call__(self, **text: object) -> object:
            raise KeyError(None)

    with pytest.raises(DrklError, match=r"The Needs writes the language .* set data\.tgt_lang"):
        encode_target(Needs(), "a")  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        encode_source(Needs(), EXAMPLE.prompt_messages)  # type: ignore[arg-type]
