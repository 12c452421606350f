"""The two terms, their gradients and what the definitions say of them; references never import the library."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq
from torch import Tensor

import drkl
import drkl.analysis
from drkl.analysis import decompose, terms
from drkl.objectives import Decoupled, Objective
from drkl.objectives.logspace import split
from tests.analysis import reference
from tests.objectives import tensors
from tests.objectives.cases import CASES, LIMITS, Case, name
from tests.rounding import rounding

INF = math.inf
every = pytest.mark.parametrize("case", [*CASES, *LIMITS], ids=name)
with_equations = pytest.mark.parametrize(
    "case", [case for case in (*CASES, *LIMITS) if case.objective.name in reference.NAMES], ids=name
)
TEMPERATURES = [1.0, 2.5]


def by_equations(objective: Objective) -> reference.Terms:
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}  # type: ignore[arg-type]
    fields.pop("target", None)
    if isinstance(objective, Decoupled):
        fields |= {key: whole(fields[key]) for key in ("on_target", "on_tail")}
        return reference.decoupled_terms(**fields)
    if objective.name == "drkl":
        parts = {"on_target": reference.whole("rkl"), "on_tail": whole(drkl.make_objective(fields.pop("tail")))}
        return reference.decoupled_terms(**parts, **fields)
    if objective.name == "dkd":
        forward = reference.whole("fkl")
        return reference.decoupled_terms(forward, forward, fields["beta"], target_weight=fields["alpha"])
    return reference.terms(objective.name, **fields)


def whole(part: Objective) -> Any:
    return reference.whole(part.name, **dataclasses.asdict(part))  # type: ignore[call-overload]


def states(case: Case, seed: int = 0, **shape: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Both logits, the labels where they are needed, and the target."""
    student, teacher, labels = tensors.logits(seed=seed, **shape)
    given_labels = labels if case.objective.needs_labels else None
    return student, teacher, given_labels, labels if given_labels is not None else teacher.argmax(-1)


def test_every_registered_objective_is_among_the_cases() -> None:
    assert {case.objective.name for case in CASES} == {*drkl.OBJECTIVES, "decoupled"}


@with_equations
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_terms_are_the_equations_and_add_up_to_the_objective(case: Case, temperature: float) -> None:
    student, teacher, labels, target = states(case)
    logq, logp = (torch.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    found = terms(case.objective, logq, logp, labels)
    assert found.target.shape == found.tail.shape == (6,)
    torch.testing.assert_close(found.target + found.tail, case.objective(logq, logp, labels), rtol=1e-12, atol=1e-14)
    both = by_equations(case.objective)
    for i in range(6):
        q, p = (reference.reference.softmax(x[i].tolist(), temperature) for x in (student, teacher))
        expected = [float(value) for value in both(q, p, int(target[i]), q)]
        np.testing.assert_allclose([found.target[i], found.tail[i]], expected, rtol=1e-10, atol=1e-13)


@every
def test_the_target_term_is_the_same_divergence_of_the_pairs_where_the_table_says_so(case: Case) -> None:
    student, teacher, labels, target = states(case, rows=20, seed=5)
    objective = case.objective
    logq, logp = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    found = terms(objective, logq, logp, labels)
    bound = rounding(tensors.VOCAB, scale=20.0)  # a KL of 7 classes, with log-probabilities of at most 20
    assert (found.target > -bound).all() and (found.tail > -bound).all()
    if objective.name in ("rkl", "fkl", "symmetric_kl", "srkl", "sfkl", "gjs"):
        pairs = objective(split(logq, target).log_two, split(logp, target).log_two)
        torch.testing.assert_close(found.target, pairs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("params", "same"), [({"alpha": 0.0, "beta": 1.0}, "rkl"), ({"alpha": 1.0, "beta": 0.0}, "fkl")]
)
def test_alpha_beta_is_split_where_it_is_a_sum_also_where_it_is_a_kl(params: dict[str, float], same: str) -> None:
    student, teacher, _ = tensors.logits()
    found, kl = (
        decompose(student, teacher, None, drkl.make_objective("ab", **params)),
        decompose(student, teacher, None, same),
    )
    torch.testing.assert_close(found.target_grad + found.tail_grad, kl.target_grad + kl.tail_grad)
    assert (found.target_grad - kl.target_grad).abs().max() > 1e-2


@with_equations
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradients_are_those_of_the_terms(case: Case, temperature: float) -> None:
    student, teacher, labels, target = states(case, rows=3, vocab=5, seed=1)
    found = decompose(student, teacher, labels, case.objective, temperature)
    both = by_equations(case.objective)
    for i, t in enumerate(target.tolist()):
        expected = reference.gradients(both, student[i].tolist(), teacher[i].tolist(), t, temperature)
        np.testing.assert_allclose(found.target_grad[i], expected[0], rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.tail_grad[i], expected[1], rtol=1e-9, atol=1e-13)
        assert found.target_push[i] == found.target_grad[i, t] and found.tail_push[i] == found.tail_grad[i, t]


@every
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", [2, 3, 30])
def test_the_two_gradients_add_up_to_the_objectives(case: Case, temperature: float, vocab: int) -> None:
    student, teacher, labels, _ = states(case, rows=9, vocab=vocab, seed=2)
    found = decompose(student, teacher, labels, case.objective, temperature)
    total = found.target_grad + found.tail_grad
    leaf = student.clone().requires_grad_()
    drkl.distillation_loss(
        leaf, teacher, labels, objective=case.objective, temperature=temperature, reduction="sum"
    ).backward()
    torch.testing.assert_close(total, leaf.grad, rtol=1e-11, atol=1e-13)
    if case.objective.has_closed_form:
        closed = student / temperature
        case.objective.value_and_grad_(closed, teacher / temperature, labels)
        torch.testing.assert_close(total, closed / temperature, rtol=1e-10, atol=1e-12)


def of_kls(objective: Objective) -> dict[str, Any] | None:
    """The arguments of `reference.equations` for an objective made of reverse and forward KL; None for others."""
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}  # type: ignore[arg-type]
    fields.pop("target", None)
    if objective.name in ("ce", "rkl", "fkl", "symmetric_kl", "akl"):
        return {"name": objective.name, **fields}
    parts = {"on_target": "rkl", "weight": "constant", "target_weight": 1.0}
    if objective.name == "decoupled":
        parts = {key: getattr(value, "name", value) for key, value in fields.items()}
    elif objective.name == "drkl" and fields.pop("skew") == 0:
        parts |= {"on_tail": fields.pop("tail"), **fields}
    elif objective.name == "dkd":
        parts |= {"on_target": "fkl", "on_tail": "fkl", "gamma": fields["beta"], "target_weight": fields["alpha"]}
    known = {parts["on_target"], parts.get("on_tail")} <= {"rkl", "fkl"}
    return {"name": "decoupled", **parts} if known else None


