"""Metrics of sampled answers, as functions of how often each prompt counts."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from drkl.evaluation import text
from drkl.evaluation.bootstrap import Interval, Resampled
from drkl.evaluation.calibration import weighted_sums
from drkl.evaluation.declared import ANSWER_KEYS, TEACHER_NLL

ORDERS = (1, 2, 3)
"""The n of Distinct-n."""
_CORPUS_SCORES = {"bleu": text.bleu, "chrf": text.chrf}
_OF_ALL = ("num_answers", *(f"distinct_{n}_corpus" for n in ORDERS))
_MEANS = tuple(key for key in ANSWER_KEYS if key not in (*_CORPUS_SCORES, *_OF_ALL, TEACHER_NLL))


class Answer(NamedTuple):
    """One generated answer: its text, how many tokens it took, and whether it ended before it was cut."""

    text: str
    num_tokens: int
    ended: bool
    token_ids: tuple[int, ...] = ()
    """The tokens, where they are known."""
    teacher_nll: float | None = None
    """-log p of all its tokens by the teacher, in nats; None where the teacher did not read it."""


@dataclass(frozen=True)
class Pool:
    """The numbers of the answers to one prompt that metrics need."""

    num_answers: int
    means: Mapping[str, tuple[float, int]]
    """By metric: the prompt's sum, and the number of values in it (0 where the metric is not defined)."""
    bleu: Sequence[int]
    chrf: Sequence[int]
    rouge_l: Sequence[float]
    """ROUGE-L of each answer, ascending; empty without a reference."""
    copies: Sequence[int]
    """The number of times that each different text occurs."""
    words: Sequence[Sequence[str]]
    """The words of each answer, lower-cased."""
    teacher_nll: tuple[float, int] = (0.0, 0)
    """-log p of all answers by the teacher, and the number of their tokens; of those that it read."""


