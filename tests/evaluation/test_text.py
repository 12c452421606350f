from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

import pytest
import sacrebleu

from drkl.evaluation import text

WORDS = "red blue green tall small cat dog sun".split()


def answers(rng: random.Random, count: int, length: int = 12) -> list[str]:
    return [" ".join(rng.choice(WORDS) for _ in range(length)) for _ in range(count)]


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + lcs(a[:-1], b[:-1])
    return max(lcs(a[:-1], b), lcs(a, b[:-1]))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    rng = random.Random(0)
    references = answers(rng, 4, 6)
    pools = [answers(rng, 3, 7) for _ in references]
    scores = [
        2 * lcs(a.split(), r.split()) / (len(a.split()) + len(r.split()))
        for pool, r in zip(pools, references, strict=True)
        for a in pool
    ]
    assert text.rouge_l(pools, references) == pytest.approx(100 * sum(scores) / 12)


def test_rouge_l_by_hand() -> None:
    # LCS "the cat the mat": 4 of 6 and of 5 words.
    assert text.rouge_l([["The cat sat on the mat"]], ["the cat, the big mat!"]) == pytest.approx(100 * 8 / 11)
    assert text.rouge_l([["dogs running"]], ["dog runs"]) == 100  # stems
    assert text.rouge_l([["", " \n", "?!", "dog"]], ["dog"]) == 25
    assert text.rouge_l([["dog"]], [""]) == 0
    assert text.rouge_l([], []) is None
    with pytest.raises(ValueError, match="shorter"):
        text.rouge_l([["a"], ["b"]], ["a"])


def test_distinct_counts_ngrams_of_a_prompts_answers() -> None:
    # 1-grams: a b . A -> a b . a ; c a: 4 different (a b . c) of 6. 2-grams: (a b) (b .) (. a), (c a): 4 of 4.
    assert text.distinct_n([["a b. A", "c a"]], 1) == pytest.approx(4 / 6)
    assert text.distinct_n([["a b. A", "c a"]], 2) == 1
    assert text.distinct_n([["x y x y"]], 2) == pytest.approx(2 / 3)
    # No 2-gram runs from one answer into the next.
    assert text.distinct_n([["x y", "x y"]], 2) == 0.5


def test_distinct_is_a_mean_over_prompts_and_leaves_out_those_without_ngrams() -> None:
    assert text.distinct_n([["a a"], ["a b"]], 1) == 0.75
    assert text.distinct_n([["a a"], ["", " "]], 1) == 0.5
    assert text.distinct_n([["a"], ["b"]], 2) is None
    assert text.distinct_n([], 1) is None


def test_distinct_of_equal_answers_falls_with_their_number() -> None:
    assert [text.distinct_n([["a b"] * k], 1) for k in (1, 2, 4)] == [1, 0.5, 0.25]


def bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """BLEU-4 from the paper's equations, effective order, a zero count smoothed to 1 / 2^i of one n-gram."""
    logs, smooth = [], 1.0
    for n in range(1, min(4, len(hypothesis)) + 1):
        grams = [tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1)]
        pools = [[tuple(r[i : i + n]) for i in range(len(r) - n + 1)] for r in references]
        hits = sum(min(grams.count(g), max(p.count(g) for p in pools)) for g in set(grams))
        if n == 1 and hits == 0:
            return 0.0
        if hits == 0:
            smooth *= 2
        logs.append(math.log(hits / len(grams) if hits else 1 / (smooth * len(grams))))
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    brevity = min(0.0, 1 - closest / len(hypothesis))
    return 100 * math.exp(brevity + sum(logs) / len(logs))


@pytest.mark.parametrize("length", [2, 5, 12])
def test_self_bleu_is_bleu_against_the_other_answers(length: int) -> None:
    rng = random.Random(length)
    pools = [answers(rng, 4, length), answers(rng, 2, length + 1)]
    means = []
    for pool in pools:
        scores = [bleu(a.split(), [b.split() for j, b in enumerate(pool) if j != i]) for i, a in enumerate(pool)]
        means.append(sum(scores) / len(scores))
    assert text.self_bleu(pools) == pytest.approx(sum(means) / 2, abs=1e-9)


def test_self_bleu_agrees_with_nltk_where_nothing_is_smoothed() -> None:
    translate = pytest.importorskip("nltk.translate.bleu_score")
    pool = ["the cat sat on the mat today", "the cat sat on the mat again", "a cat sat on the mat today"]
    words = [answer.split() for answer in pool]
    scores = [translate.sentence_bleu([*words[:i], *words[i + 1 :]], words[i]) for i in range(3)]
    assert text.self_bleu([pool]) == pytest.approx(100 * sum(scores) / 3)


def test_an_answer_is_never_among_its_own_references() -> None:
    pool = ["red blue green tall", "cat dog sun small"]
    assert text.self_bleu([pool]) == 0  # would be 100 with itself among them
    assert text.self_bleu([["red blue green tall"] * 2]) == 100
    # Equal answers of one prompt are each other's references; those of another prompt are not.
    assert text.self_bleu([[pool[0], pool[1]], [pool[0], pool[1]]]) == 0


def test_self_bleu_of_one_answer_is_nothing() -> None:
    assert text.self_bleu([["a b c"], ["d"]]) is None
    assert text.self_bleu([]) is None
    assert text.self_bleu([["a b c"], ["d e", "d e"]]) == 100


def test_self_bleu_of_empty_answers() -> None:
    assert text.self_bleu([["", " \n"]]) == 100
    assert text.self_bleu([["", "red blue"]]) == 0
    assert text.self_bleu([["", "red blue", "red blue"]]) == pytest.approx(200 / 3)


def test_more_alike_answers_score_higher_and_less_distinct() -> None:
    rng = random.Random(3)
    alike = [["red blue green tall cat dog " + extra for extra in answers(rng, 4, 2)]]
    varied = [answers(rng, 4, 8)]
    assert text.self_bleu(alike) > text.self_bleu(varied)
    assert text.distinct_n(alike, 2) < text.distinct_n(varied, 2)


def test_tokens_are_those_of_sacrebleus_13a() -> None:
    odd = "Don't stop, U.S. costs $3.50 & more—“quoted” (yes)!  Ünïcode\n中文 &amp; 1,000"
    signature = sacrebleu.BLEU(tokenize="13a")
    assert text.tokens(odd) == signature.tokenizer(odd).split()
    assert text.tokens("Hi, there.") == ["Hi", ",", "there", "."]


@pytest.mark.parametrize(
    "odd", ["\x00", "\u202e abc", "<script>", "😀" * 30, "a" * 10_000, "\ufffd", "| % {", "\u2028"]
)
def test_odd_text_gives_finite_numbers(odd: str) -> None:
    pools = [[odd, "plain words here", odd]]
    values = [text.rouge_l(pools, ["plain words"]), text.distinct_n(pools, 1), text.self_bleu(pools)]
    assert all(value is not None and 0 <= value <= 100 for value in values)


def test_docstrings_state_the_setup() -> None:
    assert re.search("13a", text.self_bleu.__doc__ or "") and re.search("13a", text.distinct_n.__doc__ or "")
