"""The row that is learnt is what the chat template itself writes, for the formats of current models."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from drkl.data import Example
from drkl.data.rendering import DATE
from drkl.data.template import encode_last, encode_prompt, encode_turns
from drkl.data.tokenize import tokenize_examples
from drkl.errors import DrklError
from tests.data.published_formats import FORMATS, Format

MERGES = [("Ċ", "Ċ"), ("Ġ", "h"), ("h", "e"), ("Ġ", "a"), (":", "Ġ"), ("<", "/"), ("Ċ", "Ġ"), ("Ċ", "b")]
QUESTION = [{"role": "user", "content": "hello there?"}]
ANSWER = [{"role": "assistant", "content": 'a: he said\n\n</s> <b>"é"'}]
MORE = [{"role": "user", "content": "and then"}, {"role": "assistant", "content": "the end"}]
SYSTEM = [{"role": "system", "content": "be brief"}]


class Day(datetime):
    """What a template finds as today."""

    today = DATE

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls.today


@pytest.fixture(autouse=True)
def _day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def byte_tokenizer(template: str, tokens: tuple[str, ...], bos: str | None, eos: str) -> Any:
    """A byte-level tokenizer with some merges; the bos is added by itself too, where the tokenizer is asked for it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*tokens, "<pad>", *alphabet, *("".join(pair) for pair in MERGES)]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if bos:
        model.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, words.index(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        chat_template=template,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=list(tokens),
    )


@cache
def tokenizer(name: str) -> Any:
    form = FORMATS[name]
    return byte_tokenizer(form.template, form.tokens, form.bos, form.eos or form.end)


def decode(name: str, ids: list[int]) -> str:
    return tokenizer(name).decode(ids, clean_up_tokenization_spaces=False)


def written(name: str, messages: list[Any], **given: Any) -> str:
    return tokenizer(name).apply_chat_template(messages, tokenize=False, **given)


def ids_of(name: str, text: str) -> list[int]:
    return tokenizer(name)(text, add_special_tokens=False)["input_ids"]


def conversations(form: Format) -> list[list[dict[str, str]]]:
    systems = [[], SYSTEM] if form.system else [[]]
    return [[*system, *QUESTION, *turns] for system in systems for turns in (ANSWER, [*ANSWER, *MORE])]


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_the_text_of_the_template(name: str) -> None:
    form = FORMATS[name]
    for messages in conversations(form):
        ids, ((start, end),), (opening,) = encode_last(tokenizer(name), messages)
        reply = form.reply.replace("{}", messages[-1]["content"]) + form.end
        whole = written(name, messages).removesuffix(form.after) + (form.end if not form.written_end else "")
        assert whole.endswith(reply)
        assert (decode(name, ids), end) == (whole, len(ids))
        assert decode(name, ids[start:]) == reply
        # The tokens too are those of the texts by themselves: a model is given the prompt alone.
        assert ids == ids_of(name, whole[: -len(reply)]) + ids_of(name, reply)
        prompt = encode_prompt(tokenizer(name), messages[:-1])
        assert ids[:start] + opening == prompt == ids_of(name, written(name, messages[:-1], add_generation_prompt=True))
        assert decode(name, opening) == form.opening
        if form.bos and form.bos != form.end and name != "LLAMA_2":  # each of its questions begins with one
            assert ids.count(tokenizer(name).bos_token_id) == 1 and ids[0] == tokenizer(name).bos_token_id


@pytest.mark.parametrize("name", FORMATS)
def test_all_turns_are_what_the_assistant_wrote_or_refused(name: str) -> None:
    form = FORMATS[name]
    messages = conversations(form)[-1]
    if form.rewrites:
        with pytest.raises(DrklError, match=r"writes the assistant's earlier turns differently.*data\.turns: last"):
            encode_turns(tokenizer(name), messages)
        return
    ids, spans, openings = encode_turns(tokenizer(name), messages)
    whole = written(name, messages).removesuffix(form.after) + (form.end if not form.written_end else "")
    for (start, end), message, opening in zip(spans, (ANSWER[0], MORE[1]), openings, strict=True):
        assert decode(name, ids[start:end]) == form.reply.replace("{}", message["content"]) + form.end
        assert decode(name, opening) == form.opening
    if not form.written_end:  # eos was put after the first turn too
        ids = ids[: spans[0][1] - 1] + ids[spans[0][1] :]
    assert decode(name, ids) == whole


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.reasoned])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_learnt_as_the_template_writes_it(name: str, field: str) -> None:
    form = FORMATS[name]
    messages = [*QUESTION, {**ANSWER[0], field: "think"}]
    ids, ((start, _),), (opening,) = encode_last(tokenizer(name), messages)
    assert form.reasoned is not None and not opening
    reply = form.reasoned.replace("{think}", "think").replace("{}", ANSWER[0]["content"]) + form.end
    assert decode(name, ids[start:]) == reply
    assert ids[:start] == encode_prompt(tokenizer(name), QUESTION)
    assert decode(name, ids) == written(name, messages).removesuffix(form.after) + form.end * (not form.written_end)


