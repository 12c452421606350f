"""What a classifier makes of the held-out texts: ``eval.json`` and ``predictions.jsonl``. q = model, p = teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from drkl.data.batching import bucket_by_length
from drkl.data.classification import LabelledRow, tokenize_labelled
from drkl.data.collate import collate
from drkl.evaluation.bootstrap import RESAMPLES, intervals
from drkl.evaluation.calibration import EDGES, Bins, mass_bins, weighted_sums, width_bins
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import CLASS_KEYS as KEYS
from drkl.evaluation.declared import definitions
from drkl.evaluation.measure import MODELS, TRAINED, Progress, finite, free_memory, reporter, timed, versions
from drkl.losses.common import log_softmax
from drkl.models.classes import class_names
from drkl.models.forward import hidden_states
from drkl.positions import brier_score, token_statistics
from drkl.runs import RunFolder, write_json, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MEANS = ("accuracy", "nll", "confidence", "entropy")
_TEACHER_MEANS = ("agreement", "fkl", "rkl")


@dataclass(frozen=True)
class Scores:
    """Per-text numbers of one model, float64 ``[n]``: everything that a metric is made of."""

    columns: dict[str, np.ndarray]
    predicted: np.ndarray
    labels: np.ndarray
    num_classes: int

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every metric, for each of ``weights`` `[m, n]` (how often a text counts); `[m]` by name. Default: once each.

        All of them are sums over texts, so a resample is a row of weights.
        """
        size = len(self.labels)
        weights = np.ones((1, size)) if weights is None else weights
        means = weighted_sums(weights, np.stack(list(self.columns.values()), -1)) / size
        out = dict(zip(self.columns, means.T, strict=True))
        out["macro_f1"] = self._macro_f1(weights)
        width, mass = self.bins(width_bins), self.bins(mass_bins)
        out |= {"ece": width.ece(weights), "mce": width.mce(weights), "ece_mass": mass.ece(weights)}
        out["calibration_gap"] = out["confidence"] - out["accuracy"]
        if "teacher_confidence" in out:
            out["confidence_gap"] = out["confidence"] - out.pop("teacher_confidence")
        return out

    def bins(self, bins: Callable[[np.ndarray], np.ndarray]) -> Bins:
        """The texts in the bins that ``bins`` makes of their confidence."""
        confidence, size = self.columns["confidence"], len(self.labels)
        return Bins.of(bins(confidence), confidence, self.columns["accuracy"], np.arange(size), size)

    def _macro_f1(self, weights: np.ndarray) -> np.ndarray:
        said, true = (_one_hot(ids, self.num_classes) for ids in (self.predicted, self.labels))
        hits, either = weights @ (said * true), weights @ said + weights @ true
        present = either > 0
        f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=present)
        mean: np.ndarray = f1.sum(-1) / present.sum(-1)
        return mean


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Scores:
    """Per-text numbers of class logits `[n, classes]` (the teacher's likewise, or None) and labels `[n]`."""
    values = token_statistics(logits.double(), None if teacher_logits is None else teacher_logits.double(), labels)
    names = _MEANS if teacher_logits is None else (*_MEANS, *_TEACHER_MEANS, "teacher_confidence")
    columns = {name: getattr(values, name).double().numpy() for name in names}
    columns["brier"] = brier_score(logits.double().softmax(-1), labels).numpy()
    return Scores(columns, logits.argmax(-1).numpy(), labels.numpy(), logits.shape[-1])


def reliability(scores: Scores) -> dict[str, list[Any]]:
    """Per bin of confidence: how many texts, their mean confidence and their accuracy (None in an empty bin)."""
    return scores.bins(width_bins).reliability("rows")


