"""On-policy distillation in the training loop: from the plan's rows to micro-batches of answers, and their record."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from drkl.data.collate import collate
from drkl.data.examples import hash_of_id
from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX
from drkl.models.forward import decoder_start
from drkl.models.sharded import is_sharded
from drkl.processes import first_alone, gather
from drkl.rollouts.asking import answer_in
from drkl.rollouts.health import RolloutLog
from drkl.rollouts.steps import AnsweredSteps, cut
from drkl.runs import RunFolder, read_json, write_json
from drkl.training.arguments import DistillationConfig
from drkl.training.checkpoints import step_of
from drkl.training.pair import Pair
from drkl.training.plan import cut_step, cuts_by_cost
from drkl.training.sharding import asks_for_fsdp
from drkl.training.writers import answer_begin, answer_stops, builtin_writer, make_asker, server_writer

_log = logging.getLogger("drkl")
PADDING = (64, 4096)
"""Positions of padding that cost as much as another part of a step, on a processor and on a GPU, which is idle without
much work in a call."""
STATE = "rollouts.json"
"""In a checkpoint: answers that were not trained on yet, and those that may be replayed."""


class OnPolicy:
    """Makes the micro-batches of each step, answers written first.

    Args:
        pair: models and rows.
        args: how to train; ``args.rollouts`` is on.
        run: the run's folder.
        steps: the numbers of the rows of every step.
        ends: the steps after which a pass over the rows ends.
    """

    def __init__(
        self,
        pair: Pair,
        args: DistillationConfig,
        run: RunFolder,
        steps: Sequence[Sequence[int]],
        ends: Sequence[int],
    ) -> None:
        self._pair, self._args = pair, args
        self._slots = args.gradient_accumulation_steps * args.world_size
        self._start = decoder_start(pair.student)
        rollouts = args.rollouts
        server = server_writer(pair, args, run) if rollouts.generator == "vllm" else None
        writer = server or builtin_writer(pair, args, rollouts.source)
        self._asker = make_asker(pair, args, writer, first_alone=server is not None)
        rows: Any = pair.rows
        self._server = server
        self._answered = AnsweredSteps(rows, steps, ends, rollouts, self._asker)
        if server is not None:
            self._answered.before_writing = lambda step: server.sync(pair.student, step)
        self._stops = answer_stops(pair, args, rollouts.source)
        self._sums, self._log = _Sums(), RolloutLog()

    def check_server(self) -> None:
        """Raise DrklError where answers come from a server that cannot be reached, or is none for this run."""
        if self._server is not None:
            first_alone(self._server.look)

    def on_writing(self, hook: Callable[[int, int], None]) -> None:
        """Call ``hook(answers written, answers due)`` while a set of answers is written."""
        self._asker.on_writing = hook

    def micro_batches(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of this process in a step, and the number of tokens in the step over all processes.

        A micro-batch is a list of parts, cut by the lengths that were really written; all processes have the same
        number of parts.
        """
        before = self._answered.seconds
        rows = self._answered.rows_of(step)
        self._sums.generating += self._answered.seconds - before
        self._sums.steps += 1
        self._sums.rows += len(rows)
        self._sums.sampled += sum(row.sampled for row in rows)
        self._log.add([answer_in(row, self._stops) for row in rows if row.sampled], self._stops)
        args = self._args
        tokens = None if args.tokens_per_step is None else max(1, args.tokens_per_step // self._slots)
        if any(row.sampled for row in rows):
            slots = cut(
                rows,
                self._slots,
                tokens=tokens,
                rows_per_part=args.per_device_train_batch_size,
                padding=PADDING[args.device.type != "cpu"],
                side_by_side=args.world_size > 1,
                packed=self._pair.packed,
            )
        else:  # as planned, and so the step that a run without answers takes
            alike = cuts_by_cost(args, args.world_size)
            slots = [[part] for part in cut_step(rows, self._slots, alike=alike, packed=self._pair.packed)]
        mine = slots[args.process_index :: args.world_size]
        ends = itertools.accumulate(row.num_trained for row in rows)
        firsts = {id(row): end - row.num_trained for row, end in zip(rows, ends, strict=True)}
        batches = [{"parts": [self._batch(part, firsts) for part in slot]} for slot in mine]
        return batches, sum(row.num_trained for row in rows)

    def _batch(self, rows: Sequence[Any], firsts: Mapping[int, int]) -> dict[str, Any]:
        """The batch of some rows; ``firsts`` has the place of the first trained token of each in the step."""
        batch = collate(rows, pad_id=self._pair.pad_id, decoder_start=self._start, packed=self._pair.packed)
        # Cross-entropy and the log tell answers from the data's responses.
        keep = batch["labels"] != IGNORE_INDEX
        sampled = torch.zeros_like(keep)
        sampled[keep] = torch.tensor([row.sampled for row in rows for _ in range(row.num_trained)], dtype=torch.bool)
        places = [place for row in rows for place in range(firsts[id(row)], firsts[id(row)] + row.num_trained)]
        return batch | {"sampled": sampled, "places": torch.tensor(places, dtype=torch.int64)}

    def moment(self) -> Callable[[], None]:
        """Note what making the micro-batches of a step changes, and return what undoes it."""
        sums, log, answered = replace(self._sums), deepcopy(self._log), self._answered.moment()

        def undo() -> None:
            self._sums, self._log = sums, log
            answered()

        return undo

    def learnt(self, seconds: float) -> None:
        """Note how long a micro-batch took."""
        self._sums.learning += seconds

    def numbers(self) -> dict[str, float]:
        """What is logged of the steps since the last call."""
        sums, self._sums = self._sums, _Sums()
        clocks = gather([(sums.generating, sums.learning)])
        sums.generating, sums.learning = (fmean(seconds) for seconds in zip(*clocks, strict=True))
        return sums.means() | self._log.pop()

    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs into a checkpoint."""
        logged = {"log": self._log.state(), "sums": asdict(self._sums)}
        state = self._answered.state(step_of(checkpoint)) | logged
        write_json(checkpoint / STATE, {"digest": _digest(state)} | state)

    def begin(self, checkpoint: Path | None) -> None:
        """Start anew, whatever was trained before; or go on from a checkpoint.

        Answers of other settings or rows than the run's own are left out, with a warning.

        Raises:
            DrklError: it was written by a run without sampled answers, or its answers are broken.
        """
        self._answered.clear()
        self._sums, self._log = _Sums(), RolloutLog()
        if checkpoint is None:
            return
        if not (checkpoint / STATE).is_file():
            raise DrklError(
                f"{str(checkpoint)!r} has no {STATE}: its run trained on the data's responses alone. Leave "
                "rollout_share at 0 to go on with it, or start a new run."
            )
        try:
            state = read_json(checkpoint / STATE)
            if state.pop("digest") != _digest(state):
                raise ValueError("it was changed after it was written")
            other = self._answered.load_state(state, step_of(checkpoint))
            self._log.restore(state["log"])
            self._sums = _Sums(**state["sums"])
        except (AttributeError, DrklError, KeyError, TypeError, ValueError) as error:
            raise DrklError(
                f"{str(checkpoint / STATE)!r} does not hold the answers of a run ({error!r}). Remove that checkpoint "
                "to go on from the one before it."
            ) from error
        if other is not None and self._args.process_index == 0:
            _log.warning(
                "Warning: the answers in %s are left out, and new ones are written: %s.", checkpoint.name, other
            )


def _digest(state: dict[str, Any]) -> str:
    return hash_of_id(json.dumps(state, sort_keys=True)).hex()


@dataclass
class _Sums:
    """Sums over the steps since the last line of the log."""

    generating: float = 0.0
    """Seconds; those of learning likewise."""
    learning: float = 0.0
    steps: int = 0
    rows: int = 0
    sampled: int = 0

    def means(self) -> dict[str, float]:
        if not self.steps:
            return {}
        return {
            "rollout_share": self.sampled / max(1, self.rows),
            "seconds_generating": self.generating / self.steps,
            "seconds_learning": self.learning / self.steps,
        }


def check_rollouts(pair: Pair, args: DistillationConfig) -> None:
    """Raise DrklError where answers cannot be sampled for this pair."""
    if pair.classes is not None:
        raise DrklError(
            "rollout_share is above 0, but the models are classifiers, which write no answers. Leave it out."
        )
    if pair.teacher is None:
        raise DrklError(
            "rollout_share is above 0, but there is no teacher to judge the sampled answers; pass teacher_model, or "
            "leave it out."
        )
    if asks_for_fsdp(args) or is_sharded(pair.student):
        raise _in_pieces("FSDP" if asks_for_fsdp(args) else "fully_shard")
    if args.rollouts.source != "student" and is_sharded(pair.teacher.model):
        raise DrklError(
            f"rollout_source is {args.rollouts.source!r} and the teacher's weights are cut over the processes, but an "
            "answer needs all of them in one. Use rollout_source='student', or leave teacher_shard out."
        )
    given = len(answer_begin(pair, args.rollouts.source))
    if pair.max_new_tokens <= given:
        raise DrklError(
            f"rollout_max_new_tokens is {pair.max_new_tokens}, and the first {given} token(s) of every answer are "
            f"given and not sampled, so nothing would be written. Set it to at least {given + 1}."
        )


def check_whole(trainer: Any) -> None:
    """Raise DrklError where no process has the whole student, to write with or to send to a server."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled:
        raise _in_pieces("FSDP")
    if plugin and plugin.zero_stage == 3:
        raise _in_pieces("DeepSpeed ZeRO-3")


def _in_pieces(wrapper: str) -> DrklError:
    return DrklError(
        f"rollout_share is above 0 and {wrapper} cuts the student's weights over the processes, but an answer needs "
        "all of them in one. Use DistributedDataParallel (torchrun or accelerate without FSDP) or DeepSpeed ZeRO-1 or "
        "ZeRO-2; LoRA or gradient checkpointing save memory there."
    )
