import pytest

from drkl.display import clean
from drkl.reporting.text import clip, count, duration, magnitude, number, percent, short


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\x00b", "a␀b"),
        ("\x1b[31m", "␛[31m"),
        ("lone \ud800 surrogate", "lone [U+D800] surrogate"),
        ("\u202egnp.exe", "[U+202E]gnp.exe"),
        ("\x85", "[U+0085]"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("שלום \u200f tab\there 😀", "שלום \u200f tab\there 😀"),
    ],
)
def test_clean_makes_visible_what_a_page_cannot_hold(raw: str, shown: str) -> None:
    assert clean(raw) == shown
    assert clean(raw).encode("utf-8")


def test_clip_counts_what_it_leaves_out() -> None:
    assert clip("x" * 10, 10).hidden == 0
    cut = clip("x" * 100_000, 1_500)
    assert (len(cut.text), cut.hidden) == (1_500, 98_500)


def test_short_gives_one_line() -> None:
    assert short("a\n  b") == "a b"
    assert short("x" * 100, 5) == "xxxx…"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(-0.5), "−0.50"),
        (number(-0.001), "0.00"),
        (number(0.28, signed=True), "+0.28"),
        (number(-0.0001, signed=True), "0.00"),
        (number(6821, 0), "6,821"),
        (number(None), "–"),
        (percent(0.353), "35.3\N{NO-BREAK SPACE}%"),
        (percent(None), "–"),
        (count(1, "row"), "1 row"),
        (count(2000, "row"), "2,000 rows"),
        (magnitude(134_515_008), "135M"),
        (magnitude(1_700_000_000), "1.7B"),
        (magnitude(12), "12"),
        (duration(826), "13 min 46 s"),
        (duration(59.6), "1 min 0 s"),
        (duration(7260), "2 h 1 min"),
    ],
)
def test_numbers_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected
