import re
from dataclasses import replace
from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.evaluation.result import Evaluation
from drkl.reporting.inputs import Curve, read_run, run_labels, unique_names
from drkl.runs import write_json, write_jsonl
from tests.reporting.conftest import LAST_STEPS, WARMUP_STEPS, MakeRun


def test_stages_stand_on_one_axis(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert [(stage.title, stage.objective, stage.model) for stage in record.stages] == [
        ("warmup", "fkl", "warmup"),
        ("drkl", "drkl", "student"),
    ]
    assert record.stages[1].start == WARMUP_STEPS
    assert record.num_steps == WARMUP_STEPS + LAST_STEPS
    curve = record.stages[1].curve("rkl", heldout=True)
    assert (curve.steps[0], curve.steps[-1]) == (WARMUP_STEPS + 30, WARMUP_STEPS + LAST_STEPS)
    assert record.models == ["teacher", "before", "warmup", "student"]


def test_after_a_resume_the_later_line_of_a_step_counts(make_run: MakeRun) -> None:
    run = make_run(warmup=False)
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "eval_loss": 5.0}, {"step": 2, "loss": 7.0}]
    write_jsonl(run.train_log_path, rows)
    stage = read_run(run).stages[0]
    assert stage.curve("loss").values == [9.0, 7.0]
    assert stage.curve("loss", heldout=True).values == [5.0]


def test_evaluations_of_the_users_own_are_no_training_batches(make_run: MakeRun) -> None:
    run = make_run(warmup=False)
    rows = [{"step": 1, "loss": 9.0, "rkl": 1.0}, {"step": 1, "test_loss": 5.0}, {"step": 1, "other_eval_rkl": 4.0}]
    write_jsonl(run.train_log_path, rows)
    stage = read_run(run).stages[0]
    assert stage.curve("rkl").values == [1.0] and not stage.curve("loss", heldout=True)


def test_odd_lines_of_a_log_are_left_out_and_that_is_said(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(warmup=False)
    run.train_log_path.write_text('[1]\n{"loss": 1}\n{"step": 3, "loss": NaN}\n{"step": 4, "loss": 2}\n{"step": 5, "lo')
    stage = read_run(run).stages[0]
    assert (stage.curve("loss").steps, stage.curve("loss").values) == ([4], [2.0])
    assert f"{run.train_log_path}: line 1 is damaged; what could not be read is left out" in caplog.text


@pytest.mark.parametrize("name", ["eval.json", "analysis.json"])
def test_a_file_that_is_no_object_is_refused(make_run: MakeRun, name: str) -> None:
    run = make_run()
    (run.root / name).write_text("[1, 2]")
    with pytest.raises(DrklError, match=rf"{re.escape(name)} holds a list; expected an object.*`drkl "):
        read_run(run)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="There is no run folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(DrklError, match="is not a run folder: it has no config"):
        read_run(tmp_path)


def test_an_evaluation_in_memory_has_no_training(make_run: MakeRun, tmp_path: Path) -> None:
    evaluation = Evaluation.load(make_run(swept=True).root)
    run = read_run(replace(evaluation, folder=None, name="mine"))
    assert (run.name, run.folder, run.stages, run.config_text) == ("mine", None, [], "")
    assert run.value("student", "rkl") == 2.54
    # One that was read from a run folder is that run's, with what stands beside it.
    assert read_run(evaluation).num_steps == WARMUP_STEPS + LAST_STEPS
    write_json(tmp_path / "copied.eval.json", evaluation.to_json())
    assert read_run(tmp_path / "copied.eval.json").name == "copied"


def test_a_file_of_an_earlier_drkl_is_read(make_run: MakeRun) -> None:
    run = make_run(swept=True)
    text = run.eval_path.read_text().replace('"student"', '"after"').replace('"format": 2,', "")
    run.eval_path.write_text(text)
    record = read_run(run)
    assert record.models == ["teacher", "before", "warmup", "student"]
    assert {finding.id for finding in record.findings} >= {"overconfident_by_teacher", "closer", "varied"}


def test_names_are_unique_and_labels_name_the_objective(make_run: MakeRun) -> None:
    run, other = read_run(make_run()), read_run(make_run("rkl", objective="rkl"))
    named = unique_names([run, other, run, run])
    assert [one.name for one in named] == ["quickstart", "rkl", "quickstart (2)", "quickstart (3)"]
    assert run_labels(named) == ["quickstart · drkl", "rkl", "quickstart (2) · drkl", "quickstart (3) · drkl"]


def test_a_run_without_teacher_or_warmup(make_run: MakeRun) -> None:
    record = read_run(make_run(teacher=False, warmup=False))
    assert record.teacher is None
    assert record.models == ["before", "student"]
    assert len(record.stages) == 1


def test_long_curves_are_thinned_to_means() -> None:
    curve = Curve([float(i) for i in range(1000)], [2.0 * i for i in range(1000)]).thinned(points=10)
    assert len(curve.steps) == 10
    assert curve.steps[0] == 49.5
    assert curve.values[0] == 99.0
