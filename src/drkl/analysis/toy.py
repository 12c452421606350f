"""Toy dynamics: a student of bare logits follows a known teacher under one objective, all seeds at once.

`S` seeds x `C` contexts x `V` tokens. ``free``: every context has its own V logits. ``capacity``: the student's logits
are A Bᵀ + b of a low rank over many contexts, so it cannot match a teacher of a higher rank, and objectives end in
different places. Every random number is drawn from a generator of its own seed: a seed's path does not depend on
which seeds stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from drkl.analysis.toy_metrics import METRICS, ToyTeacher, measure
from drkl.errors import DrklError
from drkl.objectives import Objective, make_objective

SETTINGS = ("free", "capacity")
INITS = ("random", "warm")
BLOCK_ELEMENTS = 2**18
"""Rows are differentiated in blocks of about so many logits, which stay in the processor's cache."""
ZIPF_SHARE = 0.25
"""In a capacity teacher the shared Zipf marginal has this spread; the contexts' own logits have 1."""
WARM_SHARE = 0.25
"""A warm start is forward KL for this share of the steps: distillation seldom starts from noise."""
INITIAL_SPREAD = {"free": 1.0, "capacity": 0.1}
LEARNING_RATE = {"free": 0.05, "capacity": 0.02}
CONTEXTS = {"free": 32, "capacity": 192}
STUDENT_RANK = 8
"""A setting's name tells the rank where it is another."""
QUICK = {"vocab": 300, "steps": 100, "contexts": 32}


@dataclass(frozen=True)
class ToySetting:
    """One teacher and one kind of student.

    Args:
        kind: ``free`` (a logit per context and token) or ``capacity`` (logits of a low rank).
        vocab: tokens, at least 4.
        entropy: the teacher's entropy in every context, in nats, in (0, log vocab).
        init: ``random``, or ``warm``: after forward KL for a quarter of ``steps``.
        contexts: positions; as many as `CONTEXTS` has where it is 0.
        rank: of the student's logits; ``teacher_rank``: of the teacher's (both for ``capacity`` only).
        steps: Adam's steps.
        learning_rate: at the start, from where it falls to 0 along a cosine; that of `LEARNING_RATE` where it is 0.
    """

    kind: str = "capacity"
    vocab: int = 1000
    entropy: float = 4.15
    init: str = "random"
    contexts: int = 0
    rank: int = STUDENT_RANK
    teacher_rank: int = 64
    steps: int = 400
    learning_rate: float = 0.0

    def __post_init__(self) -> None:
        for field, choices in (("kind", SETTINGS), ("init", INITS)):
            if getattr(self, field) not in choices:
                raise DrklError(f"toy: {field} is {getattr(self, field)!r}; expected {' or '.join(choices)}.")
        object.__setattr__(self, "contexts", self.contexts or CONTEXTS[self.kind])
        object.__setattr__(self, "learning_rate", self.learning_rate or LEARNING_RATE[self.kind])
        for field, least in (("vocab", 4), ("contexts", 1), ("rank", 1), ("teacher_rank", 2), ("steps", 1)):
            if getattr(self, field) < least:
                raise DrklError(f"toy: {field} is {getattr(self, field)}; expected at least {least}.")
        if not 0 < self.entropy < math.log(self.vocab):
            raise DrklError(
                f"toy: entropy is {self.entropy:g}; expected above 0 and below log({self.vocab}) = "
                f"{math.log(self.vocab):.2f} nats, the most that {self.vocab} tokens can have."
            )
        if not 0 < self.learning_rate < math.inf:
            raise DrklError(f"toy: learning_rate is {self.learning_rate}; expected a finite number above 0.")
        if self.kind == "capacity" and self.rank >= self.teacher_rank:
            raise DrklError(
                f"toy: rank is {self.rank} and teacher_rank {self.teacher_rank}; a student of no lower rank has no "
                "capacity gap. Lower --rank, or take the setting 'free'."
            )

    @property
    def name(self) -> str:
        rank = "" if self.rank == STUDENT_RANK or self.kind == "free" else f"-r{self.rank}"
        return f"{self.kind}-v{self.vocab}-h{self.entropy:g}-{self.init}{rank}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def entropy_of(logits: Tensor) -> Tensor:
    """-sum p log p of the softmax, over the last dimension, in nats."""
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def with_entropy(logits: Tensor, entropy: float, tolerance: float = 1e-5) -> Tensor:
    """Scale each row of ``logits`` `[n, vocab]` so that its softmax has this ``entropy``, in nats.

    Newton's method on the log of the scale, kept inside a bracket: the entropy falls as the scale grows.
    """
    scale_low = torch.full_like(logits[:, :1], math.log(1e-6))
    scale_high = torch.full_like(scale_low, math.log(1e6))
    scale = torch.zeros_like(scale_low)
    for _ in range(60):
        logp = torch.log_softmax(logits * scale.exp(), -1)
        probs = logp.exp()
        found = -torch.linalg.vecdot(probs, logp).unsqueeze(-1)
        off = found - entropy
        if bool((off.abs() < tolerance).all()):
            break
        scale_low = torch.where(off > 0, scale, scale_low)
        scale_high = torch.where(off > 0, scale_high, scale)
        # d entropy / d log scale = -Var_p(log p)
        variance = torch.linalg.vecdot(probs, logp.square()).unsqueeze(-1) - found.square()
        step = scale + off / variance.clamp(min=1e-12)
        inside = (step > scale_low) & (step < scale_high)
        scale = torch.where(inside, step, (scale_low + scale_high) / 2)
    return logits * scale.exp()


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * stream + seed)


