"""The answer in words, computed from ``eval.json``: it says no where the numbers say no."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from drkl.display import number
from drkl.reporting.metrics import METRICS, value_of
from drkl.reporting.record import RunRecord
from drkl.reporting.text import count, percent

# Below these a difference is called none: they are well inside what another seed would change.
SAME_NATS = 0.05
SAME_SHARE = 0.01
SAME_SCORE = 0.5

_TONES: dict[str, Literal["good", "bad", "neutral"]] = {
    "Closer": "good", "Better": "good", "Not closer": "bad", "Worse": "bad",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One question and its answer."""

    question: str
    text: str


@dataclass(frozen=True)
class Answer:
    """``verdict`` is one word or two, ``tone`` its colour, ``headline`` the sentence with the numbers."""

    verdict: str
    headline: str
    tone: Literal["good", "bad", "neutral"] = "neutral"
    points: list[Point] = field(default_factory=list)


def answer(record: RunRecord, others: Sequence[RunRecord] = ()) -> Answer:
    """What this run shows, in words."""
    if record.evaluation is None:
        return unevaluated(record)
    if value_of(record.evaluation, "after", "rkl") is None:
        return _without_teacher(record)
    makers: list[Callable[[RunRecord], Point | None]] = [_last_stage, _confidence, _variety, _quality]
    points = [point for make in makers if (point := make(record))]
    if others:
        points.append(_comparison([record, *others]))
    elif not record.is_pair:
        points.append(_no_comparison(record))
    points.append(_trust(record))
    verdict, headline = _headline(record)
    return Answer(verdict, headline, _TONES.get(verdict, "neutral"), points)


def _get(record: RunRecord, model: str, key: str) -> float | None:
    return value_of(record.evaluation, model, key)


def _headline(record: RunRecord) -> tuple[str, str]:
    before, after = ({key: _get(record, model, key) for key in ("rkl", "fkl", "agreement")} for model in
                     ("before", "after"))  # fmt: skip
    if record.is_pair:
        said = [f"Its reverse KL to the teacher is {_nats(after['rkl'])}"]
        said += [f"its forward KL {_nats(after['fkl'])}"] if after["fkl"] is not None else []
        share = after["agreement"]
        said += [] if share is None else [f"its top token is the teacher's on {percent(share, 0)} of held-out tokens"]
        return "Student and teacher", f"{_joined(said)}. Only the two were evaluated, not how the student was made."
    steps = f"After {count(record.num_steps, 'step')}" if record.num_steps else "After training"
    now = _joined(
        [f"its reverse KL to the teacher is {_nats(after['rkl'])}"]
        + ([f"its forward KL {_nats(after['fkl'])}"] if after["fkl"] is not None else [])
        + ([f"it shares the teacher's top token on {percent(after['agreement'], 0)} of held-out tokens"]
           if after["agreement"] is not None else [])
    )  # fmt: skip
    if before["rkl"] is None or after["rkl"] is None:
        return "No baseline", f"{steps} {now}. The student before training was not evaluated."
    moves = {key: _move(before[key], after[key], SAME_NATS) for key in ("rkl", "fkl")}
    moves["agreement"] = _move(after["agreement"], before["agreement"], SAME_SHARE)
    known = [move for move in moves.values() if move is not None]
    numbers = f"reverse KL {_from_to(before['rkl'], after['rkl'])}"
    if before["fkl"] is not None and after["fkl"] is not None:
        numbers += f", forward KL {_from_to(before['fkl'], after['fkl'])}"
    top = ""
    if before["agreement"] is not None and after["agreement"] is not None:
        top = (
            f" Its top token is the teacher's on {percent(after['agreement'], 0)} of held-out tokens, "
            f"against {percent(before['agreement'], 0)} before."
        )
    if all(move == "down" for move in known):
        return "Closer", f"{steps} the student is closer to its teacher: {numbers}.{top}"
    if not any(move == "down" for move in known):
        return "Not closer", f"{steps} the student is no closer to its teacher than before: {numbers}.{top}"
    return "Partly closer", f"{steps} the student is closer to its teacher by some measures only: {numbers}.{top}"


