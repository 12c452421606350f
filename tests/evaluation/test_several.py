"""Evaluations, analyses and probes by several processes: each file is that of one process, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drkl.runs import RunFolder
from tests.evaluation import several
from tests.training import tiny_runs

ROOT = Path(__file__).parents[2]
Made = dict[int, Path]


def launch(processes: int, *words: object) -> subprocess.CompletedProcess[str]:
    environment = tiny_runs.environment()
    environment["PYTHONPATH"] += f":{ROOT}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By the number of processes, the folder that they wrote."""
    root = tmp_path_factory.mktemp("several")
    several.write_inputs(root / "inputs")
    for processes in (1, 2, 3):
        (root / str(processes)).mkdir()
        done = launch(processes, "-m", "tests.evaluation.several", root / str(processes), root / "inputs")
        assert done.returncode == 0, done.stderr
    return {processes: root / str(processes) for processes in (1, 2, 3)}


def without_times(content: Any) -> Any:
    return (
        {key: value for key, value in content.items() if key not in ("timing", "checksum")}
        if isinstance(content, dict)
        else content
    )


def read(path: Path) -> Any:
    return without_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def files(folder: Path) -> dict[str, Any]:
    """The results in a folder: what the cases wrote, without what each process told and the kept parts."""
    paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file() and "shared" not in path.parts]
    return {str(path.relative_to(folder)): read(path) for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_files_are_those_of_one_process(made: Made, processes: int) -> None:
    alone, together = files(made[1]), files(made[processes])
    assert len(alone) > 20 and not any(".evaluation" in name for name in alone)
    assert list(together) == list(alone)
    assert [name for name in alone if together[name] != alone[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", several.ALL)
@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_has_the_result_of_one(made: Made, processes: int, case: str) -> None:
    alone = read(made[1] / f"{case}-0.json")
    for process in range(processes):
        assert read(made[processes] / f"{case}-{process}.json") == alone


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_kept_parts_are_those_of_one(made: Made, processes: int) -> None:
    names = [sorted(path.name for path in (made[n] / "shared" / "evaluation").rglob("*.*")) for n in (1, processes)]
    assert names[0] == names[1] and len(names[0]) > 10
    for path in (made[1] / "shared" / "evaluation").rglob("*.*"):
        assert path.read_bytes() == (made[processes] / path.relative_to(made[1])).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("other_rows", ["The processes of the group have different models, rows or settings."] * 3),
        ("other_weights", ["The processes of the group have different weights of the student."] * 3),
        ("one_fails", ["Process 1 of {n}, counted from 0, failed:\nTraceback", "no reason"]),
        ("one_is_out_of_memory", ["The memory ran out as the models are measured (no room)."] * 3),
        ("one_has_no_file", ["There is no file"] * 3),
        ("sharded", ["The weights of the FSDPLlamaForCausalLM lie in parts in several processes"] * 3),
    ],
)
@pytest.mark.parametrize("processes", [2, 3])
def test_an_error_is_every_process_s(made: Made, processes: int, case: str, said: list[str]) -> None:
    for process in range(processes):
        text = json.loads((made[processes] / f"{case}-{process}.json").read_text())
        expected = said[min(process, len(said) - 1)] if process < 2 else said[0]
        assert text.startswith(expected.format(n=processes)) or expected in text, text


@pytest.mark.slow
def test_the_commands_write_what_one_process_writes(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, data={"eval_path": str(tiny_runs.write_rows(tmp_path / "held.jsonl", 300))})
    config = tiny_runs.write_config(values, tmp_path / "c.yaml")
    run = tiny_runs.train(values)
    kept: list[dict[str, Any]] = []
    probes = []
    for count in (1, 2):
        done = launch(count, "-m", "drkl", "evaluate", run.root, "--fresh")
        assert done.returncode == 0 and done.stdout.count("Written:") == 1, done.stderr
        done = launch(count, "-m", "drkl", "analyze", run.root, "--positions", "20", "--objectives", "rkl,drkl")
        assert done.returncode == 0 and done.stdout.count("Written:") == 1, done.stderr
        done = launch(count, "-m", "drkl", "cache", config, "--probe", "--format", "json", "--positions", "60")
        assert done.returncode == 0, done.stderr
        probes.append(json.loads(done.stdout))
        kept.append(results(run))
    assert kept[0] == kept[1] and probes[0] == probes[1]
    assert {"eval.json", "samples.jsonl", "heldout.jsonl", "analysis.json"} <= kept[0].keys()
    assert any(name.endswith(".svg") for name in kept[0])
    done = launch(2, "-m", "drkl", "generate", run.root, "--prompt", "w1 w2")
    assert done.returncode == 0 and done.stdout.count("student") == 1, done.stderr
    done = launch(2, "-m", "drkl", "evaluate", run.root, "--prompts", "0", "--seeds", "-1")
    assert done.returncode == 1 and done.stderr.count("Error: --seeds: seeds are different") == 1, done.stderr


def results(run: RunFolder) -> dict[str, Any]:
    paths = [*run.root.glob("*.json*"), *run.analysis_folder.iterdir()]
    return {path.name: read(path) for path in paths}
