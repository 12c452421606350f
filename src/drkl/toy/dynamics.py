"""Toy dynamics: a student of bare logits follows a known teacher under one objective, all seeds at once.

`S` seeds x `C` contexts x `V` tokens. ``free``: every context has its own V logits. ``capacity``: the student's logits
are A Bᵀ + b of a low rank over many contexts, so it cannot match a teacher of a higher rank, and objectives end in
different places. Each seed has its own random generators: its path does not depend on the other seeds of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.objectives import Objective, make_objective
from drkl.toy.metrics import METRICS, ToyTeacher, measure

SETTINGS = ("free", "capacity")
INITS = ("random", "warm")
BLOCK_ELEMENTS = 2**18
"""Number of logits that are differentiated at a time: a block of them stays in the processor's cache."""
ZIPF_SHARE = 0.25
"""Spread of the Zipf marginal that the contexts of a capacity teacher share; their own logits have a spread of 1."""
WARM_SHARE = 0.25
"""A warm start is forward KL for this share of the steps: distillation seldom starts from noise."""
INITIAL_SPREAD = {"free": 1.0, "capacity": 0.1}
LEARNING_RATE = {"free": 0.05, "capacity": 0.02}
CONTEXTS = {"free": 32, "capacity": 192}
STUDENT_RANK = 8
"""The default rank; a setting's name includes the rank where it differs."""
QUICK = {"vocab": 300, "steps": 100, "contexts": 32}


@dataclass(frozen=True)
class ToySetting:
    """One teacher and one kind of student.

    Args:
        kind: ``free`` (a logit per context and token) or ``capacity`` (logits of a low rank).
        vocab: number of tokens, at least 4.
        entropy: the teacher's entropy in every context, in nats, in (0, log vocab).
        init: ``random``, or ``warm``: after forward KL for a quarter of ``steps``.
        contexts: number of positions; 0 is the default of the kind, in `CONTEXTS`.
        rank: rank of the student's logits (``capacity`` only).
        teacher_rank: rank of the teacher's logits (``capacity`` only).
        steps: number of Adam steps.
        learning_rate: initial learning rate, which falls to 0 along a cosine; 0 is the default of the kind, in
            `LEARNING_RATE`.

    Raises:
        DrklError: a value outside its domain.
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
                "capacity gap. Lower the rank, or take the setting 'free'."
            )

    @property
    def name(self) -> str:
        """The setting as a file name."""
        rank = "" if self.rank == STUDENT_RANK or self.kind == "free" else f"-r{self.rank}"
        return f"{self.kind}-v{self.vocab}-h{self.entropy:g}-{self.init}{rank}"


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
        current = -torch.linalg.vecdot(probs, logp).unsqueeze(-1)
        off = current - entropy
        if bool((off.abs() < tolerance).all()):
            break
        scale_low = torch.where(off > 0, scale, scale_low)
        scale_high = torch.where(off > 0, scale_high, scale)
        # d entropy / d log scale = -Var_p(log p)
        variance = torch.linalg.vecdot(probs, logp.square()).unsqueeze(-1) - current.square()
        step = scale + off / variance.clamp(min=1e-12)
        inside = (step > scale_low) & (step < scale_high)
        scale = torch.where(inside, step, (scale_low + scale_high) / 2)
    return logits * scale.exp()


def _generator(seed: int, stream: int) -> torch.Generator:
    """Streams: 1 the teacher, 2 the student's start, 3 the labels."""
    return torch.Generator().manual_seed(1_000_003 * stream + seed)


def zipf_logits(vocab: int) -> Tensor:
    """Zipf's law as logits `[vocab]`: -log rank, standardised; `with_entropy` sets the exponent."""
    logits = -torch.arange(1, vocab + 1, dtype=torch.float32).log()
    return (logits - logits.mean()) / logits.std()