@torch.no_grad()
def class_logits(
    model: PreTrainedModel,
    rows: Sequence[LabelledRow],
    *,
    pad_id: int,
    tokens_per_batch: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The class logits `[n, classes]` of the rows, fp32, on the CPU, in the order of the rows."""
    assert not model.training, "dropout would make every number a random one"
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    device = next(model.parameters()).device
    for group in bucket_by_length([row.length for row in rows], tokens_per_batch):
        batch = collate([rows[i] for i in group], pad_id=pad_id)
        states = hidden_states(model, {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)})
        for place, logits in zip(group, states.squeeze(1).float().cpu(), strict=True):
            found[place] = logits
        if progress is not None:
            progress(len(group))
    return torch.stack(found)


def evaluate_classes(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    rows: Sequence[LabelledRow],
    classes: Sequence[str],
    settings: EvaluationConfig,
    *,
    pad_id: int,
    device: str | torch.device = "cpu",
    data: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what ``eval.json`` holds and the rows of ``predictions.jsonl``.

    Args:
        models: loaders by name, of ``measure.MODELS``; each is called once, the teacher's first.
        rows: the held-out rows.
        classes: the names of the classes, by number.
        settings: of the ``evaluation`` section the seed counts, for the resampling.
        pad_id: fills batches.
        device: each model is moved there.
        data: where the rows come from, for the record.
        facts: further settings for the record: what the models are, the command.
        on_progress: called with ("teacher: reading", done, total) in texts.
    """
    assert models and set(models) <= set(MODELS), f"models are named {MODELS}"
    started = time.perf_counter()
    labels = torch.tensor([row.label for row in rows])
    logits: dict[str, Tensor] = {}
    found: dict[str, Scores] = {}
    seconds: dict[str, float] = {}
    for name in (model for model in MODELS if model in models):
        with timed(seconds, name):
            model: Any = models[name]()
            model.to(device).eval()
            model.config.get_text_config().pad_token_id = pad_id
            report = reporter(name, on_progress)("reading", len(rows))
            logits[name] = class_logits(model, rows, pad_id=pad_id, progress=report)
            del model
            free_memory(device)
        found[name] = score(logits[name], labels, logits.get("teacher"))
    result: dict[str, Any] = {
        "task": "classification",
        "settings": _describe(settings, rows, device, data, facts),
        "classes": list(classes),
        **{name: _table(scores, len(rows)) for name, scores in found.items()},
        "intervals": {
            name: intervals(scores.metrics, len(scores.labels), settings.seed) for name, scores in found.items()
        },
        "reliability": {
            "edges": EDGES,
            **{name: reliability(scores) for name, scores in found.items()},
        },
        "timing": {**{k: round(v, 2) for k, v in seconds.items()}, "total": round(time.perf_counter() - started, 2)},
    }
    trained = next(name for name in TRAINED if name in logits)
    return result, list(predictions(rows, classes, logits[trained], logits.get("teacher")))


def predictions(
    rows: Sequence[LabelledRow], classes: Sequence[str], student: Tensor, teacher: Tensor | None
) -> Iterator[dict[str, Any]]:
    """A line per text: what student and teacher say and how sure they are; ``nll`` is the student's of the label."""
    ours = log_softmax(student, 1.0)
    theirs = None if teacher is None else log_softmax(teacher, 1.0)
    for number, row in enumerate(rows):
        line: dict[str, Any] = {"id": row.id, "text": row.text, "label": classes[row.label]}
        line |= _said("student", ours[number], classes)
        if theirs is not None:
            line |= _said("teacher", theirs[number], classes)
        line["nll"] = finite(round(-float(ours[number, row.label]), 4))
        yield line


def most_probable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int, count: int = 5
) -> list[tuple[str, float]]:
    """The ``count`` most probable classes of a text, with their probabilities; cut at ``max_tokens`` as in training."""
    classes = class_names(model.config, type(model).__name__)
    labelled = [("text", text, classes[0])]
    rows, _ = tokenize_labelled(labelled, tokenizer, classes, max_tokens=max_tokens)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    best = class_logits(model, rows, pad_id=pad_id)[0].softmax(-1).topk(min(count, len(classes)))
    return [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def write_classification(run: RunFolder, evaluation: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ``predictions.jsonl`` and then ``eval.json``, each whole or not at all."""
    write_jsonl(run.predictions_path, [dict(line) for line in lines])
    write_json(run.eval_path, dict(evaluation))


def _said(who: str, logp: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    best = int(logp.argmax())
    return {who: classes[best], f"{who}_confidence": round(float(logp[best].exp()), 4)}


def _table(scores: Scores, num_rows: int) -> dict[str, float | None]:
    values: dict[str, Any] = {name: float(value[0]) for name, value in scores.metrics().items()}
    values["num_rows"] = num_rows
    return {key: finite(values.get(key)) for key in KEYS}


def _describe(
    settings: EvaluationConfig,
    rows: Sequence[LabelledRow],
    device: str | torch.device,
    data: Mapping[str, Any] | None,
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "task": "classification",
        "seed": settings.seed,
        **(facts or {}),
        "data": {**(data or {}), "heldout_rows": len(rows)},
        "intervals": f"95 %, percentiles of {RESAMPLES} bootstrap resamples of the held-out texts; not of seeds",
        "device": str(device),
        "versions": versions(),
        "definitions": definitions("classification"),
    }


def _one_hot(ids: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((len(ids), size))
    out[np.arange(len(ids)), ids] = 1.0
    return out
