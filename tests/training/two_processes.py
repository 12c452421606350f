"""Started by test_distributed in every process: trains one step and writes rank 0's gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.test_trainer import Gradients, make_trainer, rows


def answers_of(trainer: Any) -> list[tuple[int, ...]]:
    """A list that is filled, as the trainer trains, with the tokens of every answer, of all processes."""
    asker, kept = trainer._on_policy._asker, list[tuple[int, ...]]()
    ask = asker.answers

    def answers(requests: Any, **words: Any) -> Any:
        found = ask(requests, **words)
        kept.extend(tuple(answer.token_ids) for answer in found)
        return found

    asker.answers = answers
    return kept


def main(folder: Path, count: int, accumulation: int, share: float) -> None:
    """With a share of answers, three steps: the weights have to stay the same, or the answers would differ."""
    kept = Gradients()
    rollouts = {"rollout_share": share, "rollout_max_new_tokens": 6, "max_steps": 3} if share else {}
    trainer = make_trainer(
        folder, rows(count), callbacks=[kept], gradient_accumulation_steps=accumulation, ddp_backend="gloo",
        ddp_find_unused_parameters=False, **rollouts,
    )  # fmt: skip
    answers = answers_of(trainer) if share else []
    trainer.train()
    if trainer.is_world_process_zero():
        gradients = {name.removeprefix("module."): gradient for name, gradient in kept.first.items()}
        facts = {"tokens": trainer.num_tokens_seen, "loss": trainer.state.log_history[0]["loss"]}
        facts["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        facts["answers"] = answers
        facts["weights"] = dict(trainer.student.state_dict())
        torch.save({"gradients": gradients, "world": trainer.args.world_size, **facts}, folder / "out.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) > 4 else 0.0)