@pytest.mark.parametrize("name", ["QWEN_3", "QWEN_3_THINKING", "QWQ", "DEEPSEEK_R1"])
def test_reasoning_within_the_answer_stays_also_where_the_template_would_leave_it_out(name: str) -> None:
    form = FORMATS[name]
    messages = [*QUESTION, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}]
    ids, ((start, _),), (opening,) = encode_last(tokenizer(name), messages)
    assert not opening and ids[:start] == encode_prompt(tokenizer(name), QUESTION)
    before = written(name, QUESTION, add_generation_prompt=True).removesuffix("<think>\n")
    assert decode(name, ids) == f"{before}<think>\nwell\n</think>\n\nyes{form.end}"


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if "strftime_now" in form.template])
def test_a_row_is_the_same_every_day(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [*QUESTION, *ANSWER]
    row, text = encode_last(tokenizer(name), messages), written(name, messages)
    monkeypatch.setattr(Day, "today", datetime(2031, 2, 3))
    assert encode_last(tokenizer(name), messages) == row
    assert written(name, messages) != text and "2031" in written(name, messages)


def test_the_date_may_be_an_argument_of_the_template() -> None:
    given = {"date_string": "1 May 2025"}
    ids = encode_prompt(tokenizer("LLAMA_32"), QUESTION, template_kwargs=given)
    assert decode("LLAMA_32", ids) == written("LLAMA_32", QUESTION, add_generation_prompt=True, **given)


def test_an_argument_changes_prompt_and_row() -> None:
    given: dict[str, Any] = {"enable_thinking": False}
    messages = [*QUESTION, *ANSWER]
    ids, ((start, _),), (opening,) = encode_last(tokenizer("QWEN_3"), messages, template_kwargs=given)
    assert not opening and decode("QWEN_3", ids[:start]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert decode("QWEN_3", ids) + "\n" == written("QWEN_3", messages, **given)


def test_a_sample_follows_the_generation_prompt_and_the_row_does_not() -> None:
    example = Example("x", (*QUESTION, *ANSWER, *MORE))
    for turns, asked in (("last", 4), ("all", 4)):
        (row,), _ = tokenize_examples([example], tokenizer("QWQ"), max_prompt_tokens=200, max_tokens=500, turns=turns)
        prompt = encode_prompt(tokenizer("QWQ"), example.messages[: asked - 1])
        assert list(row.sampling_ids) == prompt and decode("QWQ", prompt).endswith("<|im_start|>assistant\n<think>\n")
        assert "<think>" not in decode("QWQ", list(row.all_ids))


def test_the_tokens_between_generation_tags_are_those_that_are_learnt() -> None:
    name, messages = "SMOLLM_3", [*QUESTION, *ANSWER, *MORE]
    theirs = tokenizer(name).apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, spans, _ = encode_turns(tokenizer(name), messages)
    marks = [any(start <= place < end for start, end in spans) for place in range(len(ids))]
    # The newline after the end of turn is between the tags too; it is not the assistant's to write.
    newlines = [end for _, end in spans]
    assert theirs["input_ids"] == [*ids, *ids_of(name, "\n")]
    assert [i for i, m in enumerate(theirs["assistant_masks"]) if m] == sorted(
        [*(i for i, mark in enumerate(marks) if mark), *newlines]
    )


CHARACTERS = "ab: \n\t</think>é\u0301\u00a0\u200d\u2028\x00🙂ﬁＡ▁Ġ"


@given(
    name=st.sampled_from(["CHATML", "QWEN_3", "QWQ", "ZEPHYR", "MISTRAL_3", "GPT_OSS", "FALCON"]),
    texts=st.lists(st.text(CHARACTERS, max_size=12), min_size=2, max_size=2),
)
@settings(deadline=None)
def test_any_text_comes_back(name: str, texts: list[str]) -> None:
    form = FORMATS[name]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    ids, _, _ = encode_last(tokenizer(name), messages)
    end = "" if form.written_end else form.end
    assert decode(name, ids) == written(name, messages).removesuffix(form.after) + end
