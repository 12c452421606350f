"""Metrics of generated text: likeness to a reference, and variety among the answers to one prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

Pools = Sequence[Sequence[str]]


def rouge_l(pools: Pools, references: Sequence[str]) -> float | None:
    """Mean ROUGE-L of all answers against their prompt's reference, 0 to 100; None without answers.

    F-measure of the longest common subsequence of stemmed, lower-cased words (package ``rouge-score``,
    ``use_stemmer=True``). An answer without a word scores 0.

    >>> rouge_l([["the cat sat", "a dog"]], ["the cat sat"])
    50.0
    """
    scorer = _rouge_scorer()
    return _mean(
        100 * float(scorer.score(reference, text)["rougeL"].fmeasure)
        for pool, reference in zip(pools, references, strict=True)
        for text in pool
    )


def distinct_n(pools: Pools, n: int) -> float | None:
    """Share of different n-grams among all n-grams of a prompt's answers, 0 to 1, mean over prompts.

    Tokens are those of sacrebleu's 13a tokenizer, lower-cased; n-grams do not run across answers. A prompt whose
    answers hold no n-gram at all has no share and is left out; None where that is every prompt.

    >>> distinct_n([["a b a", "a b"]], 1), distinct_n([["a b a", "a b"]], 2)
    (0.4, 0.6666666666666666)
    """
    shares = []
    for pool in pools:
        grams = [gram for text in pool for gram in _ngrams(tokens(text.lower()), n)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return _mean(shares)


def self_bleu(pools: Pools) -> float | None:
    """Mean BLEU-4 of each answer against the other answers to its prompt, 0 to 100; lower is more varied.

    Package ``sacrebleu``: sentence BLEU, 13a tokenizer, case kept, exponential smoothing, effective order. An answer is
    never among its own references; other answers of the same words are. An answer without a token scores 100 if
    another one has none either (they are the same), else 0. A prompt with fewer than two answers is left out; None
    where that is every prompt.

    >>> self_bleu([["the same answer", "the same answer"]])
    100.0
    """
    pool_means = []
    for pool in pools:
        if len(pool) < 2:
            continue
        scores = [_bleu_against(text, [*pool[:i], *pool[i + 1 :]]) for i, text in enumerate(pool)]
        pool_means.append(statistics.fmean(scores))
    return _mean(pool_means)


def tokens(text: str) -> list[str]:
    """The words and marks of a text as sacrebleu's 13a tokenizer splits them."""
    return str(_tokenizer()(text)).split()


def _bleu_against(text: str, others: list[str]) -> float:
    if not tokens(text):
        return 100.0 if any(not tokens(other) for other in others) else 0.0
    written = [other for other in others if tokens(other)]
    # Rounding leaves 100.00000000000004 for two equal texts.
    return min(100.0, float(_bleu().sentence_score(text, written).score)) if written else 0.0


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _mean(values: Any) -> float | None:
    numbers = list(values)
    return statistics.fmean(numbers) if numbers else None


# Loaded on first use: these packages bring nltk and the like with them.
@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="13a", lowercase=False, smooth_method="exp", effective_order=True, max_ngram_order=4)


@cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()
