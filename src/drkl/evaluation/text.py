"""Text metrics of the answers to one prompt: similarity to its references, and variety among themselves."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

Words = Sequence[str]

ROUGE = {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}
"""Our name and rouge-score's name of each ROUGE."""


def tokens(text: str) -> list[str]:
    """The words and punctuation marks of a text, as sacrebleu's 13a tokenizer splits it."""
    return str(_corpus_bleu()._preprocess_segment(text)).split()


def ngrams(words: Words, n: int) -> Iterator[tuple[str, ...]]:
    """Every run of ``n`` words, in order."""
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def rouge(references: Sequence[str], text: str) -> dict[str, float]:
    """ROUGE-L, -1 and -2 of an answer, 0 to 100, each against the reference that is best for it.

    F-measures of stemmed, lower-cased words (package ``rouge-score``, ``use_stemmer=True``). An answer without a word
    scores 0.

    >>> rouge(["a cat sat", "the cat sits"], "the cat sat")["rouge_2"]
    50.0
    """
    scores = _rouge_scorer().score_multi(references, text)
    return {key: 100 * float(scores[name].fmeasure) for key, name in ROUGE.items()}


def bleu_statistics(references: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Sufficient statistics of corpus BLEU (lengths, matched n-grams, all n-grams), summed over one prompt's answers.

    Package ``sacrebleu``: 13a tokenizer, case kept, order 4. Zeros where there is no reference or no answer.
    """
    metric = _corpus_bleu()
    return _summed(metric, references, texts, 2 + 2 * metric.max_ngram_order)


def bleu(statistics_: Sequence[float]) -> float:
    """Corpus BLEU of summed ``bleu_statistics``, 0 to 100; exponential smoothing.

    >>> round(bleu(bleu_statistics(["a cat sat on the mat"], ["a cat sat on the mat", "a dog sat"])), 1)
    60.5
    """
    return float(_corpus_bleu()._compute_score_from_stats(list(statistics_)).score)


def chrf_statistics(references: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Sufficient statistics of corpus chrF (character n-grams of answer, reference, both), summed as for BLEU."""
    metric = _chrf()
    return _summed(metric, references, texts, 3 * metric.order)


def chrf(statistics_: Sequence[float]) -> float:
    """Corpus chrF2 of summed ``chrf_statistics``, 0 to 100."""
    return float(_chrf()._compute_score_from_stats(list(statistics_)).score)


def pool_distinct(pool: Iterable[Words], n: int) -> float | None:
    """Share of different n-grams among all n-grams of the answers, 0 to 1; n-grams do not run across answers.

    ``pool`` holds each answer's words: ``tokens(text.lower())``. None where no answer holds an n-gram.

    >>> pool_distinct([["a", "b", "a"], ["a", "b"]], 1), pool_distinct([["a", "b", "a"], ["a", "b"]], 2)
    (0.4, 0.6666666666666666)
    """
    counts = Counter(gram for words in pool for gram in ngrams(words, n))
    return len(counts) / counts.total() if counts else None


def repetition(words: Words, n: int = 4) -> float | None:
    """Share of an answer's n-grams that it has had before, 0 to 1; None for fewer than n words.

    >>> repetition("to be or not to be or not".split())
    0.2
    """
    grams = list(ngrams(words, n))
    return (len(grams) - len(set(grams))) / len(grams) if grams else None


def pool_self_bleu(pool: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each answer against the other answers, 0 to 100; lower is more varied.

    Package ``sacrebleu``: sentence BLEU, 13a tokenizer, case kept, exponential smoothing, effective order. An answer is
    never among its own references; other answers of the same words are. An answer without a token scores 100 if
    another one has none either (they are the same), else 0. None for fewer than two answers.

    >>> pool_self_bleu(["the same answer", "the same answer"])
    100.0
    """
    if len(pool) < 2:
        return None
    return statistics.fmean(_bleu_against(text, [*pool[:i], *pool[i + 1 :]]) for i, text in enumerate(pool))


def _bleu_against(text: str, others: list[str]) -> float:
    if not tokens(text):
        return 100.0 if any(not tokens(other) for other in others) else 0.0
    written = [other for other in others if tokens(other)]
    # Rounding leaves 100.00000000000004 for two equal texts.
    return min(100.0, float(_sentence_bleu().sentence_score(text, written).score)) if written else 0.0


def _summed(metric: Any, references: Sequence[str], texts: Sequence[str], size: int) -> list[int]:
    if not references or not texts:
        return [0] * size
    # sacrebleu's own steps of `corpus_score`; the references' n-grams are made once for all the answers.
    ours = metric._cache_references([[reference] for reference in references])[0]
    statistics = [metric._compute_segment_statistics(metric._preprocess_segment(text), ours) for text in texts]
    return [sum(column) for column in zip(*statistics, strict=True)]


# Loaded on first use: these packages bring nltk and the like with them.
@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    class Tokenizer:
        # Stemming is slow, and a reference is met again with every answer.
        tokenize = staticmethod(lru_cache(64)(DefaultTokenizer(use_stemmer=True).tokenize))

    return RougeScorer(list(ROUGE.values()), tokenizer=Tokenizer)


@cache
def _corpus_bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="13a", lowercase=False, smooth_method="exp", max_ngram_order=4)


@cache
def _sentence_bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="13a", lowercase=False, smooth_method="exp", effective_order=True, max_ngram_order=4)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