def _last_stage(record: RunRecord) -> Point | None:
    """What the last stage added to the warm-up."""
    pairs = {key: (_get(record, "warmup", key), _get(record, "after", key)) for key in ("rkl", "fkl")}
    if any(value is None for pair in pairs.values() for value in pair):
        return None
    sentences, moves = [], {}
    for key, title in (("rkl", "Reverse KL"), ("fkl", "forward KL")):
        old, new = pairs[key]
        moves[key] = _move(old, new, SAME_NATS)
        verb = {"down": "fell", "up": "rose", "same": "hardly moved", None: ""}[moves[key]]
        sentences.append(f"{title} {verb} {_from_to(old, new)} ({number((new or 0) - (old or 0), 2, signed=True)})")
    verdict = {
        ("down", "down"): "It helped on both sides.",
        ("up", "up"): "It made both worse.",
        ("same", "same"): "It changed next to nothing.",
        ("down", "up"): "A trade: less on tokens the teacher thinks unlikely, and more of the teacher's own missed.",
        ("up", "down"): "A trade: more of the teacher's tokens covered, and more spent on tokens it thinks unlikely.",
    }.get((moves["rkl"] or "", moves["fkl"] or ""), "One of the two moved.")
    text = f"{sentences[0]}; {sentences[1]}. {verdict}"
    old, new = _get(record, "warmup", "agreement"), _get(record, "after", "agreement")
    if old is not None and new is not None:
        text += f" Top-token agreement: {percent(old)} after the warm-up, {percent(new)} now."
    return Point(f"What did the last stage, {record.objective}, add?", text)


def _confidence(record: RunRecord) -> Point | None:
    """Whether the student is surer than its teacher; entropy, max q and the teacher's top token must say the same."""
    student, teacher = _get(record, "after", "entropy"), _get(record, "teacher", "entropy")
    gap, target = _get(record, "after", "confidence_gap"), _get(record, "after", "target_gap")
    signs = [_sign(gap, SAME_SHARE), _sign(target, SAME_SHARE)]
    if student is not None and teacher is not None:
        signs.append(_sign(teacher - student, SAME_NATS))
    known = [sign for sign in signs if sign is not None]
    if not known:
        return None
    text = f"{_confidence_verdict(known)} {_capital('; '.join(_confidence_facts(record)))}."
    over = _get(record, "after", "overconfidence")
    if over is not None and over > SAME_SHARE and not any(sign > 0 for sign in known):
        agreement = _get(record, "after", "agreement")
        shared = "" if agreement is None else f" (the two share it on {percent(agreement, 0)} of tokens)"
        text += (
            f" To its own top token it does give more than the teacher would, {number(over, 2, signed=True)}, "
            f"for it often prefers another one{shared}."
        )
    if not any(sign > 0 for sign in known):
        text += " Its distributions are not too sharp, so this run cannot show an objective curing that."
    text += _deserved(record)
    return Point("Is the student overconfident?", text)


def _deserved(record: RunRecord) -> str:
    """Its sureness against how often it is right; empty for an older evaluation."""
    gap, error, teacher = (
        _get(record, model, key) for model, key in (("after", "calibration_gap"), ("after", "ece"), ("teacher", "ece"))
    )
    if gap is None or error is None:
        return ""
    way = {1: f"surer than right, by {number(gap)}", 0: "as sure as it is right",
           -1: f"less sure than right, by {number(-gap)}"}[_sign(gap, SAME_SHARE) or 0]  # fmt: skip
    beside = "" if teacher is None else f"; the teacher's {number(teacher)}"
    return f" Against the tokens that people wrote it is {way} (calibration error {number(error)}{beside})."


def _confidence_verdict(signs: Sequence[int]) -> str:
    if all(sign > 0 for sign in signs):
        return "Yes: it is surer than its teacher."
    if all(sign < 0 for sign in signs):
        return "No: it is less sure than its teacher."
    if all(sign == 0 for sign in signs):
        return "No: it is as sure as its teacher."
    if not any(sign > 0 for sign in signs):
        return "No: by no measure is it surer than its teacher."
    return "By some measures only."


