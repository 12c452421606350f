"""Metrics of sampled answers, against sacrebleu, rouge-score, nltk, brute force and numbers worked by hand."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.util import ngrams
from rouge_score.rouge_scorer import RougeScorer

from drkl.evaluation import text
from drkl.evaluation.answers import Answer, AnswerTable
from drkl.evaluation.declared import ANSWER_KEYS, TEACHER_NLL

WORDS = "red blue green tall small cat dogs running sun the a".split()
NO_INTERVAL = {"num_answers", "distinct_1_corpus", "distinct_2_corpus", "distinct_3_corpus", TEACHER_NLL}
"""Of answers that no teacher read."""
Prompt = tuple[list[str], list[str]]


def table(*prompts: tuple[Sequence[str], Sequence[str]]) -> AnswerTable:
    """Of (references, texts) of each prompt."""
    made = AnswerTable()
    for references, texts in prompts:
        made.update(references, [Answer(one, len(one.split()) + 1, len(one) % 2 == 0) for one in texts])
    return made


def value(key: str, *pools: Sequence[str], references: Sequence[str] = ("the cat",)) -> float | None:
    return table(*((references, pool) for pool in pools)).compute()[key]


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def some_prompts(seed: int, count: int = 6, most: int = 4) -> list[Prompt]:
    """Pools and references of different sizes; now and then an empty answer, and one said twice."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        answers = [sentence(rng, rng.choice([0, 1, 3, 8, 14])) for _ in range(rng.randint(1, most))]
        references = [sentence(rng, rng.randint(1, 12)) for _ in range(rng.randint(1, 3))]
        prompts.append((references, [*answers, answers[0]] if rng.random() < 0.5 else answers))
    return prompts


def flat(prompts: Sequence[Prompt]) -> list[tuple[list[str], str]]:
    return [(references, one) for references, texts in prompts for one in texts]


# Likeness to the references.


@pytest.mark.parametrize("seed", range(3))
def test_rouge_is_rouge_scores_best_reference_of_each_answer(seed: int) -> None:
    prompts = some_prompts(seed)
    scorer = RougeScorer(["rougeL", "rouge1", "rouge2"], use_stemmer=True)
    found = table(*prompts).compute()
    for key, name in {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}.items():
        pools = [
            [max(100 * scorer.score(reference, one)[name].fmeasure for reference in references) for one in texts]
            for references, texts in prompts
        ]
        assert found[key] == pytest.approx(np.mean([score for pool in pools for score in pool]), rel=1e-14)
        assert found[f"{key}_best"] == pytest.approx(np.mean([max(pool) for pool in pools]), rel=1e-14)


def test_each_rouge_has_its_own_best_reference() -> None:
    # ROUGE-1 prefers the same words in another order, ROUGE-2 and -L the shorter one in the same order.
    found = table((["d c b a", "a b"], ["a b c d"])).compute()
    assert (found["rouge_1"], found["rouge_2"]) == (100, 50)
    assert found["rouge_l"] == pytest.approx(100 * 4 / 6)


def test_rouge_by_hand() -> None:
    # LCS "the cat the mat": 4 of 6 and of 5 words.
    assert value("rouge_l", ["The cat sat on the mat"], references=["the cat, the big mat!"]) == pytest.approx(800 / 11)
    assert value("rouge_l", ["dogs running"], references=["dog runs"]) == 100  # stems
    assert value("rouge_l", ["", " \n", "?!", "dog"], references=["dog"]) == 25
    assert value("rouge_l_best", ["", " \n", "?!", "dog"], ["?"], references=["dog"]) == 50
    assert value("rouge_l", ["dog"], references=[""]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_are_sacrebleus_corpus_scores(seed: int) -> None:
    prompts = some_prompts(seed)
    lines = flat(prompts)
    hypotheses = [one for _, one in lines]
    most = max(len(references) for references, _ in lines)
    streams = [[r[i] if i < len(r) else None for r, _ in lines] for i in range(most)]
    found = table(*prompts).compute()
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, streams).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, streams).score
    assert found["bleu"] > 0


def test_a_resample_of_bleu_is_the_bleu_of_the_resample() -> None:
    prompts = some_prompts(7)
    counts = [2, 0, 1, 3, 0, 1]
    drawn = [prompt for prompt, many in zip(prompts, counts, strict=True) for _ in range(many)]
    weighted = table(*prompts).metrics(np.array([counts, [1] * 6], dtype=float))
    for key in ("bleu", "chrf"):
        assert weighted[key].tolist() == [table(*drawn).compute()[key], table(*prompts).compute()[key]]


