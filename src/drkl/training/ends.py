"""Where answers end in a run: what rows, student and teacher say of it, and what the student learns."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from drkl.data.ends import taught_ends
from drkl.models.ends import set_ends, stops_of
from drkl.rollouts.stops import Agreement, agree_on_stops
from drkl.teachers.live import LiveTeacher
from drkl.teachers.stops import Stops, read_stops
from drkl.training.arguments import DistillationConfig

FACTOR = 10.0
"""The teacher means another end where it gives that one so many times the probability of the taught one, and so many
times what a token has on average; a teacher that would go on writing means none."""
_log = logging.getLogger("drkl")


class Ends(NamedTuple):
    """The probabilities that the teacher gives the taught ends, and its own most probable other, after a turn."""

    taught: str
    taught_probability: float
    own: str | None
    own_probability: float
    num_ends: int
    vocab_size: int
    own_id: int | None = None

    @property
    def differ(self) -> bool:
        """Whether the teacher means another token than the rows."""
        least = FACTOR * max(self.taught_probability, 1 / self.vocab_size)
        return self.own is not None and self.own_probability > least

    def warning(self) -> str:
        """The sentence for the user where they differ."""
        return (
            f"The rows end a turn with {self.taught!r}, and the teacher with {self.own!r}: at the ends of "
            f"{self.num_ends} turns it gives {self.taught!r} a mean probability of {self.taught_probability:.2g} and "
            f"{self.own!r} {self.own_probability:.2g}. The student learns the teacher's, which is added to those that "
            "stop it. To teach one end alone, write the rows as the teacher writes its turns: data.template: chat with "
            "the teacher's tokenizer and chat template (in Python template and processing_class), or set the "
            "tokenizer's eos_token."
        )

    def as_record(self) -> dict[str, Any]:
        """For ``env.json``."""
        record = self._asdict() | {"differ": self.differ}
        del record["own_id"]
        return record


class Settled(NamedTuple):
    """Where answers end, as far as a run has to know it later."""

    notes: Sequence[str] = ()
    """Notes for the user."""
    ends: Ends | None = None
    """Where the teacher ends a turn, and where the rows do; None where nothing is learnt of it, or no row is whole."""
    merged_ids: tuple[int, ...] = ()
    """The stop tokens that count as one event in the loss; empty where each counts for itself."""
    teacher_stops: Sequence[int] = ()
    """The teacher's stop tokens; empty where it was not asked."""


def settle_ends(
    student: PreTrainedModel,
    teacher: LiveTeacher | None,
    rows: Any,
    eval_rows: Any,
    tokenizer: Any,
    args: DistillationConfig,
    *,
    listed: Sequence[int],
    pad_id: int,
    vocab_size: int | None,
    teacher_tokenizer: Any,
) -> Settled:
    """Find out where answers end, refuse two models that cannot agree on it, and give the student all ends it learns.

    Args:
        student: as it came; its settings are changed.
        teacher: on its device; None for none.
        rows: the training rows, of a language model.
        eval_rows: the held-out rows, which are read too where few training rows are whole.
        tokenizer: the run's.
        args: whether answers are sampled, and by whom.
        listed: the ids that end an answer by the settings of the teacher, or of the student where there is none.
        pad_id: fills batches; its value changes nothing.
        vocab_size: the number of ids, from 0, that are compared; None for all.
        teacher_tokenizer: the teacher's own; None where it has none but the run's.

    Raises:
        DrklError: the teacher stops with another token, or ``rollouts.stop_map`` has an entry that is no such pair.
    """
    rollouts, samples = args.rollouts, args.rollouts.is_on
    taught = [*taught_ends(rows, tokenizer), *listed]
    learns = args.kd_weight > 0 and args.make_objective().needs_teacher
    agreement, ends, theirs = Agreement(), None, list[int]()
    if teacher is not None and (samples or learns):
        everything, asked = itertools.chain(rows, eval_rows), student if samples else None
        given: dict[str, Any] = {"pad_id": pad_id, "teacher_tokenizer": teacher_tokenizer}
        stops = read_stops(asked, teacher, everything, tokenizer, taught, **given)
        theirs, by_teacher = stops.teacher, rollouts.source == "teacher"
        if samples:
            kind: dict[str, Any] = {"vocab_size": vocab_size, "refuse": not by_teacher}
            agreement = agree_on_stops(stops, tokenizer, rollouts.stop_map, **kind)
            taught += agreement.merged_ids
            taught += [token for token in theirs if by_teacher and (vocab_size is None or token < vocab_size)]
        ends = compare_ends(stops, tokenizer, agreement.merged_ids) if learns else None
    warning = agreement.warning
    if ends is not None and ends.differ and ends.own_id is not None:
        taught.append(ends.own_id)
        warning = ends.warning()  # in place of the other, which is no news then
    if warning is not None and args.process_index == 0:
        _log.warning("Warning: %s", warning)
    notes = [] if agreement.note is None else [agreement.note]
    notes += set_ends(student, tokenizer, stops_of(student, tokenizer, args.template, taught))
    return Settled(notes, ends, agreement.merged_ids, theirs)


def compare_ends(stops: Stops, tokenizer: Any, merged_ids: Sequence[int] = ()) -> Ends | None:
    """Judge whether the teacher ends a turn with the token that the rows teach; None where no row is whole.

    Args:
        stops: of the teacher, read at the ends of rows.
        tokenizer: names the tokens.
        merged_ids: ids that mean one end, so that none of them is another where the rows end with one of them.
    """
    if not stops.num_rows:
        return None
    taught = [token for token, _ in Counter(stops.labels.tolist()).most_common()]
    alike = set(merged_ids) if set(merged_ids) & set(taught) else set()
    mean = stops.logp.exp().mean(0)
    others = [token for token in stops.teacher if token not in taught and token not in alike]
    own = max(others, key=lambda token: float(mean[token]), default=None)
    return Ends(
        taught=" or ".join(map(str, tokenizer.convert_ids_to_tokens(taught))),
        taught_probability=float(stops.logp.gather(1, stops.labels[:, None]).exp().mean()),
        own=None if own is None else str(tokenizer.convert_ids_to_tokens(own)),
        own_probability=0.0 if own is None else float(mean[own]),
        num_ends=len(stops.labels),
        vocab_size=len(mean),
        own_id=own,
    )
