"""Where answers end in a run: what rows, student and teacher say of it, and what the student learns."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from drkl.data.ends import taught_ends
from drkl.data.stored import JoinedRows
from drkl.models.ends import set_ends, stops_of
from drkl.rollouts.stops import agree_on_stops
from drkl.teachers.stops import Stops, read_stops
from drkl.training.arguments import DistillationConfig

if TYPE_CHECKING:
    from drkl.training.pair import Pair

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


def settle_ends(pair: Pair, args: DistillationConfig) -> None:
    """Find out where answers end, refuse models that cannot agree on it, and give the student all ends that it learns.

    Args:
        pair: of language models, the student's settings as they came; what is found is written into it.
        args: whether answers are sampled, and by whom.

    Raises:
        DrklError: the teacher stops with another token, or ``rollouts.stop_map`` has an entry that is no such pair.
    """
    student, words, rollouts = pair.student, pair.words, args.rollouts
    rows: Any = pair.rows
    taught = [*taught_ends(rows, words), *pair.listed_ends]
    learns = args.kd_weight > 0 and args.make_objective().needs_teacher
    warning = None
    if pair.teacher is not None and (rollouts.is_on or learns):
        stops = read_stops(
            student if rollouts.is_on else None, pair.teacher, JoinedRows(rows, pair.eval_rows), words, taught,
            pad_id=pair.pad_id, teacher_tokenizer=pair.teacher_tokenizer,
        )  # fmt: skip
        pair.teacher_stops = stops.teacher
        if rollouts.is_on:
            agreement = agree_on_stops(stops, words, rollouts, vocab_size=pair.vocab_size)
            pair.merged_ids, warning = agreement.merged_ids, agreement.warning
            pair.notes += [] if agreement.note is None else [agreement.note]
            taught += [*agreement.merged_ids, *agreement.learnt]
        pair.ends = compare_ends(stops, words, pair.merged_ids) if learns else None
        if pair.ends is not None and pair.ends.differ and pair.ends.own_id is not None:
            taught.append(pair.ends.own_id)
            warning = pair.ends.warning()  # in place of the other, which says the same of the student
    if warning is not None and args.process_index == 0:
        _log.warning("Warning: %s", warning)
    pair.notes += set_ends(student, words, stops_of(student, words, args.template, taught))


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
