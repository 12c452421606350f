"""The Triton kernel against the definition: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl import LMHead
from drkl.losses import fused, kernel_steps
from drkl.losses.common import LossSettings, make_settings
from tests.objectives import reference, tensors
from tests.objectives.cases import CASES, FEW, LIMITS, Case
from tests.rounding import rounding

FP32 = torch.float32
INF = math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="no Triton for this system")
from drkl.losses import row_kernel, row_programs  # noqa: E402
from tests.losses.interpreter import patched_once  # noqa: E402

OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("fkl", {}),
    ("rkl", {}),
    ("srkl", {"skew": 0.8}),
    ("drkl", {"target": "label", "gamma": 2.0}),
    ("drkl", {"weight": "teacher", "target": "label"}),
    ("drkl", {"weight": "floor", "gamma": 0.3}),
]
every = pytest.mark.parametrize(("name", "params"), OBJECTIVES, ids=str)
KINDS = {case.id: case for case in [*FEW, *CASES, *LIMITS]}
"""Every objective and variant, those of `FEW` first."""
MAIN = ("fkl", "gjs", "akl", "ab", "todi", "drkl", "drkl-gjs", "drkl-0.1", "dkd-1.0-0.5-teacher", "ce")


def kinds(*, default: Any = None) -> pytest.MarkDecorator:
    """All objectives and variants, those beside ``default`` (all, where None) among the slow tests."""
    marks = {id: () if default is None or id in default else pytest.mark.slow for id in KINDS}
    return pytest.mark.parametrize("case", [pytest.param(KINDS[id], marks=marks[id], id=id) for id in KINDS])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_kernel, "BLOCK", 16)
    with patched_once():
        yield


def loss_settings(name: str, params: dict[str, Any], temperature: float = 1.0, kd_weight: float = 1.0) -> LossSettings:
    return case_settings(drkl.make_objective(name, **params), temperature, kd_weight)


def case_settings(objective: Any, temperature: float = 1.0, kd_weight: float = 1.0, **words: Any) -> LossSettings:
    return make_settings(objective, temperature, kd_weight, words.get("t2_scaling", False), "mean")


def by_kernel(
    settings: LossSettings, student: Tensor, teacher: Tensor, labels: Tensor, **words: Any
) -> tuple[Tensor, Tensor]:
    grad = student.clone().to(DEVICE)
    compared = teacher.to(DEVICE) if settings.uses_teacher else None
    values = row_kernel.row_step_(grad, compared, labels.to(DEVICE), settings, **words)
    return values.cpu().double(), grad.cpu().double()


def by_definition(
    settings: LossSettings, student: Tensor, teacher: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    leaf = student.to(dtype, copy=True).requires_grad_()
    values = drkl.distillation_loss(
        leaf,
        teacher.to(dtype),
        labels,
        objective=settings.objective,
        temperature=settings.temperature,
        kd_weight=settings.kd_weight,
        t2_scaling=settings.t2_scaling,
        reduction="none",
    )
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad


def by_hand(case: Case, settings: LossSettings, student: Tensor, teacher: Tensor, labels: Tensor) -> np.ndarray:
    """The values with 40 digits."""
    values = settings.kd_factor * tensors.by_hand(case, student, teacher, labels, settings.temperature)
    if not settings.uses_cross_entropy:
        return values
    rows = zip(student.tolist(), labels.tolist(), strict=True)
    observed = [float(reference.cross_entropy(reference.softmax(z), label)) for z, label in rows]
    return values + (1.0 - settings.kd_weight) * np.array(observed)


def coarse(student: Tensor, teacher: Tensor) -> float:
    """A difference of logits is rounded to the last bit of the larger one; the kernel forms it before it normalises."""
    return rounding(0, float(student[student.isfinite()].abs().max() + teacher[teacher.isfinite()].abs().max()), FP32)


def assert_in_budget(case: Case, settings: LossSettings, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Twice the error of the naive lines, and what a difference of logits is rounded by, of values of this size."""
    exact = by_definition(settings, student, teacher, labels)
    naive = by_definition(settings, student, teacher, labels, FP32)
    truth = torch.from_numpy(by_hand(case, settings, student, teacher, labels)), exact[1]
    close = coarse(student, teacher) / settings.temperature * max(settings.kd_factor, 1.0)
    close *= max(1.0, float(exact[0].abs().max()))
    for found, plain, gold in zip(by_kernel(settings, student, teacher, labels), naive, truth, strict=True):
        naive_error = float((plain.double() - gold).abs().max())
        assert float((found - gold).abs().max()) <= 2 * naive_error + close


