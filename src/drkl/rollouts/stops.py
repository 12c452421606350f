"""Whether student and teacher mean the same by a finished answer, asked before training on the student's answers.

Where the student stops with one token and the teacher with another, the student is taught never to stop: at the end of
each of its answers the teacher gives the student's token next to nothing. ``rollouts.stop_map`` makes the two tokens
one event, of which both models have the summed probability.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.ends import as_ids, special_tokens
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.ends import listed_ends, stops_of
from drkl.models.forward import decoder_start, in_eval_mode
from drkl.models.load import load_tokenizer
from drkl.models.readout import batches, logits_of
from drkl.teachers.live import LiveTeacher

ROWS = 32
"""Finished rows that are read for it."""
RARE = 1e-4
"""A stop token with a smaller probability than this at the ends of rows is none of the teacher's."""
TIMES = 100.0
"""The teacher stops with another token where it gives that one so many times as much."""
SURE = 0.5
"""A special token that nothing calls an end is one where the teacher gives it at least this at the ends of rows."""


class Agreement(NamedTuple):
    """What two models agree on, and what the user is told of it."""

    merged_ids: tuple[int, ...]
    """The ids that count as one event in the loss; empty where none do."""
    note: str | None = None
    warning: str | None = None
    learnt: tuple[int, ...] = ()
    """The ids that end the answers that the student learns from, where the teacher writes them."""


def agree_on_stops(
    student: PreTrainedModel,
    teacher: LiveTeacher,
    rows: Iterable[Row],
    tokenizer: Any,
    stop_map: Mapping[str, str],
    *,
    taught: Iterable[int],
    pad_id: int,
    vocab_size: int | None = None,
    refuse: bool = True,
) -> Agreement:
    """Ask the teacher, at the ends of finished rows, for the token that the student stops with.

    Args:
        student: as it came, before any end is added to its settings.
        teacher: a language model, on its device.
        rows: the data's; the first `ROWS` whose response is whole are read.
        tokenizer: the run's.
        stop_map: stop tokens of the student, by text or id, to those of the teacher that mean the same.
        taught: the ids that the rows' responses end with where they are whole.
        pad_id: fills batches; its value changes nothing.
        vocab_size: the number of ids, from 0, that are compared; None for all.
        refuse: whether the student's answers are trained on; the teacher's own end as the teacher ends them.

    Raises:
        DrklError: the teacher stops with another token, or ``stop_map`` has an entry that is no such pair.
    """
    own, theirs = student_stops(student, tokenizer, teacher.model), teacher_stops(teacher.model, tokenizer)
    logp = _log_probs_at_ends(teacher, rows, {*taught, *own, *theirs}, pad_id, vocab_size)
    specials = set(special_tokens(tokenizer).values()) - set(theirs)
    theirs += [i for i in sorted(specials) if logp is not None and i < logp.shape[1] and _mean(logp[:, i]) >= SURE]
    merged = merged_ids(stop_map, tokenizer, own, theirs, vocab_size)
    event = list(dict.fromkeys([*own, *merged]))
    asked = " or ".join(map(repr, _texts(tokenizer, event)))
    if not refuse:
        learnt = tuple(token for token in theirs if vocab_size is None or token < vocab_size)
        return Agreement(merged, learnt=learnt)
    if logp is None:
        return Agreement(merged, warning=_not_asked(tokenizer, own, theirs, event, asked))
    size = logp.shape[1]
    inside = [token for token in event if token < size]
    if not inside:
        return Agreement(
            merged,
            warning=f"The student stops with {asked}, beyond the ids 0 to {size - 1} on which the models are compared, "
            "so none of its answers ends with that. It learns to stop as the teacher does.",
        )
    probability = _mean(torch.logsumexp(logp[:, inside], -1))
    others = {token: _mean(logp[:, token]) for token in theirs if token < size and token not in event}
    other = max(others, key=others.__getitem__, default=None)
    found = f"at the ends of {len(logp)} finished rows the teacher gives {asked} a probability of {probability:.2g}"
    if probability >= RARE:
        return Agreement(merged, note=f"The student stops with {asked}: {found}.")
    if other is None or others[other] < TIMES * probability:
        return Agreement(
            merged,
            warning=f"The student stops with {asked}: {found}, and no other stop token of its own much more. The "
            "student learns that from it: look at the share of answers that finish.",
        )
    raise _refusal(tokenizer, own, other, others[other], found, asked)


