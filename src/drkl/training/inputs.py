"""From the specs of a finished run back to its models and rows, as an evaluation takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from drkl.models.classes import class_names
from drkl.models.load import load_classifier, load_config, load_model, load_tokenizer
from drkl.models.precision import has_device, pick_device, resolve_dtype
from drkl.models.student import make_student
from drkl.training.rows import Rows, make_rows, read_shares
from drkl.training.spec import RunSpec
from drkl.training.tokens import has_encoder

Loader = Callable[[], PreTrainedModel]


class EvaluationInputs(NamedTuple):
    """What the evaluation of one run needs."""

    models: dict[str, Loader]
    tokenizer: Any
    rows: Rows
    device: torch.device
    data: dict[str, Any]
    vocab_size: int | None
    """How many ids the models were compared on in training, where that is not all."""
    classes: tuple[str, ...] | None
    """Of a classification run, by number."""


def evaluation_models(
    specs: Sequence[RunSpec], names: Sequence[str] = ("teacher", "before", "warmup", "after")
) -> tuple[dict[str, Loader], Any, torch.device]:
    """Loaders by name, the tokenizer and the device.

    ``before`` is the first stage's init, made again from its config; ``warmup`` the student of the stage before the
    last, where there is one; ``after`` the run's student.
    """
    first, last = specs[0], specs[-1]
    # A run may have been made on another machine.
    wanted = last.run.device
    device = pick_device(wanted if has_device(wanted) else "auto")
    tokenizer = load_tokenizer(str(last.folder.student_path), classifier=last.classifies)
    classes = trained_classes(last)
    load = load_model if classes is None else load_classifier
    loaders: dict[str, Loader] = {}
    if last.teacher is not None:
        teacher = last.teacher
        loaders["teacher"] = lambda: load(teacher.model, resolve_dtype(teacher.dtype, device))
    teacher_name = first.teacher.model if first.teacher else None
    loaders["before"] = lambda: make_student(first.student, teacher_name, first.run.seed, tokenizer, classes)
    if len(specs) > 1:
        loaders["warmup"] = lambda: load(str(specs[-2].folder.student_path), last.student.dtype)
    loaders["after"] = lambda: load(str(last.folder.student_path), last.student.dtype)
    return {name: loaders[name] for name in names if name in loaders}, tokenizer, device


def trained_classes(last: RunSpec) -> tuple[str, ...] | None:
    """The classes of a finished run's student; None of a language model."""
    if not last.classifies:
        return None
    folder = str(last.folder.student_path)
    return class_names(load_config(folder), folder)


def evaluation_inputs(specs: Sequence[RunSpec]) -> EvaluationInputs:
    """Models, tokenizer and held-out rows of a finished run."""
    models, tokenizer, device = evaluation_models(specs)
    last = specs[-1]
    if last.classifies and specs[0].student.init == "random":
        del models["before"]  # its numbers are chance, its calibration by chance perfect
    data = last.data
    classes = trained_classes(last)
    apart = classes is None and has_encoder(specs[0], tokenizer)
    heldout = read_shares(data, classifier=last.classifies)[1]
    rows, report = make_rows(heldout, data, tokenizer, classes=classes, encoder_decoder=apart)
    described = {
        "path": data.path,
        "dataset": data.dataset,
        "sources": [source.name for source in data.sources],
        "eval_path": data.eval_path,
        "dropped": dict(report.dropped),
        "responses_cut": report.responses_cut,
    }
    shared = (last.folder.read_env().get("vocabulary") or {}).get("shared")
    return EvaluationInputs(models, tokenizer, rows, device, described, shared, classes)