@pytest.mark.parametrize("case", [case for case in [*CASES, *LIMITS] if of_kls(case.objective)], ids=name)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradients_are_the_closed_forms(case: Case, temperature: float) -> None:
    arguments = of_kls(case.objective) or {}
    student, teacher, labels, target = states(case, rows=9, vocab=8, seed=3)
    found = decompose(student, teacher, labels, case.objective, temperature)
    name = arguments.pop("name")
    expected = reference.equations(name, student.numpy(), teacher.numpy(), target.numpy(), temperature, **arguments)
    np.testing.assert_allclose(found.target_grad, expected[0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found.tail_grad, expected[1], rtol=1e-10, atol=1e-13)


LOGITS = arrays(np.float64, (3, 4), elements=st.floats(-30, 30, width=32))


@pytest.mark.slow
@settings(max_examples=60)
@given(LOGITS, LOGITS, arrays(np.int64, 3, elements=st.integers(0, 3)), st.sampled_from([0.5, 1.0, 4.0]))
def test_reverse_forward_and_decoupled_reverse_kl_on_any_logits(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> None:
    z, y, t = torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels)
    at = reference.numbers(student, teacher, labels, temperature)
    q_t, rest = at["q_t"], at["rest_q"]
    size = np.maximum(1.0, np.abs(at["D"]) + np.abs(at["K"])) / temperature

    def check(found: drkl.analysis.Decomposition, target_push: np.ndarray, tail_push: np.ndarray) -> None:
        assert (np.abs(found.target_push.numpy() - target_push / temperature) <= 1e-12 * size).all()
        assert (np.abs(found.tail_push.numpy() - tail_push / temperature) <= 1e-12 * size).all()
        for key in ("q_t", "p_t", "B", "K", "D"):
            np.testing.assert_allclose(getattr(found, key), at[key], rtol=1e-10, atol=1e-12)

    check(decompose(z, y, t, "rkl", temperature), q_t * rest * at["D"], -q_t * rest * at["K"])
    check(decompose(z, y, t, "fkl", temperature), q_t - at["p_t"], 0 * q_t)
    by_label = drkl.make_objective("drkl", target="label")
    found = decompose(z, y, t, by_label, temperature)
    check(found, q_t * rest * at["D"], 0 * q_t)
    tail = 0.5 * at["tail_q"] * (at["log_ratio"] - at["K"][:, None]) / temperature
    assert (np.abs(found.tail_grad.numpy() - tail) <= 1e-12 * size[:, None]).all()


def matched(log_odds: float, seed: int = 0, vocab: int = 40) -> tuple[Tensor, Tensor]:
    """Student and teacher `[1, vocab]` with equal probabilities of class 0 and unequal tails."""
    rows = [tensors.confident(log_odds, vocab, seed=2 * seed + i) for i in (1, 2)]
    return torch.from_numpy(rows[0][None]), torch.from_numpy(rows[1][None])


@pytest.mark.parametrize("log_odds", [-1.0, 0.0, 0.5, 3.0, 12.0, 30.0])
def test_reverse_kl_pushes_a_matched_target_and_drkl_does_not(log_odds: float) -> None:
    student, teacher = matched(log_odds)
    label = torch.tensor([0])
    found = decompose(student, teacher, label, "rkl")
    q_t, rest = 1 / (1 + math.exp(-log_odds)), 1 / (1 + math.exp(log_odds))
    assert float(found.K) > 0.5 and abs(float(found.D)) < 1e-12 and abs(float(found.target_push)) < 1e-12
    assert float(found.tail_push) == pytest.approx(-q_t * rest * float(found.K), rel=1e-10, abs=1e-12)
    for weight in ("constant", "student", "teacher", "floor"):
        for tail in ("rkl", "fkl", "gjs"):
            objective = drkl.make_objective("drkl", target="label", weight=weight, tail=tail)
            found = decompose(student, teacher, label, objective)
            assert abs(float(found.target_push)) < 1e-12 and abs(float(found.tail_push)) < 1e-12
            assert float(found.tail_grad.abs().max()) > 0.0


@settings(max_examples=40)
@given(st.floats(-6, 12), st.integers(0, 10**6))
def test_the_push_on_a_matched_target_whatever_the_tails(log_odds: float, seed: int) -> None:
    student, teacher = matched(log_odds, seed, vocab=7)
    label = torch.tensor([0])
    found = decompose(student, teacher, label, "rkl")
    assert abs(float(found.tail_push + found.q_t * (1 - found.q_t) * found.K)) < 1e-12
    found = decompose(student, teacher, label, drkl.make_objective("drkl", target="label"))
    assert abs(float(found.tail_push)) < 1e-12


def push_at(log_odds: float, objective: str, teacher: Tensor) -> tuple[float, drkl.analysis.Decomposition]:
    """On the target where the student has these log-odds and a fixed tail."""
    student = torch.from_numpy(tensors.confident(log_odds, teacher.shape[-1], seed=1)[None])
    found = decompose(student, teacher, None, objective)
    return float(found.target_push + found.tail_push), found


@pytest.mark.parametrize("log_odds", [3.0, 5.0])
def test_where_the_target_comes_to_rest(log_odds: float) -> None:
    _, teacher = matched(log_odds)
    assert int(teacher.argmax()) == 0
    k = float(push_at(0.0, "rkl", teacher)[1].K)
    assert k > 0.5
    rest = brentq(lambda s: push_at(s, "rkl", teacher)[0], log_odds - 5, log_odds + 8, xtol=1e-13)
    assert rest == pytest.approx(log_odds + k, abs=1e-10)
    rest = brentq(lambda s: push_at(s, "drkl", teacher)[0], log_odds - 5, log_odds + 8, xtol=1e-13)
    assert rest == pytest.approx(log_odds, abs=1e-10)


@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_the_mixture_of_a_skewed_drkl_pushes_a_matched_target_down(skew: float) -> None:
    student, teacher = matched(3.0)
    objective = drkl.make_objective("drkl", skew=skew)
    found = decompose(student, teacher, None, objective)
    assert abs(float(found.target_push)) < 1e-12 and float(found.tail_push) > 1e-4
    at = reference.numbers(student.numpy(), teacher.numpy(), np.array([0]), 1.0)
    middle = (1 - skew) * at["tail_p"] + skew * at["tail_q"]
    middle[0, 0] = 1.0
    chi_squared = float((at["tail_q"] ** 2 / middle).sum()) - 1
    assert float(found.tail_push) == pytest.approx(skew * 0.5 * float(found.q_t) * chi_squared, rel=1e-10)
    apart = decompose(student, teacher, None, drkl.decoupled("srkl", "srkl"))
    assert abs(float(apart.target_push)) < 1e-12 and abs(float(apart.tail_push)) < 1e-12


def test_a_detached_weight_takes_the_push_out_of_reverse_kl_and_leaves_its_value() -> None:
    student, teacher, _ = tensors.logits(rows=8)
    rkl = decompose(student, teacher, None, "rkl")
    detached = decompose(student, teacher, None, drkl.make_objective("drkl", weight="student"))
    torch.testing.assert_close(rkl.target_grad, detached.target_grad, rtol=1e-12, atol=1e-14)
    assert detached.tail_push.abs().max() < rounding(tensors.VOCAB, scale=20.0)
    # What is left is the gradient of the weight: a function of q_t alone, times K.
    tail_q = reference.numbers(student.numpy(), teacher.numpy(), teacher.argmax(-1).numpy(), 1.0)["tail_q"]
    left = -(rkl.q_t * (1 - rkl.q_t) * rkl.K).unsqueeze(-1)
    by_hand = (-left * torch.from_numpy(tail_q)).scatter(-1, teacher.argmax(-1, keepdim=True), left)
    torch.testing.assert_close(rkl.tail_grad - detached.tail_grad, by_hand, rtol=1e-10, atol=1e-13)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits(case: Case, dtype: torch.dtype) -> None:
    high, low = 1e4, -1e4
    student = [[high, low, 0, 1], [low, high, 0, 1], [high, high, low, low], [0, 1, 2, low], [high, 1, 2, 3]]
    teacher = [[low, high, 0, 1], [low, high, 1, 0], [high, low, low, high], [0, 2, high, 3], [high, 3, 1, 2]]
    z, y = torch.tensor(student, dtype=dtype), torch.tensor(teacher, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 3, 0]) if case.objective.needs_labels else None
    if case in LIMITS and "0.3" in case.id:
        pytest.skip("(p/q)^alpha leaves the range of the number format")
    found = decompose(z, y, labels, case.objective)
    for column in found:
        assert column.dtype == dtype and column.isfinite().all()
    total = tensors.value_and_grad(case.objective, z, y, torch.tensor([0, 1, 2, 3, 0]))[1]
    rtol = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.target_grad + found.tail_grad, total, rtol=rtol, atol=rtol)