def _not_asked(tokenizer: Any, own: Sequence[int], theirs: Sequence[int], event: Sequence[int], asked: str) -> str:
    nothing = "no row has a whole response, at whose end the teacher could be asked for that"
    if not theirs or set(theirs) & set(event):
        return f"The student stops with {asked}, and {nothing}. If answers never finish, see rollouts.stop_map."
    named = " or ".join(map(repr, _texts(tokenizer, theirs)))
    return (
        f"The student stops with {asked}, the teacher with {named}, and {nothing}. If both tokens mean that an answer "
        f"is over, {_way_out(tokenizer, own, theirs[0])}."
    )


def _way_out(tokenizer: Any, own: Sequence[int], other: int) -> str:
    """What to set, as a file, a shell and Python each take it."""
    (theirs,) = _texts(tokenizer, [other])
    pairs = json.dumps(dict.fromkeys(_texts(tokenizer, own), theirs), ensure_ascii=False)
    word = shlex.quote(f"rollouts.stop_map={pairs}")
    return f"set rollouts.stop_map: {pairs} (in a command {word}, in Python rollout_stop_map={pairs})"


def _refusal(tokenizer: Any, own: Sequence[int], other: int, probability: float, found: str, asked: str) -> DrklError:
    (theirs,) = _texts(tokenizer, [other])
    return DrklError(
        f"The student stops with {asked}, and the teacher with {theirs!r}: {found}, and {theirs!r} {probability:.2g} "
        "(geometric means). On its own answers the student would be taught never to stop. If both tokens mean that an "
        f"answer is over, {_way_out(tokenizer, own, other)}: the models are then compared "
        "on the event of stopping, the summed probability of these tokens."
    )


def student_stops(student: PreTrainedModel, tokenizer: Any, teacher: PreTrainedModel | None = None) -> list[int]:
    """Return the ids that a student stops with as it came, whatever tokenizer wrote the rows.

    They are the eos of the tokenizer in the folder it starts from and the ends that its settings list; those of the
    teacher for a student that starts from the teacher's folder; where nothing else says anything the run's eos, or the
    end of its chat template.

    Args:
        student: before any end is added to its settings.
        tokenizer: the run's.
        teacher: the model it is to learn from.
    """
    source = _source(student)
    if teacher is not None and source and source == _source(teacher):
        return teacher_stops(teacher, tokenizer)
    own = _tokenizer_of(source)
    words = tokenizer if own is None else own
    ids = [] if own is None else as_ids(own.eos_token_id)
    ids += listed_ends(student, words)
    if Path(source).is_dir() and source:  # a student with random weights has the settings of a config alone
        ids += listed_ends(source, words)
    return list(dict.fromkeys(ids or as_ids(tokenizer.eos_token_id) or teacher_stops(student, tokenizer)))


