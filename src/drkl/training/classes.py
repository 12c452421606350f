"""The classes of a classification run: the teacher's, the student's, or the labels of the training rows."""

from __future__ import annotations

from collections.abc import Sequence

from drkl.data.classification import label_set, load_labelled
from drkl.models.classes import class_names, is_classifier
from drkl.models.load import load_config
from drkl.training.spec import RunSpec

TWO_CLASSES = (
    "With two classes the tail is one class, and its divergence K is 0: every unskewed drkl equals rkl here (dkd is "
    "its target term alone), so a two-class task cannot show what decoupling does."
)


def run_classes(specs: Sequence[RunSpec]) -> tuple[str, ...] | None:
    """The names of the classes by number, one set for all stages; None where the task is generation.

    Raises:
        DrklError: a teacher that is no classifier, or training rows of fewer than two labels.
    """
    first = specs[0]
    if first.task != "classification":
        return None
    if first.teacher is not None:
        return class_names(load_config(first.teacher.model), first.teacher.model)
    student = first.student
    if student.model is not None and student.init != "random":
        config = load_config(student.model)
        if is_classifier(config):
            return class_names(config, student.model)
    return label_set(row for data in dict.fromkeys(spec.data for spec in specs) for row in load_labelled(data)[0])


def is_two_class(specs: Sequence[RunSpec], classes: Sequence[str] | None) -> bool:
    """Whether decoupling changes nothing in this run, though its objective decouples."""
    decouples = any(spec.objective.name in ("drkl", "dkd") for spec in specs)
    return classes is not None and len(classes) == 2 and decouples
