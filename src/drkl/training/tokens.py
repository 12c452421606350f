"""The one tokenizer of a run and its stages: the teacher's, the student's, or one learnt from the training text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drkl.data.classification import load_labelled
from drkl.data.examples import load_examples
from drkl.data.tokenizer import learn_tokenizer, texts_of
from drkl.models.forward import is_encoder_decoder
from drkl.models.load import load_config, load_tokenizer
from drkl.models.student import source_model, student_config
from drkl.training.spec import RunSpec

LEARNT = "a tokenizer learnt from the training text"


def tokenizer_name(first: RunSpec) -> str:
    """Where the tokenizer of a run comes from; ``LEARNT`` where it is made."""
    if first.tokenizer is not None:
        return LEARNT
    return first.teacher.model if first.teacher is not None else source_model(first.student, None)


def run_tokenizer(specs: Sequence[RunSpec]) -> Any:
    """Load the tokenizer of a run, or learn it from the training rows of all stages.

    Raises:
        DrklError: there is none, or no rows.
    """
    config, classifier = specs[0].tokenizer, specs[0].classifies
    if config is None:
        return load_tokenizer(tokenizer_name(specs[0]), classifier=classifier)
    sections = dict.fromkeys(spec.data for spec in specs)
    if classifier:
        texts = (text for data in sections for _, text, _ in load_labelled(data)[0])
        return learn_tokenizer(config, texts, classifier=True)
    return learn_tokenizer(config, (text for data in sections for text in texts_of(load_examples(data)[0])))


def has_encoder(first: RunSpec, tokenizer: Any) -> bool:
    """Whether the models of a run are encoder-decoders; student and teacher are of one kind."""
    if first.teacher is not None:
        return is_encoder_decoder(load_config(first.teacher.model))
    return is_encoder_decoder(student_config(first.student, None, tokenizer))
