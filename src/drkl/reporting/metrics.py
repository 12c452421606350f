"""What each number of ``eval.json`` means, its unit, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from drkl.reporting.text import as_number, number

Better = Literal["lower", "higher", "zero", "teacher", "none"]

MODELS = ("teacher", "before", "warmup", "after")
STUDENTS = ("before", "warmup", "after")
MODEL_TITLES = {"teacher": "Teacher", "before": "Before", "warmup": "Warm-up", "after": "After"}

DIRECTIONS: dict[Better, tuple[str, str]] = {
    "lower": ("\N{DOWNWARDS ARROW}", "lower is better"),
    "higher": ("\N{UPWARDS ARROW}", "higher is better"),
    "zero": ("\N{RIGHTWARDS ARROW}\N{THIN SPACE}0", "nearer to 0 is better"),
    "teacher": ("\N{RIGHTWARDS ARROW}\N{THIN SPACE}T", "the teacher's is best"),
    "none": ("", ""),
}


@dataclass(frozen=True)
class Metric:
    """One row of the table; ``scale`` turns the stored value into the shown one."""

    key: str
    title: str
    unit: str
    better: Better
    definition: str
    digits: int = 3
    scale: float = 1.0

    def show(self, value: Any, *, signed: bool = False) -> str:
        """The value as it stands in the table, without its unit."""
        stored = as_number(value)
        return number(None if stored is None else stored * self.scale, self.digits, signed=signed)

    def distance(self, value: float, teacher: float | None) -> float | None:
        """How far from ideal (smaller is better); None where there is no ideal."""
        if self.better == "teacher":
            return None if teacher is None else abs(value - teacher)
        if self.better == "none":
            return None
        return {"lower": value, "higher": -value, "zero": abs(value)}[self.better]

    def verdict(self, old: Any, new: Any, teacher: Any = None) -> Literal["better", "worse", "same"] | None:
        """Whether ``new`` is nearer to ideal than ``old``; "same" where the shown digits cannot tell."""
        before, after = as_number(old), as_number(new)
        if before is None or after is None:
            return None
        first, second = (self.distance(value, as_number(teacher)) for value in (before, after))
        if first is None or second is None:
            return None
        if abs(first - second) * self.scale < 0.5 * 10.0**-self.digits:
            return "same"
        return "better" if second < first else "worse"


CONFIDENCE_GAP = Metric(
    "confidence_gap",
    "Confidence gap",
    "−1–1",
    "zero",
    "Mean max q minus mean max p; above 0 the student is surer than the teacher.",
)
GROUPS: tuple[tuple[str, str, tuple[Metric, ...]], ...] = (
    (
        "Closeness to the teacher",
        "Both models read the same held-out answers; p is the teacher's next-token distribution, q the student's.",
        (
            Metric(
                "rkl",
                "Reverse KL",
                "nats",
                "lower",
                "KL(q‖p), mean over tokens: grows where the student puts "
                "probability on what the teacher thinks unlikely.",
                2,
            ),
            Metric(
                "fkl",
                "Forward KL",
                "nats",
                "lower",
                "KL(p‖q), mean over tokens: grows where the student misses what the teacher thinks likely.",
                2,
            ),
            Metric(
                "tvd",
                "Total variation",
                "0–1",
                "lower",
                "Half the sum of |p − q|: the share of probability that sits on other tokens than the teacher's.",
            ),
            Metric(
                "agreement",
                "Top-token agreement",
                "%",
                "higher",
                "How often student and teacher rank the same token first.",
                1,
                100.0,
            ),
        ),
    ),
    (
        "The held-out answers themselves",
        "Measured against the token a person wrote, not against the teacher.",
        (
            Metric("nll", "Negative log-likelihood", "nats", "lower", "−log q of the observed token, mean.", 2),
            Metric(
                "accuracy",
                "Next-token accuracy",
                "%",
                "higher",
                "How often the observed token is ranked first.",
                1,
                100.0,
            ),
        ),
    ),
    (
        "How sure it is",
        "A good student is as sure as its teacher: neither more nor less.",
        (
            Metric(
                "entropy",
                "Entropy",
                "nats",
                "teacher",
                "Mean entropy of the next-token distribution; low is sure, high is undecided.",
                2,
            ),
            Metric("entropy_gap", "Entropy gap", "nats", "zero", "Student's mean entropy minus the teacher's.", 2),
            Metric(
                "confidence", "Confidence", "0–1", "teacher", "Mean probability of the model's own top token, max q."
            ),
            CONFIDENCE_GAP,
            Metric(
                "target_gap",
                "Target gap",
                "−1–1",
                "zero",
                "Mean of q − p on the teacher's top token; above 0 the student overdoes what the teacher prefers.",
            ),
            Metric(
                "overconfidence",
                "Overconfidence",
                "−1–1",
                "zero",
                "Mean of q − p on the student's own top token; also grows when it prefers tokens the teacher does not.",
            ),
        ),
    ),
    (
        "What it writes",
        "Answers sampled for held-out prompts. Random text is the most varied text there is, so variety is compared "
        "with the teacher's.",
        (
            Metric(
                "rouge_l",
                "ROUGE-L",
                "0–100",
                "higher",
                "Longest common subsequence with the reference answer (F-measure, stemmed), mean over samples.",
                1,
            ),
            Metric(
                "distinct_1",
                "Distinct-1",
                "0–1",
                "teacher",
                "Share of different words among one prompt's samples; higher is more varied.",
            ),
            Metric(
                "distinct_2",
                "Distinct-2",
                "0–1",
                "teacher",
                "Share of different word pairs among one prompt's samples; higher is more varied.",
            ),
            Metric(
                "self_bleu",
                "Self-BLEU",
                "0–100",
                "teacher",
                "BLEU-4 of each sample against the others of its prompt; lower is more varied.",
                1,
            ),
        ),
    ),
    (
        "Size of the test",
        "",
        (
            Metric(
                "num_tokens",
                "Held-out tokens",
                "tokens",
                "none",
                "Answer tokens that the first three groups are means over.",
                0,
            ),
        ),
    ),
)

METRICS: dict[str, Metric] = {metric.key: metric for _, _, metrics in GROUPS for metric in metrics}

CLASS_GROUPS: tuple[tuple[str, str, tuple[Metric, ...]], ...] = (
    (
        "The labels",
        "Measured against the label in the data. Under each number: its 95 % bootstrap interval over the texts.",
        (
            Metric("accuracy", "Accuracy", "%", "higher", "How often the most probable class is the label.", 1, 100.0),
            Metric("macro_f1", "Macro-F1", "%", "higher", "F1 of each class, mean over the classes.", 1, 100.0),
            Metric("nll", "Negative log-likelihood", "nats", "lower", "−log q of the label, mean over texts."),
        ),
    ),
    (
        "Closeness to the teacher",
        "p is the teacher's distribution over the classes, q the student's.",
        (
            Metric(
                "agreement",
                "Agreement",
                "%",
                "higher",
                "How often student and teacher rank the same class first.",
                1,
                100.0,
            ),
            Metric("fkl", "Forward KL", "nats", "lower", "KL(p‖q), mean over texts."),
            Metric("rkl", "Reverse KL", "nats", "lower", "KL(q‖p), mean over texts."),
        ),
    ),
    (
        "How sure it is",
        "A calibrated model is right on 80 % of the texts for which it gives a class 80 %.",
        (
            Metric(
                "ece",
                "Calibration error (ECE)",
                "0–1",
                "lower",
                "Mean distance of confidence and accuracy over 15 equal bins of confidence, weighted by their texts.",
            ),
            Metric(
                "calibration_gap",
                "Sureness over accuracy",
                "−1–1",
                "zero",
                "Mean confidence minus accuracy; above 0 the model is surer than it is right.",
            ),
            Metric(
                "confidence", "Confidence", "0–1", "teacher", "Mean probability of the model's own top class, max q."
            ),
            CONFIDENCE_GAP,
            Metric("entropy", "Entropy", "nats", "teacher", "Mean entropy over the classes; low is sure.", 2),
        ),
    ),
    ("Size of the test", "", (Metric("num_rows", "Held-out texts", "texts", "none", "What the means are over.", 0),)),
)


def groups_of(task: str) -> tuple[tuple[str, str, tuple[Metric, ...]], ...]:
    """The metrics of a task, in groups."""
    return CLASS_GROUPS if task == "classification" else GROUPS


def metrics_of(task: str) -> dict[str, Metric]:
    """The metrics of a task by their keys."""
    return {metric.key: metric for _, _, metrics in groups_of(task) for metric in metrics}


def best_student(metric: Metric, evaluation: Mapping[str, Any]) -> str | None:
    """The student nearest to ideal by the shown digits; None for a tie, or with fewer than two to choose from."""
    teacher = value_of(evaluation, "teacher", metric.key)
    distances = {}
    for model in STUDENTS:
        value = value_of(evaluation, model, metric.key)
        away = None if value is None else metric.distance(value, teacher)
        if away is not None:
            distances[model] = round(away * metric.scale, metric.digits)
    least = [model for model, away in distances.items() if away == min(distances.values())]
    return least[0] if len(distances) > 1 and len(least) == 1 else None


def value_of(evaluation: Mapping[str, Any] | None, model: str, key: str) -> float | None:
    """One number of ``eval.json``, or None where it is missing, null or not finite."""
    values = (evaluation or {}).get(model)
    return as_number(values.get(key)) if isinstance(values, Mapping) else None
