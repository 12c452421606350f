"""Measure what a cache of a teacher's k most probable tokens would lose, on some rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drkl.analysis.analyze import named_objectives
from drkl.analysis.states import evenly
from drkl.analysis.topk import KeptLoss, KeptMass, ProbedObjective, TopKProbe
from drkl.errors import DrklError
from drkl.evaluation.bookkeeping import check_same_weights, finite, placed
from drkl.evaluation.bootstrap import Estimate, Resampled
from drkl.evaluation.calibration import weighted_sums
from drkl.evaluation.paired import MIN_UNITS
from drkl.evaluation.store import fingerprint
from drkl.losses import TopK
from drkl.losses.common import make_settings
from drkl.losses.fused import values_and_grads_
from drkl.models.forward import decoder_start, lm_head
from drkl.models.readout import batch_rows, chunks, logits_of, to_batch
from drkl.objectives import OBJECTIVES, Objective
from drkl.objectives.base import on_classes, why_not_on_classes
from drkl.processes import Share
from drkl.runs import RunFolder
from drkl.teachers.cached import TeacherCache, check_same_text
from drkl.teachers.served import ServedTeacher
from drkl.teachers.stored import StoredTopK, wide_head
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import Pair, make_pair
from drkl.training.run import Listener, prepare
from drkl.training.spec import RunSpec

POSITIONS = 2000
"""Positions of a probe at most, unless it is told otherwise."""
DEFAULT_KS = (16, 64, 256)
LOGITS = 2**22
"""Logits of one model that exist at once, about."""
SMALLEST = 1e-6
"""Nats for each position. Below it the two models agree but for rounding, and a share of that is no number."""

Progress = Callable[[int, int], None]


def probe_top_k(
    teacher_model: Any,
    train_dataset: Any,
    *,
    model: Any,
    args: DistillationConfig | None = None,
    processing_class: Any = None,
    k: int | Sequence[int] | None = None,
    positions: int = POSITIONS,
    seed: int = 0,
    progress: Progress = lambda done, of: None,
) -> TopKProbe:
    """Measure on some rows what a cache of a teacher's k most probable tokens would lose, for each objective.

    Each objective that compares with a teacher is computed and differentiated twice at every position: on the whole
    vocabulary, and on k + 1 classes. Nothing is written.

    >>> probe = drkl.probe_top_k(teacher, rows, model=student, args=args)              # doctest: +SKIP
    >>> probe.advice(), probe.objectives[0].kept[64].share                             # doctest: +SKIP

    Args:
        teacher_model: the teacher, as `DistillationTrainer` takes it, or a `TeacherCache` of hidden states.
        train_dataset: training rows, likewise.
        model: the student, likewise; it is left as it is. What is lost depends on it: one that is trained loses other
            shares than the one it starts from.
        args: of the run: its objective and temperature, and how rows are read. `max_steps` has no effect.
        processing_class: as `DistillationTrainer` takes it.
        k: a number of tokens to try, or several, each below the vocabulary. Default: those of 16, 64 and 256 that are.
        positions: whole rows, evenly spaced, are taken up to so many positions, and one row at least.
        seed: random seed of the intervals.
        progress: called with the rows that are compared, and that are to be compared.

    Raises:
        DrklError: what `DistillationTrainer` refuses, a classifier, no teacher or one of which a few logits are known,
            a run that learns from no teacher, sampled answers, a number out of range, or logits that are no numbers.
    """
    args = DistillationConfig(output_dir=".") if args is None else args
    with Share.of_group().joined():
        check_same_text(args.rollouts.is_on)
        if not (args.kd_weight > 0 and args.make_objective().needs_teacher):
            raise DrklError(_NO_OBJECTIVE)
        _check_whole(teacher_model)
        pair = make_pair(model, teacher_model, args, train_dataset, None, processing_class)
        own = [(args.make_objective(), args.temperature)]
        return probe_pair(pair, own, student=pair.student_name, k=k, positions=positions, seed=seed, progress=progress)


def probe_specs(
    specs: Sequence[RunSpec],
    *,
    student: str | None = None,
    k: int | Sequence[int] | None = None,
    positions: int = POSITIONS,
    seed: int = 0,
    listener: Listener | None = None,
    progress: Progress = lambda done, of: None,
) -> TopKProbe:
    """`probe_top_k` for the stages of a config, on the rows of the last one that learns from the teacher.

    Args:
        specs: the stages.
        student: a run folder or a model in place of the student that the first stage starts from.
        k: as in `probe_top_k`, and so are the others.
        positions: likewise.
        seed: likewise.
        listener: hooks for a front end.
        progress: likewise.
    """
    check_same_text(any(spec.rollouts.is_on for spec in specs))
    teacher, start = specs[0].teacher, specs[0].student
    if teacher is None:
        raise DrklError("The config has teacher: null, so there is nothing to probe.")
    learning = [number for number, spec in enumerate(specs) if spec.uses_teacher]
    if not learning:
        raise DrklError(_NO_OBJECTIVE)
    if teacher.is_served:
        raise DrklError(_sparse(f"the teacher at {teacher.server}"))
    if teacher.cache is not None:
        _check_whole(TeacherCache.of(teacher))
    source = start.model or start.model_type or teacher.model
    name = f"{source if start.init == 'pretrained' else f'{start.init} of {source}'}, before training"
    if student is not None:
        name = _student_of(student)
        start = type(start)(init="pretrained", model=name, dtype=start.dtype)
        specs = [replace(spec, student=start if number == 0 else spec.student) for number, spec in enumerate(specs)]
    own = [(specs[number].objective.make(), specs[number].loss.temperature) for number in learning]
    prepared = prepare(specs, listener or Listener())
    with TemporaryDirectory() as unused:
        spec = prepared.specs[learning[-1]]
        peft = spec.peft if student is None else None
        trainer = prepared.trainer(replace(spec, student=start, peft=peft, folder=RunFolder(Path(unused))))
        return probe_pair(trainer.pair, own, student=name, k=k, positions=positions, seed=seed, progress=progress)


_NO_OBJECTIVE = (
    "The run learns from no teacher: its objective reads none, or kd_weight is 0, so there is nothing to lose. Set the "
    "objective that it is to minimise, such as drkl."
)


def _check_whole(teacher: Any) -> None:
    if isinstance(teacher, ServedTeacher):
        raise DrklError(_sparse(f"the teacher at {teacher.server}"))
    if isinstance(teacher, TeacherCache) and teacher.kind != "hidden":
        raise DrklError(_sparse(f"the teacher in the cache {str(teacher.folder)!r}"))


def _sparse(teacher: str) -> str:
    return (
        f"A few logits are known of {teacher} at each position, and a probe compares with all of them. Take the "
        "teacher itself, or a cache of its hidden states."
    )


def _student_of(name: str) -> str:
    """The student of a run folder; any other name is a model's."""
    if not name.strip():
        raise DrklError("student is empty; expected a run folder, or the path or Hub id of a model.")
    run = RunFolder(Path(name))
    if not run.config_path.is_file():
        return name
    if not any((run.student_path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise DrklError(f"The run {name!r} has no student yet; resume its training first.")
    return str(run.student_path)


def probe_pair(
    pair: Pair,
    own: Sequence[tuple[Objective, float]],
    *,
    student: str,
    k: int | Sequence[int] | None = None,
    positions: int = POSITIONS,
    seed: int = 0,
    progress: Progress = lambda done, of: None,
) -> TopKProbe:
    """`probe_top_k` for models and rows that are ready.

    Args:
        pair: the models and the rows.
        own: the objectives of the run, with their temperatures.
        student: what the student is, for the reader.
        k: as in `probe_top_k`, and so are the others.
        positions: likewise.
        seed: likewise.
        progress: likewise.
    """
    teacher = pair.teacher
    if teacher is None:
        raise DrklError("There is no teacher to probe; expected a teacher_model.")
    if pair.classes is not None:
        raise DrklError(
            "The models are classifiers: their class logits are few, and a cache keeps all of them, so nothing is lost."
        )
    head = teacher.head
    if head is None:
        raise DrklError(_sparse(f"the teacher {pair.teacher_name!r}"))
    if not _is_whole(seed) or seed < 0:
        raise DrklError(f"seed is {seed!r}; expected a whole number of at least 0.")
    size = pair.vocab_size or head.vocab_size
    ks, rows = _check_ks(k, size), _sample(pair.rows, positions)
    cases = _cases(own)
    share = Share.of_group()
    sums = LossSums(len(rows), cases, ks)
    with share.joined(), placed(pair.student, head.weight.device) as model, torch.no_grad():
        _check_same(pair, rows, cases, ks, share)
        heads = [wide_head(one, size) for one in (lm_head(model), head)]

        def compared(members: list[int]) -> tuple[int, LossSums]:
            batch = to_batch(rows, members, pad_id=pair.pad_id, decoder_start=decoder_start(model))
            known, found = teacher.states(batch), LossSums(len(rows), cases, ks)
            assert isinstance(known, Tensor)
            states = [batch.states(model), known]
            place = torch.tensor(batch.rows).repeat_interleave(batch.keep.sum(1))
            for part in chunks(len(place), max(1, LOGITS // size)):
                ours, theirs = (logits_of(s[part], one) for s, one in zip(states, heads, strict=True))
                _check_numbers(ours, theirs, [rows[i].id for i in place[part].tolist()])
                found.add(ours, theirs, batch.labels[part].to(ours.device), place[part].numpy())
            return len(members), found

        done = 0
        for count, part_sums in share.map(compared, batch_rows([row.length for row in rows])):
            sums.merge(part_sums)
            done += count
            progress(done, len(rows))
    bytes_of_state = int(head.weight.shape[1]) * teacher.model.dtype.itemsize
    return sums.result(
        seed, teacher=pair.teacher_name or "", student=student, vocab_size=size, hidden_bytes=bytes_of_state
    )


def _check_same(pair: Pair, rows: Sequence[Any], cases: Sequence[Case], ks: Sequence[int], share: Share) -> None:
    """Raise DrklError unless several processes probe the same."""
    if not share.is_divided:
        return
    asked = fingerprint(rows=[[row.id, *row.all_ids] for row in rows], cases=repr(cases), ks=list(ks))
    share.check_same("rows or settings", asked)
    assert pair.teacher is not None
    for name, model in (("student", pair.student), ("teacher", pair.teacher.model)):
        if not (name == "teacher" and isinstance(pair.teacher, TeacherCache)):
            check_same_weights(name, model, share)


@dataclass(frozen=True)
class Case:
    """An objective at a temperature."""

    name: str
    objective: Objective
    temperature: float
    own: bool


def _cases(own: Sequence[tuple[Objective, float]]) -> list[Case]:
    """The objectives of the run at their temperatures, then all others at each of these."""
    listed = named_objectives([name for name, kind in OBJECTIVES.items() if kind().needs_teacher])
    cases: list[Case] = []
    for objective, temperature in reversed(own):  # the last stage is what the run is about
        found = next((name for name, other in listed.items() if other == objective), f"this run's {objective.name}")
        if not any((case.objective, case.temperature) == (objective, temperature) for case in cases):
            cases.append(Case(found, objective, temperature, True))
    for temperature in dict.fromkeys(case.temperature for case in cases):
        done = [case.objective for case in cases if case.temperature == temperature]
        cases += [Case(name, one, temperature, False) for name, one in listed.items() if one not in done]
    return cases


def _check_ks(given: int | Sequence[int] | None, size: int) -> list[int]:
    wanted = [] if given is None else [*given] if isinstance(given, Iterable) else [given]
    for k in wanted:
        if not _is_whole(k) or not 1 <= k < size:
            raise DrklError(
                f"k is {k!r}; expected whole numbers from 1 to {size - 1}, below the {size} ids that student and "
                "teacher are compared on."
            )
    found = sorted({int(k) for k in wanted}) or [k for k in DEFAULT_KS if k < size]
    if not found:
        raise DrklError(
            f"Student and teacher are compared on {size} ids, fewer than any k that is tried by itself; give k, from 1 "
            f"to {size - 1}."
        )
    return found


def _is_whole(number: Any) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _sample(rows: Sequence[Any], positions: int) -> list[Any]:
    """Whole rows, evenly spaced, up to so many positions."""
    if not _is_whole(positions) or positions < 1:
        raise DrklError(f"positions is {positions!r}; expected a whole number of at least 1.")
    with_labels = [row for row in rows if row.num_trained]
    counts = np.array([row.num_trained for row in with_labels])
    for count in range(min(len(counts), positions), 0, -1):
        chosen = evenly(np.arange(len(counts)), count)
        if count == 1 or counts[chosen].sum() <= positions:
            return [with_labels[place] for place in chosen]
    raise DrklError("No training row has a response to learn from, so there is nothing to probe.")


def _check_numbers(ours: Tensor, theirs: Tensor, row_ids: Sequence[str]) -> None:
    for name, logits in (("student", ours), ("teacher", theirs)):
        bad = (logits.isnan() | (logits == torch.inf)).any(-1)
        if bool(bad.any()):
            row = row_ids[int(bad.to(torch.uint8).argmax())]
            raise DrklError(f"The {name}'s logits are not numbers in row {row!r}. Check its weights, or its dtype.")


class LossSums:
    """Sums over the positions of each row, of everything that a probe tells."""

    def __init__(self, num_rows: int, cases: Sequence[Case], ks: Sequence[int]) -> None:
        self._num_rows, self._cases, self._ks = num_rows, cases, ks
        self._losses = tuple(dict.fromkeys(case.temperature for case in cases))
        self._stored = tuple(sorted({1.0, *self._losses}))
        self._sums: dict[str, np.ndarray] = {}

    def add(self, ours: Tensor, theirs: Tensor, labels: Tensor, row: np.ndarray) -> None:
        """Compare both models' logits `[n, vocab]` with the labels `[n]` of rows `[n]`."""

        def count(name: str, values: Tensor) -> None:
            self._sums.setdefault(name, np.zeros(self._num_rows))
            self._sums[name] += np.bincount(row, values.double().cpu().numpy(), self._num_rows)

        count("positions", torch.ones(len(row)))
        known = {k: TopK.of_logits(theirs, k, self._stored, labels) for k in self._ks}
        for k, few in known.items():
            for temperature in self._losses:
                mass, tail = few.masses(temperature)
                count(_key("mass", temperature, k), mass)
                count(_key("tail", temperature, k), tail)
        for number, case in enumerate(self._cases):
            value, gradient = _differentiated(case, ours, theirs, labels)
            count(_key("value", number), value)
            count(_key("square", number), torch.linalg.vecdot(gradient, gradient))
            for k, few in known.items() if on_classes(case.objective) is not None else ():
                value, other = _differentiated(case, ours, few, labels)
                change = other.sub_(gradient)
                count(_key("kept", number, k), value)
                count(_key("along", number, k), torch.linalg.vecdot(change, gradient))
                count(_key("change", number, k), torch.linalg.vecdot(change, change))

    def merge(self, other: LossSums) -> None:
        """Add the sums of other rows; each row's positions are all in one of the two."""
        for name, values in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + values

    def result(self, seed: int, *, teacher: str, student: str, vocab_size: int, hidden_bytes: int) -> TopKProbe:
        """Every number with its interval."""
        made = Resampled.of(self._metrics, self._num_rows, seed)
        ends = made.intervals() if self._num_rows >= MIN_UNITS else {}

        def estimate(*key: Any) -> Estimate:
            name = _key(*key)
            value = finite(made.points[name])
            return Estimate(value, None if value is None else ends.get(name))

        masses = [
            KeptMass(k, t, self._size(k, vocab_size), estimate("mass", t, k), estimate("tail", t, k))
            for t in self._losses
            for k in self._ks
        ]
        objectives = []
        for number, case in enumerate(self._cases):
            kind = on_classes(case.objective)
            kept = {
                k: KeptLoss(estimate("kept", number, k), estimate("angle", number, k))
                for k in (self._ks if kind is not None else ())
            }
            reason = None if kind is not None else why_not_on_classes(case.objective)
            value = estimate("value", number)
            objectives.append(ProbedObjective(case.name, case.temperature, case.own, kind, reason, value, kept))
        positions = int(self._sums["positions"].sum())
        return TopKProbe(teacher, student, self._num_rows, positions, vocab_size, hidden_bytes, masses, objectives)

    def _size(self, k: int, vocab_size: int) -> int:
        return StoredTopK(k, self._stored, vocab_size, torch.float32).bytes_per_position

    def _metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every number `[m]` for each of ``weights`` `[m, rows]`: how often a row counts."""
        names = [*self._sums]
        totals = weighted_sums(weights, np.stack([self._sums[name] for name in names], -1))
        sums = dict(zip(names, totals.T, strict=True))
        count = sums.pop("positions")
        found = {name: total / count for name, total in sums.items() if name.startswith(("mass", "tail", "value"))}
        for number, case in enumerate(self._cases):
            value, square = sums[_key("value", number)], sums[_key("square", number)]
            known = np.isfinite(value) & (np.abs(value) > SMALLEST * count)
            for k in self._ks if on_classes(case.objective) is not None else ():
                with np.errstate(invalid="ignore", divide="ignore"):
                    found[_key("kept", number, k)] = np.where(known, sums[_key("kept", number, k)] / value, np.nan)
                    turned = _angle(square, sums[_key("change", number, k)], sums[_key("along", number, k)])
                found[_key("angle", number, k)] = np.where(known & (square > 0), turned, np.nan)
        return found


def _key(*parts: Any) -> str:
    return " ".join(map(str, parts))


def _angle(square: np.ndarray, change: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Degrees between g and g + d, of |g|^2, |d|^2 and g.d: no digit is lost where d is small."""
    across = np.sqrt(np.maximum(square * change - along**2, 0.0))
    return np.degrees(np.arctan2(across, square + along))


def _differentiated(case: Case, ours: Tensor, theirs: Tensor | TopK, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The values `[n]`, and their gradients on the student's logits `[n, vocab]`."""
    settings = make_settings(case.objective, case.temperature, kd_weight=1.0, t2_scaling=False, reduction="none")
    gradient = ours.clone()
    # Both are overwritten.
    values = values_and_grads_(gradient, theirs.clone() if isinstance(theirs, Tensor) else theirs, labels, settings)
    return values, gradient
