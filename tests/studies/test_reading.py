"""Cells as they stand in their folders: how far they are, what is wrong with them, and what they were given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import drkl
from drkl.errors import DrklError
from drkl.locks import STUDY, holding
from drkl.runs import RunFolder, write_json, write_yaml
from drkl.sealed import sealed
from drkl.studies.cells import CellResult
from drkl.studies.grid import cells_of
from drkl.studies.result import Study, as_markdown
from tests.studies.made import definition, evaluation, planted, write_cell, write_study

SMALL = {"objective.name": ["rkl", "drkl"], "run.seed": [0, 1]}
DRKL = {"objective.name": "drkl"}


def small(folder: Path, **changes: Any) -> Path:
    return write_study(folder, definition(axes=SMALL, **changes), planted({"drkl": -0.2}))


def cell(folder: Path, name: str = "drkl-seed1") -> CellResult:
    return next(one for one in Study.load(folder, prompts=False).cells if one.name == name)


def test_a_finished_cell_has_its_numbers_and_its_budget(tmp_path: Path) -> None:
    found = cell(small(tmp_path))
    assert (found.state, found.why, found.start, found.began) == ("done", None, "weights 1", "2026-01-02")
    assert found.axes == {"objective.name": "drkl", "run.seed": 1}
    assert found.run == tmp_path / "cells/drkl-seed1"
    assert set(found.metrics) == {"rkl"} and found.teacher["entropy"] == 2.0
    assert found.seconds == {"start": 20.0, "train": 60.0, "evaluate": 30.0}
    known = {key: value for key, value in found.budget.items() if key not in ("sampling", "evaluated rows")}
    assert known == {
        "steps": 100, "tokens": 5000, "tokens per step": 50, "rows per step": None, "selection": "best held-out loss",
        "training rows": "t", "held-out rows": "h", "teacher": "teacher", "evaluated prompts": None,
        "student_step": None,
    }  # fmt: skip
    assert found.budget["sampling"]["sampling_temperature"] == 1.0


def note(folder: Path, status: int | None, message: str | None = None, **more: Any) -> None:
    tries = [{"began": "2026-01-01", "ended": status and "2026-01-02", "status": status, "message": message}]
    write_json(folder / "cell.json", sealed({"axes": DRKL | {"run.seed": 1}, "tries": tries, "seconds": {}} | more))


@pytest.mark.parametrize(
    ("status", "state", "why"),
    [(1, "failed", "CUDA is full."), (143, "interrupted", None), (None, "interrupted", None)],
)
def test_the_record_says_how_far_a_cell_is(tmp_path: Path, status: int | None, state: str, why: str | None) -> None:
    folder = small(tmp_path) / "cells/drkl-seed1"
    (folder / "eval.json").unlink()
    note(folder, status, why)
    assert (cell(tmp_path).state, cell(tmp_path).why) == (state, why)
    with holding(folder, STUDY):
        assert cell(tmp_path).state == "running"


def test_a_cell_that_is_not_there_is_missing(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "cells/drkl-seed1").rename(tmp_path / "away")
    study = Study.load(tmp_path, prompts=False)
    assert [one.state for one in study.cells] == ["done", "done", "done", "missing"]
    assert "3 of 4 cells are done; the others: 1 missing." in study.notes


def test_results_alone_are_enough(tmp_path: Path) -> None:
    """As where eval.json of every cell was copied, and nothing else."""
    small(tmp_path)
    for path in tmp_path.glob("cells/*/*"):
        if path.name not in ("eval.json", "env.json"):
            path.unlink()
    study = Study.load(tmp_path)
    assert [one.state for one in study.cells] == ["done"] * 4
    assert study.verdicts[0].seeds == 2 and study.verdicts[0].prompts_interval is None


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("eval.json", "{", "eval.json is not valid json"),
        ("eval.json", '{"format": 99}', "has the format 99"),
        ("eval.json", None, "eval.json' is gone"),
        ("env.json", "[]", "env.json holds a list"),
        ("config.yaml", "a: [", "config.yaml is not valid yaml"),
        ("config.yaml", "objective: {name: fkl}", "has objective.name fkl, and the cell is of drkl"),
        ("config.yaml", "run: {seed: 7}", "has run.seed 7, and the cell is of 1"),
        ("heldout.jsonl", "{}\n", "lacks model, row_id"),
        ("cell.json", "{", "cell.json is not valid json"),
        ("cell.json", '{"tries": 3}', "tries: expected a list, found a int"),
        ("cell.json", '{"finished": "now", "axes": {"objective.name": "fkl"}}', "says that the run is another cell"),
    ],
)
def test_a_damaged_file_is_said_and_its_cell_has_failed(tmp_path: Path, name: str, text: str | None, why: str) -> None:
    path = small(tmp_path) / "cells/drkl-seed1" / name
    path.unlink() if text is None else path.write_text(text)
    study = Study.load(tmp_path)
    found = study.cells[3]
    assert found.state == "failed" and found.why is not None and why in found.why
    assert study.verdicts[0].seeds == 1 and "seed 1: the cell has failed" in (study.verdicts[0].why or "")
    assert json.dumps(study.to_json(), allow_nan=False)


def test_a_cell_of_another_study_is_read_where_it_is(tmp_path: Path) -> None:
    small(tmp_path / "one")
    other = small(tmp_path / "two")
    (other / "cells/drkl-seed1").rename(tmp_path / "one/cells/elsewhere")
    (other / "cells/drkl-seed1").mkdir()
    note(other / "cells/drkl-seed1", 0, run="../one/cells/elsewhere", finished="2026-01-02")
    found = cell(other)
    assert found.state == "done" and found.run.resolve() == tmp_path / "one/cells/elsewhere"
    assert Study.load(other).to_json()["cells"][3]["run"] == "../one/cells/elsewhere"


def test_study_json_is_what_is_promised(tmp_path: Path) -> None:
    primary = [{"metric": "rkl", "cell": DRKL, "against": {"objective.name": "rkl"}}]
    foretold = [{"text": "It helps.", "metric": "rkl", "cell": DRKL, "expect": "better"}]
    study = drkl.Study.load(small(tmp_path, primary=primary, predictions=foretold))
    values = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert {key: values["cells"][3][key] for key in ("axes", "run", "state")} == {
        "axes": {"objective.name": "drkl", "run.seed": 1}, "run": "cells/drkl-seed1", "state": "done",
    }  # fmt: skip
    (verdict,) = values["verdicts"]
    assert verdict["axes"] == DRKL and verdict["baseline"] == {"objective.name": "rkl"}
    assert verdict["difference"] < 0 and verdict["interval"][0] < verdict["difference"] < verdict["interval"][1]
    assert verdict["exploratory"] is False and verdict["seeds"] == 2 and verdict["p_holm"] == verdict["p"]
    assert set(verdict["by_seed"]) == {"0", "1"} and len(verdict["prompts_interval"]) == 2
    assert values["predictions"][0]["text"] == "It helps." and values["began"] == "2026-01-01"
    assert values["cost"] == {"hours": round(4 * 110 / 3600, 3)}
    taken = replace(study.cells[0], run=tmp_path.parent / "other" / "cells" / "drkl-seed0")
    assert replace(study, cells=(taken, *study.cells[1:])).hours == pytest.approx(3 * 110 / 3600)
    assert values["predicted"] is None


def test_what_git_said_of_the_predictions(tmp_path: Path) -> None:
    """That of when the first cell began, unless what was predicted was changed afterwards."""
    small(tmp_path)
    then, later = ({"commit": name, "date": "2026-01-01", "is_changed": False} for name in "ab")
    env: dict[str, Any] = {"drkl": "1", "began": "2026-01-05", "predicted": then, "predicted_now": later}
    for what, expected in ((["axes.run.seed has also 3"], then), (["predictions is another"], later)):
        write_json(tmp_path / "env.json", sealed(env | {"changes": [{"when": "2026-01-06", "what": what}]}))
        study = Study.load(tmp_path, prompts=False)
        # A cell that began before the study did is one of another study.
        assert (study.predicted, study.began, study.made) == (expected, "2026-01-01", {"drkl": "1"})
        assert study.changed == (("predictions",) if expected is later else ())
        assert f"Changed at 2026-01-06, after the first cell began: {what[0]}." in study.notes


@pytest.mark.parametrize(
    ("what", "changed", "has_more_seeds"),
    [
        ("axes.run.seed has also 3", (), True),
        ("axes.run.seed has no longer 1", ("axes",), False),
        ("variants has also c", (), False),
        ("variants has no longer b", ("variants",), False),
        ("variants.b: objective.gamma 0.1 then, objective.gamma 0.2 now", ("variants",), False),
        ("primary is another", ("primary",), False),
    ],
)
def test_what_was_changed_is_dated_anew_unless_it_was_only_added(
    tmp_path: Path, what: str, changed: tuple[str, ...], has_more_seeds: bool
) -> None:
    then, later = ({"commit": name, "date": "2026-01-01", "is_changed": False} for name in "ab")
    changes = [{"when": "2026-01-06", "what": [what]}]
    env = {"began": "2026-01-05", "predicted": then, "predicted_now": later, "changes": changes}
    write_json(small(tmp_path) / "env.json", sealed(env))
    study = Study.load(tmp_path, prompts=False)
    assert (study.changed, study.has_more_seeds) == (changed, has_more_seeds)
    assert study.predicted == (later if changed else then)


def test_a_cell_that_trained_its_own_stages_began_before_the_first(tmp_path: Path) -> None:
    run = RunFolder(small(tmp_path) / "cells/drkl-seed1")
    stage = RunFolder(run.root / "stages" / "01-warmup")
    stage.root.mkdir(parents=True)
    write_yaml(stage.config_path, {})
    stage.write_env({"inputs": {"student": {"weights": "initial"}}})
    assert cell(tmp_path).start == "initial"


def test_the_rows_of_a_step_are_those_of_all_processes(tmp_path: Path) -> None:
    run = RunFolder(small(tmp_path) / "cells/drkl-seed1")
    env = run.read_env()
    env["inputs"]["settings"]["rows in a step over all processes"] = 8
    run.write_env({key: value for key, value in env.items() if key != "checksum"})
    assert cell(tmp_path).budget["rows per step"] == 8


def test_the_tables_of_pandas(tmp_path: Path) -> None:
    study = Study.load(small(tmp_path, smallest_difference={"rkl": 5.0}))
    table = study.table()
    assert len(table) == len(study.verdicts) == 1
    (row,), (one,) = table.to_dict("records"), study.verdicts
    assert (row["metric"], row["objective.name"], row["against"], row["verdict"]) == (
        "rkl", "drkl", "rkl", "no difference",
    )  # fmt: skip
    assert one.interval is not None and (row["low"], row["high"]) == one.interval
    assert bool(row["exploratory"]) is True and row["prompts_low"] <= row["prompts_high"]
    cells = study.cell_table()
    assert list(cells["cell"]) == [one.name for one in study.cells]
    assert list(cells["rkl"]) == [one.metrics["rkl"] for one in study.cells]
    assert list(cells["run.seed"]) == [0, 0, 1, 1] and set(cells["seconds_train"]) == {60.0}


def test_the_table_in_markdown_escapes_what_others_wrote(tmp_path: Path) -> None:
    asked = definition(
        axes={"run.seed": [0, 1]},
        variants={"a": {"loss.temperature": 1}, "b_c": {"loss.temperature": 2}},
        baseline={"variant": "a"},
        predictions=["<script>alert(1)</script> *wins*"],
        primary=[{"metric": "rkl", "cell": {"variant": "b_c"}, "against": {"variant": "a"}}],
    )  # fmt: skip
    write_study(tmp_path, asked, lambda one: {"rkl": 1.0 + 0.1 * one.axes["run.seed"] * (one.axes["variant"] == "a")})
    (tmp_path / "cells/a-seed1/eval.json").write_text("| <b>")
    text = as_markdown(Study.load(tmp_path))
    assert "<script>" not in text and r"\<script\>" in text and r"\*wins\*" in text and "<b>" not in text
    assert "## Primary" in text and "| undecided |" in text and "## Failed" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decide": ["rkll"]}, r"decide\.0: there is no metric 'rkll' of generation\. Did you mean 'rkl'\?"),
        ({"decide": []}, "decide names no metric"),
        ({"decide": ["rkl", "rkl"]}, "stands there twice"),
        ({"smallest_difference": {"rkl": 0.0}}, r"smallest_difference\.rkl is 0\.0; expected a number above 0"),
        ({"smallest_difference": {"fkl": 0.1}}, "the metric is in none of decide, primary and predictions"),
        ({"primary": [{"metric": "stronger_tail_share", "cell": DRKL, "against": {}}]}, "has no better side"),
        ({"primary": 2 * [{"metric": "rkl", "cell": DRKL, "against": {}}]}, r"primary\.1 is primary\.0 once more"),
        ({"predictions": [{"metric": "bleuu", "cell": DRKL}]}, r"predictions\.0\.metric: .*Did you mean 'bleu'"),
        ({"baseline": {"objective.name": "gjs"}}, "objective.name has no value gjs in the study"),
    ],
)
def test_a_study_that_asks_what_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_yaml(tmp_path / "study.yaml", definition(axes=SMALL, **changes).model_dump(mode="json"))
    with pytest.raises(DrklError, match=message) as caught:
        Study.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'study.yaml'}: ")


def test_a_study_in_which_nothing_has_run(tmp_path: Path) -> None:
    write_yaml(tmp_path / "study.yaml", definition(decide=["accuracy", "macro_f1"]).model_dump(mode="json"))
    write_yaml(tmp_path / "base.yaml", {"task": "classification"})
    study = Study.load(tmp_path)
    assert {one.state for one in study.cells} == {"missing"} and study.task == "classification"
    assert {one.verdict for one in study.verdicts} == {"undecided"} and study.began is None
    assert "0 of 9 runs are done" in as_markdown(study) and len(study.table()) == 4


@pytest.mark.parametrize("there", [True, False])
def test_no_folder_of_a_study(tmp_path: Path, there: bool) -> None:
    folder = tmp_path if there else tmp_path / "none"
    with pytest.raises(DrklError, match=r"is no study's folder.*`drkl study STUDY\.yaml` makes one"):
        Study.load(folder)


def test_cells_of_other_machines_are_noted(tmp_path: Path) -> None:
    small(tmp_path)
    asked = definition(axes=SMALL | {"run.seed": [0, 1, 2]})
    write_yaml(tmp_path / "study.yaml", asked.model_dump(mode="json"))
    for one in cells_of(asked)[-2:]:
        write_cell(tmp_path, one, {}, made=evaluation({"rkl": 1.0}, device="cuda", versions={"torch": "9"}))
    notes = Study.load(tmp_path, prompts=False).notes
    assert any("device not known (4 cells); torch 9, cuda (2 cells)" in text for text in notes)


MATCHED = "rouge_l_when_as_varied"
LINES = ("heldout.jsonl", "samples.jsonl")


def reported(folder: Path) -> Path:
    """A study whose page was made, with answers from which a metric follows."""
    asked = definition(axes=SMALL, decide=["rkl", MATCHED])
    folder.mkdir()
    write_yaml(folder / "study.yaml", asked.model_dump(mode="json"))
    for place, one in enumerate(cells_of(asked)):
        made = evaluation({"rkl": 1.0 + 0.1 * place}, place, temperatures=(0.7, 1.0, 1.5), sweep=[0.7, 1.0, 1.5])
        write_cell(folder, one, {}, made=made)
    write_json(folder / "study.json", Study.load(folder).to_json())
    return folder


def without_lines(folder: Path) -> Path:
    for path in (path for name in LINES for path in folder.glob(f"cells/*/{name}")):
        path.unlink()
    return folder


def test_a_copy_of_the_numbers_alone_keeps_what_followed_from_the_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Study.load(reported(tmp_path / "s")).to_json()
    assert all(row["prompts_interval"] is not None for row in before["verdicts"])
    assert all(MATCHED in one["metrics"] and one["budget"]["evaluated rows"] for one in before["cells"])
    assert not caplog.messages
    after = Study.load(without_lines(tmp_path / "s")).to_json()
    assert len(caplog.messages) == 1 and "of 4 cells the lines beside eval.json are gone" in caplog.messages[0]
    assert json.loads(json.dumps(after)) == json.loads(json.dumps(before))


def test_another_evaluation_keeps_nothing_of_the_one_before(tmp_path: Path) -> None:
    folder = reported(tmp_path / "s")
    for one in cells_of(definition(axes=SMALL)):
        path = folder / "cells" / one.name
        evaluation({"rkl": 3.0 + len(one.name)}).save(path)
    study = Study.load(without_lines(folder))
    assert all(row.prompts_interval is None for row in study.verdicts)
    assert all(one.budget["evaluated rows"] is None and MATCHED not in one.metrics for one in study.cells)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"cells": 3, "verdicts": []}', '{"cells": [{}], "verdicts": [1]}',
     '{"cells": [{"name": "drkl-seed1", "began": 1, "metrics": 3, "scaled": {}, "budget": {}}], "verdicts": []}'],
)  # fmt: skip
def test_a_damaged_study_json_is_as_none(tmp_path: Path, text: str) -> None:
    folder = without_lines(reported(tmp_path / "s"))
    (folder / "study.json").write_text(text)
    assert all(row.prompts_interval is None for row in Study.load(folder).verdicts)
