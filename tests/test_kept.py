"""A finished run's files are told from others by what env.json says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.kept import check_log, check_student, describe_run_files, note_changes
from drkl.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of made-up files."""
    run = RunFolder(tmp_path / "r")
    run.student_path.mkdir(parents=True)
    run.config_path.write_text("run: {}\n")
    run.train_log_path.write_text('{"step": 1, "loss": 2.5}\n')
    for name in ("config.json", "model.safetensors", "README.md"):
        (run.student_path / name).write_text(name)
    run.write_env({"finished": "now"} | describe_run_files(run))
    return run


def test_a_whole_student_passes_and_its_card_may_be_edited(run: RunFolder) -> None:
    check_student(run.student_path)
    (run.student_path / "README.md").write_text("mine")
    (run.student_path / "notes.txt").write_text("mine")
    check_student(str(run.student_path))


def test_a_changed_student_is_refused_with_its_files_and_the_ways_out(run: RunFolder) -> None:
    check_student(run.student_path)
    (run.student_path / "model.safetensors").write_text("model.safetensorz")
    (run.student_path / "config.json").unlink()
    wanted = (
        r"config\.json is missing; model\.safetensors has another content than was written\. Bring it back.*model of "
        "its own: copy it to another folder"
    )
    with pytest.raises(DrklError, match=wanted):
        check_student(run.student_path)
    check_student(run.student_path.rename(run.root.parent / "mine"))


def test_a_run_of_before_and_any_other_folder_are_taken_as_they_are(run: RunFolder, tmp_path: Path) -> None:
    run.write_env({"finished": "now"})
    (run.student_path / "config.json").unlink()
    check_student(run.student_path)
    check_student(tmp_path / "student")
    check_student("an/id")
    check_log(run, run.train_log_path)


@pytest.mark.parametrize("said", [[], {"config.json": 3}, {"../x": {"bytes": 1, "xxh3": ""}}])
def test_a_record_that_lists_no_files_is_named(run: RunFolder, said: object) -> None:
    run.write_env({"student": said})
    with pytest.raises(DrklError, match=r"env\.json does not list files as 'student'"):
        check_student(run.student_path)


def test_a_damaged_record_is_named(run: RunFolder) -> None:
    run.env_path.write_text(run.env_path.read_text().replace('"now"', '"nov"'))
    with pytest.raises(DrklError, match=r"env\.json is damaged, or was edited: .*take out its 'checksum'\. It says"):
        check_student(run.student_path)
    run.env_path.write_bytes(bytes(40))
    with pytest.raises(DrklError, match=r"env\.json is not valid json.*Bring it back from a copy"):
        run.read_env()


def test_a_log_may_grow_and_not_change(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    path = run.train_log_path
    path.write_text(path.read_text() + '{"step": 1, "other_eval_loss": 2}\n')
    check_log(run, path)
    path.write_text(path.read_text().replace("2.5", "2.4"))
    with pytest.raises(DrklError, match=r"train\.jsonl has another content.*env\.json\. Bring it back.*move it away"):
        check_log(run, path)
    path.unlink()
    check_log(run, path)
    assert "train.jsonl is gone: what it says is left out" in caplog.text


def test_a_changed_config_is_a_warning_and_so_is_a_record_that_is_gone(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    note_changes(run)
    assert not caplog.text
    run.config_path.write_text("run: {seed: 1}\n")
    note_changes(run)
    assert re.search(r"since the run ended, config\.yaml has 15 bytes in place of 8\.", caplog.text)
    run.env_path.unlink()
    note_changes(run)
    assert "has no env.json: nothing tells whether its student" in caplog.text
