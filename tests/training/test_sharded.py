"""Sharded students and teachers in two processes give what one process with whole ones gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training import sharded_processes as sharded
from tests.training import tiny_runs

ROOT = Path(__file__).parents[2]
EXACT = 1e-12
"""In float64 the order of the sums moves the last of 16 digits, which a step of Adam makes a part of its 1e-2."""
BEGUN = ("tied", "untied", "lora", "accelerate", "accelerate pieces")


def start(folder: Path, mode: str, names: tuple[str, ...], processes: int = 2) -> list[dict[str, Any]]:
    """What the processes wrote, by rank."""
    environment = tiny_runs.environment() | {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] += f":{ROOT}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = ["-m", "tests.training.sharded_processes", str(folder), mode, *names]
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def student(folder: Path, name: str) -> dict[str, Tensor]:
    files = sorted((folder / name.replace(" ", "-") / "student").glob("*.safetensors"))
    assert len(files) == 1
    return load_file(files[0])


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    assert {key: weight.dtype for key, weight in ours.items()} == {key: weight.dtype for key, weight in theirs.items()}
    return max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in theirs)


@cache
def alone(name: str) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """What one process with whole models logs, the student that it saves, and the names of the saved files."""
    with TemporaryDirectory() as folder:
        where = Path(folder) / name.replace(" ", "-")
        facts = sharded.train(where, sharded.CASES[name])
        files = sorted(path.name for path in (where / "student").iterdir())
        return facts, student(Path(folder), name), files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, start(folder, "whole", tuple(sharded.CASES))


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.CASES)
def test_two_processes_give_the_student_of_one(whole: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, found = whole
    case, (facts, weights, files) = sharded.CASES[name], alone(name)
    tolerance = EXACT if case.tolerance is None else case.tolerance
    assert len({line["eval_loss"] for line in facts["log"] if "eval_loss" in line}) > 1, "nothing was learnt"
    for rank in found:
        assert rank[name]["sharded"] == (case.by != "nobody"), rank[name]
        assert rank[name]["parameters"] == facts["parameters"]
        assert len(rank[name]["log"]) == len(facts["log"])
        for ours, theirs in zip(rank[name]["log"], facts["log"], strict=True):
            # transformers keeps the sum of the losses in fp32.
            assert ours == pytest.approx(theirs, rel=max(tolerance, 2**-21))
    assert error(student(folder, name), weights) <= tolerance
    assert sorted(path.name for path in (folder / name.replace(" ", "-") / "student").iterdir()) == files


@pytest.mark.slow
def test_students_and_answers_in_pieces_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    found = start(tmp_path, "refused", tuple(sharded.REFUSED))
    for name, (_, message) in sharded.REFUSED.items():
        assert all(message in rank[name] for rank in found), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that were cut off after the checkpoint of their second step, by the number of processes."""
    folders = {count: tmp_path_factory.mktemp(f"begun{count}") for count in (1, 2)}
    for count, folder in folders.items():
        start(folder, "begin", BEGUN, count)
    return folders


# Another number of processes pads rows otherwise, and Llama sums its norms and its softmax in fp32 whatever the dtype.
@pytest.mark.slow
@pytest.mark.parametrize(("of", "to", "tolerance"), [(2, 2, 0.0), (2, 1, EXACT), (1, 2, EXACT), (2, 3, 1e-6)])
def test_runs_go_on_with_any_number_of_processes(
    tmp_path: Path, begun: dict[int, Path], whole: tuple[Path, list[dict[str, Any]]], of: int, to: int, tolerance: float
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun[of], folder)
    found = start(folder, "resume", BEGUN, to)
    for name in BEGUN:
        by_accelerate = sharded.CASES[name].by == "accelerate"
        if by_accelerate and 1 in (of, to):
            expected = "written by a run that accelerate sharded" if of > 1 else "written by a run without fsdp"
            assert all(expected in rank[name] for rank in found), found
        else:
            assert error(student(folder, name), student(whole[0], name)) <= tolerance, name


def distill(config: Path, processes: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = tiny_runs.environment() | {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, "-m", "drkl", "distill", str(config), *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_config_shards_its_teacher(tmp_path: Path) -> None:
    """In fp32, where the order of the sums moves a gradient by an ulp for each of the tokens of a step."""
    values = tiny_runs.config(tmp_path)
    values["training"] |= {"max_grad_norm": 0.0}
    values["training"]["arguments"] |= {"optim": "sgd"}
    config = tiny_runs.write_config(values, tmp_path / "config.yaml")
    alone = tiny_runs.train(values | {"run": values["run"] | {"name": "alone"}})
    done = distill(config, 2, "teacher.shard=true")
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "r"
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (run, alone.root))
    assert error(ours, theirs) <= 6 * 1e-2 * 120 * 2**-23
    assert "shard: true" in (run / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate shards on GPUs alone")
def test_accelerate_shards_on_one_gpu(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    values["run"]["device"] = "cuda"
    config = tiny_runs.write_config(values, tmp_path / "config.yaml")
    done = distill(config, 1, "training.arguments.fsdp=true")
    assert done.returncode == 0, done.stderr[-4000:]
    weights = load_file(tmp_path / "runs" / "r" / "student" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