def _confidence_facts(record: RunRecord) -> list[str]:
    facts = []
    for key, phrase in (
        ("entropy", "mean entropy is {} nats against the teacher's {}"),
        ("confidence", "its top token has a probability of {} on average, the teacher's {}"),
    ):
        student, teacher = _get(record, "after", key), _get(record, "teacher", key)
        if student is not None and teacher is not None:
            facts.append(phrase.format(number(student), number(teacher)))
    target = _get(record, "after", "target_gap")
    if target is not None:
        facts.append(f"to the teacher's top token it gives {_more_or_less(target)} than the teacher does")
    return facts


def _variety(record: RunRecord) -> Point | None:
    parts = []
    for key, title in (("distinct_2", "Distinct-2"), ("self_bleu", "Self-BLEU")):
        student, teacher = _get(record, "after", key), _get(record, "teacher", key)
        if student is None or teacher is None:
            continue
        same = SAME_SHARE if key == "distinct_2" else SAME_SCORE
        more = _sign(student - teacher if key == "distinct_2" else teacher - student, same)
        word = {1: "more varied than", 0: "as varied as", -1: "less varied than"}[more or 0]
        metric = METRICS[key]
        parts.append((word, f"{title} {metric.show(student)} against {metric.show(teacher)}"))
    if not parts:
        return None
    words = {word for word, _ in parts}
    shown = "; ".join(text for _, text in parts)
    if len(words) > 1:
        return Point("Are its answers as varied?", f"The two measures differ: {shown}.")
    text = f"Its samples for one prompt are {words.pop()} the teacher's: {shown}."
    if parts[0][0].startswith("more"):
        text += " Text with less sense in it is also more varied; read the samples."
    return Point("Are its answers as varied?", text)


def _quality(record: RunRecord) -> Point | None:
    scores = {model: _get(record, model, "rouge_l") for model in ("before", "warmup", "after", "teacher")}
    if scores["after"] is None:
        return None
    names = {"before": "before", "warmup": "after the warm-up", "teacher": "by the teacher"}
    rest = [f"{number(scores[model], 1)} {name}" for model, name in names.items() if scores[model] is not None]
    text = f"ROUGE-L with the reference answers is {number(scores['after'], 1)}"
    text += f" ({_joined(rest)})." if rest else "."
    if scores["teacher"] is not None and scores["after"] < scores["teacher"] - SAME_SCORE:
        text += " The student still writes clearly less like the references than its teacher does."
    return Point("Does it answer well?", text)


def _comparison(records: Sequence[RunRecord]) -> Point:
    labels = run_labels(records)
    wins = []
    for key, phrase in (
        ("rkl", "lowest reverse KL"),
        ("fkl", "lowest forward KL"),
        ("agreement", "highest agreement"),
        ("entropy", "entropy nearest its teacher's"),
        ("rouge_l", "highest ROUGE-L"),
    ):
        found = []
        for label, record in zip(labels, records, strict=True):
            value, teacher = _get(record, "after", key), _get(record, "teacher", key)
            away = None if value is None else METRICS[key].distance(value, teacher)
            if value is not None and away is not None:
                found.append((round(away * METRICS[key].scale, METRICS[key].digits), label, _with_unit(key, value)))
        least = min((away for away, _, _ in found), default=None)
        best = [(label, shown) for away, label, shown in found if away == least]
        if len(found) > 1 and len(best) == 1:
            own = next((shown for _, label, shown in found if label == labels[0]), None)
            beside = f", this run {own}" if own and best[0][0] != labels[0] else ""
            wins.append(f"{phrase}: {best[0][0]} ({best[0][1]}{beside})")
    text = _capital("; ".join(wins)) + "." if wins else "The runs have no number in common to compare, or tie on all."
    return Point(f"And next to {_joined(labels[1:])}?", text)


def _no_comparison(record: RunRecord) -> Point:
    other = "rkl" if record.objective != "rkl" else "drkl"
    root = record.run.root
    beside = root.with_name(f"{root.name}-{other}")
    config, name, own, new = (shlex.quote(str(x)) for x in (record.run.config_path, beside.name, root, beside))
    return Point(
        "Is it the objective?",
        f"One run cannot say. Train the same with {other} in the last stage and look at the two side by side: "
        f"`drkl distill {config} objective.name={other} run.name={name}`, `drkl evaluate {new}`, "
        f"`drkl report {own} {new}`.",
    )