def test_prompts_without_a_reference_count_where_none_is_needed() -> None:
    with_one = (["the cat sat on the mat"], ["the cat sat on a mat", "dogs"])
    both, alone = table(with_one, ([], ["red blue", "red"])).compute(), table(with_one).compute()
    for key in ANSWER_KEYS:
        if key.startswith(("rouge", "bleu", "chrf")):
            assert both[key] == alone[key], key
    assert both["num_answers"] == 4 and both["distinct_1"] != alone["distinct_1"]
    unscored = table(([], ["red blue", "red"]))
    assert {key for key, one in unscored.compute().items() if one is None} == {
        *("bleu", "chrf", "distinct_3", "distinct_3_corpus", "repetition", TEACHER_NLL),
        *(f"rouge_{name}{best}" for name in "l12" for best in ("", "_best")),
    }
    assert unscored.coverage() == {"samples": [1, 2], "rouge_l_best": [None, None], "distinct_answers": [1, 2]}


def test_one_reference_is_a_list_of_one() -> None:
    with pytest.raises(AssertionError, match="one letter each"):
        AnswerTable().update("the cat", [Answer("a", 1, True)])


# Variety.


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_is_what_nltks_ngrams_count(n: int) -> None:
    prompts = some_prompts(n)
    grams = [[gram for one in texts for gram in ngrams(one.split(), n)] for _, texts in prompts]
    found = table(*prompts).compute()
    shares = [len(set(pool)) / len(pool) for pool in grams if pool]
    assert found[f"distinct_{n}"] == pytest.approx(np.mean(shares), rel=1e-14)
    everything = [gram for pool in grams for gram in pool]
    assert found[f"distinct_{n}_corpus"] == len(set(everything)) / len(everything)


def test_distinct_by_hand() -> None:
    # 1-grams: a b . a ; c a: 4 different (a b . c) of 6. 2-grams: (a b) (b .) (. a), (c a): 4 of 4.
    assert value("distinct_1", ["a b. A", "c a"]) == pytest.approx(4 / 6)
    assert value("distinct_2", ["a b. A", "c a"]) == 1
    assert value("distinct_2", ["x y x y"]) == pytest.approx(2 / 3)
    # No 2-gram runs from one answer into the next, nor from one prompt into the next.
    assert value("distinct_2", ["x y", "x y"]) == 0.5
    assert value("distinct_2_corpus", ["x y"], ["x y"]) == 0.5


def test_distinct_is_a_mean_over_prompts_and_leaves_out_those_without_ngrams() -> None:
    assert value("distinct_1", ["a a"], ["a b"]) == 0.75
    assert value("distinct_1", ["a a"], ["", " "]) == 0.5
    assert value("distinct_2", ["a"], ["b"]) is None
    assert value("distinct_2_corpus", ["a"], ["b"]) is None


def test_distinct_of_equal_answers_falls_with_their_number() -> None:
    assert [value("distinct_1", ["a b"] * k) for k in (1, 2, 4)] == [1, 0.5, 0.25]
    assert [value("distinct_answers", ["a b"] * k) for k in (1, 2, 4)] == [1, 0.5, 0.25]


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
    pools = [[sentence(rng, length) for _ in range(4)], [sentence(rng, length + many) for many in (0, 1)]]
    means: dict[str, list[float]] = {"equations": [], "sacrebleu": [], "nltk": []}
    smoothing = SmoothingFunction().method3
    for pool in pools:
        scores: dict[str, list[float]] = {name: [] for name in means}
        for i, one in enumerate(pool):
            others = pool[:i] + pool[i + 1 :]
            words, other_words = one.split(), [other.split() for other in others]
            scores["equations"].append(bleu(words, other_words))
            scores["sacrebleu"].append(sacrebleu.sentence_bleu(one, others).score)
            if length > 3:  # nltk has no effective order
                scores["nltk"].append(100 * sentence_bleu(other_words, words, smoothing_function=smoothing))
        for name, found in scores.items():
            means[name].append(float(np.mean(found)) if found else math.nan)
    for name, each in means.items():
        if name != "nltk" or length > 3:
            assert value("self_bleu", *pools) == pytest.approx(np.mean(each), rel=1e-12), name


def test_an_answer_is_never_among_its_own_references() -> None:
    pool = ["red blue green tall", "cat dog sun small"]
    assert value("self_bleu", pool) == 0  # would be 100 with itself among them
    assert value("self_bleu", ["red blue green tall"] * 3) == 100
    # Equal answers of one prompt are each other's references; those of another prompt are not.
    assert value("self_bleu", pool, pool) == 0


