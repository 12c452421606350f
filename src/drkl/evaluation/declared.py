"""The metrics of ``eval.json``: declared once, for the file, the tables, the page and the docs.

q = the model, p = the teacher, y* = argmax q, t = argmax p; temperature 1 but where a sampling temperature is named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, isfinite, log10
from typing import Any, Literal

from drkl.display import as_number, number

Better = Literal["lower", "higher", "zero", "teacher", "none"]
Of = Literal["tokens", "answers", "texts"]

NUM_CALIBRATION_BINS = 15
HEAD_MASS = 0.9
"""The teacher's head is its most probable tokens, up to the one with which their mass reaches this."""
OVERLAP = 10
RANKS = (2, 100)
"""First and last of the teacher's ranks in the rank correlation."""

TEACHER_NLL = "teacher_nll_of_answers"
MOST_DIGITS = 6
"""Digits after the point, at most; what is smaller is rounding."""
JUDGED = 1.0
"""The sampling temperature of the answers that the teacher reads."""


@dataclass(frozen=True)
class Metric:
    """One metric. Tables show the stored value times ``scale``.

    ``better``: ``zero`` is nearer to 0, ``teacher`` nearer to the teacher's value, ``none`` is no quality at all.
    ``of``: what it is averaged over: held-out response tokens, sampled answers, or classified texts.
    """

    key: str
    title: str
    symbol: str
    unit: str
    better: Better
    definition: str
    of: Of = "tokens"
    library: str = "drkl"
    digits: int = 3
    scale: float = 1.0

    def show(self, value: Any, *, signed: bool = False) -> str:
        """The value as it stands in a table, without its unit."""
        stored = as_number(value)
        return number(None if stored is None else stored * self.scale, self.digits, signed=signed)

    @property
    def finer(self) -> Metric:
        """The metric with one digit more, in which its differences are shown."""
        return replace(self, digits=self.digits + 1)

    def fine_enough(self, *values: float | None) -> Metric:
        """The metric with as many digits more as the largest of these stored values needs to show two of its own."""
        size = max((abs(value * self.scale) for value in values if value is not None), default=0.0)
        needed = 1 - floor(log10(size)) if isfinite(size) and size > 0 else 0
        return replace(self, digits=max(self.digits, min(needed, MOST_DIGITS)))

    def distance(self, value: Any, teacher: Any) -> Any:
        """Return the distance of a number or an array from its ideal (smaller is better), or None without an ideal."""
        if self.better == "teacher":
            return None if teacher is None else abs(value - teacher)
        if self.better == "none":
            return None
        return {"lower": value, "higher": -value, "zero": abs(value)}[self.better]


@dataclass(frozen=True)
class Group:
    """Metrics under one heading."""

    title: str
    note: str
    metrics: tuple[Metric, ...]


_AGREEMENT = "How often student and teacher rank the same {} first: argmax q = argmax p."
_SHARE: dict[str, Any] = {"digits": 1, "scale": 100.0}
_ROUGE: dict[str, Any] = {"of": "answers", "library": "rouge-score", "digits": 1}
_BLEU: dict[str, Any] = {"of": "answers", "library": "sacrebleu", "digits": 1}
_DISTINCT: dict[str, Any] = {"of": "answers", "library": "drkl; tokens by sacrebleu"}
_TEXTS: dict[str, Any] = {"of": "texts"}


def _rouge(name: str, what: str) -> tuple[Metric, Metric]:
    key, title = f"rouge_{name.lower()}", f"ROUGE-{name}"
    mean = (
        f"F-measure of the {what} shared with the reference (stemmed, lower-cased; the best reference where there are "
        "several), mean over answers."
    )
    best = f"{title} of the best of a prompt's answers, mean over prompts; grows with the number of samples."
    return (
        Metric(key, title, title, "0–100", "higher", mean, **_ROUGE),
        Metric(f"{key}_best", f"{title}, best of k", f"{title} max", "0–100", "higher", best, **_ROUGE),
    )


