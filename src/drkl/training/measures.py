"""What evaluations during training measure on the held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from drkl.data.rows import Rows
from drkl.data.stored import column, take
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.models.forward import decoder_start
from drkl.objectives import Objective
from drkl.rollouts.config import PREFIX
from drkl.runs import RunFolder
from drkl.training.arguments import DistillationConfig
from drkl.training.heldout import HeldOut
from drkl.training.heldout_answers import HeldOutAnswers
from drkl.training.pair import Pair
from drkl.training.writers import answer_stops, builtin_writer, make_asker


class Measures:
    """The loss on the responses of held-out rows and, where answers are sampled, on the student's own answers to them.

    Args:
        responses: reads the rows that have responses; None where none has.
        answers: answers the prompts; None where none are to be answered.
    """

    def __init__(self, responses: HeldOut | None, answers: HeldOutAnswers | None) -> None:
        self._responses, self.answers = responses, answers

    def evaluate(
        self, model: PreTrainedModel, objective: Objective, loss: LossConfig, *, step: int, keep: bool
    ) -> dict[str, float]:
        """The numbers of both, the loss of answers alone where no row has a response.

        Args:
            model: the student, in eval mode.
            objective: what is minimised.
            loss: the loss around it.
            step: the optimiser steps that were taken.
            keep: whether this process keeps some answers as text.

        Raises:
            NonFiniteLoss: the loss is not finite.
            DrklError: the answers cannot be written.
        """
        values: dict[str, float] = {}
        if self._responses is not None:
            values |= self._responses.evaluate(model, objective, loss)
        if self.answers is not None:
            values |= self.answers.evaluate(model, objective, loss, step=step, keep=keep)
        return values if self._responses is not None else {"loss": values[f"{PREFIX}loss"]} | values

    def begin(self, from_step: int, history: Sequence[Mapping[str, Any]] = (), texts: str | None = None) -> None:
        """Start after a step; what was kept of later ones will come again. Called in one process.

        Args:
            from_step: the step of the checkpoint, below 0 for none.
            history: what was logged until then.
            texts: the `texts_digest` of the answers that were kept until then.
        """
        if self.answers is not None:
            self.answers.begin(from_step, history, texts)


def make_measures(rows: Rows, pair: Pair, args: DistillationConfig, run: RunFolder) -> Measures:
    """What measures these held-out rows.

    Args:
        rows: at least one.
        pair: the models.
        args: how to train.
        run: the folder that keeps answers.

    Raises:
        DrklError: there would be nothing to measure.
    """

    def reader(some: Sequence[Any], remember: bool = False) -> HeldOut:
        return HeldOut(
            some,
            pair.pad_id,
            pair.teacher,
            rows_per_batch=args.per_device_eval_batch_size,
            decoder_start=decoder_start(pair.student),
            vocab_size=pair.vocab_size,
            merged_ids=pair.merged_ids,
            remember=remember,
            packed=pair.packs_heldout,
        )

    rollouts = args.rollouts
    if not rollouts.is_on:
        return Measures(reader(rows, remember=True), None)
    any_rows: Sequence[Any] = rows
    answers = None
    if rollouts.eval_prompts:
        answers = HeldOutAnswers(
            any_rows,
            make_asker(pair, args, builtin_writer(pair, args, "student")),
            reader,
            pair.tokenizer,
            run,
            rollouts,
            stops=answer_stops(pair, args, "student"),
        )
    with_response = take(any_rows, np.flatnonzero(column(any_rows, "response")))
    if not with_response and answers is None:
        raise DrklError(
            "The held-out rows have no responses and rollout_eval_prompts is 0, so there is nothing to measure on "
            "them. Set it to the number of prompts that the student is to answer, or leave the held-out rows out."
        )
    return Measures(reader(with_response, remember=True) if with_response else None, answers)