def test_self_bleu_of_one_answer_is_nothing() -> None:
    assert value("self_bleu", ["a b c"], ["d"]) is None
    assert value("self_bleu", ["a b c"], ["d e", "d e"]) == 100


def test_self_bleu_of_empty_answers() -> None:
    assert value("self_bleu", ["", " \n"]) == 100
    assert value("self_bleu", ["", "red blue"]) == 0
    assert value("self_bleu", ["", "red blue", "red blue"]) == pytest.approx(200 / 3)


def test_more_alike_answers_score_higher_and_less_distinct() -> None:
    rng = random.Random(3)
    alike = table((["x"], ["red blue green tall cat dog " + sentence(rng, 2) for _ in range(4)])).compute()
    varied = table((["x"], [sentence(rng, 8) for _ in range(4)])).compute()
    assert alike["self_bleu"] > varied["self_bleu"]
    assert alike["distinct_2"] < varied["distinct_2"]


def test_repetition_lengths_and_ends_by_hand() -> None:
    assert value("repetition", ["a b c d"]) == 0
    assert value("repetition", ["A a. a a a, a a"]) == 0  # a a . a | a . a a | . a a a | a a a , | a a , a | a , a a
    assert value("repetition", ["a a a a a"]) == 0.5
    assert value("repetition", ["a b c d a b c d a b c d"]) == pytest.approx(5 / 9)
    assert value("repetition", ["a a a", "a a a a a"], ["b c d e"]) == 0.25  # over answers; those without are left out
    assert value("repetition", ["a b", ""]) is None
    answers = AnswerTable()
    answers.update(["x"], [Answer("x", 3, True)])
    answers.update(["x"], [Answer("x", 8, False), Answer("y", 10, True), Answer("y", 3, True)])
    found = answers.compute()
    assert (found["answer_tokens"], found["ended"], found["num_answers"]) == (6, 0.75, 4)
    assert found["distinct_answers"] == pytest.approx((1 + 2 / 3) / 2)  # over prompts


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=4, max_size=4), min_size=1, max_size=5))
def test_different_answers_of_four(pools: list[list[str]]) -> None:
    shares = [sum(one not in pool[:place] for place, one in enumerate(pool)) / 4 for pool in pools]
    answers = table(*((["x"], pool) for pool in pools))
    assert answers.compute()["distinct_answers"] == pytest.approx(np.mean(shares), rel=1e-12)
    weights = np.arange(1.0, len(pools) + 1)[None]
    found = answers.metrics(weights)["distinct_answers"]
    assert found == pytest.approx(np.average(shares, weights=weights[0]), rel=1e-12)
    assert value("distinct_answers", ["a", "A", "a ", "a"]) == 0.75  # as texts: case and blanks count


def judged(*nll: float | None, tokens: int = 2) -> list[Answer]:
    return [Answer("x", tokens, True, teacher_nll=one) for one in nll]


def test_the_teachers_likelihood_is_a_mean_over_tokens() -> None:
    answers = AnswerTable()
    answers.update(["x"], [*judged(3.0), *judged(5.0, tokens=10)])
    answers.update(["x"], judged(1.0, None))
    assert answers.compute()[TEACHER_NLL] == 9 / 14  # the answer that was not read does not count
    assert answers.metrics(np.array([[1.0, 0.0], [2.0, 1.0]]))[TEACHER_NLL].tolist() == [8 / 12, 17 / 26]
    answers.update(["x"], judged(math.inf))
    assert answers.compute()[TEACHER_NLL] == math.inf
    assert answers.metrics(np.array([[1.0, 1.0, 0.0]]))[TEACHER_NLL].tolist() == [9 / 14]
    assert TEACHER_NLL not in table((["x"], ["x"])).metrics(np.ones((1, 1)))


# Coverage.


@pytest.mark.parametrize("seed", range(3))
def test_coverage_is_the_mean_over_all_subsets(seed: int) -> None:
    prompts = [prompt for prompt in some_prompts(seed, count=12, most=5) if len(prompt[1]) > 1]
    found = table(*prompts).coverage()
    assert found is not None
    assert found["samples"] == list(range(1, min(len(texts) for _, texts in prompts) + 1))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for k in found["samples"]:
        best, different = [], []
        for references, texts in prompts:
            scores = [max(scorer.score(r, one)["rougeL"].fmeasure for r in references) for one in texts]
            subsets = list(itertools.combinations(range(len(texts)), k))
            best.append(np.mean([max(scores[i] for i in subset) for subset in subsets]))
            different.append(np.mean([len({texts[i] for i in subset}) for subset in subsets]))
        assert found["rouge_l_best"][k - 1] == pytest.approx(100 * np.mean(best), rel=1e-12)
        assert found["distinct_answers"][k - 1] == pytest.approx(np.mean(different), rel=1e-12)


