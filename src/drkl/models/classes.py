"""Sequence classifiers: the names of their classes, and whether two models have the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drkl.errors import DrklError

_SUFFIX = "ForSequenceClassification"


def is_classifier(model_or_config: Any) -> bool:
    """Whether this model, or the model that this config was saved with, is a sequence classifier."""
    config = getattr(model_or_config, "config", None)
    names = getattr(model_or_config, "architectures", None) if config is None else [type(model_or_config).__name__]
    return any(str(name).endswith(_SUFFIX) for name in names or ())


def class_names(model_or_config: Any, name: str) -> tuple[str, ...]:
    """Return the classes of a classifier in the order of their ids.

    Args:
        model_or_config: the classifier, or its config as saved.
        name: the model's name in errors.

    Raises:
        DrklError: no classifier, a regression, several labels for one text, or two classes of one name.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not is_classifier(model_or_config):
        raise DrklError(
            f"{name!r} is no classifier (its config.json says {getattr(config, 'architectures', None)}), so it has no "
            "class logits. Use a model that was trained for sequence classification."
        )
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise DrklError(
            f"{name!r} has {config.num_labels} output(s) and the problem_type {kind!r}; a text must have exactly one "
            "of two or more classes here."
        )
    classes = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise DrklError(f"{name!r} calls two of its classes {twice!r}; rename one in id2label of its config.json.")
    return classes


def check_classes(model_or_config: Any, classes: Sequence[str], name: str) -> None:
    """Raise DrklError unless a classifier has these classes in this order.

    Every objective compares class number i of the student with class number i of the teacher.
    """
    ours = class_names(model_or_config, name)
    if ours == tuple(classes):
        return
    if sorted(ours) == sorted(classes):
        first = next(i for i, pair in enumerate(zip(ours, classes, strict=True)) if pair[0] != pair[1])
        what = f"the same classes in another order (class {first}: {ours[first]!r}, expected {classes[first]!r})"
    elif len(ours) != len(classes):
        what = f"{len(ours)} classes, expected {len(classes)}"
    else:
        strange = next(name for name in ours if name not in classes)
        what = f"other classes (for instance {strange!r}; expected {classes[0]!r} and so on)"
    raise DrklError(
        f"{name!r} has {what}. Student and teacher are compared class by class, by number: choose models of one set of "
        "labels, or a student without a head (a bare encoder, init: random), which takes the teacher's."
    )


def label_fields(classes: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a model config that name its classes."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": "single_label_classification",
    }
