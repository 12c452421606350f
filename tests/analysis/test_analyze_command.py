"""`drkl analyze` from the command line: pairs of every kind, a run, its page, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from drkl import make_objective
from drkl.analysis.analyze import analyze
from drkl.analysis.result import Analysis
from drkl.evaluation.findings import SHARED
from drkl.evaluation.result import Evaluation, Numbers
from drkl.run_models import analyze_run, evaluate_run
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs

QUICK = ("--positions", 16, "--objectives", "rkl,drkl,fkl,ce")
FILES = ["B", "D", "K", "gamma", "objectives", "push", "reliability", "rest", "sure"]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, the same again, one whose logits are three times as large, and rows."""
    root = tmp_path_factory.mktemp("pair")
    made = {name: tiny.llama(tie_word_embeddings=False) for name in ("teacher", "same", "surer")}
    with torch.no_grad():
        made["surer"].lm_head.weight.mul_(3)
    found = {name: tiny.save(model, root / name) for name, model in made.items()}
    return {**found, "rows": tiny_runs.write_rows(root / "rows.jsonl", 24)}


def answers(analysis: dict[str, Any]) -> dict[str, str]:
    return {finding["id"]: finding["answer"] for finding in analysis["findings"]}


def pair(models: dict[str, Path], student: str) -> list[object]:
    return ["--student", models[student], "--teacher", models["teacher"], "--data", models["rows"]]


