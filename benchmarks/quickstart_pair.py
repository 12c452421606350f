"""The pair that training is measured with, and rows for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drkl.config import load_config
from drkl.data.examples import read_examples
from drkl.models.load import load_model, load_tokenizer, quiet_transformers
from drkl.models.prune import pruned


def write_pair(folder: Path, student: str = "pruned") -> None:
    """Write the quickstart's teacher and the student it starts from, or another, each with the tokenizer."""
    quiet_transformers()
    config = load_config("quickstart")[0]
    name: Any = config.teacher.model if config.teacher is not None else None
    large = load_model(name, "fp32")
    layers: Any = config.student.layers
    small = pruned(large, layers) if student == "pruned" else load_model(student, "fp32")
    for kind, model in (("teacher", large), ("student", small)):
        model.save_pretrained(folder / kind)
        load_tokenizer(name).save_pretrained(folder / kind)


def single_turns() -> list[dict[str, Any]]:
    """The rows of the bundled Dolly slice that have one question and its answer."""
    examples = (example for example in read_examples("bundled:dolly") if len(example.messages) == 2)
    return [{"messages": [dict(message) for message in example.messages]} for example in examples]