def test_coverage_ends_where_the_table_stands() -> None:
    answers = table((["the cat"], ["the cat", "a cat", "a cat"]), (["red"], ["blue", "sun", "dogs"]))
    coverage, found = answers.coverage(), answers.compute()
    assert coverage is not None
    assert coverage["rouge_l_best"][0] == pytest.approx(found["rouge_l"])
    assert coverage["rouge_l_best"][-1] == pytest.approx(found["rouge_l_best"])
    assert coverage["distinct_answers"] == pytest.approx([1, (5 / 3 + 2) / 2, 2.5])
    assert coverage["distinct_answers"][-1] == pytest.approx(3 * found["distinct_answers"])


def test_coverage_of_a_pool_too_large_to_list() -> None:
    found = table((["red"], ["red"] + ["blue"] * 59)).coverage()
    assert found is not None
    assert found["rouge_l_best"] == pytest.approx([100 * k / 60 for k in range(1, 61)])
    assert found["distinct_answers"] == pytest.approx([1, *(1 + k / 60 for k in range(2, 61))])


# The table.

some_text = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), st.text(max_size=20), st.sampled_from(["", "  ", "?!"])
)
some_prompt = st.tuples(st.lists(some_text, max_size=2), st.lists(some_text, max_size=4))
some_tables = st.lists(some_prompt, max_size=4)


def close(one: float | None, other: float | None) -> bool:
    return one is other is None or math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-12)


def assert_same(one: AnswerTable, other: AnswerTable) -> None:
    ours, theirs = one.compute(), other.compute()
    assert list(ours) == list(theirs) == list(ANSWER_KEYS)
    for key in ANSWER_KEYS:
        assert close(ours[key], theirs[key]), key
    ours_, theirs_ = one.coverage(), other.coverage()
    assert (ours_ and ours_["samples"]) == (theirs_ and theirs_["samples"])
    for key in ours_ or {}:
        assert all(map(close, ours_[key], theirs_[key])), key


@settings(max_examples=25, deadline=None)
@given(some_tables, some_tables, some_tables)
def test_merging_is_associative_and_the_order_of_prompts_does_not_matter(a: Any, b: Any, c: Any) -> None:
    whole, left, right, turned = table(*a, *b, *c), table(*a), table(*b), table(*reversed([*a, *b, *c]))
    left.merge(table(*b))
    left.merge(table(*c))
    right.merge(table(*c))
    outer = table(*a)
    outer.merge(right)
    assert left.pools == outer.pools == whole.pools
    assert_same(whole, turned)


@settings(max_examples=25, deadline=None)
@given(some_tables)
def test_weights_of_ones_are_the_table_and_of_twos_the_table_twice(prompts: Any) -> None:
    answers, twice = table(*prompts), table(*prompts, *prompts)
    found = answers.compute()
    weighted = answers.metrics(np.ones((1, len(prompts))))
    assert set(ANSWER_KEYS) - set(weighted) == NO_INTERVAL
    for key, ones in weighted.items():
        assert ones.shape == (1,)
        assert np.isnan(ones[0]) if found[key] is None else ones[0] == found[key], key
    twos, doubled = answers.metrics(np.full((3, len(prompts)), 2.0)), twice.compute()
    for key in weighted:
        for one in twos[key]:
            assert np.isnan(one) if doubled[key] is None else one == pytest.approx(doubled[key], rel=1e-12), key


@settings(max_examples=25, deadline=None)
@given(some_tables)
def test_every_number_is_none_or_within_its_range(prompts: Any) -> None:
    for key, one in table(*prompts).compute().items():
        if one is None:
            continue
        most = 100 if key.startswith(("rouge", "bleu", "chrf", "self")) else math.inf if "tokens" in key else 1
        assert 0 <= one <= (math.inf if key == "num_answers" else most * (1 + 1e-12)), key


@pytest.mark.parametrize(
    "odd", ["\x00", "\u202e abc", "<script>", "😀" * 30, "a" * 10_000, "\ufffd", "| % {", "\u2028", "\ud800"]
)
def test_odd_text_gives_finite_numbers(odd: str) -> None:
    found = table((["plain words", odd], [odd, "plain words here", odd])).compute()
    for key in ("rouge_l", "bleu", "chrf", "distinct_1", "self_bleu"):
        one = found[key]
        assert one is not None and 0 <= one <= 100 + 1e-9, key


