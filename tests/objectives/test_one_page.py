"""The page of numpy that is the whole method, as an oracle of the library, and the other way round."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import drkl
from drkl.objectives.logspace import split
from drkl.positions import target_statistics
from tests.objectives import tensors

PATH = Path(__file__).parents[2] / "examples" / "one_page.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_page", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("vocab", [2, 3, 40])
@pytest.mark.parametrize(("objective", "function"), [("fkl", "forward_kl"), ("rkl", "reverse_kl"), ("drkl", "drkl")])
def test_values_and_gradients(page: ModuleType, objective: str, function: str, vocab: int) -> None:
    student, teacher, _ = tensors.logits(rows=9, vocab=vocab, seed=vocab)
    expected, expected_grad = getattr(page, function)(student.numpy(), teacher.numpy())
    made = drkl.make_objective(objective)
    for values, grad in (
        tensors.value_and_grad(made, student, teacher, None),
        tensors.closed_form(made, student, teacher, None),
    ):
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.1, 2.0])
def test_gamma_and_the_fused_loss(page: ModuleType, gamma: float) -> None:
    student, teacher, _ = tensors.logits(rows=9, vocab=12)
    expected, expected_grad = page.drkl(student.numpy(), teacher.numpy(), gamma)
    leaf, eye = student.clone().requires_grad_(), torch.eye(12, dtype=torch.float64)
    objective = drkl.make_objective("drkl", gamma=gamma)
    loss = drkl.fused_distillation_loss(leaf, eye, teacher, eye, objective=objective, reduction="sum")
    loss.backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(loss.detach(), expected.sum(), rtol=1e-10)
    np.testing.assert_allclose(leaf.grad, expected_grad, rtol=1e-10, atol=1e-13)


def test_both_parts_at_any_target(page: ModuleType) -> None:
    student, teacher, labels = tensors.logits(rows=9, vocab=12)
    logq, logp = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    found = target_statistics(split(logq, labels), split(logp, labels), labels)
    B, K = page.parts(student.numpy(), teacher.numpy(), labels.numpy())
    np.testing.assert_allclose(found.B, B, rtol=1e-10)
    np.testing.assert_allclose(found.K, K, rtol=1e-10)
    reverse, _ = page.reverse_kl(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(B + found.rest.numpy() * K, reverse, rtol=1e-10)


@pytest.mark.slow
def test_what_it_prints() -> None:
    done = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    numbers = next(line.split("is ")[1:] for line in lines if line.startswith("Reverse KL is"))
    assert numbers[0].split(",")[0] == numbers[1].rstrip(".")
    assert "reverse KL pushes the target's logit by +0.368, DRKL by +0.000." in lines[1]
    gaps = {line.split()[0]: float(line.split("= ")[1].split()[0]) for line in lines if "q_t - p_t = " in line}
    assert gaps.keys() == {"forward_kl", "reverse_kl", "drkl", "teacher"}
    assert gaps["reverse_kl"] > 0.1 and abs(gaps["drkl"]) < 0.02


def test_it_is_one_page_of_numpy_alone() -> None:
    text = PATH.read_text()
    assert len(text.splitlines()) <= 120
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import numpy as np"]
