"""What the walk goes through: every objective with its variants, and rows of logits in which something goes wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import drkl
from drkl.objectives import Objective
from tests.objectives.answers import Groups

Row = NDArray[np.float64]
INF = np.inf


class Variant(NamedTuple):
    """An objective by its name in the list, or ``decoupled``, and what is set of it."""

    name: str
    params: dict[str, Any]

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.params.items())])

    @property
    def objective(self) -> Objective:
        if self.name == "decoupled":
            return drkl.decoupled(**self.params)
        return drkl.make_objective(self.name, **self.params)


def _variants() -> Iterator[Variant]:
    choices: list[tuple[str, str, list[Any]]] = [
        ("symmetric_kl", "forward_weight", [0.0, 0.5, 0.9, 1.0]),
        ("gjs", "beta", [0.5, 1e-3, 0.1, 0.97]),
        ("sfkl", "skew", [0.0, 0.1, 0.8, 0.999]),
        ("srkl", "skew", [0.0, 0.1, 0.8, 0.999]),
        ("akl", "mu", [0.5, 1e-3, 0.05, 0.9, 1.0]),
    ]
    for name in ("ce", "fkl", "rkl", "tvd", "todi"):
        yield Variant(name, {})
    for name, key, values in choices:
        yield from (Variant(name, {key: value}) for value in values)
    for alpha, beta in [
        (0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.4), (0.5, 0.5), (1.0, 1.0), (3.0, 0.25), (0.01, 0.02),
        (0.1, 0.1), (0.05, 0.15), (0.05, 0.14), (1e-7, 0.6), (0.6, 1e-7), (1e-7, 1e-7), (0.0, 0.05), (0.0, 0.0),
        (0.3, -0.3), (-0.3, 0.3), (2.0, 2.0),
    ]:  # fmt: skip
        yield Variant("ab", {"alpha": alpha, "beta": beta})
    for alpha, beta in [(1.0, 0.5), (0.0, 8.0), (2.0, 0.0)]:
        yield from (Variant("dkd", {"alpha": alpha, "beta": beta, "target": t}) for t in ("teacher", "label"))
    weights = ("constant", "student", "teacher", "floor")
    for tail, weight, target in itertools.product(("rkl", "fkl", "gjs"), weights, ("teacher", "label")):
        yield Variant("drkl", {"tail": tail, "weight": weight, "target": target, "gamma": 0.3})
    for skew, weight, target in itertools.product((0.1, 0.9), weights, ("teacher", "label")):
        yield Variant("drkl", {"skew": skew, "weight": weight, "target": target})
    yield Variant("drkl", {"skew": 0.999, "gamma": 2.5})
    for on_target, on_tail, words in [
        ("rkl", "rkl", {"gamma": 2.5}),
        ("fkl", "fkl", {"gamma": 8.0, "target_weight": 2.0}),
        ("gjs", "rkl", {"weight": "teacher"}),
        ("rkl", "gjs", {"target": "label", "weight": "floor"}),
        ("fkl", "rkl", {"target_weight": 0.0}),
        ("srkl", "srkl", {}),
        ("tvd", "todi", {"gamma": 0.3}),
        ("todi", "tvd", {"weight": "student"}),
        ("ab", "akl", {"weight": "student"}),
        ("akl", "ab", {"target": "label"}),
        ("symmetric_kl", "sfkl", {}),
    ]:
        yield Variant("decoupled", {"on_target": on_target, "on_tail": on_tail, **words})


VARIANTS = list(_variants())


class Rows(NamedTuple):
    """Pairs of logits `[n, vocab]`, labels `[n]`, and the names of the rows."""

    student: Row
    teacher: Row
    labels: NDArray[np.int64]
    names: list[str]

    def pick(self, keep: Callable[[str], bool]) -> Rows:
        at = [i for i, name in enumerate(self.names) if keep(name)]
        return Rows(self.student[at], self.teacher[at], self.labels[at], [self.names[i] for i in at])


def _confident(rest: Row, log_odds: float, place: int) -> Row:
    """Logits whose class ``place`` has these log-odds against the rest."""
    others = np.delete(rest, place)
    row = rest.copy()
    row[place] = log_odds + (np.log(np.exp(others - others.max()).sum()) + others.max() if len(others) else 0.0)
    return row


def _random(random: np.random.Generator, vocab: int) -> Iterator[tuple[str, Row, Row]]:
    def normal(scale: float = 2.0) -> Row:
        return random.normal(size=vocab) * scale

    for scale in (0.1, 2.0, 2.0, 6.0, 30.0):
        yield f"random {scale}", normal(scale), normal(scale)
    yield "flat student", np.zeros(vocab), normal()
    yield "flat teacher", normal(), np.zeros(vocab)
    near = normal().astype(np.float32)
    yield "equal", near.astype(float), near.astype(float)
    yield "equal but for a shift", near.astype(float), near.astype(float) + 8.0
    yield "equal but for the last bit", near.astype(float), np.nextafter(near, np.float32(100)).astype(float)
    yield "all equal", np.full(vocab, 3.0), np.full(vocab, -7.0)
    yield "subnormal", normal(1e-40), normal(1e-42)
    yield "offset", normal() + 1e4, normal() - 1e4
    yield "hundreds of nats", normal(200.0), normal(200.0)
    yield "thousands of nats", normal(3e3), normal(3e3)
    spread = normal()
    yield "huge against spread", np.where(random.random(vocab) < 0.3, 1e4, -1e4), spread
    yield "spread against huge", spread, np.where(random.random(vocab) < 0.3, 1e4, -1e4)
    yield "huge both", *(np.where(random.random(vocab) < 0.5, 1e4, -1e4) for _ in "qp")


def _ties(random: np.random.Generator, vocab: int) -> Iterator[tuple[str, Row, Row]]:
    def coarse(step: float) -> Row:
        return np.round(random.normal(size=vocab) * 2 / step) * step

    tied = coarse(0.01)
    tied[[vocab // 3, vocab - 1]] = 9.0
    yield "ties at the top", coarse(0.01), tied
    yield "many ties", coarse(0.5), coarse(1.0)
    yield "two values", coarse(4.0), np.where(np.arange(vocab) % 3 == 1, 1.0, 0.0)
    halves = np.full(vocab, -60.0)
    halves[[0, vocab - 1]] = 5.0
    yield "two halves", coarse(0.25), halves
    top = np.full(vocab, 5.0)
    top[1::2] = np.nextafter(np.float32(5.0), np.float32(9.0))
    yield "ties but for the last bit", coarse(0.25), top
    last = coarse(0.01)
    last[-1] = 12.0
    yield "top in the last column", coarse(0.01), last


def _certain(random: np.random.Generator, vocab: int) -> Iterator[tuple[str, Row, Row]]:
    odds = [(15, 15), (18, 18), (22, 22), (22, 3), (3, 22), (40, 41), (60, 80), (80, -80), (-30, 25), (5, 27.6)]
    for number, (q, p) in enumerate(odds):
        place = number * 7 % vocab
        rest = [random.normal(size=vocab) * 2 for _ in "qp"]
        yield f"confident {q} {p}", _confident(rest[0], q, place), _confident(rest[1], p, place)


def _excluded(random: np.random.Generator, vocab: int) -> Iterator[tuple[str, Row, Row]]:
    """-inf here and there; a name says in whose logits, and the label is at 0."""

    def pair() -> tuple[Row, Row]:
        first, second = (random.normal(size=vocab) * 2 for _ in "qp")
        second[vocab // 2] = 7.0
        return first, second

    top = vocab // 2
    some = [i for i in range(1, vocab, 3) if i != top]
    last = slice(vocab - max(1, vocab // 3), None)
    for name, ours, theirs in [
        ("both", some, some),
        ("both, at the end", last, last),
        ("both, at the label", [0], [0]),
        ("the teacher", [], some),
        ("the student", some, []),
        ("each another", [1], [vocab - 1]),
        ("the student, at the teacher's top", [top], []),
        ("the teacher, at the label", [], [0]),
        ("the student, at the label", [0], []),
    ]:
        student, teacher = pair()
        student[ours] = teacher[theirs] = -INF  # type: ignore[call-overload]
        yield f"-inf {name}", student, teacher
    beside = [i for i in range(vocab) if i != top]
    for name, ours, theirs in [
        ("both, all but one", beside, beside),
        ("the teacher, all but one", [], beside),
        ("the student, all but one", beside, []),
        ("all but one, each another", beside, [*beside[1:], top]),
    ]:
        student, teacher = pair()
        student[ours] = teacher[theirs] = -INF
        yield f"-inf {name}", student, teacher
    student, teacher = (x * 1e3 for x in pair())
    student[some] = teacher[some] = -INF
    yield "-inf both, thousands of nats", student, teacher
    student, teacher = pair()
    teacher[some[:1]] = -INF
    student[some[:1]] = -1e4
    yield "-inf the teacher, where the student underflows", student, teacher


KINDS = (_random, _ties, _certain, _excluded)


def rows(vocab: int, seed: int = 0, finite: bool = False) -> Rows:
    """All hazards that a vocabulary of this size can have, exact in fp32 unless rounded further."""
    random = np.random.default_rng(seed + vocab)
    found = []
    for kind in KINDS[:3] if finite else KINDS:
        if vocab == 1 and kind is not _random:
            continue
        found += list(kind(random, vocab))
    with_mass = [x for x in found if (x[1] > -INF).any() and (x[2] > -INF).any()]
    names = [name for name, _, _ in with_mass]
    student, teacher = (np.stack([x[i] for x in with_mass]).astype(np.float32).astype(float) for i in (1, 2))
    labels = random.integers(0, vocab, len(names))
    for i, name in enumerate(names):
        if "label" in name:
            labels[i] = 0
        if name.startswith(("confident", "top")):
            labels[i] = teacher[i].argmax() if i % 2 else vocab - 1
    return Rows(student, teacher, labels, names)


def groups(
    rows: Rows, temperature: float, *, label: bool = False, k: int | None = None, merged_ids: list[int] | None = None
) -> Groups:
    """The classes of a teacher that is known on k tokens and the rest, or of a vocabulary with some ids merged."""
    count, vocab = rows.teacher.shape
    if merged_ids is not None:
        return _merged(rows, merged_ids)
    assert k is not None
    listed = np.argsort(-rows.teacher, axis=-1, kind="stable")[:, :k]
    of = np.full((count, vocab), k)
    np.put_along_axis(of, listed, np.arange(k)[None], -1)
    at_label = rows.labels[:, None]
    if label:  # a label that is not listed is a class of its own, taken from the rest
        found = np.take_along_axis(of, at_label, -1)
        np.put_along_axis(of, at_label, np.where(found == k, k + 1, found), -1)
    labels = np.take_along_axis(of, at_label, -1)[:, 0]
    return Groups(of, k + 2, labels, np.zeros(count, np.int64), last_is_taken=label)


def _merged(rows: Rows, ids: list[int]) -> Groups:
    """The event at the smallest of its ids; the last columns in the places of the others."""
    vocab, ids = rows.teacher.shape[-1], sorted(ids)
    size = vocab - len(ids) + 1
    others = [i for i in range(size, vocab) if i not in ids]
    place = np.arange(vocab)
    place[ids] = ids[0]
    for source, free in zip(others, [i for i in ids[1:] if i < size], strict=True):
        place[source] = free
    of = np.broadcast_to(place, rows.teacher.shape)
    return Groups(of, size, place[rows.labels])
