import pytest

from drkl.errors import DrklError
from drkl.reporting.record import read_run
from drkl.runs import write_jsonl
from tests.reporting.conftest import LAST_STEPS, WARMUP_STEPS, MakeRun


def test_stages_stand_on_one_axis(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert [(stage.title, stage.objective, stage.model) for stage in record.stages] == [
        ("warmup", "fkl", "warmup"),
        ("drkl", "drkl", "after"),
    ]
    assert record.stages[1].start == WARMUP_STEPS
    assert record.num_steps == WARMUP_STEPS + LAST_STEPS
    curve = record.stages[1].curve("rkl", heldout=True)
    assert (curve.steps[0], curve.steps[-1]) == (WARMUP_STEPS + 30, WARMUP_STEPS + LAST_STEPS)
    assert record.models == ["teacher", "before", "warmup", "after"]


def test_after_a_resume_the_later_line_of_a_step_counts(make_run: MakeRun) -> None:
    run = make_run(warmup=False)
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "eval_loss": 5.0}, {"step": 2, "loss": 7.0}]
    write_jsonl(run.train_log_path, rows)
    stage = read_run(run).stages[0]
    assert stage.curve("loss").values == [9.0, 7.0]
    assert stage.curve("loss", heldout=True).values == [5.0]


def test_odd_lines_of_a_log_are_left_out(make_run: MakeRun) -> None:
    run = make_run(warmup=False)
    run.train_log_path.write_text('[1]\n{"loss": 1}\n{"step": 3, "loss": NaN}\n{"step": 4, "loss": 2}\n{"step": 5, "lo')
    stage = read_run(run).stages[0]
    assert (stage.curve("loss").steps, stage.curve("loss").values) == ([4], [2.0])


def test_an_evaluation_that_is_no_object_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    run.eval_path.write_text("[1, 2]")
    with pytest.raises(DrklError, match=r"eval\.json holds a list; expected an object .*`drkl evaluate "):
        read_run(run)


def test_a_run_without_teacher_or_warmup(make_run: MakeRun) -> None:
    record = read_run(make_run(teacher=False, warmup=False))
    assert record.teacher is None
    assert record.models == ["before", "after"]
    assert len(record.stages) == 1
