"""What a run is trained on is known by its content, and what is another when it goes on is named."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.teachers.served import ServedTeacher
from drkl.training import trainer as trainer_module
from drkl.training.inputs import _describe_stored, begins_anew, check_inputs, differences
from tests.models import tiny
from tests.training.test_python import make


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = make(tmp_path_factory.mktemp("inputs"))
    found: dict[str, Any] = trainer._describe_inputs()
    assert json.loads(json.dumps(found)) == found
    return found


def changed(inputs: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    other = copy.deepcopy(inputs)
    place = other
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return other


ROWS = {"rows": 20, "digest": "x", "ids": None}


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("rows", "training rows"), ROWS, "training rows: as many as before, with other content or in another order"),
        (("rows", "training rows"), ROWS | {"rows": 1000}, "training rows: 20 then, 1,000 now"),
        (("rows", "held-out rows"), None, "held-out rows: 4 then, 0 now"),
        (("texts", "the template"), "x", "the template: another"),
        (("texts", "the tokens that end an answer"), [1], "the tokens that end an answer: another"),
        (("teacher",), None, "the teacher: a model then, none now"),
        (("teacher", "kind"), "a cache", "the teacher: a model then, a cache now"),
        (("teacher", "weights"), "x", "the teacher: other weights"),
        (("teacher", "config"), "x", "the teacher: another config"),
        (("student", "weights"), "x", "the student: other weights before its first step"),
        (("settings", "objective.gamma"), 0.25, "objective.gamma: 0.5 then, 0.25 now"),
        (
            ("settings", "rows in a step over all processes"),
            4,
            "rows in a step over all processes: not set then, 4 now",
        ),
        (("best", "training.eval_every"), 7, "training.eval_every: 1 then, 7 now"),
    ],
)
def test_what_is_another_is_named(inputs: dict[str, Any], path: tuple[str, ...], to: Any, said: str) -> None:
    assert list(differences(inputs, inputs)) == []
    assert list(differences(inputs, changed(inputs, *path, to=to))) == [said]


def test_settings_that_act_through_the_rows_are_told_where_these_are_others(inputs: dict[str, Any]) -> None:
    other = changed(inputs, "content", "data.max_rows", to=10)
    assert list(differences(inputs, other)) == []
    other = changed(other, "rows", "training rows", to=ROWS | {"rows": 10})
    assert list(differences(inputs, other)) == ["training rows: 20 then, 10 now", "data.max_rows: not set then, 10 now"]


def test_ids_count_where_they_draw(inputs: dict[str, Any]) -> None:
    rows = inputs["rows"]["training rows"]
    drawn = changed(inputs, "rows", "training rows", to=rows | {"ids": "a"})
    assert list(differences(inputs, drawn)) == []
    other = changed(inputs, "rows", "training rows", to=rows | {"ids": "b"})
    assert list(differences(drawn, other)) == ["training rows: other ids"]


def test_another_version_of_the_library_may_have_another_config(inputs: dict[str, Any]) -> None:
    other = changed(inputs, "teacher", "config", to="x")
    other["machine"]["transformers"] = "99"
    assert list(differences(inputs, other)) == []


def test_what_chooses_nothing_may_change(inputs: dict[str, Any]) -> None:
    assert list(differences({**inputs, "best": {}}, changed(inputs, "best", "training.eval_every", to=7))) == []


def test_what_divides_a_step_is_told(inputs: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = changed(inputs, "divides", "training.arguments.gradient_accumulation_steps", to=2)
    other["machine"]["processes"] = 2
    with caplog.at_level(logging.WARNING, logger="drkl"):
        check_inputs(inputs, inputs, RunFolder(tmp_path), nn.Linear(1, 1))
        assert not caplog.records
        check_inputs(inputs, other, RunFolder(tmp_path), nn.Linear(1, 1))
    assert caplog.messages == [
        "Note: the run goes on with processes: 1 then, 2 now; training.arguments.gradient_accumulation_steps: 1 then, "
        "2 now. Its steps are the same up to rounding, and to the draws of a dropout."
    ]


def test_a_student_that_was_trained_is_the_one_that_began(inputs: dict[str, Any], tmp_path: Path) -> None:
    student, run = nn.Linear(1, 1), RunFolder(tmp_path)
    now = changed(inputs, "student", "weights", to="those after some steps")
    with pytest.raises(DrklError, match="the student: other weights before its first step"):
        check_inputs(inputs, now, run, student)
    begins_anew(None, inputs, run, student)
    check_inputs(inputs, now, run, student)


def test_a_run_that_kept_no_step_begins_anew(
    inputs: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = changed(inputs, "settings", "run.seed", to=7)
    with caplog.at_level(logging.WARNING, logger="drkl"):
        begins_anew(inputs, other, RunFolder(tmp_path / "r"), nn.Linear(1, 1))
    [text] = caplog.messages
    assert text.startswith("Note: the run in ") and text.endswith(
        "/r' has no checkpoint, so it begins anew, with what was changed: run.seed: 0 then, 7 now."
    )


def test_a_served_teacher_is_known_by_what_its_server_says() -> None:
    teacher = ServedTeacher("http://localhost:1/v1", "big")
    for root in ("/models/big-7b/", "/elsewhere/big-7b"):
        teacher._served = SimpleNamespace(root=root, longest=None)  # type: ignore[assignment]
        assert _describe_stored(teacher) == {"kind": "a server", "weights": "big big-7b", "config": None}


@pytest.mark.slow
def test_a_run_in_python_goes_on_with_its_inputs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(rate: float = 0.1, **changes: Any) -> Any:
        student = tiny.llama(1, layers=2)
        optimizer = torch.optim.SGD(student.parameters(), lr=rate)
        return make(tmp_path, student, optimizers=(optimizer, None), eval_dataset=None, **changes)

    trainer(fields={"max_steps": 1}).train()
    before = (tmp_path / "x" / "config.yaml").read_bytes()
    for other, said in (
        (trainer(0.2, fields={"max_steps": 1}), "optimizers: lr of the optimiser: 0.1 then, 0.2 now"),
        (trainer(fields={"max_steps": 1, "per_device_train_batch_size": 4}), "training.tokens_per_step: 60 then, not"),
    ):
        with pytest.raises(DrklError, match=said):
            other.train(resume_from_checkpoint=True)
    again = trainer(fields={"max_steps": 1, "logging_steps": 5})
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "plan_digest", lambda steps: "another")
        with pytest.raises(DrklError, match="the rows of the steps up to checkpoint-1: others"):
            again.train(resume_from_checkpoint=True)
    assert (tmp_path / "x" / "config.yaml").read_bytes() == before
    again.train(resume_from_checkpoint=True)
