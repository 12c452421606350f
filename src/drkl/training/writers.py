"""What writes the answers of a run: the models in memory, or a server that is given the student's weights."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedModel

from drkl.models.ends import answer_start, stops_of
from drkl.processes import Share
from drkl.rollouts.answers import Writer
from drkl.rollouts.asking import Asker
from drkl.rollouts.builtin import BuiltInWriter
from drkl.rollouts.served import served_folder
from drkl.rollouts.server import PROBES, ServerWriter
from drkl.runs import RunFolder
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import Pair

Source = Literal["student", "mixed", "teacher"]


def builtin_writer(pair: Pair, args: DistillationConfig, source: Source) -> Writer:
    """What samples from the models in memory.

    Args:
        pair: with a teacher.
        args: ``args.rollouts`` says how.
        source: writer of the answers.
    """
    rollouts = args.rollouts
    student, teacher = _models(pair)
    return BuiltInWriter(
        student,
        teacher=teacher,
        source=source,
        teacher_share=rollouts.teacher_share,
        stops=answer_stops(pair, args, source),
        sampling_temperature=rollouts.sampling_temperature,
        top_p=rollouts.top_p,
        batch_size=rollouts.batch_size,
        precision=args.precision,
        vocab_size=pair.vocab_size,
        pad_id=pair.pad_id,
        begin=answer_begin(pair, source),
    )


def server_writer(pair: Pair, args: DistillationConfig, run: RunFolder) -> ServerWriter:
    """What asks a vLLM server, whose weights go through a folder beside the run's."""
    rows: Any = pair.rows
    return ServerWriter(
        pair.student,
        pair.tokenizer,
        args.rollouts,
        stops=answer_stops(pair, args, "student"),
        folder=served_folder(args.rollouts, run.root),
        prompts=[row.sampling_ids for row in rows[:PROBES]],
        adapter=pair.adapter,
        vocab_size=pair.vocab_size,
    )


def answer_begin(pair: Pair, source: Source) -> list[int]:
    """The ids that every answer of this writer begins with, which are not sampled."""
    student, teacher = _models(pair)
    return answer_start(teacher if source == "teacher" else student, pair.words)


def answer_stops(pair: Pair, args: DistillationConfig, source: Source) -> list[int]:
    """The ids that end an answer of this writer."""
    student, teacher = _models(pair)
    if source != "teacher":
        return stops_of(student, pair.words, args.template)
    # It may end an answer as its own chat template does, and not that of the rows.
    return stops_of(teacher, pair.words, args.template, pair.teacher_stops)


def make_asker(pair: Pair, args: DistillationConfig, writer: Writer, *, first_alone: bool = False) -> Asker:
    """What has the answers written, each process writing its part; with ``first_alone`` the first writes them all."""
    share = Share.of_group(first_alone=first_alone)
    return Asker(writer, seed=args.seed, max_new_tokens=pair.max_new_tokens, room=pair.room, share=share)


def _models(pair: Pair) -> tuple[PreTrainedModel, PreTrainedModel]:
    assert pair.teacher is not None, "check_rollouts refuses the rest"
    return pair.student, pair.teacher.model