@every
def test_excluded_tokens(case: Case) -> None:
    student, teacher, labels, _ = states(case, vocab=6, seed=4)
    found = decompose(student, teacher, labels, case.objective)
    wide = [torch.cat([torch.full((6, 1), -INF), x], -1) for x in (student, teacher)]
    wider = decompose(*wide, None if labels is None else labels + 1, case.objective)
    assert (wider.target_grad[:, 0] == 0).all() and (wider.tail_grad[:, 0] == 0).all()
    for one, other in zip(found, wider, strict=True):
        torch.testing.assert_close(other[:, 1:] if other.dim() == 2 else other, one, rtol=1e-11, atol=1e-13)
    teacher[:, 2] = -INF
    logq, logp = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    both = terms(case.objective, logq, logp, labels)
    torch.testing.assert_close(both.target + both.tail, case.objective(logq, logp, labels), rtol=1e-12, atol=1e-14)
    assert not any(column.isnan().any() for column in decompose(student, teacher, labels, case.objective))


def test_a_mass_that_underflows_is_still_excluded() -> None:
    student, teacher = torch.tensor([[0.0, -2e3, -2e3]]), torch.tensor([[1.0, 0.0, -INF]])
    both = terms(drkl.make_objective("rkl"), torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    assert both.tail.tolist() == [INF] and both.target.isfinite().all()


@pytest.mark.parametrize("tokens", [[0.3, -INF, -INF], [0.3]])
def test_no_tail_at_all(tokens: list[float]) -> None:
    logits = torch.tensor([tokens])
    for objective in ("rkl", "fkl", "drkl", "gjs"):
        found = decompose(logits, logits, None, objective)
        assert [float(x) for x in (found.q_t, found.p_t, found.B, found.K, found.D)] == [1, 1, 0, 0, 0]
        assert float(found.target_grad.abs().max()) == float(found.tail_grad.abs().max()) == 0.0


def test_two_classes_have_no_tail_to_differ_in() -> None:
    student, teacher, _ = tensors.logits(vocab=2)
    rkl, of_drkl = decompose(student, teacher, None, "rkl"), decompose(student, teacher, None, "drkl")
    for found in (rkl, of_drkl):
        bound = rounding(2, scale=20.0)
        assert found.K.abs().max() < bound and found.tail_grad.abs().max() < bound
    torch.testing.assert_close(rkl.target_grad, of_drkl.target_grad)


def test_which_class_is_the_target() -> None:
    student, teacher, _ = tensors.logits()
    labels = (teacher.argmax(-1) + 1) % teacher.shape[-1]

    def p_t(objective: str | Objective, labels: Tensor | None) -> Tensor:
        return decompose(student, teacher, labels, objective).p_t

    probs = torch.softmax(teacher, -1)
    top, observed = probs.amax(-1), probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(p_t("rkl", None), top)
    torch.testing.assert_close(p_t("rkl", labels), observed)
    torch.testing.assert_close(p_t("ce", labels), observed)
    torch.testing.assert_close(p_t("drkl", None), top)
    torch.testing.assert_close(p_t("drkl", labels), top)
    torch.testing.assert_close(p_t(drkl.make_objective("drkl", target="label"), labels), observed)
    ties = decompose(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    assert float(ties.q_t) == pytest.approx(math.e / (1 + math.e + math.e**2))


def test_at_temperature_t_the_gradients_are_those_of_the_divided_logits_over_t() -> None:
    student, teacher, _ = tensors.logits()
    warm, plain = decompose(student, teacher, temperature=4.0), decompose(student / 4.0, teacher / 4.0)
    for key in drkl.analysis.Decomposition._fields:
        factor = 4.0 if "grad" in key or "push" in key else 1.0
        torch.testing.assert_close(getattr(warm, key) * factor, getattr(plain, key), rtol=1e-12, atol=1e-14)


def test_what_comes_back_and_what_is_left_alone() -> None:
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in tensors.logits())
    student.requires_grad_()
    before = student.detach().clone()
    found = decompose(student, teacher)
    assert student.grad is None and torch.equal(student, before)
    assert not any(column.requires_grad for column in found)
    assert found.target_grad.shape == (6, tensors.VOCAB) and found.tail_push.shape == (6,)
    with torch.inference_mode():
        inside = decompose(student * 1.0, teacher * 1.0, labels * 1, "drkl")
    assert torch.equal(inside.tail_grad, decompose(student, teacher, labels, "drkl").tail_grad)
    half = decompose(student.bfloat16(), teacher.bfloat16())
    assert half.tail_grad.dtype == torch.float32
    none = decompose(student[:0], teacher[:0])
    assert none.tail_grad.shape == (0, tensors.VOCAB) and none.K.shape == (0,)


@dataclasses.dataclass(frozen=True)
class Own:
    """Squared distance of the logs, of a single class."""

    name: ClassVar[str] = "own"
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = False

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        return ((student_logp - teacher_logp) ** 2).sum(-1)

    def value_and_grad_(self, *args: Any) -> Tensor:
        raise NotImplementedError


class OwnWithTerms(Own):
    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        whole = self(student_logp, teacher_logp)
        return 0.25 * whole, 0.75 * whole


def test_an_objective_of_ones_own() -> None:
    student, teacher, _ = tensors.logits()
    found = decompose(student, teacher, None, OwnWithTerms())
    torch.testing.assert_close(3 * found.target_grad, found.tail_grad)
    with pytest.raises(drkl.DrklError, match=r"'own' does not say what its target term .* method terms\("):
        decompose(student, teacher, None, Own())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "drlk"}, "no objective 'drlk'. Did you mean 'drkl'"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a finite number above 0"),
        ({"objective": "ce"}, "'ce' needs labels here"),
        ({"objective": drkl.make_objective("drkl", target="label")}, "'drkl' needs labels here"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels has shape \[5\]; expected \[6\]"),
        ({"labels": torch.full((6,), 7)}, r"labels run from 7 to 7; expected ids in \[0, 7\)"),
        ({"labels": torch.tensor([0, -100, 1, 2, -100, 3])}, "labels has 2 positions that do not count"),
        ({"teacher_logits": torch.zeros(6, 8)}, "teacher scores 8 tokens and the student 7"),
        ({"teacher_logits": torch.zeros(5, 7)}, r"teacher_logits has shape \[5, 7\] and student_logits \[6, 7\]"),
        ({"teacher_logits": None}, r"teacher_logits is NoneType; expected a tensor of floats \[n, vocab\]"),
        ({"student_logits": torch.zeros(2, 3, 7)}, r"student_logits has shape \[2, 3, 7\]; expected \[n, vocab\]"),
        ({"student_logits": torch.zeros(6, 7, dtype=torch.long)}, "student_logits is torch.int64; expected"),
    ],
)
def test_errors(unchecked: None, change: dict[str, Any], message: str) -> None:
    student, teacher, _ = tensors.logits()
    with pytest.raises(drkl.DrklError, match=message):
        decompose(**({"student_logits": student, "teacher_logits": teacher} | change))