def teacher_stops(teacher: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids that a teacher stops with: its tokenizer's eos, the end of its chat template, those it lists.

    Args:
        teacher: a language model.
        tokenizer: the run's, for a teacher without one of its own.
    """
    words = _tokenizer_of(_source(teacher)) or tokenizer
    try:
        return stops_of(teacher, words)
    except DrklError:  # a template that takes no conversation of one question and its answer
        return list(dict.fromkeys([*as_ids(words.eos_token_id), *listed_ends(teacher, words)]))


def merged_ids(
    stop_map: Mapping[str, str], tokenizer: Any, own: Sequence[int], theirs: Sequence[int], vocab_size: int | None
) -> tuple[int, ...]:
    """Return the ids of ``rollouts.stop_map``, ascending: all of them mean that an answer is over.

    Args:
        stop_map: tokens of the student to tokens of the teacher, by text or id.
        tokenizer: the run's.
        own: the student's stop tokens.
        theirs: the teacher's.
        vocab_size: the number of ids, from 0, that are compared; None for all.

    Raises:
        DrklError: an unknown token, several tokens, a token that is no stop token, one that is mapped to itself or
            twice, or one beyond the shared vocabulary.
    """
    pairs: dict[int, int] = {}
    for key, value in stop_map.items():
        token, meant = _stop(key, "student", tokenizer, own), _stop(value, "teacher", tokenizer, theirs)
        if token == meant:
            raise DrklError(f"rollouts.stop_map has {key!r}: {value!r}, one token to both models; leave it out.")
        if pairs.setdefault(token, meant) != meant:
            first, second = _texts(tokenizer, [pairs[token], meant])
            raise DrklError(f"rollouts.stop_map maps {key!r} to {first!r} and to {second!r}; expected one of them.")
        for number, text in ((token, key), (meant, value)):
            if vocab_size is not None and number >= vocab_size:
                raise DrklError(
                    f"rollouts.stop_map has {text!r} (id {number}), but student and teacher are compared on the ids 0 "
                    f"to {vocab_size - 1}, which both have. Choose stop tokens among those."
                )
    return tuple(sorted({*pairs.keys(), *pairs.values()}))


def _stop(text: str, whose: str, tokenizer: Any, stops: Sequence[int]) -> int:
    """The id of an entry of the map, which is a token's text, or an id."""
    valid = ", ".join(f"{name!r} (id {number})" for name, number in zip(_texts(tokenizer, stops), stops, strict=True))
    expected = f"expected a stop token of the {whose}: {valid}"
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[text]] if text in vocabulary else tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in found and text != tokenizer.unk_token
    number = int(text) if text.isascii() and text.isdigit() else None
    for candidate in (*(found if len(found) == 1 and not unknown else ()), number):
        if candidate in stops:
            assert candidate is not None
            return int(candidate)
    if number is None and (unknown or len(found) != 1):
        what = "which the tokenizer does not know" if unknown or not found else f"which is {len(found)} tokens"
        raise DrklError(f"rollouts.stop_map has {text!r}, {what}; {expected}.")
    raise DrklError(f"rollouts.stop_map has {text!r}, with which the {whose} does not stop; {expected}.")


def _source(model: PreTrainedModel) -> str:
    """The folder or id that a model's weights came from; empty for one that was made in memory."""
    name = str(getattr(model, "pruned_from", "") or model.name_or_path or "")
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _tokenizer_of(source: str) -> Any:
    """The tokenizer that lies beside a model; None where there is none."""
    try:
        return load_tokenizer(source) if source else None
    except DrklError:
        return None


def _texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in ids]


def _mean(logp: Tensor) -> float:
    """The geometric mean of probabilities `[n]`."""
    return float(logp.mean().exp())


@torch.no_grad()
def _log_probs_at_ends(
    teacher: LiveTeacher, rows: Iterable[Row], ends: set[int], pad_id: int, vocab_size: int | None
) -> Tensor | None:
    """The teacher's log-probabilities `[n, ids]` where a response ends; None where none is whole."""
    whole = (row for row in rows if row.response_ids and row.trained_ids and row.trained_ids[-1] in ends)
    read = [row.for_teacher for row in itertools.islice(whole, ROWS)]
    if not read:
        return None
    places = {number: [row.num_trained - 1] for number, row in enumerate(read)}
    start, head = decoder_start(teacher.model), teacher.head
    with in_eval_mode(teacher.model):
        logits = [
            logits_of(batch.states(teacher.model), head, vocab_size)
            for batch in batches(read, pad_id=pad_id, decoder_start=start, positions=places)
        ]
    return torch.cat(logits).cpu().double().log_softmax(-1)
