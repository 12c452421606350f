"""What the student writes to the same held-out prompts at each evaluation, and its distance from the teacher there."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from drkl.data.examples import hash_of_id
from drkl.data.tokenize import Row
from drkl.losses.config import LossConfig
from drkl.objectives import Objective
from drkl.rollouts.answers import Answer
from drkl.rollouts.asking import Asker, answer_in, answered_row
from drkl.rollouts.config import PREFIX, RolloutsConfig
from drkl.rollouts.health import numbers_of
from drkl.runs import RunFolder, append_jsonl, lines_up_to, write_jsonl
from drkl.sealed import sealed
from drkl.training.heldout import HeldOut
from drkl.training.logs import begun, texts_digest

_log = logging.getLogger("drkl")
OF_DATA = ("distinct2", "repeated4")
"""Numbers that the data's responses to the prompts have too, for comparison."""


class HeldOutAnswers:
    """Held-out prompts that the student answers at each evaluation, each time with the same random numbers.

    Args:
        rows: held-out rows, with or without responses; some of them are chosen by a hash of seed and id.
        asker: has the answers written, with the student's weights of now.
        held_out: makes the rows' reader of answers (`HeldOut`), with teacher, batch size and vocabulary.
        tokenizer: decodes the texts that are kept.
        run: the folder that keeps them, in ``rollouts.jsonl``.
        config: the section `rollouts`: the number of prompts, at least 1, and of answers that are kept as text each
            time, those to the first of the chosen prompts.
        stops: the tokens that end an answer.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        asker: Asker,
        held_out: Callable[[Sequence[Row]], HeldOut],
        tokenizer: Any,
        run: RunFolder,
        config: RolloutsConfig,
        *,
        stops: Collection[int],
    ) -> None:
        hashes = {number: hash_of_id(f"{asker.seed} {row.id}") for number, row in enumerate(rows)}
        chosen = sorted(sorted(hashes, key=lambda number: (hashes[number], number))[: config.eval_prompts])
        self._rows = [rows[number] for number in chosen]
        self._asker, self._held_out, self._tokenizer, self._run = asker, held_out, tokenizer, run
        self._keep, self._stops = config.keep_texts, frozenset(stops)
        self._of_data = self._numbers_of_data()

    def evaluate(
        self, model: PreTrainedModel, objective: Objective, loss: LossConfig, *, step: int, keep: bool
    ) -> dict[str, float]:
        """Answer the prompts, and measure the answers.

        Args:
            model: the student, in eval mode.
            objective: what is minimised.
            loss: the loss around it. Its cross-entropy has no part here, as in training.
            step: the optimiser steps that were taken.
            keep: whether this process appends texts to ``rollouts.jsonl``, once for each step.

        Returns:
            The numbers of `numbers_of` and of `HeldOut.evaluate`, with ``rollout_`` before their names, and those of
            the data's responses to the same prompts, with ``response_``. Empty where no prompt leaves room for an
            answer.

        Raises:
            NonFiniteLoss: the loss on the answers is not finite.
            DrklError: the writer's, or a file that cannot be written.
        """
        answered = self._answer()
        if not answered:
            return {}
        if keep:
            self._keep_texts(answered, step)
        numbers = numbers_of([answer_in(row, self._stops) for row in answered], self._stops)
        values = self._held_out(answered).evaluate(model, objective, loss.model_copy(update={"kd_weight": 1.0}))
        values["loss"] *= loss.kd_weight
        return {PREFIX + name: value for name, value in (numbers | values).items()} | self._of_data

    def begin(self, from_step: int, history: Sequence[Mapping[str, Any]] = (), digest: str | None = None) -> None:
        """Start after a step; texts of later ones will come again. Called in one process.

        Args:
            from_step: the step of the checkpoint, below 0 for none.
            history: what was logged until then.
            digest: the `texts_digest` of the texts that were kept until then; None where it is not known.
        """
        path = self._run.rollouts_path
        kept, said = begun(path, from_step)
        texts = Counter(line["step"] for line in kept)
        measured = {line["step"] for line in history if f"eval_{PREFIX}loss" in line}
        lacking = sorted(step for step in measured if texts[step] < max(texts.values(), default=1))
        if lacking and self._keep and said is None:
            said = f"{path} lacks texts of the steps {', '.join(map(str, lacking))}: lines of it were lost."
        if said is None and digest not in (None, texts_digest(path, from_step)):
            said = f"{path} has other texts than those that this run wrote until step {from_step}."
        if said:
            _log.warning("Warning: %s", said)
        if os.path.lexists(path):
            write_jsonl(path, map(sealed, kept))

    def _answer(self) -> list[Row]:
        # Always the same pass, so that a prompt has the same random numbers each time.
        asked = [(row, request) for row in self._rows if (request := self._asker.request(row, 0)) is not None]
        answers = self._asker.answers([request for _, request in asked])
        return [answered_row(row, answer.token_ids) for (row, _), answer in zip(asked, answers, strict=True)]

    def _keep_texts(self, answered: Sequence[Row], step: int) -> None:
        path = self._run.rollouts_path
        if path.is_file() and any(line["step"] == step for line in lines_up_to(path, step)):
            return  # an evaluation after training, where the best weights may be back
        append_jsonl(path, [sealed(self._line(row, step)) for row in answered[: self._keep]])

    def _line(self, row: Row, step: int) -> dict[str, Any]:
        answer = answer_in(row, self._stops)
        return {
            "step": step,
            "id": row.id,
            "prompt": self._text(row.prompt_ids) if row.example is None else row.example.prompt_text,
            "text": self._text(row.response_ids),
            "finished": answer.finished,
            "num_tokens": len(answer.token_ids),
        }

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _numbers_of_data(self) -> dict[str, float]:
        texts = [row.response_ids[: self._asker.max_new_tokens] for row in self._rows if row.response_ids]
        numbers = numbers_of([Answer(ids, True) for ids in texts], self._stops)
        return {f"response_{name}": numbers[name] for name in OF_DATA if name in numbers}
