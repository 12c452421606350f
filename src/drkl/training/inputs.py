"""From the specs of a finished run back to its models and rows, as an evaluation takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from drkl.data.examples import load_examples
from drkl.data.tokenize import Row, tokenize_examples
from drkl.models.load import load_model, load_tokenizer
from drkl.models.precision import has_device, pick_device, resolve_dtype
from drkl.models.student import make_student
from drkl.training.spec import RunSpec
from drkl.training.tokens import has_encoder

Loader = Callable[[], PreTrainedModel]


class EvaluationInputs(NamedTuple):
    """What the evaluation of one run needs."""

    models: dict[str, Loader]
    tokenizer: Any
    rows: list[Row]
    device: torch.device
    data: dict[str, Any]
    vocab_size: int | None
    """How many ids the models were compared on in training, where that is not all."""


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
    tokenizer = load_tokenizer(str(last.folder.student_path))
    loaders: dict[str, Loader] = {}
    if last.teacher is not None:
        teacher = last.teacher
        loaders["teacher"] = lambda: load_model(teacher.model, resolve_dtype(teacher.dtype, device))
    teacher_name = first.teacher.model if first.teacher else None
    loaders["before"] = lambda: make_student(first.student, teacher_name, first.run.seed, tokenizer)
    if len(specs) > 1:
        loaders["warmup"] = lambda: load_model(str(specs[-2].folder.student_path), last.student.dtype)
    loaders["after"] = lambda: load_model(str(last.folder.student_path), last.student.dtype)
    return {name: loaders[name] for name in names if name in loaders}, tokenizer, device


def evaluation_inputs(specs: Sequence[RunSpec]) -> EvaluationInputs:
    """Models, tokenizer and held-out rows of a finished run."""
    models, tokenizer, device = evaluation_models(specs)
    last = specs[-1]
    data = last.data
    _, heldout = load_examples(data)
    settings = data.row_settings | {"encoder_decoder": has_encoder(specs[0], tokenizer)}
    rows, report = tokenize_examples(heldout, tokenizer, **settings)
    described = {
        "path": data.path,
        "dataset": data.dataset,
        "sources": [source.name for source in data.sources],
        "eval_path": data.eval_path,
        "dropped": dict(report.dropped),
        "responses_cut": report.responses_cut,
    }
    shared = (last.folder.read_env().get("vocabulary") or {}).get("shared")
    return EvaluationInputs(models, tokenizer, rows, device, described, shared)
