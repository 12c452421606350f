"""Several processes (here on CPUs, with gloo) are one process: weights, log and held-out numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from drkl.runs import RunFolder
from drkl.training import heldout
from drkl.training.run import cache_states, distill
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.several import TOKENS
from tests.training.test_trainer import assert_same, first_gradients, rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(processes: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes under torchrun, each with one thread."""
    environment = tiny_runs.environment()
    environment["PYTHONPATH"] += f":{ROOT}"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*run, *map(str, words)], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(("count", "accumulation"), [(8, 1), (8, 2), (3, 4)])
def test_two_processes_take_the_step_that_one_takes(tmp_path: Path, count: int, accumulation: int) -> None:
    done = launch(2, ROOT / "tests" / "training" / "two_processes.py", tmp_path, count, accumulation)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    alone, trainer = first_gradients(tmp_path, rows(count), 1)
    assert found["world"] == 2
    assert found["tokens"] == trainer.num_tokens_seen
    assert found["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)
    assert_same(found["gradients"], alone)


TRAINING = {
    "max_steps": 4, "tokens_per_step": 120, "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "weight_decay": 0.0, "max_grad_norm": 0.0, "eval_every": 2, "save_every": 2,
}  # fmt: skip
ARGUMENTS = {"logging_steps": 1, "optim": "sgd", "eval_on_start": True}


def settings(root: Path, name: str, **sections: Any) -> dict[str, Any]:
    """The config of a run whose loss has cross-entropy in it too, so that its gradient is as large as any column's."""
    root.mkdir(exist_ok=True)
    training = TRAINING | sections.pop("training", {})
    training["arguments"] = ARGUMENTS | training.get("arguments", {})
    rows_apart = tiny_runs.write_rows(root / "heldout.jsonl", 11)
    values = tiny_runs.config(root, training=training, loss={"kd_weight": 0.5}, **sections)
    values["run"] |= {"name": name}
    values["data"] |= {"eval_path": str(rows_apart)}
    values["student"] |= {"disable_dropout": True}
    return values


def cached(root: Path, kind: str) -> dict[str, Any]:
    values = settings(root, kind)
    cache_states(tiny_runs.specs(values), root / f"cache-{kind}", kind=kind, k=8 if kind == "topk" else None)
    values["teacher"] |= {"cache": str(root / f"cache-{kind}")}
    return values


def t5(root: Path) -> dict[str, Any]:
    root.mkdir()
    tiny.save(tiny.t5(initializer_factor=1.0), root / "teacher")
    tiny_runs.write_rows(root / "data.jsonl")
    return settings(root, "t5", training={"learning_rate": 0.005})


def lora(root: Path) -> dict[str, Any]:
    values = settings(root, "lora", peft={"r": 2, "target_modules": ["q_proj", "v_proj"], "export": "merged"})
    tiny.save(tiny.llama(5, layers=2), root / "other")
    return values | {"student": {"init": "pretrained", "model": str(root / "other"), "disable_dropout": True}}


def adam(root: Path) -> dict[str, Any]:
    root.mkdir()
    tiny.save(tiny.gpt2(), root / "teacher")
    tiny_runs.write_rows(root / "data.jsonl")
    return settings(root, "adam", training={"learning_rate": 1e-3, "arguments": {"optim": "adamw_torch"}})


def classifier(root: Path) -> dict[str, Any]:
    root.mkdir()
    tiny_classifiers.save(tiny_classifiers.make(), root / "teacher")
    for name, count in (("data", 40), ("heldout", 11)):
        texts = (" ".join(f"w{(i * 5 + j) % 24}" for j in range(1 + i % 7)) for i in range(count))
        made = [{"id": f"r{i}", "text": text, "label": "card"} for i, text in enumerate(texts)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    texts = {"path": str(root / "data.jsonl"), "eval_path": str(root / "heldout.jsonl"), "max_tokens": 24}
    values = settings(root, "classifier", training={"tokens_per_step": 60}) | {"task": "classification"}
    (root / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return values | {"data": texts}


ROLLOUTS = {"share": 0.5, "max_new_tokens": 6, "eval_prompts": 5}
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "live": lambda root: settings(root, "live"),
    "accumulated": lambda root: settings(
        root, "accumulated", training={"arguments": {"gradient_accumulation_steps": 2}}
    ),
    "rows": lambda root: settings(root, "rows", training={"tokens_per_step": None, "per_device_train_batch_size": 6}),
    "hidden": lambda root: cached(root, "hidden"),
    "topk": lambda root: cached(root, "topk"),
    "rollouts": lambda root: settings(root, "rollouts", rollouts=ROLLOUTS),
    "stages": lambda root: settings(root, "stages", stages=[{"name": "first", "objective": {"name": "rkl"}}]),
    "lora": lora,
    "t5": lambda root: t5(root / "t5"),
    "classifier": lambda root: classifier(root / "classifier"),
}


CASES["adam"] = lambda root: adam(root / "adam")
OF_PROCESS = ("rows",)
"""Cases in which the number of processes decides about a step: the rows of each process are counted."""


class Terms(TrainerCallback):
    """Adds up how large the rows' parts of the gradients are, each row being a micro-batch."""

    def __init__(self) -> None:
        self.moved = 0.0
        """The learning rate times the norms of the rows' gradients, over all steps."""
        self.largest = 0.0
        """The largest sum of these norms in a step."""
        self.in_loss = 0.0
        """The learning rate times the sums of the sizes of all numbers in the rows' gradients, over all steps."""
        self._before: list[Tensor] = []
        self._sum = self._sizes = 0.0

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        new = [a - b for a, b in zip(now, self._before, strict=True)] if self._before else now
        self._before = now
        gradient = torch.cat([part.flatten() for part in new])
        self._sum += float(gradient.norm())
        self._sizes += float(gradient.abs().sum())

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.on_substep_end(args, state, control, model=model)
        self.moved += optimizer.param_groups[0]["lr"] * self._sum
        self.in_loss += optimizer.param_groups[0]["lr"] * self._sizes
        self.largest = max(self.largest, self._sum)
        self._before, self._sum, self._sizes = [], 0.0, 0.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    """The configs of all cases, each run by two processes and by three."""
    root = tmp_path_factory.mktemp("runs")
    configs = {name: make(root) for name, make in CASES.items()}
    paths = [tiny_runs.write_config(values, root / f"{name}.yaml") for name, values in configs.items()]
    for count in (2, 3):
        some = [path for path in paths if path.stem not in OF_PROCESS or count == 2]
        done = launch(count, ROOT / "tests" / "training" / "several.py", count, *some)
        assert done.returncode == 0, done.stderr
    return configs, root


def alone(values: dict[str, Any], name: str, *, rows_of_each: int | None = None) -> tuple[RunFolder, Terms]:
    """The run of a config in this process, and the sizes of what its gradients are made of."""
    run, training = values["run"], values["training"]
    size = {} if rows_of_each is None else {"per_device_train_batch_size": rows_of_each}
    whole = {"run": run | {"name": f"{run['name']}-{name}"}, "training": training | size}
    one = distill(tiny_runs.specs(values | whole))
    terms, arguments = Terms(), training["arguments"] | {"gradient_accumulation_steps": rows_of_each or 24}
    size = {} if rows_of_each is None else {"per_device_train_batch_size": 1}
    apart = {"run": run | {"name": f"{run['name']}-apart-{name}"}}
    apart["training"] = training | size | {"arguments": arguments}
    distill(tiny_runs.specs(values | apart), on_trainer=lambda trainer: trainer.add_callback(terms))
    return one, terms


def distance(run: RunFolder, other: RunFolder) -> float:
    """The norm of the difference of their students' weights."""
    ours, theirs = (load_file(one.student_path / "model.safetensors") for one in (run, other))
    assert ours.keys() == theirs.keys()
    return float(torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm())


def run_of(values: dict[str, Any], suffix: str) -> RunFolder:
    return RunFolder(Path(values["run"]["dir"]) / f"{values['run']['name']}{suffix}")


ROUNDING = 2 * torch.finfo(torch.float32).eps * (24 + 120 + 16 + 32 + tiny.VOCAB)
"""Between two orders of a sum, by the sum of the sizes: rows of a step, positions, widths of layers, vocabulary."""
CLOCK = {"seconds", "tokens_per_second", "seconds_generating", "seconds_learning"}
OF_PROCESSES = {"padding_share", "idle_share"}
"""Columns that tell how a step was cut."""
COUNTED = {"num_tokens", "step", "epoch", "learning_rate"}
COUNTED_ANSWERS = {
    f"rollout_{name}" for name in ("share", "answers", "finished", "length", "ends_per_1000", "distinct2", "repeated4")
}


@pytest.mark.parametrize(
    ("case", "count"), [(case, count) for case in CASES for count in (2, 3) if count == 2 or case not in OF_PROCESS]
)
def test_several_processes_are_one(runs: Any, case: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights move by the learning rate times sums of the rows' gradients, which processes add up in another order.

    In fp32 two orders of a sum differ by at most 2 eps (terms) (sum of sizes). The terms are the rows of a step and,
    within a row's gradient, the products of a batch of another shape: positions, and widths of the layers. What the
    log and the held-out rows tell moves with the weights, at most as fast as the loss does, and is such a sum itself.

    Adam divides each gradient g by its own size: an error e in it moves its weight by the learning rate times 2 e / g,
    however small g is, and where g is 0 (a key's bias) by up to twice the learning rate. The weights are therefore not
    compared. The loss moves by g times that, so by the learning rate times 2 e, of all weights together.
    """
    monkeypatch.setattr(heldout, "SHORT_TOKENS_PER_BATCH", TOKENS)
    values = runs[0][case]
    several = run_of(values, f"-{count}")
    one, terms = alone(values, f"1-{count}", rows_of_each=12 if case == "rows" else None)
    moved = ROUNDING * terms.moved
    told = 2 * ROUNDING * terms.in_loss if case == "adam" else 4 * terms.largest * moved
    assert distance(several, one) <= moved or case == "adam"
    assert moved < 1e-3 * terms.moved, "far less than any row moves the weights"

    for stage, other in zip([*several.stages(), several], [*one.stages(), one], strict=True):
        lines, expected = stage.read_train_log(), other.read_train_log()
        assert len(lines) == len(expected)
        for line, wanted in zip(lines, expected, strict=True):
            assert line.keys() == wanted.keys()
            for name in line.keys() - CLOCK - OF_PROCESSES:
                same_weights = line["step"] == 0 and (stage is not several or not several.stages())
                if name in COUNTED or name.removeprefix("eval_") in COUNTED_ANSWERS or same_weights:
                    assert line[name] == wanted[name], (line["step"], name)
                elif name.endswith("agreement"):
                    assert abs(line[name] - wanted[name]) <= 0.1, name  # one token of a small step
                else:
                    size = ROUNDING * max(1.0, abs(wanted[name]))
                    assert abs(line[name] - wanted[name]) <= size + told, (line["step"], name)
            if "idle_share" in line:
                assert wanted["idle_share"] == 0 and 0 <= line["idle_share"] < 1 and 0 <= line["padding_share"] < 1


def test_each_process_reads_its_share_of_the_held_out_rows_alone(runs: Any) -> None:
    """There are 13 batches of held-out rows, read once and kept, and 4 micro-batches of each process."""
    values, root = runs
    path = tiny_runs.write_config(values["live"] | {"run": values["live"]["run"] | {"name": "count"}}, root / "c.yaml")
    done = launch(2, ROOT / "tests" / "training" / "several.py", "shares", path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"batches that the teacher read: {4 + own}" for own in (6, 7)]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("rollouts", [{}, ROLLOUTS])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, first: int, then: int, rollouts: dict[str, Any]
) -> None:
    """Cut off in the fourth of six steps, and resumed after the second."""
    values = settings(tmp_path, "r", training={"max_steps": 6}, rollouts=rollouts)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    cut_off = launch(first, ROOT / "tests" / "training" / "failing.py", "error", 0, "distill", path)
    assert "The disk of this process is full" in cut_off.stderr
    resumed = launch(then, "-m", "drkl", "distill", "--resume", tmp_path / "runs" / "r")
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on from checkpoint-2." in resumed.stdout
    run = RunFolder(tmp_path / "runs" / "r")
    one, terms = alone(values, "alone")
    assert distance(run, one) <= ROUNDING * terms.moved
    lines, expected = run.read_train_log(), one.read_train_log()
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys() and line.get("num_tokens") == wanted.get("num_tokens")
        for name in line.keys() & {"loss", "eval_loss", "fkl", "rollout_loss"}:
            assert abs(line[name] - wanted[name]) <= ROUNDING + 4 * terms.largest * ROUNDING * terms.moved, name
