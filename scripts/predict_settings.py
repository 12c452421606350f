"""Predict from gradients how settings of the decoupling operator move agreement and overconfidence.

At a student's weights each setting has a direction of descent: its mean gradient on training rows, divided as Adam
divides it by the root of the mean square over batches, and brought to one length. The first-order change of a held-out
metric along it is a scalar product with the metric's own gradient, so that the student's capacity is part of it.

    python -m scripts.predict_settings STUDENT [--batches 24] [--rows 60] --output docs/results/settings.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from drkl.config import load_config
from drkl.data.collate import collate
from drkl.models.load import load_model
from drkl.objectives.variants import parse_variant
from drkl.training.run import Listener, prepare

SETTINGS = (
    "fkl", "rkl", "srkl", "dkd", "drkl:0.1", "drkl:0.25", "drkl:0.5", "drkl:1", "drkl@student", "drkl@teacher",
    "drkl@floor", "rkl+fkl:0.25", "rkl+fkl:0.5", "rkl+fkl:1", "rkl+fkl@teacher", "rkl+gjs:0.5", "fkl+rkl:0.1",
    "fkl+rkl:0.25", "fkl+rkl:0.5", "fkl+rkl:1", "fkl+rkl@student", "fkl+rkl@teacher", "fkl+rkl@floor",
    "symmetric_kl+rkl:0.5", "fkl+fkl@teacher",
)  # fmt: skip
METRICS = ("soft_agreement", "overconfidence", "fkl", "rkl")
HEAD = ("student", "setting", "loss", *(f"d_{name}" for name in METRICS), "cosine_with_drkl")
EPSILON = 1e-8
ROWS = 5
"""Rows of a batch; the quickstart's have about six."""


def metrics_of(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Sums over positions of what is differentiated; logits `[n, vocab]`.

    ``soft_agreement`` is the sigmoid of the margin of the teacher's top token over the highest other one.
    """
    top = teacher.argmax(-1, keepdim=True)
    others = student.scatter(-1, top, float("-inf")).amax(-1)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    own = student.argmax(-1, keepdim=True)
    return {
        "soft_agreement": torch.sigmoid(student.gather(-1, top).squeeze(-1) - others).sum(),
        "overconfidence": (log_q.gather(-1, own).exp() - log_p.gather(-1, own).exp()).sum(),
        "fkl": (log_p.exp() * (log_p - log_q)).sum(),
        "rkl": (log_q.exp() * (log_q - log_p)).sum(),
    }


def logits_at(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits `[n, vocab]` at the positions whose next token counts."""
    found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found[batch["labels"] != -100].float()


def batches_of(rows: Any, pad_id: int) -> Iterator[dict[str, Any]]:
    """Padded batches of rows in their order; a position's label is what follows it."""
    for place in range(0, len(rows), ROWS):
        yield collate(rows[place : place + ROWS], pad_id=pad_id)


def flat(parameters: list[Tensor], gradients: tuple[Tensor | None, ...]) -> Tensor:
    """All gradients one after another; zeros where there is none."""
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def gradients(student: str, batches: int, rows: int, recipe: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """By setting its loss, direction of descent and mean gradient; by metric its value and gradient."""
    with TemporaryDirectory() as folder:
        config, _ = load_config(
            recipe,
            [f"run.dir={folder}", "run.name=x", "stages=[]", f"student={{init: pretrained, model: {student}, "
             "freeze_embeddings: true}", f"training.eval_rows={rows}"],
        )  # fmt: skip
        trainer = prepare(config.specs(), Listener()).trainer(config.specs()[-1])
        pair = trainer.pair
        train = list(islice(batches_of(pair.rows, pair.tokenizer.pad_token_id), batches))
        held_out = list(batches_of(pair.eval_rows[:rows], pair.tokenizer.pad_token_id))
        model = pair.student.eval()
    teacher = load_model(str(config.teacher and config.teacher.model)).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    zeros = torch.zeros(sum(p.numel() for p in parameters))
    sums, squares = ({name: zeros.clone() for name in SETTINGS} for _ in range(2))
    losses = dict.fromkeys(SETTINGS, 0.0)
    total = sum(int((batch["labels"] != -100).sum()) for batch in train)
    for number, batch in enumerate(train):
        ours = logits_at(model, batch)
        with torch.no_grad():
            reference = logits_at(teacher, batch)
        for name in SETTINGS:
            values = parse_variant(name).objective(ours.log_softmax(-1), reference.log_softmax(-1))
            loss = values.sum() / total * len(train)
            own = flat(parameters, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
            sums[name].add_(own, alpha=1 / len(train))
            squares[name].addcmul_(own, own, value=1 / len(train))
            losses[name] += float(values.detach().sum()) / total
        print(f"{number + 1} of {len(train)} batches", flush=True)
    found = {
        name: (losses[name], _unit(sums[name] / (squares[name].sqrt() + EPSILON)), sums[name]) for name in SETTINGS
    }
    measured: dict[str, Any] = dict.fromkeys(METRICS, (0.0, 0.0))
    positions = sum(int((batch["labels"] != -100).sum()) for batch in held_out)
    for batch in held_out:
        with torch.no_grad():
            reference = logits_at(teacher, batch)
        parts = metrics_of(logits_at(model, batch), reference)
        for name, part in parts.items():
            own = flat(
                parameters, torch.autograd.grad(part / positions, parameters, retain_graph=True, allow_unused=True)
            )
            measured[name] = (measured[name][0] + float(part) / positions, measured[name][1] + own)
    return found, measured


def _unit(direction: Tensor) -> Tensor:
    return direction / direction.norm()


def lines(student: str, found: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[list[str]]:
    """The rows of the table: changes for a step of length 1 in the weights, and the cosine of the mean gradients."""
    own = _unit(found["drkl:0.5"][2])
    for name, (loss, direction, mean) in found.items():
        changes = [-float(direction @ measured[metric][1]) for metric in METRICS]
        yield [
            student,
            name,
            f"{loss:.4f}",
            *(f"{change:.5f}" for change in changes),
            f"{float(_unit(mean) @ own):.4f}",
        ]


def main() -> None:
    """Write the table, or add to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder of a student's weights")
    parser.add_argument("--name", help="what the table calls it", default="student")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    found, measured = gradients(asked.student, asked.batches, asked.rows, asked.recipe)
    is_new = not asked.output.exists()
    with asked.output.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(HEAD)
        writer.writerow([asked.name, "its value", "", *(f"{measured[name][0]:.5f}" for name in METRICS), ""])
        writer.writerows(lines(asked.name, found, measured))


if __name__ == "__main__":
    main()
