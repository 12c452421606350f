"""The rule of lengths: what the user gave is kept, and what they did not give fits the models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drkl.data import DataConfig, Example
from drkl.data.lengths import Lengths, Room, answer_room, check_answer, fit_answer, fit_lengths, no_prompt_fits
from drkl.data.rows import rows_from
from drkl.data.tokenize import DropReport
from drkl.errors import DrklError
from tests.data.test_seq2seq import like_t5
from tests.data.tiny_tokenizers import build

CONTEXT = st.none() | st.integers(2, 2000)


@pytest.mark.parametrize(
    ("prompt", "total", "room", "expected"),
    [
        (None, None, Room(), (256, 512)),
        (None, None, Room(4096, 4096), (256, 512)),
        (None, None, Room(300, 300), (256, 300)),
        (None, None, Room(128, 128), (127, 128)),
        (None, 64, Room(128, 128), (32, 64)),
        (None, 512, Room(128, 128), (127, 512)),
        (100, None, Room(128, 128), (100, 128)),
        (300, None, Room(), (300, 556)),
        (300, 700, Room(128, 128), (300, 700)),
        # An encoder's context is for the prompt, a decoder's for the response.
        (None, None, Room(64, 24, separate=True), (64, 88)),
        (None, None, Room(1024, 1024, separate=True), (256, 512)),
        (None, None, Room(None, 24, separate=True), (256, 512)),
        (200, None, Room(None, None, separate=True), (200, 512)),
    ],
)
def test_by_hand(prompt: int | None, total: int | None, room: Room, expected: tuple[int, int]) -> None:
    assert fit_lengths(prompt, total, room) == expected


def test_answers_of_a_given_length_leave_less_for_prompts() -> None:
    assert fit_lengths(None, None, Room(96, 96), max_new_tokens=40) == (56, 96)
    assert fit_lengths(None, None, Room(96, 96), max_new_tokens=200) == (1, 96)
    assert fit_lengths(50, None, Room(96, 96), max_new_tokens=90) == (50, 96)


@pytest.mark.parametrize(
    ("lengths", "room", "given", "expected"),
    [
        ((256, 512), Room(), None, 256),
        ((256, 512), Room(), 1000, 1000),
        ((40, 80), Room(96, 96), None, 40),
        ((40, 80), Room(96, 96), 56, 56),
        ((40, 200), Room(96, 96), None, 56),
        ((256, 512), Room(512, 24, separate=True), None, 24),
        ((256, 300), Room(512, 512, separate=True), None, 44),
        ((256, 300), Room(None, None, separate=True), 60, 60),
    ],
)
def test_the_longest_sampled_answer(lengths: tuple[int, int], room: Room, given: int | None, expected: int) -> None:
    assert answer_room(Lengths(*lengths), room, given) == expected


@pytest.mark.parametrize(
    ("lengths", "room", "given", "message"),
    [
        (
            (40, 80), Room(96, 96), 57,
            r"rollout_max_new_tokens \(57\) after a prompt of data.max_prompt_tokens \(40\) passes the models' "
            r"context of 96 tokens. Set it to at most 56, or data.max_prompt_tokens to at most 39\.$",
        ),
        ((40, 80), Room(96, 96), 96, r"context of 96 tokens. Set it to at most 56\.$"),
        (
            (96, 200), Room(96, 96), None,
            r"data.max_prompt_tokens \(96\) leaves no room for an answer in the models' context of 96 tokens. Set it "
            "to less",
        ),
        (
            (40, 80), Room(96, 24, separate=True), 25,
            r"^rollout_max_new_tokens \(25\) passes the decoder's context of 24 tokens. Set it to at most 24\.$",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit(lengths: tuple[int, int], room: Room, given: int | None, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        answer_room(Lengths(*lengths), room, given)


@given(st.none() | st.integers(1, 900), st.none() | st.integers(2, 900), CONTEXT)
def test_what_is_not_given_fits(prompt: int | None, total: int | None, context: int | None) -> None:
    room = Room(context, context)
    try:
        lengths = fit_lengths(prompt, total, room)
    except DrklError:
        assert prompt is not None and total is None and context is not None and prompt >= context
        return
    assert prompt in (None, lengths.max_prompt_tokens) and total in (None, lengths.max_tokens)
    if total is None and context is not None:
        assert lengths.max_prompt_tokens < lengths.max_tokens <= context
    if prompt is None:
        assert 1 <= lengths.max_prompt_tokens < lengths.max_tokens
        assert context is None or lengths.max_prompt_tokens < context


def test_a_prompt_that_leaves_no_room() -> None:
    message = (
        r"max_prompt_tokens \(128\) leaves no room .* context of 128 tokens\. Set data\.max_prompt_tokens to at most"
    )
    with pytest.raises(DrklError, match=message + " 127, or leave it out"):
        fit_lengths(128, None, Room(128, 128))


@given(CONTEXT, st.integers(1, 1999), st.booleans())
def test_an_answer_fits_after_the_shortest_prompt(context: int | None, prompt: int, separate: bool) -> None:
    prompt = prompt if context is None or separate else min(prompt, context - 1)
    room = Room(None if separate else context, context, separate)
    length = fit_answer(64, room, prompt)
    assert 1 <= length <= 64
    check_answer(length, room, prompt)
    if context is not None and not separate and prompt <= context // 2:
        assert length == max(1, min(64, context // 2)), "no shorter than half of the context where prompts are short"


@pytest.mark.parametrize(
    ("length", "room", "prompt", "message"),
    [
        (
            64,
            Room(100, 100),
            60,
            r"64 tokens after a prompt of 60 pass the models' context of 100 tokens\. Set it to at mo",
        ),
        (
            64,
            Room(100, 50, separate=True),
            60,
            r"64 tokens pass the models' context of 50 tokens\. Set it to at most 50",
        ),
        (
            1,
            Room(100, 100),
            100,
            r"A prompt of 100 tokens is too long for the models' context of 100 tokens\. Shorten it",
        ),
        (1, Room(100, 50, separate=True), 101, "A prompt of 101 tokens is too long for the models' context of 100"),
    ],
)
def test_answers_that_do_not_fit(length: int, room: Room, prompt: int, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        check_answer(length, room, prompt)


def test_a_section_knows_what_was_given() -> None:
    room = Room(100, 100)
    for given_values in (
        {},
        {"max_tokens": 90},
        {"max_prompt_tokens": 30},
        {"max_prompt_tokens": 30, "max_tokens": 90},
    ):
        config = DataConfig.model_validate({"path": "a", **given_values})
        assert config.given_lengths == given_values
        fitted = config.fitted(room)
        expected = fit_lengths(given_values.get("max_prompt_tokens"), given_values.get("max_tokens"), room)
        assert (fitted.max_prompt_tokens, fitted.max_tokens) == expected
        assert fitted.fitted(Room(7, 7)) == fitted, "what is written out counts as given"
    assert DataConfig(path="a", max_prompt_tokens=600).max_tokens == 856


def example(row_id: str, prompt: str, response: str) -> Example:
    return Example(row_id, ({"role": "user", "content": prompt}, {"role": "assistant", "content": response}))


@pytest.mark.parametrize(
    ("shortest", "room", "message"),
    [
        (13, Room(), "13 tokens; raise data.max_prompt_tokens (12)."),
        (30, Room(), "30 tokens; raise data.max_prompt_tokens (12) to at least 30 and data.max_tokens (20) above it."),
        (13, Room(40, 40), "13 tokens and the models' context is 40; raise data.max_prompt_tokens (12) to at least "
         "13, which leaves 27 for a response (rollout_max_new_tokens where it is sampled)."),
        (40, Room(40, 40), "40 tokens and the models' context is 40: no row fits. Shorten the prompts, or choose "
         "models with a longer context."),
        (40, Room(40, 9, separate=True), "40 tokens and the models' context is 40; raise data.max_prompt_tokens (12) "
         "to at least 40 and data.max_tokens (20) above it."),
    ],
)  # fmt: skip
def test_where_no_prompt_fits(shortest: int, room: Room, message: str) -> None:
    assert no_prompt_fits(shortest, Lengths(12, 20), room) == f" The shortest prompt has {message}"


def test_where_no_row_fits_the_context_and_the_shortest_prompt_are_named() -> None:
    rows = [example("a", "a b c a b c", "a"), example("b", "a b c", "a")]
    message = (
        r"None of the 2 rows can be used: 2 prompt longer than max_prompt_tokens\. The shortest prompt has 5 tokens "
    )
    for kind in ({"template": "plain"}, {"encoder_decoder": True}):
        with pytest.raises(DrklError, match=message + r"and the models' context is 4: no row fits"):
            rows_from(rows, build(), room=Room(4, 4, separate="encoder_decoder" in kind), **kind)
    tokenised = [{"input_ids": [5] * 6, "labels": [-100] * 5 + [5]}]
    with pytest.raises(DrklError, match=r"The shortest prompt has 5 tokens and the models' context is 5: no row fits"):
        rows_from(tokenised, build(), room=Room(5, 5))


def test_rows_fit_the_context() -> None:
    rows = [example(str(n), " ".join("a" * n), " ".join("b" * m)) for n in range(1, 12) for m in (1, 5, 12)]
    for context in (4, 9, 16, 60):
        found, report = rows_from(rows, build(), template="plain", room=Room(context, context))
        fitting = [row for row in rows if 2 * len(row.prompt_text.split()) - 1 < context]
        assert [row.id for row in found] == [row.id for row in fitting]
        assert max(row.length for row in found) <= context
        assert report.dropped.get("prompt_too_long", 0) == len(rows) - len(fitting)
    texts = [Example("t", ({"role": "assistant", "content": "a b c " * 30},))]
    blocks, _ = rows_from(texts, build(), room=Room(16, 16))
    assert max(len(row.all_ids) for row in blocks) == 16


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(4, 20))
def test_blocks_are_the_texts_one_after_another(sizes: list[int], context: int) -> None:
    tokenizer = build()
    texts = [" ".join("abc"[(n + k) % 3] for k in range(size)) for n, size in enumerate(sizes)]
    examples = [Example(str(n), ({"role": "assistant", "content": text},)) for n, text in enumerate(texts)]
    blocks, _ = rows_from(examples, tokenizer, room=Room(context, context))
    stream = [tokenizer.bos_token_id]
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    step = context - 1
    expected = [stream[start : start + context] for start in range(0, len(stream) - 1, step)]
    assert [list(row.all_ids) for row in blocks] == expected


def test_a_target_fits_the_decoder_and_a_source_the_encoder() -> None:
    rows = [example(str(n), " ".join("a" * n), " ".join("b" * n)) for n in range(1, 12)]
    room = Room(13, 8, separate=True)
    found, report = rows_from(rows, like_t5(), encoder_decoder=True, room=room)
    assert [(len(row.prompt_ids), len(row.response_ids)) for row in found] == [
        (2 * n, min(2 * n, 8)) for n in range(1, 7)
    ]
    assert report == DropReport(kept=6, dropped={"prompt_too_long": 5}, responses_cut=2)
    tokenised = [{"input_ids": [5] * 13, "labels": [6] * 9}, {"input_ids": [5] * 14, "labels": [6]}]
    (row,), report = rows_from(tokenised, like_t5(), encoder_decoder=True, room=room)
    assert (len(row.prompt_ids), len(row.response_ids)) == (13, 8)
    assert report == DropReport(kept=1, dropped={"prompt_too_long": 1}, responses_cut=1)