class AnswerTable:
    """The answers of one model at one sampling temperature, prompt by prompt.

    Metrics are weighted ratios of sums, or corpus scores of weighted sums of sufficient statistics; they are defined in
    ``declared``. A prompt for which a metric is not defined (no reference, one answer only, no n-gram) is left out of
    that metric.

    >>> table = AnswerTable()
    >>> table.update(["a cat"], [Answer("a cat", 3, True), Answer("a dog", 3, True)])
    >>> table.compute()["rouge_l"], table.coverage()["rouge_l_best"]
    (75.0, [75.0, 100.0])
    """

    def __init__(self) -> None:
        self.pools: list[Pool] = []

    def __len__(self) -> int:
        return len(self.pools)

    def update(self, references: Sequence[str], answers: Sequence[Answer]) -> None:
        """Add a prompt: its references (none, one or several) and the answers to it."""
        assert not isinstance(references, str), "a string would be taken for references of one letter each"
        texts = [answer.text for answer in answers]
        words = [[sys.intern(word) for word in text.tokens(answer.lower())] for answer in texts]
        copies = list(Counter(texts).values())
        rouge = [text.rouge(references, answer) for answer in texts] if references else []
        means = {
            "self_bleu": _defined([text.pool_self_bleu(texts)]),
            "distinct_answers": _defined([len(copies) / len(texts)] if texts else []),
            "repetition": _defined(map(text.repetition, words)),
            "answer_tokens": _defined(answer.num_tokens for answer in answers),
            "ended": _defined(answer.ended for answer in answers),
        }
        for key in text.ROUGE:
            scores = [score[key] for score in rouge]
            means[key] = _defined(scores)
            means[f"{key}_best"] = _defined([max(scores)] if scores else [])
        for n in ORDERS:
            means[f"distinct_{n}"] = _defined([text.pool_distinct(words, n)])
        self.pools.append(
            Pool(
                num_answers=len(answers),
                means=means,
                bleu=text.bleu_statistics(references, texts),
                chrf=text.chrf_statistics(references, texts),
                rouge_l=sorted(score["rouge_l"] for score in rouge),
                copies=copies,
                words=words,
                teacher_nll=_judged(answers),
            )
        )

    def merge(self, other: AnswerTable) -> None:
        """Add the prompts of another table after this one's."""
        self.pools.extend(other.pools)

    def compute(self) -> dict[str, float | None]:
        """Every metric of ``declared.ANSWER_KEYS``; None where no prompt defines it."""
        values = {key: float(value[0]) for key, value in self.metrics(np.ones((1, len(self)))).items()}
        table: dict[str, float | None] = {key: None if math.isnan(value) else value for key, value in values.items()}
        for n in ORDERS:
            everything = (words for pool in self.pools for words in pool.words)
            table[f"distinct_{n}_corpus"] = text.pool_distinct(everything, n)
        table["num_answers"] = sum(pool.num_answers for pool in self.pools)
        return {key: table.get(key) for key in ANSWER_KEYS}

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric, `[m]` by name, for each row of ``weights`` `[m, prompts]`: how often a prompt counts.

        NaN where none of the prompts that count defines it. Without what no teacher read. Without ``num_answers``,
        which is a size and no estimate, and without ``distinct_n_corpus``: a resample repeats prompts, a repeated
        prompt brings n-grams but no new ones, and so the share on resamples is biased low and its percentiles need
        not even hold the corpus's own.
        """
        assert weights.ndim == 2 and weights.shape[1] == len(self), "a weight for each prompt"
        if not self.pools:
            return {key: np.full(len(weights), np.nan) for key in (*_MEANS, *_CORPUS_SCORES)}
        shares = np.array([[pool.means[key] for key in _MEANS] for pool in self.pools], dtype=np.float64)
        totals, counts = (weights @ part for part in (shares[..., 0], shares[..., 1]))
        means = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
        out = dict(zip(_MEANS, means.T, strict=True))
        scored = counts[:, _MEANS.index("rouge_l")] > 0
        for key, score in _CORPUS_SCORES.items():
            sums = weights @ np.array([getattr(pool, key) for pool in self.pools], dtype=np.float64)
            scores = [score(row) if some else np.nan for row, some in zip(sums.tolist(), scored, strict=True)]
            out[key] = np.array(scores)
        judged = np.array([pool.teacher_nll for pool in self.pools], dtype=np.float64)
        if judged[:, 1].any():
            total, tokens = weighted_sums(weights, judged).T
            out[TEACHER_NLL] = np.divide(total, tokens, out=np.full_like(total, np.nan), where=tokens > 0)
        return out

    def intervals(self, seed: int) -> dict[str, Interval]:
        """95 % bootstrap intervals over the prompts, of the metrics that have one."""
        return Resampled.of(self.metrics, len(self), seed).intervals()

    def coverage(self) -> dict[str, list[Any]] | None:
        """Expected quality and variety of ``k`` of a prompt's answers, for ``k`` from 1 to the smallest pool.

        ``rouge_l_best`` is the expected ROUGE-L of the best of ``k`` answers drawn without replacement from the pool,
        ``distinct_answers`` the expected number of different texts among them, both as means over prompts: with n
        answers of ascending scores s, Σᵢ sᵢ C(i−1, k−1) / C(n, k), and with each text cₐ times among them,
        Σₐ 1 − C(n−cₐ, k) / C(n, k). None without answers.
        """
        most = min((pool.num_answers for pool in self.pools), default=0)
        if most == 0:
            return None
        samples = list(range(1, most + 1))
        scored = [pool.rouge_l for pool in self.pools if pool.rouge_l]
        best = [[_expected_best(scores, k) for scores in scored] for k in samples]
        different = [[_expected_different(pool.copies, k) for pool in self.pools] for k in samples]
        return {
            "samples": samples,
            "rouge_l_best": [math.fsum(row) / len(row) if row else None for row in best],
            "distinct_answers": [math.fsum(row) / len(row) for row in different],
        }

    @classmethod
    def from_samples(cls, lines: Iterable[Mapping[str, Any]], max_new_tokens: int) -> AnswerTable:
        """The table of one model's lines of ``samples.jsonl`` at one sampling temperature.

        Prompts stand in the order of their first lines, answers in that of seed and sample. Where a line has no
        boolean ``ended``, an answer of fewer than ``max_new_tokens`` tokens has ended.
        """
        pools: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
        for line in lines:
            pools.setdefault((line.get("suite"), line["prompt_id"]), []).append(line)
        sources = {(line.get("model"), line.get("sampling_temperature")) for pool in pools.values() for line in pool}
        assert len(sources) <= 1, f"lines of one model at one sampling temperature, not of {sorted(map(str, sources))}"
        table = cls()
        for pool in pools.values():
            pool.sort(key=lambda line: (line.get("seed") or 0, line["sample"]))
            reference = pool[0].get("reference")
            references = [reference] if isinstance(reference, str) else reference or []
            table.update(references, [_answer(line, max_new_tokens) for line in pool])
        return table


def _answer(line: Mapping[str, Any], max_new_tokens: int) -> Answer:
    ended = line.get("ended")
    if not isinstance(ended, bool):
        ended = line["num_tokens"] < max_new_tokens
    nll = line.get("teacher_nll")  # an infinite one is text
    return Answer(line["text"], line["num_tokens"], ended, teacher_nll=None if nll is None else float(nll))


def _judged(answers: Sequence[Answer]) -> tuple[float, int]:
    read = [(answer.teacher_nll, answer.num_tokens) for answer in answers if answer.teacher_nll is not None]
    return math.fsum(nll for nll, _ in read), sum(count for _, count in read)


def _defined(values: Iterable[float | None]) -> tuple[float, int]:
    known = [value for value in values if value is not None]
    return math.fsum(known), len(known)


def _expected_best(ascending: Sequence[float], k: int) -> float:
    subsets = math.comb(len(ascending), k)
    # The one at place i is the best of those subsets whose other members stand before it.
    return math.fsum(score * (math.comb(i, k - 1) / subsets) for i, score in enumerate(ascending))


def _expected_different(copies: Sequence[int], k: int) -> float:
    size = sum(copies)
    subsets = math.comb(size, k)
    return sum(subsets - math.comb(size - many, k) for many in copies) / subsets
