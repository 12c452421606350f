"""From the specs of a finished run back to its models, as an evaluation takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from drkl.models.classes import class_names
from drkl.models.load import load_classifier, load_config, load_model, load_tokenizer
from drkl.models.precision import has_device, pick_device, resolve_dtype
from drkl.models.student import make_student
from drkl.training.spec import RunSpec

Loader = Callable[[], PreTrainedModel]


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
