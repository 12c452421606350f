"""`drkl evaluate` from the command line: runs, outside pairs, suites, kills."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from drkl.evaluation.config import MINILLM
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs

QUICK = ("--prompts", 3, "--samples", 2, "--max-new-tokens", 4, "--sweep", "0.5,1.0")


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return found


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return {
        "--student": tiny.save(tiny.llama(1, layers=2), tmp_path / "student"),
        "--teacher": tiny.save(tiny.llama(), tmp_path / "teacher"),
        "--data": tiny_runs.write_rows(tmp_path / "rows.jsonl", 12),
    }


def options(pair: dict[str, Path]) -> list[object]:
    return [part for item in pair.items() for part in item]


@pytest.mark.slow
def test_two_plain_folders(cli: Cli, pair: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("evaluate", *options(pair), "--output", out, *QUICK)
    assert done.code == 0, done.err
    result = read(out)
    assert result["settings"]["models"] == {"teacher": str(pair["--teacher"]), "student": str(pair["--student"])}
    assert result["student"]["fkl"] > 0 and result["teacher"]["fkl"] == pytest.approx(0, abs=1e-6)
    assert result["intervals"]["student"]["rkl"] and len(result["sweep"]["student"]) == 2
    assert len(samples(out)) == 2 * 2 * 3 * 2 and samples(out)[0]["model"] == "teacher"
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "heldout.jsonl", "samples.jsonl"]
    assert result["settings"]["command"][:2] == ["drkl", "evaluate"]
    assert "sampling temperature" in done.out and "rouge_l" in done.out
    # Without a teacher.
    del pair["--teacher"]
    done = cli("evaluate", *options(pair), "--output", tmp_path / "alone", *QUICK)
    assert done.code == 0, done.err
    alone = read(tmp_path / "alone")
    assert "teacher" not in alone and alone["student"]["fkl"] is None
    assert alone["student"]["nll"] == pytest.approx(result["student"]["nll"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "bart", "gpt2"])
def test_other_families(cli: Cli, tmp_path: Path, family: str) -> None:
    make = getattr(tiny, family)
    student = tiny.save(make(1, layers=2), tmp_path / "student")
    teacher = tiny.save(make(0), tmp_path / "teacher")
    data = tiny_runs.write_rows(tmp_path / "rows.jsonl", 6)
    out = tmp_path / "out"
    done = cli("evaluate", "--student", student, "--teacher", teacher, "--data", data, "--output", out, *QUICK)
    assert done.code == 0, done.err
    assert read(out)["student"]["rkl"] > 0


@pytest.mark.slow
def test_a_pair_of_classifiers(cli: Cli, tmp_path: Path) -> None:
    student = tiny_classifiers.save(tiny_classifiers.make(seed=1), tmp_path / "student")
    teacher = tiny_classifiers.save(tiny_classifiers.make(seed=0), tmp_path / "teacher")
    rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 2]} for i in range(10)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    pair = ("--student", student, "--teacher", teacher, "--data", data, "--output", out)
    done = cli("evaluate", *pair)
    assert done.code == 0, done.err
    result = read(out)
    assert result["task"] == "classification" and 0 <= result["student"]["ece_mass"] <= 1
    assert result["student"]["num_rows"] == 10 and result["intervals"]["student"]["accuracy"]
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 10
    language_model = tiny.save(tiny.llama(), tmp_path / "llama")
    done = cli("evaluate", "--student", language_model, *pair[2:])
    assert done.code == 2 and "is a language model and the teacher" in done.err
    assert "Suites and protocols" in cli("evaluate", *pair[:4], "--suite", "dolly", "--output", out).err


@pytest.mark.slow
def test_padded_vocabularies_are_trimmed_and_others_refused(cli: Cli, pair: dict[str, Path], tmp_path: Path) -> None:
    pair["--teacher"] = tiny.save(tiny.llama(vocab=80), tmp_path / "padded")
    done = cli("evaluate", *options(pair), "--output", tmp_path / "out", *QUICK)
    assert done.code == 0, done.err
    assert read(tmp_path / "out")["student"]["rkl"] > 0
    pair["--teacher"] = tiny.save(tiny.llama(), tmp_path / "other", tiny.tokenizer(words=20))
    done = cli("evaluate", *options(pair), "--output", tmp_path / "refused", *QUICK)
    assert done.code == 2 or read(tmp_path / "refused")["student"]["rkl"] > 0


@pytest.mark.slow
def test_suites_of_a_pair(cli: Cli, pair: dict[str, Path], tmp_path: Path) -> None:
    rows = pair.pop("--data")
    more = tmp_path / "vicuna.jsonl"
    more.write_text(json.dumps({"instruction": "w1 w2", "input": "w3", "output": ["w4", "w5 w6"]}) + "\n")
    out = tmp_path / "out"
    done = cli(
        "evaluate", *options(pair), "--suite", f"dolly={rows}", "--suite", f"vicuna={more}", "--output", out, *QUICK
    )
    assert done.code == 0, done.err
    result = read(out)
    assert result["settings"]["suites"] == ["dolly", "vicuna"] and set(result["suites"]) == {"dolly", "vicuna"}
    assert result["settings"]["data"]["suites"]["vicuna"]["rows"] == 1
    own = [row for row in samples(out) if row["suite"] == "vicuna"]
    assert {row["prompt_id"] for row in own} == {"vicuna/row-1"} and own[0]["reference"] == ["w4", "w5 w6"]
    assert "vicuna" in done.out
    # One suite has the ids of its file.
    done = cli("evaluate", *options(pair), "--suite", f"dolly={rows}", "--output", tmp_path / "one", *QUICK)
    assert samples(tmp_path / "one")[0]["prompt_id"].startswith("r")


@pytest.mark.slow
def test_minillms_protocol(cli: Cli, pair: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli(
        "evaluate", *options(pair), "--output", out, "--protocol", "minillm", "--max-new-tokens", 3, "--prompts", 2
    )
    assert done.code == 0, done.err
    settings = read(out)["settings"]
    assert settings["template"] == "minillm" and settings["protocol"] == "minillm"
    assert settings["seeds"] == list(MINILLM["seeds"]) and settings["sweep"] == []  # type: ignore[call-overload]
    assert len(samples(out)) == 2 * 2 * 5


@pytest.mark.slow
def test_a_run_with_flags_and_elsewhere(cli: Cli, tmp_path: Path) -> None:
    config = tiny_runs.write_config(tiny_runs.config(tmp_path, training={"max_steps": 2}), tmp_path / "c.yaml")
    assert cli("distill", config).code == 0
    root, out = tmp_path / "runs" / "r", tmp_path / "elsewhere"
    done = cli("evaluate", root, "--output", out, *QUICK, "--seeds", "1,2")
    assert done.code == 0, done.err
    assert not (root / "eval.json").exists() and read(out)["settings"]["seeds"] == [1, 2]
    assert list(read(out)["sweep"]) == ["teacher", "student"]
    rows = tiny_runs.write_rows(tmp_path / "suite.jsonl", 4)
    assert cli("evaluate", root, "--suite", f"dolly={rows}", *QUICK).code == 0
    assert read(root)["settings"]["suites"] == ["dolly"] and not (root / ".evaluation").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either a RUN, or `--student PATH"),
        (["RUN", "--student", "x"], "Give either a RUN"),
        (["--student", "x", "--output", "o"], "exactly one of --data FILE and --suite NAME=WHERE; got neither"),
        (["--student", "x", "--data", "f", "--suite", "dolly", "--output", "o"], "got both"),
        (["--student", "x", "--data", "f"], "--output is missing"),
        (["--student", "/nowhere/at/all", "--data", "f", "--output", "o"], "There is no folder '/nowhere/at/all'"),
        (["--student", "STUDENT", "--data", "/no/file.jsonl", "--output", "o"], "There is no file '/no/file.jsonl'"),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "ROWS"], "is a file; expected a folder"),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--samples", "0"], "--samples: "),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--sweep", "a"], "--sweep is 'a'"),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--sweep", "0,1"], "finite numbers above 0"),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--prompts", "x"], "--prompts is 'x'"),
        (
            ["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--logit-temperature", "0"],
            "--logit-temperature: expected a finite number above 0, fit, fit_to_teacher or null; got 0.0",
        ),
        (
            ["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--logit-temperature", "fit_to_teacher"],
            "there is no teacher's distribution to fit the student to",
        ),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--dtype", "x"], "--dtype is 'x'"),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--template", "x"], "there is no template 'x'"),
        (["--student", "STUDENT", "--data", "ROWS", "--output", "o", "--protocol", "x"], "There is no protocol 'x'"),
        (["--student", "STUDENT", "--suite", "x", "--output", "o"], "There is no suite 'x'"),
        (["--student", "STUDENT", "--suite", "dolly=ROWS", "--suite", "dolly=ROWS", "--output", "o"], "named twice"),
    ],
)  # fmt: skip
def test_what_is_refused(
    cli: Cli, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"STUDENT": str(pair["--student"]), "ROWS": str(pair["--data"]), "dolly=ROWS": f"dolly={pair['--data']}"}
    before = tiny_runs.tree(tmp_path)
    done = cli("evaluate", *(names.get(one, one) for one in arguments))
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert tiny_runs.tree(tmp_path) == before


def test_a_runs_own_settings_are_not_given_again(cli: Cli, tmp_path: Path) -> None:
    config = tiny_runs.write_config(tiny_runs.config(tmp_path, training={"max_steps": 1}), tmp_path / "c.yaml")
    assert cli("distill", config).code == 0
    root = tmp_path / "runs" / "r"
    done = cli("evaluate", root, "--template", "plain", "--dtype", "bf16")
    assert done.code == 2 and "--template, --dtype: a run brings its own" in done.err
    done = cli("evaluate", "--student", root / "student", "--data", tmp_path / "data.jsonl", "--output", root)
    assert done.code == 2 and "is a run folder" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 3, 6])
def test_killed_and_started_again(pair: dict[str, Path], tmp_path: Path, moment: int) -> None:
    """SIGKILL once so many parts are finished; the same command then gives what an undisturbed one gives."""
    arguments = ["evaluate", *options(pair), "--prompts", 8, "--samples", 2, "--max-new-tokens", 24, "--batch-size", 4]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    os.environ["DRKL_CACHE"] = str(tmp_path / "cache-whole")
    try:
        done = tiny_runs.call(*arguments, "--output", whole)
        assert done.returncode == 0, done.stderr
        os.environ["DRKL_CACHE"] = str(tmp_path / "cache")
        done = tiny_runs.call_killed("file", moment, *arguments, "--output", killed)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (killed / "eval.json").exists()
        done = tiny_runs.call(*arguments, "--output", killed)
        assert done.returncode == 0, done.stderr
    finally:
        del os.environ["DRKL_CACHE"]
    first, second = read(whole), read(killed)
    for result in (first, second):
        del result["timing"], result["settings"]["command"], result["checksum"]
    assert first == second and samples(whole) == samples(killed)
    assert (whole / "heldout.jsonl").read_text() == (killed / "heldout.jsonl").read_text()


@pytest.mark.slow
def test_lengths_that_are_not_given_fit_the_context(cli: Cli, pair: dict[str, Path], tmp_path: Path) -> None:
    long = {"id": "long", "prompt": " ".join(["w1"] * 70), "response": "w2"}
    with pair["--data"].open("a") as file:
        file.write(json.dumps(long) + "\n")
    done = cli("evaluate", *options(pair), "--output", tmp_path / "out", "--max-new-tokens", 40, "--sweep", "none")
    assert done.code == 0, done.err
    assert read(tmp_path / "out")["settings"]["data"]["dropped"] == {"prompt_too_long": 1}, "96 - 40 tokens are left"
    done = cli("evaluate", *options(pair), "--output", tmp_path / "o", "--max-prompt-tokens", 300, "--max-tokens", 400)
    assert done.code == 2 and "Set --max-tokens to at most 96" in done.err