def _trust(record: RunRecord) -> Point:
    tokens = _get(record, "after", "num_tokens")
    settings = (record.evaluation or {}).get("settings")
    prompts, samples = (
        (settings.get(key) if isinstance(settings, dict) else None) for key in ("prompts", "samples_per_prompt")
    )
    parts = []
    if tokens is not None:
        parts.append(f"{count(tokens, 'held-out token')}")
    if isinstance(prompts, int) and isinstance(samples, int):
        parts.append(f"{count(prompts, 'prompt')} with {count(samples, 'sample')} each")
    once = "one student" if record.is_pair else "one training seed"
    basis = f"The numbers rest on {_joined(parts)}, and on {once}" if parts else _capital(once)
    if record.evaluation and isinstance(record.evaluation.get("intervals"), dict):
        text = f"{basis}. The intervals say what other rows and prompts would change, not what another seed would."
        return Point("How far to trust this?", text)
    return Point(
        "How far to trust this?",
        f"{basis}. Without intervals over several seeds, small differences between models or runs are not evidence.",
    )


def unevaluated(record: RunRecord) -> Answer:
    """What can be said of a run, or a pair of models, without ``eval.json``."""
    if record.is_pair:
        said = str((record.analysis or {}).get("headline", ""))
        return Answer("Analysed", f"{said} What the two write was not evaluated.")
    text = f"This run has not been evaluated. `drkl evaluate {record.run.root}` measures it; then make the report anew."
    for key, title in (("rkl", "reverse KL"), ("nll", "negative log-likelihood")):
        if not record.stages:
            break
        curve = record.stages[-1].curve(key, heldout=True)
        if curve:
            text += (
                f" The last check on held-out rows during training, at step {number(curve.steps[-1], 0)}, "
                f"had a {title} of {_nats(curve.values[-1])}."
            )
            break
    return Answer("Not evaluated", text)


def _without_teacher(record: RunRecord) -> Answer:
    old, new = _get(record, "before", "nll"), _get(record, "after", "nll")
    points = [point for point in (_quality(record), _trust(record)) if point]
    if new is None:
        return Answer("No result", "The evaluation holds no number for the trained student.", points=points)
    if old is None:
        return Answer("No baseline", f"The held-out negative log-likelihood is {_nats(new)}.", points=points)
    move = _move(old, new, SAME_NATS)
    verdict = {"down": "Better", "up": "Worse"}.get(move or "", "No change")
    word = {"down": "fell", "up": "rose"}.get(move or "", "hardly moved:")
    text = f"There was no teacher in this run. The held-out negative log-likelihood {word} {_from_to(old, new)}."
    return Answer(verdict, text, _TONES.get(verdict, "neutral"), points)


def run_labels(records: Sequence[RunRecord]) -> list[str]:
    """A name per run, with its objective where the name does not say it; runs of the same name get a number."""
    names = [
        record.name
        if record.is_pair or record.objective in record.name.split("-")
        else f"{record.name} · {record.objective}"
        for record in records
    ]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _move(old: float | None, new: float | None, same: float) -> str | None:
    if old is None or new is None:
        return None
    return {1: "up", 0: "same", -1: "down"}[_sign(new - old, same) or 0]


def _sign(value: float | None, same: float) -> int | None:
    if value is None:
        return None
    return 0 if abs(value) < same else (1 if value > 0 else -1)


def _more_or_less(gap: float) -> str:
    return f"{number(abs(gap), 2)} {'more' if gap > 0 else 'less'}"


def _with_unit(key: str, value: float) -> str:
    return METRICS[key].show(value) + ("\N{NO-BREAK SPACE}%" if METRICS[key].unit == "%" else "")


def _nats(value: float | None) -> str:
    return f"{number(value)} nats"


def _from_to(old: float | None, new: float | None) -> str:
    return f"from {number(old)} to {number(new)} nats"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
