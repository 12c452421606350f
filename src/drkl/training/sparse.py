"""A teacher of which the k largest logits are known: what a run can learn from it, and what its student misses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from drkl.errors import DrklError
from drkl.losses.topk import TopK, objective_on_classes
from drkl.models.forward import decoder_start, lm_head
from drkl.models.readout import batches
from drkl.objectives.base import on_classes
from drkl.teachers.cached import TeacherCache
from drkl.teachers.stored import StoredTopK
from drkl.teachers.teacher import Teacher
from drkl.training.arguments import DistillationConfig

if TYPE_CHECKING:
    from drkl.training.pair import Pair

POSITIONS = 4096
"""At most so many positions tell how much of the teacher is known."""


def learns_from_teacher(args: DistillationConfig) -> bool:
    """Whether the loss of a run compares with a teacher."""
    return args.kd_weight > 0 and args.make_objective().needs_teacher


def check_sparse(teacher: Teacher | None, args: DistillationConfig) -> None:
    """Raise DrklError where a cache of the k largest logits has not what the loss of a run asks for."""
    if not isinstance(teacher, TeacherCache) or not isinstance(stored := teacher.stored, StoredTopK):
        return
    if not learns_from_teacher(args):
        return
    objective_on_classes(args.make_objective())
    if args.temperature not in stored.temperatures:
        known = " and ".join(f"{t:g}" for t in stored.temperatures)
        raise DrklError(
            f"The temperature of the loss is {args.temperature:g}, and the cache {str(teacher.folder)!r} knows what "
            f"the tokens beyond its {stored.k} add up to at {known} alone. Use one of those, or make a "
            "cache of kind topk with this temperature too."
        )


def check_sparse_vocabulary(pair: Pair) -> None:
    """Raise DrklError where the cached teacher was compared on other ids than those that a pair shares."""
    if not isinstance(pair.teacher, TeacherCache) or not isinstance(stored := pair.teacher.stored, StoredTopK):
        return
    shared = pair.vocab_size or lm_head(pair.student).vocab_size
    if stored.vocab_size != shared:
        raise DrklError(
            f"The cache {str(pair.teacher.folder)!r} is over the first {stored.vocab_size} ids, and this student is "
            f"compared with its teacher on {shared}. What the tokens beyond its {stored.k} add up to cannot be cut: "
            "make a cache with this student."
        )


@torch.no_grad()
def sparse_notes(pair: Pair, args: DistillationConfig) -> list[str]:
    """What a student will not see of a teacher of which a few logits are known, in a line; nothing for any other.

    Args:
        pair: the teacher is asked for its first rows.
        args: the loss of the run.
    """
    if pair.teacher is None or pair.teacher.k is None or not learns_from_teacher(args):
        return []
    masses, tails = list[torch.Tensor](), list[torch.Tensor]()
    for batch in batches(_first_rows(pair), pad_id=pair.pad_id, decoder_start=decoder_start(pair.student)):
        known = pair.teacher.states(batch)
        assert isinstance(known, TopK)
        mass, tail = known.masses(args.temperature)
        masses.append(mass)
        tails.append(tail)
    if not masses:
        return []
    k, objective, mass, tail = pair.teacher.k, args.make_objective(), torch.cat(masses), torch.cat(tails)
    near = ""
    if on_classes(objective) == "approximation":
        near = f" The value of {objective.name} is an approximation then, and no lower bound."
    return [
        f"The student sees the teacher's {k} most probable tokens, and all others as one class: at {len(mass):,} "
        f"positions the {k} have {_percent(mass)} of its mass, and {_percent(tail)} of what is beside the most "
        f"probable one.{near} The probe of `drkl cache` says what that loses."
    ]


def describe_sparse(pair: Pair) -> dict[str, Any] | None:
    """For ``env.json``: how much was known of the teacher, and what the log's numbers are then; None where all was."""
    if pair.teacher is None or pair.teacher.k is None:
        return None
    return {
        "k": pair.teacher.k,
        "log": "the KLs and the teacher's entropy are of k + 1 classes, lower bounds; the agreement is exact",
    }


def card_note(pair: Pair, args: DistillationConfig) -> str | None:
    """For the model card: how much was known of the teacher; None where all was, and where it taught nothing."""
    if pair.teacher is None or pair.teacher.k is None or not learns_from_teacher(args):
        return None
    return f"It learnt from its teacher's {pair.teacher.k} most probable tokens, with all others as one class."


def _first_rows(pair: Pair) -> list[Any]:
    rows, count = list[Any](), 0
    for row in pair.rows:
        if not row.num_trained:  # a prompt alone
            continue
        if count + row.num_trained > POSITIONS and rows:
            break
        rows.append(row)
        count += row.num_trained
    return rows


def _percent(shares: torch.Tensor) -> str:
    """A mean share; what is not all is not rounded to it."""
    return f"{math.floor(1e4 * float(shares.double().mean())) / 100:g} %"