def test_an_empty_table_has_no_numbers() -> None:
    empty = AnswerTable()
    assert empty.compute() == {key: 0 if key == "num_answers" else None for key in ANSWER_KEYS}
    assert empty.coverage() is None and empty.intervals(0) == {}
    without_answers = table((["the cat"], []))
    assert without_answers.compute() == empty.compute()
    assert without_answers.coverage() is None and without_answers.intervals(0) == {}
    assert table((["the cat"], []), (["the cat"], ["the"])).coverage() is None


def test_intervals_hold_the_value_and_are_of_what_has_one() -> None:
    answers = table(*some_prompts(5, count=30))
    found, intervals = answers.compute(), answers.intervals(1)
    assert set(intervals) == set(ANSWER_KEYS) - NO_INTERVAL
    for key, (low, high) in intervals.items():
        assert low < found[key] < high or low == found[key] == high == 0, key
    assert intervals == answers.intervals(1) != answers.intervals(2)


def test_the_corpus_share_of_resamples_would_miss_its_own_value() -> None:
    prompts = some_prompts(5, count=20)
    rng = random.Random(0)
    resampled = [table(*rng.choices(prompts, k=20)).compute()["distinct_3_corpus"] for _ in range(20)]
    assert max(resampled) < table(*prompts).compute()["distinct_3_corpus"]


def test_a_table_survives_a_trip_between_processes() -> None:
    answers = table(*some_prompts(2))
    assert_same(answers, pickle.loads(pickle.dumps(answers)))


# samples.jsonl.


def line(prompt_id: str, sample: int, answer: str, **more: Any) -> dict[str, Any]:
    return {
        **{"model": "after", "prompt_id": prompt_id, "prompt": "?", "sampling_temperature": 1.0, "sample": sample},
        **{"text": answer, "reference": "the cat", "num_tokens": 4, **more},
    }


def test_a_table_of_samples_is_that_of_the_answers() -> None:
    lines = [
        line("b", 1, "a cat sat", num_tokens=5),
        line("a", 0, "dogs", reference=["dogs", "the sun"]),
        line("b", 0, "the cat"),
        line("a", 1, "red", reference=["dogs", "the sun"], num_tokens=5, ended=True),
        line("a", 0, "blue", suite="dolly", reference=None),
        line("a", 0, "sun", suite="vicuna", reference=[], ended=False),
        line("c", 0, "small", reference=""),
    ]
    direct = AnswerTable()
    direct.update(["the cat"], [Answer("the cat", 4, True), Answer("a cat sat", 5, False)])
    direct.update(["dogs", "the sun"], [Answer("dogs", 4, True), Answer("red", 5, True)])
    direct.update([], [Answer("blue", 4, True)])
    direct.update([], [Answer("sun", 4, False)])
    direct.update([""], [Answer("small", 4, True)])
    read = AnswerTable.from_samples(json.loads(json.dumps(lines)), max_new_tokens=5)
    assert read.pools == direct.pools
    assert read.compute() == direct.compute()


def test_samples_of_several_seeds_are_one_pool() -> None:
    lines = [line("a", sample, f"{seed} {sample}", seed=seed) for seed in (20, 10) for sample in (1, 0)]
    kept = copy.deepcopy(lines)
    (pool,) = AnswerTable.from_samples(lines, 5).pools
    assert pool.words == [["10", "0"], ["10", "1"], ["20", "0"], ["20", "1"]]
    assert lines == kept


def test_samples_of_two_models_or_temperatures_are_not_mixed() -> None:
    for other in ({"model": "teacher"}, {"sampling_temperature": 0.5}):
        with pytest.raises(AssertionError, match="one model at one sampling temperature"):
            AnswerTable.from_samples([line("a", 0, "x"), line("a", 1, "y", **other)], 5)
    assert len(AnswerTable.from_samples([], 5)) == 0


# The words.


def test_tokens_are_those_of_sacrebleus_13a() -> None:
    odd = "Don't stop, U.S. costs $3.50 & more—“quoted” (yes)!  Ünïcode\n中文 &amp; 1,000"
    assert text.tokens(odd) == sacrebleu.BLEU(tokenize="13a").tokenizer(odd).split()
    assert text.tokens("Hi, there.") == ["Hi", ",", "there", "."]