def teacher_logits(setting: ToySetting, seed: int) -> Tensor:
    """The teacher's logits `[contexts, vocab]`; each context has exactly the entropy of the setting.

    ``free``: Zipf's law, permuted and perturbed for each context. ``capacity``: U Vᵀ with Gaussian factors, plus
    Zipf's law as a marginal that all contexts share (a column of ones in U).
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
    """The students of all seeds: ``parameters``, and the `logits` `[S * C, vocab]` computed from them."""

    def __init__(self, setting: ToySetting, seeds: Sequence[int]) -> None:
        spread = INITIAL_SPREAD[setting.kind]
        shapes = [(setting.contexts, setting.vocab)]
        if setting.kind == "capacity":
            shapes = [(setting.contexts, setting.rank), (setting.vocab, setting.rank)]
        samples: list[list[Tensor]] = [[] for _ in shapes]
        for seed in seeds:
            generator = _generator(seed, 2)
            for tensors, shape in zip(samples, shapes, strict=True):
                tensors.append(spread * torch.randn(shape, generator=generator))
        self.parameters = [torch.stack(tensors).requires_grad_() for tensors in samples]
        if setting.kind == "capacity":
            self.parameters.append(torch.zeros(len(seeds), 1, setting.vocab, requires_grad=True))

    def logits(self) -> Tensor:
        """The logits `[S * C, vocab]`."""
        if len(self.parameters) == 1:
            return self.parameters[0].flatten(0, 1)
        left, right, bias = self.parameters
        return torch.baddbmm(bias, left, right.mT).flatten(0, 1)

    @torch.no_grad()
    def copy_from(self, other: ToyStudent) -> None:
        """Overwrite the parameters with those of ``other``."""
        for parameter, source in zip(self.parameters, other.parameters, strict=True):
            parameter.copy_(source)


class ToyProblem:
    """A setting with its seeds: the teachers and the common start, built once for all objectives."""

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

    def run(self, objective: Objective, *, points: int = 40) -> list[dict[str, float]]:
        """Train; return a row for each seed at about ``points`` steps and at the last one: seed, step, the metrics."""
        student, steps = self.student(), self.setting.steps
        every = max(1, steps // points)
        rows = self._measured(student, 0)
        for step in self._descend(student, objective, steps):
            if step % every == 0 or step == steps:
                rows += self._measured(student, step)
        return rows

    def _measured(self, student: ToyStudent, step: int) -> list[dict[str, float]]:
        with torch.no_grad():
            logits = student.logits()
            parts = [measure(logits[rows], self.teacher.rows(rows)) for rows in _blocks(logits)]
        columns = {key: torch.cat([part[key] for part in parts]) for key in METRICS}
        means = {key: column.view(len(self.seeds), -1).mean(-1).tolist() for key, column in columns.items()}
        return [
            {"seed": seed, "step": step} | {key: means[key][i] for key in METRICS} for i, seed in enumerate(self.seeds)
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
            self._cumulative = self.teacher.model.probs.double().cumsum(-1)
        draws = torch.cat([torch.rand(self.setting.contexts, 1, generator=g, dtype=torch.float64) for g in generators])
        # The last sum is 1 only up to rounding.
        tokens = torch.searchsorted(self._cumulative, draws * self._cumulative[:, -1:])
        return tokens.squeeze(-1).clamp(max=self.setting.vocab - 1)


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    return (slice(first, first + rows) for first in range(0, logits.shape[0], rows))


def gradient_on_logits(objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    """d value / d student logits `[n, vocab]`: the closed form where the objective has one, else autograd."""
    gradient = student.detach().clone()
    for part in _blocks(student):
        block, block_labels = gradient[part], None if labels is None else labels[part]
        if objective.has_closed_form:
            with torch.no_grad():
                objective.value_and_grad_(block, teacher[part].clone(), block_labels)
            continue
        leaf = block.clone().requires_grad_()
        values = objective(torch.log_softmax(leaf, -1), torch.log_softmax(teacher[part], -1), block_labels)
        block.copy_(torch.autograd.grad(values.sum(), leaf)[0])
    return gradient
