"""Numbers that are not finite: in rows, models, caches, checkpoints, and at a step of training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drkl.runs import RunFolder
from tests.faults.conftest import Injected
from tests.faults.forked import Ended, Runner
from tests.models import tiny
from tests.training import tiny_runs

INSIDE = "tests.faults.planting:numbers"
TRAINING = {"max_steps": 6, "eval_every": 2, "save_every": 2, "arguments": {"logging_steps": 1}}
LOWER = "lower learning rate"


def config_of(root: Path, **sections: Any) -> Path:
    sections = {"training": TRAINING} | sections
    return tiny_runs.write_config(tiny_runs.config(root, **sections), root / "c.yaml")


def spoil(path: Path, name: str | None = None, value: float = float("nan")) -> str:
    """Write a number that is not finite into a file of weights, into the first tensor or the one of this name."""
    tensors = load_file(path)
    name = name or next(key for key, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    return name


def assert_told(done: Ended, *words: str, code: int = 2) -> None:
    """One message, without a traceback, that has these words (a pattern each)."""
    assert done.code == code, f"status {done.code}: {done.err[-400:]}"
    assert "Traceback" not in done.err, done.err[-600:]
    text = " ".join(done.err.split())
    assert text.count("Error:") == 1, text[-600:]
    for word in words:
        assert re.search(word, text), f"{word!r} is not in {text[-600:]!r}"


def assert_no_bad_weights(run: RunFolder) -> None:
    for path in [*run.root.rglob("model.safetensors")]:
        for name, tensor in load_file(path).items():
            assert bool(torch.isfinite(tensor).all()), f"{path} has {name}"


def assert_kept(done: Ended, run: RunFolder) -> None:
    """The checkpoint that the message speaks of is there, and the student is not."""
    whole = [int(path.parent.name[11:]) for path in run.checkpoints_path.glob("checkpoint-*/complete.json")]
    said = re.search(r"checkpoint-(\d+), is kept", " ".join(done.err.split()))
    assert (int(said[1]) if said else None) == max(whole, default=None), f"{done.err[-300:]}: {whole}"
    assert said or "here is no checkpoint yet" in done.err
    assert not run.student_path.exists(), "a student was saved"
    assert_no_bad_weights(run)


STEPS: list[tuple[str, str, list[int], str]] = [
    ("weight", "nan", [1, 2, 4, 6], r"student weight 'model\.layers\.1\.mlp\.up_proj\.weight'"),
    ("weight", "inf", [3], r"student weight 'model\.layers\.1\.mlp\.up_proj\.weight'"),
    ("teacher's weight", "nan", [1, 3, 5], r"teacher weight 'model\.norm\.weight'.*teacher is at fault"),
    (
        "teacher's states",
        "nan",
        [1, 3],
        r"teacher hidden states, first in what its 'model\.layers\.0\.mlp'.*teacher is",
    ),
    ("states", "nan", [1, 2, 3, 6], r"student hidden states, first in what its 'model\.layers\.0\.mlp'"),
    ("states", "inf", [4], r"student hidden states, first in what its 'model\.layers\.0\.mlp'"),
    ("gradient", "nan", [1, 3, 6], r"gradient of 'model\.layers\.1\.mlp\.up_proj\.weight'\."),
    ("gradient", "inf", [5], r"gradient of 'model\.layers\.1\.mlp\.up_proj\.weight'\."),
    ("optimiser", "nan", [2, 3, 5], r"optimiser's state exp_avg of 'model\."),
    ("learning rate", "nan", [1, 3], r"learning rate, \[nan"),
    ("learning rate", "inf", [3], r"learning rate, \[inf"),
    ("last weights", "nan", [6], r"student weight 'model\.norm\.weight'"),
]
QUICK = [("gradient", "nan", [3], STEPS[6][3]), ("teacher's weight", "nan", [1], STEPS[2][3])]


def each_step(runner: Runner, injected: Injected, tmp_path: Path, cases: list[tuple[str, str, list[int], str]]) -> None:
    config = config_of(tmp_path)
    for what, value, steps, words in cases:
        for step in steps:
            name = f"{what}-{value}-{step}".replace("'", "").replace(" ", "-")
            with injected(f"{what} {value} at step {step}"):
                done = runner.call("distill", config, f"run.name={name}", inject=INSIDE, given=[what, [step], value])
                run = RunFolder(tmp_path / "runs" / name)
                whose = "teacher" if "teacher" in what else ""
                seen = (
                    f"{step}|{step + 1}" if what == "optimiser" else f"{step - 1}|{step}"
                )  # by what it makes of weights
                assert_told(done, words, rf"[Ss]tep ({seen})\b", "drkl distill --resume")
                assert not whose or LOWER not in done.err, "the learning rate is blamed for the teacher"
                assert_kept(done, run)
                again = runner.call("distill", "--resume", run.root)  # had it been a cosmic ray
                assert again.code == 0 and run.is_finished(), again.err[-300:]
                assert tiny_runs.steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault(
    group="Numbers",
    fault="NaN or infinity appears at a step: in a gradient, or in the teacher's weights",
    does="stops before the step is taken, names the first tensor, the rows and the checkpoint that is kept",
)
def test_numbers_at_a_step(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    each_step(runner, injected, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.fault(
    group="Numbers",
    fault="NaN or infinity appears at a step: in weights, states, gradient, optimiser or learning rate, the teacher's "
    "or the student's, at every kind of step",
    does="stops before the step is taken or anything is saved, names whose tensor it is, and can be resumed",
)
def test_numbers_at_any_step(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    each_step(runner, injected, tmp_path, STEPS)


@pytest.mark.fault(
    group="Numbers",
    fault="NaN or infinity in the weights of a teacher or of a student's start, as they are loaded",
    does="refuses them by the tensor's name, before anything is written",
)
def test_weights_that_are_loaded(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tiny.save(tiny.llama(1, layers=2), tmp_path / "student")
    for whose, value, name in (
        ("teacher", float("nan"), "model.norm.weight"),
        ("teacher", float("inf"), "model.embed_tokens.weight"),
        ("student", float("-inf"), "model.layers.1.mlp.up_proj.weight"),
    ):
        path = tmp_path / whose / "model.safetensors"
        good = path.read_bytes()
        with injected(f"{value} in {whose}'s {name}"):
            spoil(path, name, value)
            start = [f"student.model={tmp_path / 'student'}", "student.init=pretrained", "student.layers=null"]
            changes = start if whose == "student" else []
            done = runner.call("distill", config, "run.name=new", *changes)
            assert_told(done, re.escape(name), whose)
            assert LOWER not in done.err and not (tmp_path / "runs" / "new").exists()
        path.write_bytes(good)


@pytest.mark.slow
@pytest.mark.fault(
    group="Numbers",
    fault="NaN in the student of a finished run, or in its teacher, that is evaluated or analysed",
    does="refuses it by the tensor's name; no number is written",
)
def test_models_that_are_measured(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    done = runner.call("distill", config_of(tmp_path))
    assert done.code == 0, done.err
    run = RunFolder(tmp_path / "runs" / "r")
    for path in (run.student_path / "model.safetensors", tmp_path / "teacher" / "model.safetensors"):
        good = path.read_bytes()
        for command in ("evaluate", "analyze"):
            with injected(f"{command}, {path.parent.name}"):
                name = spoil(path, "model.norm.weight")
                done = runner.call(command, run.root)
                assert done.code == 2 and "Traceback" not in done.err, done.err[-400:]
                assert name in done.err or "is not" in done.err  # or its checksum is told first
                assert not run.eval_path.exists() and not run.analysis_path.exists()
            path.write_bytes(good)


ANSWER = {"role": "assistant", "content": "w2", "weight": 0}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("a message's weight", {"messages": [{"role": "user", "content": "w1"}, ANSWER]}),
    ("a row's weight", {"prompt": "w1", "response": "w2", "weight": 1.0}),
    ("a row's sample_weight", {"prompt": "w1", "response": "w2", "sample_weight": 1.0}),
]  # fmt: skip


@pytest.mark.fault(
    group="Numbers",
    fault="NaN or infinity as a weight of a message, of a row or of a source of rows",
    does="refuses it before anything is loaded, naming row and field",
)
def test_numbers_in_rows(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for what, row in ROWS:
        with injected(what):
            text = re.sub(r'(weight": )[\d.]+', r"\1NaN", json.dumps(row))
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(f"{text}\n" for _ in range(20)))
            done = runner.call("distill", config, "run.name=rows", f"data.path={path}")
            assert_told(done, "weight")
            assert not (tmp_path / "runs" / "rows").exists()
    with injected("a source's weight"):
        done = runner.call(
            "distill", config, "run.name=rows", "data.path=null", "data.sources=[{path: x, weight: .nan}]"
        )
        assert_told(done, "weight")


@pytest.mark.slow
@pytest.mark.fault(
    group="Numbers",
    fault="NaN is written into the weights or the optimiser's state of a checkpoint",
    does="refuses the checkpoint by name, or goes on from the one before; never takes a step with it",
)
def test_a_checkpoint_with_such_numbers(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    done = runner.call("distill", config_of(tmp_path), inject=INSIDE, given=["gradient", [6], "nan"])
    assert done.code == 2, done.err
    cut = RunFolder(tmp_path / "runs" / "r")

    def in_optimizer(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        next(iter(state["state"].values()))["exp_avg"].view(-1)[0] = float("nan")
        torch.save(state, path)

    changes: dict[str, Callable[[Path], Any]] = {"model.safetensors": spoil, "optimizer.pt": in_optimizer}
    for name, change in changes.items():
        with injected(name):
            run = RunFolder(shutil.copytree(cut.root, tmp_path / f"copy-{name}"))
            change(run.checkpoints_path / "checkpoint-4" / name)
            done = runner.call("distill", "--resume", run.root)
            assert "Traceback" not in done.err and LOWER not in done.err, done.err[-400:]
            assert "checkpoint-4" in done.err + done.out
            assert done.code == 2 or run.is_finished()
            if run.is_finished():
                assert tiny_runs.steps(run) == [1, 2, 3, 4, 5, 6]
            assert_no_bad_weights_of_student(run)


def assert_no_bad_weights_of_student(run: RunFolder) -> None:
    if run.student_path.exists():
        for tensor in load_file(run.student_path / "model.safetensors").values():
            assert bool(torch.isfinite(tensor).all())


@pytest.mark.slow
@pytest.mark.fault(
    group="Numbers",
    fault="NaN in a file of a teacher's cache",
    does="refuses the file; the learning rate is not blamed",
)
def test_a_cache_with_such_numbers(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for kind in (["--kind", "hidden"], ["--kind", "topk", "--k", "8"]):
        cache = tmp_path / f"cache-{kind[1]}"
        done = runner.call("cache", config, "--output", cache, *kind)
        assert done.code == 0, done.err
        for path in sorted(cache.glob("values-*.safetensors")) + sorted(cache.glob("head.safetensors")):
            good = path.read_bytes()
            with injected(f"{kind[1]} {path.name}"):
                spoil(path)
                name = f"c-{kind[1]}-{path.stem}"
                done = runner.call(
                    "distill", config, f"run.name={name}", f"teacher.cache={cache}", "teacher.dtype=auto"
                )
                assert_told(done, "cache", re.escape(path.name))
                assert LOWER not in done.err and not RunFolder(tmp_path / "runs" / name).student_path.exists()
            path.write_bytes(good)


@pytest.mark.slow
@pytest.mark.fault(
    group="Numbers",
    fault="learning rates from 1 to 1e30, with and without clipping, under every precision of a processor",
    does="stops at the step whose numbers overflow, or goes on with finite ones; nothing else is saved",
)
def test_learning_rates(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for rate in ("1", "1e3", "1e8", "1e20", "1e30", "1e38"):
        for norm in ("1.0", "0"):
            for precision in ("fp32", "bf16"):
                name = f"r-{rate}-{norm}-{precision}"
                settings = [f"training.learning_rate={rate}", f"training.max_grad_norm={norm}"]
                with injected(name):
                    done = runner.call(
                        "distill", config, f"run.name={name}", *settings, f"training.precision={precision}"
                    )
                    run = RunFolder(tmp_path / "runs" / name)
                    if done.code and "in one step" in done.err:  # seen before the first one
                        assert_told(done, "optimiser", "learning rate of")
                        assert not run.root.exists()
                    elif done.code:
                        assert_told(done, r"[Ss]tep \d", "not finite|became")
                        assert_kept(done, run)
                    assert_no_bad_weights(run)
                    for line in run.read_train_log():
                        assert all(value is not None for value in line.values())


@pytest.mark.slow
@pytest.mark.fault(
    group="Numbers",
    fault="NaN at one step, or at up to nan_skips in a row, with training.nan: skip; killed and resumed around them",
    does="leaves those steps out and counts them; a resumed run is the uninterrupted one bit for bit; more stop it",
)
def test_steps_that_are_left_out(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    skip = ["training.nan=skip", "training.nan_skips=2"]
    for what in ("states", "gradient", "teacher's states"):
        for bad in ([1], [2], [3], [3, 4], [2, 3, 5, 6]):
            name = f"s-{what[0]}-{'-'.join(map(str, bad))}"
            with injected(f"{what} at {bad}"):
                done = runner.call(
                    "distill", config, f"run.name={name}", *skip, inject=INSIDE, given=[what, bad, "nan"]
                )
                assert done.code == 0, done.err[-400:]
                run = RunFolder(tmp_path / "runs" / name)
                assert_no_bad_weights(run)
                last = [line for line in run.read_train_log() if "skipped_steps" in line][-1]
                assert last["skipped_steps"] == len(bad)
                assert all(f"at step {step}," in " ".join(done.err.split()) for step in bad), done.err
                cut = RunFolder(tmp_path / "runs" / f"{name}-cut")
                killed = runner.call(
                    "distill", config, f"run.name={cut.root.name}", *skip,
                    inject="tests.faults.planting:numbers_and_end", given=[what, bad, "nan", bad[-1]],
                )  # fmt: skip
                assert killed.code < 0
                again = runner.call("distill", "--resume", cut.root, inject=INSIDE, given=[what, bad, "nan"])
                assert again.code == 0, again.err[-400:]
                assert tiny_runs.weights(cut) == tiny_runs.weights(run)
    with injected("three in a row"):
        name = "too-many"
        done = runner.call(
            "distill", config, f"run.name={name}", *skip, inject=INSIDE, given=["states", [3, 4, 5], "nan"]
        )
        assert_told(done, "step 5", "3 steps in a row", "nan_skips is 2", "drkl distill --resume")
        assert_kept(done, RunFolder(tmp_path / "runs" / name))
    with injected("broken weights are never left out"):
        done = runner.call("distill", config, "run.name=w", *skip, inject=INSIDE, given=["weight", [3], "nan"])
        assert_told(done, "step 3", "student weight")
        assert_kept(done, RunFolder(tmp_path / "runs" / "w"))
