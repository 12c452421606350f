"""The best weights of a run: the choice goes on among those that are there, whatever became of others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from transformers import TrainerState

from drkl.training.checkpoints import damage, own_checkpoints, step_of

_log = logging.getLogger("drkl")


class Best(NamedTuple):
    """The weights with the lowest held-out loss."""

    step: int | None = None
    """The optimiser step after which they were; None: none were measured."""
    loss: float | None = None
    """Their held-out loss, in nats."""
    path: Path | None = None
    """Their checkpoint; None for the weights in memory."""


def heldout_loss_at(state: TrainerState, step: int) -> float | None:
    """The held-out loss that was measured after a step, in nats; None where none was."""
    return _heldout_losses(state).get(step)


def _heldout_losses(state: TrainerState) -> dict[int, float]:
    return {int(row["step"]): row["eval_loss"] for row in state.log_history if "eval_loss" in row}


def find_best(folder: Path, state: TrainerState, *, read: bool, ended: bool, whole: Path | None = None) -> Best:
    """Return the best weights that are there, and say so where the best that there were are gone or damaged.

    Args:
        folder: ``checkpoints/`` of the run.
        state: the trainer's; its ``best_global_step`` is not None.
        read: whether the files of checkpoints are read and compared with their checksums.
        ended: whether training has ended, so that the weights in memory take part.
        whole: a checkpoint that is known to be whole.
    """
    step = state.best_global_step
    path = folder / f"checkpoint-{step}"
    reason = _why_not(path, read=read and path != whole)
    if reason is None:
        return Best(step, state.best_metric, path)
    best = _best_of_others(folder, state, path, read=read, ended=ended)
    then = f"step {best.step} has it now, {best.loss:.4f}" if best.loss is not None else "no other is left"
    _log.warning(
        "Warning: checkpoint-%s, which had the lowest held-out loss (%.4f), %s; %s.",
        step,
        state.best_metric,
        reason,
        then,
    )
    return best


def _best_of_others(folder: Path, state: TrainerState, gone: Path, *, read: bool, ended: bool) -> Best:
    losses, reached = _heldout_losses(state), state.global_step
    there: dict[int, Path | None] = {step_of(path): path for path in own_checkpoints(folder) if path != gone}
    if ended:
        there[reached] = None
    for step in sorted((step for step in there if step in losses and step <= reached), key=lambda step: losses[step]):
        path = there[step]
        if path is None or _why_not(path, read=read) is None:
            return Best(step, losses[step], path)
    return Best()


def _why_not(path: Path, *, read: bool) -> str | None:
    """Why the weights of a checkpoint cannot be used, in words that go on after its name; None where they can."""
    if path.is_symlink() or not path.is_dir():
        return "is gone"
    found = damage(path) if read else None
    return found and f"is damaged ({found})"