def zipf_logits(vocab: int) -> Tensor:
    """-log rank, standardised: Zipf's law as logits; its exponent is the scale that `with_entropy` finds."""
    logits = -torch.arange(1, vocab + 1, dtype=torch.float32).log()
    return (logits - logits.mean()) / logits.std()


def teacher_logits(setting: ToySetting, seed: int) -> Tensor:
    """The teacher `[contexts, vocab]`, each context with exactly the asked entropy.

    ``free``: Zipf's law, permuted and perturbed for each context. ``capacity``: U Vᵀ with Gaussian factors, and one
    column of U is all ones and meets Zipf's law in V: the marginal that all contexts share.
    """
    generator = _generator(seed, 1)
    contexts, vocab = setting.contexts, setting.vocab
    zipf = zipf_logits(vocab)
    if setting.kind == "free":
        order = torch.rand(contexts, vocab, generator=generator).argsort(-1)
        logits = zipf[order] + 0.1 * torch.randn(contexts, vocab, generator=generator)
    else:
        own = setting.teacher_rank - 1
        left = torch.randn(contexts, own, generator=generator)
        right = torch.randn(vocab, own, generator=generator)
        shared = zipf[torch.randperm(vocab, generator=generator)]
        logits = left @ right.T / math.sqrt(own) + ZIPF_SHARE * shared
    return with_entropy(logits, setting.entropy)


class ToyStudent:
    """The students of all seeds: ``parameters``, and `logits` `[S * C, vocab]` made of them."""

    def __init__(self, setting: ToySetting, seeds: Sequence[int]) -> None:
        spread = INITIAL_SPREAD[setting.kind]
        shapes = [(setting.contexts, setting.vocab)]
        if setting.kind == "capacity":
            shapes = [(setting.contexts, setting.rank), (setting.vocab, setting.rank)]
        drawn: list[list[Tensor]] = [[] for _ in shapes]
        for seed in seeds:
            generator = _generator(seed, 2)
            for found, shape in zip(drawn, shapes, strict=True):
                found.append(spread * torch.randn(shape, generator=generator))
        self.parameters = [torch.stack(found).requires_grad_() for found in drawn]
        if setting.kind == "capacity":
            self.parameters.append(torch.zeros(len(seeds), 1, setting.vocab, requires_grad=True))

    def logits(self) -> Tensor:
        if len(self.parameters) == 1:
            return self.parameters[0].flatten(0, 1)
        left, right, bias = self.parameters
        return torch.baddbmm(bias, left, right.mT).flatten(0, 1)

    @torch.no_grad()
    def copy_from(self, other: ToyStudent) -> None:
        for mine, its in zip(self.parameters, other.parameters, strict=True):
            mine.copy_(its)


