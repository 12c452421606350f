import csv
from dataclasses import replace
from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.evaluation.result import Evaluation
from drkl.reporting import report
from drkl.runs import write_yaml
from tests.reporting.conftest import MakeRun, write_pair


def test_markdown_has_the_words_the_tables_and_the_commands(make_run: MakeRun) -> None:
    run, other = make_run(swept=True), make_run("rkl", objective="rkl", swept=True, changes={"student": {"rkl": 2.4}})
    path = report([run, other], output_format="md")
    assert path == run.root / "report.md"
    text = path.read_text()
    for wanted in (
        "# quickstart\n", "**2 runs side by side.** ", "## The runs side by side",
        "| Reverse KL, KL(q‖p) (nats) ↓ | 0.00 | 2.54 (2.39 to 2.69) | 2.40 (2.26 to 2.54) |",
        "**Is the student closer to its teacher than before training?**\n\n- quickstart · drkl: ",
        "| Teacher | 0.5 | 29.3", "| objective.name | drkl | rkl |", "```bash\ndrkl distill",
    ):  # fmt: skip
        assert wanted in text, wanted
    table = text.split("## The runs side by side")[1].split("##")[0].splitlines()
    assert {line.count("|") for line in table if line.startswith("|")} == {5}


def test_markdown_keeps_hostile_names_text(make_run: MakeRun) -> None:
    run = make_run()
    config = run.read_config()
    config["run"]["name"] = "a|b<script>`x`*_[l](u)\n# head\u202e"
    write_yaml(run.config_path, config)
    text = report(run, output_format="md").read_text()
    assert text.startswith("# a\\|b\\<script\\>\\`x\\`\\*\\_\\[l\\](u) \\# head\\[U+202E\\]\n")


def test_csv_has_a_line_per_number_in_its_unit(make_run: MakeRun, tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "pair")
    path = report([make_run(swept=True), pair], tmp_path / "x.csv", output_format="csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [(row["run"], row["model"], row["suite"], row["sampling_temperature"], row["metric"]) for row in rows]
    assert len(keys) == len(set(keys))
    by_key = dict(zip(keys, rows, strict=True))
    row = by_key["quickstart · drkl", "student", "", "", "agreement"]
    assert (row["value"], row["unit"], row["direction"]) == ("35.3", "%", "higher")
    assert float(row["low"]) < 35.3 < float(row["high"])
    assert by_key["quickstart · drkl", "student", "", "0.5", "rouge_l"]["value"] == "16.17"
    assert by_key["pair", "student", "dolly", "1", "rouge_l"]["low"] == "12"
    assert by_key["pair", "student", "", "1", "rouge_l"]["value"] == "13.2"


def test_another_format_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(DrklError, match="format is 'pdf'; expected one of html, md, csv"):
        report(make_run(), output_format="pdf")


def test_the_ending_of_the_path_names_the_format(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    assert report(run, tmp_path / "a.md").read_text().startswith("# quickstart")
    assert report(run, tmp_path / "a.csv").read_text().startswith("run,model,suite")
    assert report(run, tmp_path / "a.txt").read_text().startswith("<!doctype html>")
    assert report(run, tmp_path / "a.txt", output_format="md").read_text().startswith("# quickstart")


@pytest.mark.parametrize("name", ["=1+2", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1"])
def test_no_name_is_a_formula_in_the_csv(tmp_path: Path, name: str) -> None:
    pair = write_pair(tmp_path / "pair")
    evaluation = replace(Evaluation.load(pair.root), name=name)
    numbers = evaluation.suites["dolly"]
    evaluation = replace(evaluation, suites={name: numbers}, folder=None)
    with report(evaluation, tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"][0] for row in rows} == {"'"} or name.startswith("\t")
    assert {row["suite"][:1] for row in rows} == {"", "'"}
    assert {row["value"][0] for row in rows if float(row["value"]) < 0} == {"-"}