@kinds()
def test_value_and_gradient(case: Case) -> None:
    student, teacher, labels = tensors.logits(rows=2, vocab=21, seed=len(case.id))
    settings = case_settings(case.objective, 2.0, 0.4, t2_scaling=True)
    assert_in_budget(case, settings, student.float(), teacher.float(), labels)


@kinds(default=())
@pytest.mark.parametrize("vocab", [1, 2, 3, 16, 17, 53])
@pytest.mark.parametrize(("temperature", "kd_weight"), [(1.0, 1.0), (1.0, 0.3), (0.5, 1.0), (3.0, 0.9)])
def test_value_and_gradient_at_any_width(case: Case, vocab: int, temperature: float, kd_weight: float) -> None:
    student, teacher, labels = tensors.logits(rows=3, vocab=vocab, seed=vocab)
    assert_in_budget(
        case, case_settings(case.objective, temperature, kd_weight), student.float(), teacher.float(), labels
    )


@pytest.mark.parametrize("name", ["fkl", "tvd", "akl", "drkl"])
def test_one_class_is_certain(name: str) -> None:
    settings = case_settings(name)
    values, grad = by_kernel(settings, torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    assert values.tolist() == [0.0, 0.0] and grad.tolist() == [[0.0], [0.0]]


def test_cross_entropy_alone_reads_no_teacher() -> None:
    student, _, labels = tensors.logits(rows=3, vocab=21, seed=2)
    for settings in (case_settings("drkl", 3.0, 0.0), case_settings("ce", 3.0)):
        leaf = student.clone().requires_grad_()
        logits = leaf / (settings.temperature if settings.uses_objective else 1.0)
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        expected.sum().backward()
        values, grad = by_kernel(settings, student.float(), torch.empty(0), labels)
        close = coarse(student, student)
        torch.testing.assert_close(values, expected.detach(), rtol=close, atol=close)
        torch.testing.assert_close(grad, leaf.grad, rtol=close, atol=close)


DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


@kinds(default=("akl", "drkl"))
@pytest.mark.parametrize(("ours", "theirs"), DTYPES, ids=str)
def test_low_precision(case: Case, ours: torch.dtype, theirs: torch.dtype) -> None:
    settings = case_settings(case.objective, kd_weight=0.5)
    student, teacher, labels = tensors.logits(rows=2, vocab=20, seed=21)
    student, teacher = student.to(ours), teacher.to(theirs)
    values, grad = by_kernel(settings, student, teacher, labels)
    expected, expected_grad = by_definition(settings, student, teacher, labels)
    close = coarse(student, teacher) * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(values, expected, rtol=close, atol=close)
    # The interpreter cuts to the digits of bf16, it does not round.
    bound = 2 * torch.finfo(ours).eps + close
    torch.testing.assert_close(grad, expected_grad, rtol=bound, atol=max(close, torch.finfo(ours).tiny))


CONFIDENT = [(15.0, 15.0), (22.0, 22.0), (3.0, 22.0), (60.0, 80.0)]


@pytest.mark.parametrize("tail", ["rkl", "fkl", "gjs"])
@pytest.mark.parametrize(("log_odds_q", "log_odds_p"), CONFIDENT)
def test_the_tail_of_a_confident_position(tail: str, log_odds_q: float, log_odds_p: float) -> None:
    pair = [tensors.confident(x, vocab=40, seed=i)[None] for i, x in ((2, log_odds_q), (1, log_odds_p))]
    student, teacher = (torch.from_numpy(x).float() for x in pair)
    settings = loss_settings("drkl", {"gamma": 1.0, "tail": tail})
    values, _ = by_kernel(settings, student, teacher, torch.zeros(1, dtype=torch.long))
    q, p = (reference.softmax(x[0].tolist()) for x in (student, teacher))
    (b_q, q_tail), (b_p, p_tail) = reference.split(q, 0), reference.split(p, 0)
    exact = reference.rkl(b_q, b_p) + reference.PARTS[tail](q_tail, p_tail)
    assert float(values) == pytest.approx(float(exact), rel=coarse(student, teacher))


@kinds(default=MAIN)
def test_huge_logits(case: Case) -> None:
    high, low = 1e4, -1e4
    student = torch.tensor([[high, low, 0, 1], [high, high, low, low], [0, 1, 2, low]])
    teacher = torch.tensor([[low, high, 0, 1], [high, low, low, high], [0, 2, high, 3]])
    labels = torch.tensor([0, 1, 2])
    settings = case_settings(case.objective)
    values, grad = by_kernel(settings, student, teacher, labels)
    expected, expected_grad = by_definition(settings, student, teacher, labels)
    if case in LIMITS:  # at alpha = -beta powers of p/q leave the range of the format
        assert not values.isnan().any()
        return
    close = coarse(student, teacher)
    np.testing.assert_allclose(values, expected, rtol=close, atol=close)
    np.testing.assert_allclose(grad / high, expected_grad / high, rtol=close, atol=close)


def test_the_lowest_index_is_the_target_on_ties() -> None:
    student, teacher, _ = tensors.logits(rows=3, vocab=60, seed=22)
    student, teacher = student.float(), teacher.float()
    teacher[:, [7, 23, 39, 58]] = 20.0
    first = by_kernel(loss_settings("drkl", {}), student, teacher, torch.full((3,), 7))
    label = by_kernel(loss_settings("drkl", {"target": "label"}), student, teacher, torch.full((3,), 7))
    close = coarse(student, teacher)
    torch.testing.assert_close(first[1], label[1], rtol=close, atol=close)


WIDTH, TOP, OTHER = 20, 4, 9


def excluded() -> tuple[Tensor, Tensor, list[str]]:
    """Rows with infinite logits, the student's and the teacher's, and what each of them is about."""
    rest = [i for i in range(WIDTH) if i != TOP]
    all_ids = list(range(WIDTH))
    changes: dict[str, tuple[dict[int, float], dict[int, float]]] = {
        "nothing": ({}, {}),
        "the student's": ({OTHER: -INF}, {}),
        "the teacher's": ({}, {OTHER: -INF}),
        "of both": ({OTHER: -INF}, {OTHER: -INF}),
        "one of each": ({OTHER: -INF}, {OTHER + 1: -INF}),
        "the student's top": ({TOP: -INF}, {}),
        "the teacher's top": ({}, {TOP: -INF}),
        "both tails": (dict.fromkeys(rest, -INF), dict.fromkeys(rest, -INF)),
        "the teacher's tail": ({}, dict.fromkeys(rest, -INF)),
        "the student's tail": (dict.fromkeys(rest, -INF), {}),
        "nothing in common": (dict.fromkeys(rest[:9], -INF), dict.fromkeys(rest[9:], -INF)),
        "what underflows": ({OTHER: -3e3}, {OTHER: -INF}),
        "what the student has no weight for": ({TOP: 5e3}, {OTHER: -INF}),
        "all of the student's": (dict.fromkeys(all_ids, -INF), {}),
        "all of the teacher's": ({}, dict.fromkeys(all_ids, -INF)),
        "+inf": ({OTHER: INF}, {}),
        "+inf at the top": ({TOP: INF}, {TOP: INF}),
        "the teacher's +inf": ({}, {OTHER: INF}),
        "no number": ({OTHER: math.nan}, {}),
        "the teacher's no number": ({}, {OTHER: math.nan}),
        "no number at the top": ({TOP: math.nan}, {TOP: math.nan}),
    }
    student, teacher, _ = tensors.logits(rows=1, vocab=WIDTH, seed=23)
    students, teachers = (x.float().repeat(len(changes), 1) for x in (student, teacher))
    teachers[:, TOP] = 4.0
    for row, both in enumerate(changes.values()):
        for logits, change in zip((students, teachers), both, strict=True):
            for place, value in change.items():
                logits[row, place] = value
    return students, teachers, list(changes)


@kinds(default=("fkl", "akl", "drkl-floor-0.3"))
@pytest.mark.parametrize("label", [TOP, pytest.param(OTHER, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("temperature", "kd_weight"), [(1.0, 1.0), pytest.param(2.0, 0.4, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is infinite on purpose
def test_infinite_logits_are_what_the_definition_makes_of_them(
    case: Case, label: int, temperature: float, kd_weight: float
) -> None:
    student, teacher, names = excluded()
    labels = torch.full((len(names),), label)
    settings = case_settings(case.objective, temperature, kd_weight)
    values, grad = by_kernel(settings, student, teacher, labels)
    expected, expected_grad = by_definition(settings, student, teacher, labels)
    close = coarse(student, teacher)  # 5,000 among them
    for row, name in enumerate(names):
        about = f"{case.id}: {name}"
        np.testing.assert_allclose(values[row], expected[row], rtol=close, atol=close, err_msg=about)
        known = expected_grad[row].isfinite() & ~expected[row].isnan()
        near = {"rtol": close, "atol": close, "err_msg": about}
        np.testing.assert_allclose(grad[row][known], expected_grad[row][known], **near)


HEADS = {
    "scale": LMHead(torch.empty(21, 1), scale=-0.4),
    "bias": LMHead(torch.empty(21, 1), torch.linspace(-2, 2, 21)),
    "all": LMHead(torch.empty(21, 1), torch.linspace(-2, 2, 21).index_fill(0, torch.tensor(5), -INF), 1.5, 3.0),
}


def through(head: LMHead, products: Tensor) -> Tensor:
    """softcap(scale (product + bias)) in float64."""
    bias = 0.0 if head.bias is None else head.bias.double()
    logits = head.scale * (products + bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def products(rows: int = 3, spare: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of 21 columns, with more beside them that do not count."""
    student, teacher, labels = tensors.logits(rows=rows, vocab=21, seed=rows)
    room = torch.full((rows, spare), 50.0)
    return torch.cat([student.float(), room], 1), torch.cat([teacher.float(), room], 1), labels


@pytest.mark.parametrize("name", ["drkl-label", "ce", *(pytest.param(n, marks=pytest.mark.slow) for n in MAIN[:-1])])
@pytest.mark.parametrize("which", HEADS)
def test_what_stands_between_products_and_logits(name: str, which: str) -> None:
    head, settings = HEADS[which], case_settings(KINDS[name].objective, 1.5, 0.5)
    student, teacher, labels = products(spare=3)
    leaf = student[:, :21].double().requires_grad_()
    expected = drkl.distillation_loss(
        through(head, leaf),
        through(head, teacher[:, :21].double()),
        labels,
        objective=settings.objective,
        temperature=1.5,
        kd_weight=0.5,
        reduction="none",
    )
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    words = {"vocab_size": 21, "student_head": head, "teacher_head": head}
    values, grad = by_kernel(settings, student, teacher, labels, **words)
    close = coarse(through(head, leaf.detach()), through(head, teacher[:, :21].double()))
    torch.testing.assert_close(values, expected.detach(), rtol=close, atol=close)
    torch.testing.assert_close(grad[:, :21], expected_grad, rtol=close, atol=close)
    assert (grad[:, 21:] == 50).all()
    assert torch.equal(by_kernel(settings, student, teacher, labels, needs_grad=False, **words)[1], student.double())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["drkl", "ce"])
def test_ids_that_count_as_one(name: str, temperature: float) -> None:
    ids, head, settings = [4, 9, 20], LMHead(torch.empty(21, 1), None, 0.8, 5.0), case_settings(name, temperature)
    student, teacher, _ = products()
    labels = torch.tensor([20, 4, 11])
    leaf = student.double().requires_grad_()
    words: dict[str, Any] = {"objective": name, "temperature": temperature, "merged_ids": ids}
    expected = drkl.distillation_loss(through(head, leaf), teacher.double(), labels, reduction="none", **words)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    members = through(head, leaf.detach())[:, ids].float()
    events = [temperature * torch.logsumexp(x / temperature, -1).to(DEVICE) for x in (members, teacher[:, ids])]
    rows = [x.clone().index_fill_(1, torch.tensor(ids[1:]), -INF) for x in (student, teacher)]
    seen = torch.where(labels == 20, 4, labels)
    values, grad = by_kernel(settings, *rows, seen, student_head=head, event=(4, *events))
    assert (grad[:, ids[1:]] == 0).all()
    grad[:, ids] = torch.softmax(members / temperature, -1) * grad[:, 4:5] * 0.8 * (1 - (members / 5.0) ** 2)
    close = coarse(student, teacher)
    torch.testing.assert_close(values, expected.detach(), rtol=close, atol=close)
    torch.testing.assert_close(grad, expected_grad, rtol=close, atol=close)


@pytest.mark.parametrize("temperatures", [(2.0,), (2.0, 1.0)])
def test_the_rest_as_one_class(temperatures: tuple[float, ...]) -> None:
    head, places = HEADS["all"], torch.tensor([[1, 5], [2, 20], [0, 7]])
    student, _, _ = products(spare=2)
    cut = student.scatter(1, places, -INF)
    leaf = student[:, :21].double().requires_grad_()
    logits = through(head, leaf)
    rest = [torch.logsumexp(logits.scatter(1, places, -INF) / t, -1) for t in temperatures]
    found = row_kernel.rest_log_sum_exp(cut.to(DEVICE), temperatures, vocab_size=21, head=head)
    close = coarse(student[:, :21], student[:, :21])
    torch.testing.assert_close(found.cpu().double(), torch.stack(rest, -1).detach(), rtol=close, atol=close)
    # d rest / d logit is the softmax over T: of T factor * rest that is what is asked for. A label in the first row.
    factors, labels = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([3, 2, 7])
    total = sum(t * (factors * r).sum() for t, r in zip(temperatures, rest, strict=True)) - 0.3 * logits[0, 3]
    (expected,) = torch.autograd.grad(total, leaf)
    shares = [(t, found[:, i], factors.to(DEVICE)) for i, t in enumerate(temperatures)]
    grad = cut.to(DEVICE)
    row_kernel.spread_rest_(grad, shares, labels=labels.to(DEVICE), label_share=0.3, vocab_size=21, head=head)
    torch.testing.assert_close(grad[:, :21].cpu().double(), expected, rtol=close, atol=close)
    assert (grad[:, 21:] == 50).all()


def test_no_rest_is_left() -> None:
    nothing = torch.full((2, 5), -INF, device=DEVICE)
    sums = row_kernel.rest_log_sum_exp(nothing, (1.0,))
    row_kernel.spread_rest_(nothing, [(1.0, sums[:, 0], torch.zeros(2, device=DEVICE))])
    assert (sums == -INF).all() and (nothing == 0).all()


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from drkl.losses import row_kernel, row_programs
from tests.losses.test_row_kernel import compiled
for capability in (80, 90):
    for program, signature, constants, warps in compiled():
        names = program.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        source = ASTSource(program, signature, {(names.index(n),): c for n, c in constants.items()}, aligned)
        compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
"""


def compiled() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Every program with its arguments' types, its constants, and its number of warps; constants once each."""
    plain, full, event = (False,) * 4, (True, True, True, False), (False, False, False, True)
    settings = [case_settings(case.objective) for case in KINDS.values()]
    settings += [case_settings("ce", 2.0), *(case_settings("drkl", t, w) for t, w in ((2.0, 0.5), (1.0, 0.0)))]
    seen = set()
    for case in settings:
        constants = dict(row_kernel.launched(case, 50_000).constants)
        key = str({k: getattr(v, "__name__", v) for k, v in constants.items()})
        warps = constants.pop("num_warps")
        if key not in seen:
            yield _typed(row_programs.row_step, {**constants, "HEADS": (plain, plain), "GRAD": True}, warps)
        seen.add(key)
    for heads, grad, dtype in (
        ((full, full), True, "fp32"),
        ((event, event), True, "fp16"),
        ((plain, full), False, "bf16"),
    ):
        more = {**constants, "HEADS": heads, "GRAD": grad}
        yield _typed(row_programs.row_step, more, warps, dtype)
    for count in (1, 2):
        yield _typed(row_programs.rest_sums, {"HEAD": full, "COUNT": count, "BLOCK": 2048}, 8)
        yield _typed(row_programs.spread_rest, {"HEAD": full, "COUNT": count, "LABEL": count == 2, "BLOCK": 2048}, 8)


def _typed(program: Any, constants: dict[str, Any], warps: int, dtype: str = "bf16") -> Any:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("student_pointer", "teacher_pointer", "pointer") or name.endswith(("bias", "bias_pointer")):
            return f"*{dtype}"
        if name.endswith("pointer"):
            return "*i64" if name == "label_pointer" else "*fp32"
        return "i32" if name in ("vocab_size", "event") or name.endswith("stride") else "fp32"

    return program, {name: kind(name) for name in program.arg_names}, constants, warps


@pytest.mark.slow
def test_every_program_compiles_for_two_generations_of_gpus(tmp_path: Path) -> None:
    """What the interpreter takes and the compiler does not; no GPU is needed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(["src", "."])}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@every
def test_the_fused_loss_takes_it(name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(fused, "CHUNK_BYTES", 5 * 30 * 4)
    monkeypatch.setattr(fused, "CUDA_CHUNK_BYTES", 5 * 30 * 4)
    calls: list[int] = []
    step = row_kernel.row_step_
    kernel_steps._runs.cache_clear()

    def watch(*args: Any, **words: Any) -> Tensor:
        calls.append(len(args[0]))
        return step(*args, **words)

    monkeypatch.setattr(row_kernel, "row_step_", watch)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(13, 6, generator=generator), torch.randn(30, 6, generator=generator)
    teacher_hidden, teacher_weight = torch.randn(13, 8, generator=generator), torch.randn(30, 8, generator=generator)
    labels = torch.randint(0, 30, (13,), generator=generator)
    labels[[2, 5]] = -100
    weights = torch.rand(13, generator=generator)

    def run(dtype: torch.dtype, device: str) -> list[Tensor]:
        observed: list[Tensor] = []
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        given = [x.to(device, dtype) for x in (teacher_hidden, teacher_weight)]
        loss = drkl.fused_distillation_loss(
            leaves[0],
            leaves[1],
            given[0],
            given[1],
            labels.to(device),
            objective=drkl.make_objective(name, **params),
            token_weights=weights.to(device),
            observe=lambda chunk: observed.extend((chunk.student.clone(), chunk.teacher.clone())),  # type: ignore[union-attr]
        )
        (3 * loss).backward()
        grads = [x.grad for x in leaves if x.grad is not None]
        logits = [torch.cat(observed[side::2]) for side in (0, 1)]
        return [x.detach().cpu().double() for x in (loss, *logits, *grads)]

    found = run(torch.float32, DEVICE)
    assert calls == [1, 4, 4, 3]  # one row to see that it runs
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ())
    close = rounding(8 + 30 + 13, 5.0, FP32)  # sums over the hidden size, the vocabulary and the positions
    for a, b in zip(found, run(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_without_a_compiler_the_loss_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))

    def broken(*args: Any, **words: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(row_kernel, "row_step_", broken)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((5, 6), (30, 6), (5, 8), (30, 8))]
    kernel_steps._runs.cache_clear()
    with pytest.warns(UserWarning, match="goes on without it, slower. Failed to find C compiler"):
        loss = drkl.fused_distillation_loss(*inputs)
    torch.testing.assert_close(loss, drkl.fused_distillation_loss(*inputs))  # without a further warning
    kernel_steps._runs.cache_clear()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of an infinite logit
def test_a_chunk_that_the_kernel_gives_up_is_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(fused, "CHUNK_BYTES", 4)
    monkeypatch.setattr(fused, "CUDA_CHUNK_BYTES", 4)
    inputs = [x.to(DEVICE) for x in (torch.eye(3), torch.eye(3), torch.eye(3), torch.eye(3))]
    inputs[2][1] = torch.inf
    starts: list[int] = []
    loss = drkl.fused_distillation_loss(*inputs, reduction="none", observe=lambda chunk: starts.append(chunk.start))
    assert starts == [0, 1, 2] and loss[[0, 2]].isfinite().all() and not loss[1].isfinite()


def test_what_the_kernel_does_not_know() -> None:
    def mine(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return -student_logp[:, 0]

    class Mine(drkl.objectives.ReverseKL):
        pass

    for objective in (mine, Mine(), drkl.decoupled(mine, "rkl"), drkl.decoupled("rkl", mine)):
        reason = row_kernel.why_not(make_settings(objective, 1.0, 1.0, False, "mean"))
        assert reason is not None and "has no device function for objective" in reason
        assert row_kernel.supports(make_settings(objective, 1.0, 0.0, False, "mean"))  # cross-entropy alone
