"""The script for a machine with a GPU: its rows, what is carried along, and every part shrunk to a CPU."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day, gpu_machine, gpu_part, gpu_parts
from benchmarks.rows import append_json, read_json, read_rows

ROOT = Path(__file__).resolve().parents[1]
ABOUT = dict.fromkeys(gpu_day.ABOUT, "x") | {"size": "gpu", "gpu": "A GPU"}


def row(part: str, status: str = "measured", **values: str) -> dict[str, str]:
    return {"part": part, "status": status, **values, **ABOUT}


def test_every_part_has_a_limit_and_all_of_them_fit_in_a_run() -> None:
    assert list(gpu_day.LIMITS) == list(gpu_parts.PARTS)
    assert sum(list(gpu_day.LIMITS.values())[:5]) < 8 * 60  # whatever the last ones take, the first ones are run


def test_the_shapes_are_those_of_the_models() -> None:
    sizes = {}
    for name, shape in {"135M": gpu_parts.SMOLLM2, "1.5B": gpu_parts.QWEN_15, "0.5B": gpu_parts.QWEN_05}.items():
        import torch

        sizes[name] = gpu_parts.made(shape, "meta", torch.bfloat16, 0).num_parameters()
    assert sizes == {"135M": 134_515_008, "1.5B": 1_543_714_304, "0.5B": 494_032_768}


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_json(path) == []
    append_json(path, {"part": "a"})
    with path.open("a") as file:
        file.write('{"part": "b", "va')
    append_json(path, {"part": "c"})
    assert read_json(path) == [{"part": "a"}, {"part": "c"}]


def test_of_each_part_the_last_try_counts() -> None:
    rows = [
        row("a", variant="one", s="1"),
        row("a", "failed", error="no memory"),
        row("b", variant="one", s="2"),  # killed
        row("a", variant="one", s="3"),
        row("a", variant="two", s="4"),
        row("a", "done"),
        row("b", variant="one", s="5"),
        row("b", "cut off", error="not done in 60 s"),
        row("c", "left out", variant="one"),
        row("c", "done"),
    ]
    assert gpu_day.newest(rows) == [rows[3], rows[4], rows[6], rows[7], rows[8]]


def test_rows_are_put_into_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fused = {"median_ms": "2", "positions": "8", "vocab": "9", "hidden": "4"}
    before = [
        row("fused loss", variant="floor", **fused),
        row("fused loss", "done"),
        row("large pair", "failed", error="no memory"),
        row("fused loss, others", variant="floor", **(fused | {"median_ms": "7"})),
        row("fused loss, others", variant="liger rkl", **fused),
    ]
    for one in before:
        append_json(tmp_path / "gpu_day.jsonl", one)
    gpu_day.check(tmp_path, tmp_path / "results")
    found = [(one["variant"], one["median_ms"]) for one in read_rows(tmp_path / "results" / "fused_loss_gpu.csv")]
    assert found == [("floor", "2"), ("liger rkl", "2")]
    (failed,) = read_rows(tmp_path / "results" / "gpu_day.csv")
    assert (failed["part"], failed["status"], failed["error"]) == ("large pair", "failed", "no memory")
    append_json(tmp_path / "gpu_day.jsonl", row("large pair", variant="1.5B to 0.5B", peak_mib="9"))
    gpu_day.check(tmp_path, tmp_path / "results")
    (measured,) = read_rows(tmp_path / "results" / "gpu_day.csv")
    assert (measured["status"], measured["peak_mib"], measured["error"]) == ("measured", "9", "")
    assert "large pair: 1.5B to 0.5B, measured, peak_mib 9" in capsys.readouterr().out


def test_rows_of_a_cpu_are_not_put_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There are no rows in"):
        gpu_day.check(tmp_path, tmp_path / "results")
    append_json(tmp_path / "gpu_day.jsonl", row("large pair", variant="1.5B to 0.5B") | {"size": "cpu"})
    with pytest.raises(SystemExit, match="shrunk to a CPU"):
        gpu_day.check(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_part_that_fails_leaves_its_rows_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(sizes: Any) -> Iterator[dict[str, str]]:
        yield {"variant": "first", "s": "1"}
        raise RuntimeError("no\nmemory")

    monkeypatch.setitem(gpu_parts.PARTS, "small pair", part)
    assert not gpu_part.run_part("small pair", "cpu", tmp_path / "rows.jsonl")
    first, ending = read_json(tmp_path / "rows.jsonl")
    assert (first["variant"], first["status"], first["size"]) == ("first", "measured", "cpu")
    assert (ending["status"], ending["error"]) == ("failed", "RuntimeError: no memory")


def test_what_takes_too_long_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert gpu_day.ended_within(0.3, command, dict(os.environ), tmp_path / "log") is None
    assert gpu_day.ended_within(30, [sys.executable, "-c", "exit(3)"], dict(os.environ), tmp_path / "log") == 3


def packed(folder: Path, python: str, names: list[str]) -> Path:
    folder.mkdir()
    (folder / "packed.json").write_text(json.dumps({"python": python, "commit": "abc"}))
    with tarfile.open(folder / "packages.tar.xz", "w:xz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"{name}/{name}/__init__.py")
            member.size = 5
            archive.addfile(member, io.BytesIO(b"x = 1"))
    return folder


def test_what_was_carried_along_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "{}.{}".format(*sys.version_info)
    folder = packed(tmp_path / "packed", here, ["numpy", "datasets", "regex"])
    assert gpu_machine.unpack(folder, tmp_path / "site") == "unpacked what was carried along, without numpy"
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["datasets", "regex"]
    monkeypatch.setattr(gpu_machine, "LEFT_OUT_WITHOUT", {"datasets": "no_such_package"})
    assert gpu_machine.unpack(folder, tmp_path / "other").endswith("without datasets, numpy")


def test_what_was_packed_for_another_python_is_not_used(tmp_path: Path) -> None:
    assert gpu_machine.unpack(tmp_path, tmp_path / "site").startswith("no packages were carried along")
    said = gpu_machine.unpack(packed(tmp_path / "packed", "2.7", []), tmp_path / "site")
    assert "are for Python 2.7, and this is" in said and not (tmp_path / "site").exists()


def test_what_travels_is_small_enough() -> None:
    """Of what was packed here, if anything was."""
    archive = gpu_machine.PACKED / "packages.tar.xz"
    size = archive.stat().st_size if archive.exists() else 0
    try:
        checkout = gpu_machine._checkout_bytes()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert size + checkout < gpu_machine.LIMIT_MIB * 2**20


def script(*arguments: object) -> list[str]:
    return [str(ROOT / "scripts" / "gpu_day.sh"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    variables = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(script("--output", tmp_path), env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch sees no CUDA GPU here, so nothing is measured; --cpu runs every part shrunk" in done.stderr
    assert "transformers" in done.stdout and "C compiler" in done.stdout


@pytest.mark.slow
def test_every_part_runs_shrunk_and_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, words = tmp_path / "gpu_day.jsonl", script("--cpu", "--minutes", 60, "--output", tmp_path)
    first = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, process_group=0)
    while not any(one["part"] == "fused loss" and one["status"] == "done" for one in read_json(path)):
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)  # what it started ends by itself
    first.wait()
    before = read_json(path)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_json(path)
    assert rows[: len(before)] == before and "fused loss: done before" in done.stdout
    for part in gpu_day.LIMITS:
        statuses = [one["status"] for one in rows if one["part"] == part]
        assert statuses[-1] == "done", (tmp_path / "gpu_day.log").read_text()[-5000:]
        assert len(statuses) > 1
    assert all(one["size"] == "cpu" and one["torch"] for one in rows)