def _distinct(n: int) -> tuple[Metric, Metric]:
    grams = {1: "words", 2: "word pairs", 3: "word triples"}[n]
    pool = (
        f"Different {grams} / all {grams} of the answers to one prompt (13a tokens, lower-cased; none across answers), "
        "mean over prompts; higher is more varied."
    )
    corpus = f"Different {grams} / all {grams} of all answers together; falls as the corpus grows."
    return (
        Metric(f"distinct_{n}", f"Distinct-{n}", f"D{n}", "0–1", "teacher", pool, **_DISTINCT),
        Metric(f"distinct_{n}_corpus", f"Distinct-{n}, corpus", f"D{n} all", "0–1", "teacher", corpus, **_DISTINCT),
    )


_RELIABLE = f"{NUM_CALIBRATION_BINS} bins of confidence (max q)"


def _against_the_teacher(of: Of, thing: str) -> tuple[Metric, ...]:
    """Return three measures of how much more confident than its teacher a student is."""
    return (
        Metric("confidence_gap", "Confidence minus the teacher's", "E[max q − max p]", "−1–1", "zero",
            "Mean max q minus mean max p; above 0 the student's distributions are sharper than the teacher's.",
            of=of),
        Metric("target_gap", "Target gap", "q_t − p_t", "−1–1", "zero",
            f"Mean of q − p at the teacher's top {thing}; above 0 the student overdoes what the teacher prefers.",
            of=of),
        Metric("overconfidence", "Overconfidence by the teacher", "q(y*) − p(y*)", "−1–1", "zero",
            f"Mean of q − p at the student's own top {thing}; above 0 the teacher is less confident there. It also "
            f"grows where the student prefers another {thing} than the teacher does.", of=of),
    )  # fmt: skip


def _calibration(of: Of, unit: str) -> tuple[Metric, ...]:
    return (
        Metric("ece", "Calibration error (ECE)", "ECE", "0–1", "lower",
            f"Expected calibration error: {_RELIABLE} of equal width, [a, b), the last with 1; |mean confidence − "
            f"accuracy| of a bin, weighted by its {unit}.", of=of),
        Metric("ece_mass", "Calibration error, equal mass", "ECE, mass", "0–1", "lower",
            f"The same with {_RELIABLE} that hold equally many {unit}.", of=of),
        Metric("mce", "Largest calibration error (MCE)", "MCE", "0–1", "lower",
            "The largest |mean confidence − accuracy| of the equal-width bins; one thin bin can decide it.", of=of),
        Metric("brier", "Brier score", "Brier", "0–2", "lower", "Mean of Σᵢ (qᵢ − 1[i = observed])².", of=of),
        Metric("calibration_gap", "Overconfidence by the data", "E[max q] − acc", "−1–1", "zero",
            "Mean confidence minus accuracy; above 0 the model is more confident than it is right.", of=of),
    )  # fmt: skip