@pytest.mark.slow
def test_an_overconfident_pair_is_called_so_and_a_calibrated_one_is_not(
    cli: Cli, models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "surer"
    done = cli("analyze", *pair(models, "surer"), "--output", out, *QUICK)
    assert done.code == 0, done.err
    assert "overconfident, measured against its teacher? Yes." in done.out and "drkl, γ 0.5" in done.out
    found = read(out)
    said = answers(found)
    assert [said[id] for id in SHARED] == ["yes", "yes", "yes"] and found["format"] == 2
    assert found["settings"]["models"] == {"teacher": str(models["teacher"]), "student": str(models["surer"])}
    assert found["settings"]["command"][:2] == ["drkl", "analyze"] and found["timing"]["total"] > 0
    assert [row["objective"] for row in found["objectives"]] == ["rkl", "drkl, γ 0.5", "fkl", "ce"]
    assert sorted(path.name for path in out.iterdir()) == ["analysis", "analysis.json"]
    drawn = {path.name for path in (out / "analysis").iterdir()}
    assert drawn >= {"positions.csv", "objectives.svg", "reliability.svg", "gamma.svg", "B.svg", "K.svg", "D.svg"}
    lines = (out / "analysis" / "positions.csv").read_text().splitlines()
    assert len(lines) == 1 + found["settings"]["positions"]

    same = tmp_path / "same"
    done = cli("analyze", *pair(models, "same"), "--output", same, *QUICK)
    assert done.code == 0, done.err
    assert "overconfident, measured against its teacher? No." in done.out
    said = answers(read(same))
    del said["overconfident_by_data"]  # the labels are not drawn from the teacher
    assert said == {
        "overconfident_by_teacher": "no", "target_too_high": "no", "pushed_when_matched": "no",
        "tail_dominates": "undecided", "drkl_strengthens_tail": "no", "sure_positions_dominate": "undecided",
    }  # fmt: skip
    assert {path.stem for path in (same / "analysis").glob("*.svg")} == set(FILES)

    # The same command gives the same numbers and figures, apart from the times.
    again = tmp_path / "again"
    assert cli("analyze", *pair(models, "same"), "--output", again, *QUICK).code == 0
    first, second = read(same), read(again)
    for one in (first, second):
        del one["timing"], one["settings"]["command"], one["checksum"]
    assert first == second
    for name in FILES:
        assert (same / "analysis" / f"{name}.svg").read_bytes() == (again / "analysis" / f"{name}.svg").read_bytes()

    # Its page, without an evaluation.
    done = cli("report", out)
    assert done.code == 0, done.err
    page = (out / "report.html").read_text()
    assert 'data-finding="overconfident_by_teacher"' in page
    assert page.count('aria-label="Mean push') == 1 and "drkl analyze --student" in page
    assert cli("report", out, "--format", "md").code == 0
    text = (out / "report.md").read_text()
    assert "overconfident, measured against its teacher?" in text and "| rkl |" in text


@pytest.mark.slow
def test_models_in_memory(models: dict[str, Path], tmp_path: Path) -> None:
    student, teacher = (LlamaForCausalLM.from_pretrained(models[name]) for name in ("surer", "teacher"))
    student.train()
    rows = [json.loads(line) for line in models["rows"].read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(models["teacher"])
    settings: dict[str, Any] = {"objectives": ["rkl", make_objective("drkl", gamma=0.2)], "positions": 16}
    made = analyze(student, teacher, rows, tokenizer, device="cpu", output_dir=tmp_path, **settings)
    assert student.training and not teacher.training and all(p.requires_grad for p in student.parameters())
    assert [row["objective"] for row in made.tables["objectives"]] == ["rkl", "drkl"]
    assert "command" not in made.tables["settings"]
    assert made.finding("overconfident_by_teacher").answer == "yes"  # type: ignore[union-attr]
    named = analyze(models["surer"], models["teacher"], models["rows"], dtype="fp32", device="cpu", **settings)
    assert named.tables["totals"] == made.tables["totals"] and named.findings == made.findings
    loaded = Analysis.load(tmp_path)
    assert loaded.findings == made.findings and len(loaded.positions["K"]) == made.tables["settings"]["positions"]


@pytest.mark.parametrize(
    ("change", "shared", "seed"),
    [
        ({}, True, 7),
        pytest.param({"seed": None}, True, 0, marks=pytest.mark.slow),
        pytest.param({"models": {"teacher": "another", "student": "s"}}, False, 7, marks=pytest.mark.slow),
        pytest.param({"data": {"heldout_rows": 3}}, False, 7, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_an_evaluation_beside_it_decides(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], shared: bool, seed: int
) -> None:
    call: dict[str, Any] = {"objectives": ["rkl"], "positions": 4, "device": "cpu", "output_dir": tmp_path}
    first = analyze(models["surer"], models["teacher"], models["rows"], **call)
    settings = first.tables["settings"]
    described = {"seed": 7, "models": settings["models"], "data": settings["data"] | {"heldout_rows": settings["rows"]}}
    described = {key: value for key, value in (described | change).items() if value is not None}
    Evaluation(Numbers({"student": {"nll": 1.0}}), described).save(tmp_path)
    again = analyze(models["surer"], models["teacher"], models["rows"], **call)
    assert again.tables["settings"]["evaluation_seed"] == seed
    assert {finding.id for finding in first.findings} - {finding.id for finding in again.findings} == (
        set() if shared else set(SHARED)
    )


@pytest.mark.slow
def test_settings_are_taken(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = (
        "analyze",
        *pair(models, "surer"),
        "--output",
        out,
        *QUICK,
        "--gamma",
        0.1,
        "--temperature",
        2,
        "--max-rows",
        9,
    )
    assert cli(*call).code == 0
    settings = read(out)["settings"]
    assert (settings["gamma"], settings["temperature"], settings["rows"]) == (0.1, 2.0, 9)
    assert settings["differentiated"]["evenly"] == 16


@pytest.mark.slow
def test_an_encoder_decoder_pair(cli: Cli, tmp_path: Path) -> None:
    folders = [tiny.save(tiny.t5(seed), tmp_path / f"t5-{seed}") for seed in (0, 1)]
    rows = tiny_runs.write_rows(tmp_path / "rows.jsonl", 8)
    call = ("--student", folders[0], "--teacher", folders[1], "--data", rows, "--output", tmp_path / "out")
    done = cli("analyze", *call, *QUICK)
    assert done.code == 0, done.err
    assert read(tmp_path / "out")["settings"]["rows"] == 8


@pytest.mark.slow
def test_classifiers(cli: Cli, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    labelled = [{"text": f"w{i % 7} w{i % 5}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(20)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    made = [tiny_classifiers.save(tiny_classifiers.make(seed=seed), tmp_path / f"c{seed}") for seed in (0, 1)]
    call = ("--student", made[0], "--teacher", made[1], "--data", rows)
    done = cli("analyze", *call, "--output", tmp_path / "out", *QUICK)
    assert done.code == 0, done.err
    found = read(tmp_path / "out")
    assert (found["settings"]["positions"], found["settings"]["rows"]) == (20, 20)
    two = [
        tiny_classifiers.save(tiny_classifiers.make(seed=seed, classes=("card", "loan")), tmp_path / f"two{seed}")
        for seed in (0, 1)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled if row["label"] != "other"))
    call = ("--student", two[0], "--teacher", two[1], "--data", rows)
    done = cli("analyze", *call, "--output", tmp_path / "none")
    assert done.code == 2 and "With two classes there is no tail" in done.err and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_and_its_page(cli: Cli, tmp_path: Path) -> None:
    run = tiny_runs.train(tiny_runs.config(tmp_path, objective={"name": "drkl", "gamma": 0.2, "skew": 0.1}))
    done = cli("analyze", run.root, *QUICK)
    assert done.code == 0, done.err
    found = read(run.root)
    assert found["settings"]["gamma"] == 0.2
    assert found["objectives"][0]["objective"] == "this run's drkl"
    assert cli("report", run.root).code == 0
    page = run.report_path.read_text()
    assert 'data-finding="pushed_when_matched"' in page and f"drkl analyze {run.root}" in page
    assert "has not been evaluated" in page

    done = cli("analyze", run.root, "--output", tmp_path / "runs" / "r", *QUICK)
    assert done.code == 2 and "is a run folder" in done.err
    done = cli("analyze", run.root, "--dtype", "bf16")
    assert done.code == 2 and "--dtype: a run brings its own" in done.err

    run.analysis_path.write_text('{"headline": "x", "diagnosis": {}}')
    done = cli("report", run.root)
    assert done.code == 2 and re.search(r"analysis\.json is not what `drkl analyze` writes .*; run it again", done.err)
    run.analysis_path.write_text("[]")
    done = cli("report", run.root)
    assert done.code == 2 and "holds a list; expected an object" in done.err


@pytest.mark.slow
def test_what_stands_in_both_files_is_decided_once(tmp_path: Path) -> None:
    heldout = tiny_runs.write_rows(tmp_path / "heldout.jsonl", 12)
    run = tiny_runs.train(tiny_runs.config(tmp_path, data={"eval_path": str(heldout)}, evaluation={"seed": 3}))
    before = analyze_run(run.root, objectives=["rkl"], positions=4)
    evaluation = evaluate_run(run.root, prompts=0)
    after = analyze_run(run.root, objectives=["rkl"], positions=4, seed=5)
    for analysis in (before, after):
        assert analysis.tables["settings"]["evaluation_seed"] == 3
        for id in SHARED:
            ours, theirs = analysis.finding(id), evaluation.finding(id)
            assert ours is not None and theirs is not None and ours.answer == theirs.answer
            assert ours.numbers.keys() == theirs.numbers.keys()
            for name, number in theirs.numbers.items():
                np.testing.assert_allclose(ours.numbers[name].value, number.value, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(ours.numbers[name].interval, number.interval, rtol=1e-5, atol=1e-6)


def test_a_run_without_a_teacher_is_refused(cli: Cli, tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    model = values["teacher"]["model"]
    values |= {"teacher": None, "objective": {"name": "ce"}, "student": {"init": "pretrained", "model": model}}
    run = tiny_runs.train(values)
    done = cli("analyze", run.root, *QUICK)
    assert done.code == 2 and "There is no teacher, and the analysis compares the student with one" in done.err
    assert not run.analysis_path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gamma", 0), "gamma is 0; expected a finite number above 0"),
        (("--temperature", "-1"), "temperature is -1; expected a finite number above 0"),
        (("--positions", 0), "positions is 0; expected at least 1"),
        (("--objectives", "rlk"), "Did you mean 'rkl'?"),
        (("--objectives", ","), "--objectives is ','; expected one value"),
    ],
)
def test_values_out_of_their_domain(
    cli: Cli, models: dict[str, Path], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    done = cli("analyze", *pair(models, "same"), "--output", tmp_path / "out", *options)
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists()


def test_what_is_missing(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out")
    done = cli("analyze")
    assert done.code == 2 and "Give either a RUN, or `--student PATH" in done.err
    done = cli("analyze", tmp_path, "--student", models["same"])
    assert done.code == 2 and "Give either a RUN" in done.err
    for name in ("teacher", "data"):
        given = pair(models, "same")
        place = given.index(f"--{name}")
        done = cli("analyze", *given[:place], *given[place + 2 :], *out)
        assert done.code == 2 and f"--{name} is missing" in done.err
    done = cli("analyze", *pair(models, "same"))
    assert done.code == 2 and "--output is missing" in done.err


def test_a_folder_that_nobody_can_write_to(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("analyze", *pair(models, "same"), "--output", tmp_path / "file" / "below", *QUICK)
    assert done.code == 2 and "Cannot write" in done.err and "reading" not in done.out