class ToyProblem:
    """A setting with its seeds: the teachers and the start, made once and shared by all objectives."""

    def __init__(self, setting: ToySetting, seeds: Sequence[int]) -> None:
        self.setting, self.seeds = setting, tuple(seeds)
        self.teacher = ToyTeacher.of(torch.cat([teacher_logits(setting, seed) for seed in seeds]))
        self._start: ToyStudent | None = None
        self._cumulative: Tensor | None = None

    def student(self) -> ToyStudent:
        """A fresh copy of the common start."""
        student = ToyStudent(self.setting, self.seeds)
        if self.setting.init == "warm":
            if self._start is None:
                self._start = ToyStudent(self.setting, self.seeds)
                steps = max(1, round(WARM_SHARE * self.setting.steps))
                for _ in self._descend(self._start, make_objective("fkl"), steps):
                    pass
            student.copy_from(self._start)
        return student

    def run(
        self,
        objective: Objective,
        *,
        points: int = 40,
        on_step: Callable[[int], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train; return a row for each seed at about ``points`` steps and at the last one: seed, step, the metrics."""
        student, steps = self.student(), self.setting.steps
        every = max(1, steps // points)
        rows = self._measured(student, 0)
        for step in self._descend(student, objective, steps):
            if step % every == 0 or step == steps:
                rows += self._measured(student, step)
            if on_step is not None:
                on_step(step)
        return rows

    def _measured(self, student: ToyStudent, step: int) -> list[dict[str, float]]:
        with torch.no_grad():
            logits = student.logits()
            parts = [measure(logits[rows], self.teacher.rows(rows)) for rows in _blocks(logits)]
        found = {key: torch.cat([part[key] for part in parts]) for key in METRICS}
        per_seed = {key: found[key].view(len(self.seeds), -1).mean(-1).tolist() for key in METRICS}
        return [
            {"seed": seed, "step": step} | {key: per_seed[key][i] for key in METRICS}
            for i, seed in enumerate(self.seeds)
        ]

    def _descend(self, student: ToyStudent, objective: Objective, steps: int) -> Iterator[int]:
        """Adam on the mean over contexts, one step at a time."""
        generators = [_generator(seed, 3) for seed in self.seeds]
        optimizer = torch.optim.Adam(student.parameters, lr=self.setting.learning_rate)
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = (
                self.setting.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            )
            labels = self._labels(generators) if objective.needs_labels else None
            logits = student.logits()
            optimizer.zero_grad()
            gradient = gradient_on_logits(objective, logits, self.teacher.logits, labels)
            logits.backward(gradient)
            optimizer.step()
            yield step

    def _labels(self, generators: list[torch.Generator]) -> Tensor:
        """One token per context, drawn from the teacher anew at each step, as data would be."""
        if self._cumulative is None:
            self._cumulative = self.teacher.probs.double().cumsum(-1)
        draws = torch.cat([torch.rand(self.setting.contexts, 1, generator=g, dtype=torch.float64) for g in generators])
        # The last sum is 1 up to rounding only.
        found = torch.searchsorted(self._cumulative, draws * self._cumulative[:, -1:])
        return found.squeeze(-1).clamp(max=self.setting.vocab - 1)


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    return (slice(first, first + rows) for first in range(0, logits.shape[0], rows))


def gradient_on_logits(objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    """d value / d student logits `[n, vocab]`, by the closed form where the objective has one, else by autograd."""
    gradient = student.detach().clone()
    for part in _blocks(student):
        block, some_labels = gradient[part], None if labels is None else labels[part]
        if objective.has_closed_form:
            with torch.no_grad():
                objective.value_and_grad_(block, teacher[part].clone(), some_labels)
            continue
        leaf = block.clone().requires_grad_()
        values = objective(torch.log_softmax(leaf, -1), torch.log_softmax(teacher[part], -1), some_labels)
        block.copy_(torch.autograd.grad(values.sum(), leaf)[0])
    return gradient