GROUPS: tuple[Group, ...] = (
    Group(
        "Closeness to the teacher",
        "Both models read the same held-out answers, end of turn included; p is the teacher's next-token distribution, "
        "q the student's. Means over tokens.",
        (
            Metric("rkl", "Reverse KL", "KL(q‖p)", "nats", "lower",
                "KL(q‖p): grows where the student puts probability on what the teacher thinks unlikely.", digits=2),
            Metric("fkl", "Forward KL", "KL(p‖q)", "nats", "lower",
                "KL(p‖q): grows where the student misses what the teacher thinks likely.", digits=2),
            Metric("js", "Jensen–Shannon", "JS(p, q)", "nats", "lower",
                "½ KL(p‖m) + ½ KL(q‖m), m = ½(p + q): bounded by log 2, whatever one of the two excludes."),
            Metric("tvd", "Total variation", "TVD", "0–1", "lower",
                "½ Σ|p − q|: the share of probability that sits on other tokens than the teacher's."),
            Metric("agreement", "Top-token agreement", "y* = t", "%", "higher", _AGREEMENT.format("token"), **_SHARE),
        ),
    ),
    Group(
        "The held-out answers",
        "Measured against the token a person wrote, not against the teacher.",
        (
            Metric("nll", "Negative log-likelihood", "−log q(y)", "nats", "lower",
                "−log q of the observed token, mean.", digits=2),
            Metric("accuracy", "Next-token accuracy", "y* = y", "%", "higher",
                "How often the observed token is ranked first.", **_SHARE),
        ),
    ),
    Group(
        "Confidence",
        "A good student is as confident as its teacher: neither more nor less.",
        (
            Metric("entropy", "Entropy", "H(q)", "nats", "teacher",
                "−Σ q log q, mean: entropy of the next-token distribution; low is confident, high is undecided.",
                digits=2),
            Metric("entropy_gap", "Entropy gap", "H(q) − H(p)", "nats", "zero",
                "Student's mean entropy minus the teacher's.", digits=2),
            Metric("confidence", "Confidence", "max q", "0–1", "teacher",
                "Mean probability of the model's own top token, max q."),
            *_against_the_teacher("tokens", "token"),
            Metric("target_log_odds_gap", "Target log-odds gap", "E[D]", "nats", "zero",
                "Mean of D = logit q_t − logit p_t at the teacher's top token; above 0 the student gives it more.",
                digits=2),
            Metric("stronger_tail_share", "Positions where DRKL strengthens the tail", "1 − q_t < γ", "%", "none",
                "Share of positions with 1 − q_t < γ, where DRKL's force on the tail is more than reverse KL's; on the "
                "others it is less (γ stands in the settings).", **_SHARE),
        ),
    ),
    Group(
        "Calibration",
        "The model's top token against the observed one. A calibrated model is right on 80 % of the tokens to which it "
        "gives 80 %.",
        _calibration("tokens", "tokens"),
    ),
    Group(
        "The tail",
        "What is left of both distributions without the teacher's top token t, renormalised: q̂ and p̂.",
        (
            Metric("tail_rkl", "Reverse KL of the tails", "E[K] = KL(q̂‖p̂)", "nats", "lower",
                "KL(q̂‖p̂), mean: what reverse KL weighs by 1 − q_t and DRKL by γ.", digits=2),
            Metric("tail_fkl", "Forward KL of the tails", "KL(p̂‖q̂)", "nats", "lower", "KL(p̂‖q̂), mean.", digits=2),
            Metric("tail_mass", "Mass beyond the teacher's head", "q(beyond head)", "0–1", "teacher",
                f"Mean probability outside the teacher's most probable tokens with a mass of {HEAD_MASS:g} (the one "
                "that crosses it is inside)."),
            Metric(f"overlap_{OVERLAP}", f"Shared top {OVERLAP}", f"overlap@{OVERLAP}", "%", "higher",
                f"How many of the teacher's {OVERLAP} most probable tokens are among the student's, mean.", **_SHARE),
            Metric("rank_correlation", "Rank correlation in the tail", "Spearman ρ", "−1–1", "higher",
                f"Spearman correlation of p and q over the tokens of the teacher's ranks {RANKS[0]} to {RANKS[1]}, "
                "mean over tokens.", digits=2),
        ),
    ),
    Group(
        "Quality of the answers",
        "Answers sampled for held-out prompts. At sampling temperature 1 these reward sharpness: see the sweep.",
        (
            *_rouge("L", "longest common subsequence"),
            *_rouge("1", "words"),
            *_rouge("2", "word pairs"),
            Metric("bleu", "BLEU", "BLEU", "0–100", "higher",
                "Corpus BLEU-4 of all answers (13a tokens, exp smoothing).", **_BLEU),
            Metric("chrf", "chrF", "chrF2", "0–100", "higher",
                "Corpus chrF2 of all answers (character 6-grams).", **_BLEU),
            Metric(TEACHER_NLL, "Negative log-likelihood by the teacher", "−log p(answer)", "nats", "teacher",
                "−log p of the tokens of the model's own answers, stop token included, as the teacher reads them after "
                "the same prompt, mean over tokens; of answers at sampling temperature 1 alone. The teacher's own "
                "value estimates its entropy: text that it finds likelier than what it writes is too sharp.",
                of="answers"),
        ),
    ),
    Group(
        "Variety of the answers",
        "Random text is the most varied text there is, so variety is compared with the teacher's.",
        (
            *_distinct(1),
            *_distinct(2),
            *_distinct(3),
            Metric("self_bleu", "Self-BLEU", "Self-BLEU", "0–100", "teacher",
                "BLEU-4 of each answer against the other answers to its prompt, never itself (sentence BLEU, 13a "
                "tokens, case kept, exp smoothing, effective order), mean over prompts; lower is more varied.",
                **_BLEU),
            Metric("distinct_answers", "Different answers", "distinct / k", "%", "teacher",
                "Different texts / answers of a prompt, mean over prompts.", of="answers", **_SHARE),
            Metric("repetition", "Repetition inside an answer", "rep-4", "%", "teacher",
                "Share of an answer's word 4-grams that it has had before (13a tokens, lower-cased), mean over answers "
                "with a 4-gram.", of="answers", digits=1, scale=100.0, library="drkl; tokens by sacrebleu"),
            Metric("answer_tokens", "Length of an answer", "tokens", "tokens", "teacher",
                "Tokens of an answer, its stop token included, mean.", of="answers", digits=1),
            Metric("ended", "Answers that ended", "ended", "%", "teacher",
                "Share of answers that ended before max_new_tokens.", of="answers", **_SHARE),
        ),
    ),
    Group(
        "Size of the test",
        "",
        (
            Metric("num_tokens", "Held-out tokens", "n", "tokens", "none",
                "Held-out response tokens that the means over tokens are over.", digits=0),
            Metric("num_answers", "Answers", "n", "answers", "none", "Sampled answers.", of="answers", digits=0),
        ),
    ),
)  # fmt: skip

CLASS_GROUPS: tuple[Group, ...] = (
    Group(
        "The labels",
        "Measured against the label in the data. Intervals are 95 % bootstrap intervals over the texts.",
        (
            Metric("accuracy", "Accuracy", "y* = y", "%", "higher", "How often the most probable class is the label.",
                of="texts", **_SHARE),
            Metric("macro_f1", "Macro-F1", "F1", "%", "higher",
                "F1 of each class, mean over the classes that occur among the labels or the predictions; 0 for a "
                "class that is never right.", of="texts", **_SHARE),
            Metric("nll", "Negative log-likelihood", "−log q(y)", "nats", "lower",
                "−log q of the label, mean over texts.", **_TEXTS),
        ),
    ),
    Group(
        "Closeness to the teacher",
        "p is the teacher's distribution over the classes, q the student's.",
        (
            Metric("agreement", "Agreement", "y* = t", "%", "higher", _AGREEMENT.format("class"), of="texts", **_SHARE),
            Metric("fkl", "Forward KL", "KL(p‖q)", "nats", "lower", "KL(p‖q), mean over texts.", **_TEXTS),
            Metric("rkl", "Reverse KL", "KL(q‖p)", "nats", "lower", "KL(q‖p), mean over texts.", **_TEXTS),
        ),
    ),
    Group(
        "Confidence",
        "A calibrated model is right on 80 % of the texts for which it gives a class 80 %.",
        (
            *_calibration("texts", "texts"),
            Metric("confidence", "Confidence", "max q", "0–1", "teacher",
                "Mean probability of the model's own top class, max q.", **_TEXTS),
            *_against_the_teacher("texts", "class"),
            Metric("entropy", "Entropy", "H(q)", "nats", "teacher",
                "−Σ q log q, mean over texts; low is confident.", of="texts", digits=2),
        ),
    ),
    Group(
        "Size of the test",
        "",
        (
            Metric("num_rows", "Held-out texts", "n", "texts", "none", "Held-out texts that the means are over.",
                of="texts", digits=0),
        ),
    ),
)  # fmt: skip


def groups_of(task: str) -> tuple[Group, ...]:
    """The metrics of a task, in groups."""
    return CLASS_GROUPS if task == "classification" else GROUPS


def metrics_of(task: str) -> dict[str, Metric]:
    """The metrics of a task by their keys."""
    return {metric.key: metric for group in groups_of(task) for metric in group.metrics}


METRICS: dict[str, Metric] = metrics_of("generation")
CLASS_METRICS: dict[str, Metric] = metrics_of("classification")
KEYS: tuple[str, ...] = tuple(METRICS)
TOKEN_KEYS: tuple[str, ...] = tuple(key for key, metric in METRICS.items() if metric.of == "tokens")
ANSWER_KEYS: tuple[str, ...] = tuple(key for key, metric in METRICS.items() if metric.of == "answers")
CLASS_KEYS: tuple[str, ...] = tuple(CLASS_METRICS)


def definitions(task: str) -> dict[str, str]:
    """Every definition by its key, as it stands in ``eval.json``."""
    return {key: f"{metric.definition} [{metric.unit}; {metric.library}]" for key, metric in metrics_of(task).items()}
