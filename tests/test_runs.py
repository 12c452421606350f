from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from drkl.disk import CannotWrite
from drkl.errors import DrklError, did_you_mean
from drkl.runs import (
    RunFolder,
    append_jsonl,
    read_json,
    read_jsonl,
    read_text,
    read_yaml,
    write_json,
    write_jsonl,
    write_text,
    write_together,
    write_yaml,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    root = tmp_path / "runs" / "mine"
    write_yaml(root / "config.yaml", {"run": {"name": "mine"}})
    return RunFolder.open(root)


def test_paths(run: RunFolder) -> None:
    assert run.name == "mine"
    files = {
        run.config_path: "config.yaml",
        run.env_path: "env.json",
        run.train_log_path: "train.jsonl",
        run.student_path: "student",
        run.checkpoints_path: "checkpoints",
        run.eval_path: "eval.json",
        run.samples_path: "samples.jsonl",
        run.report_path: "report.html",
    }
    assert all(path == run.root / name for path, name in files.items())
    assert run.read_config() == {"run": {"name": "mine"}}


def test_a_run_of_a_relative_path_has_a_name(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.root)
    assert RunFolder.open(".").name == "mine"


def test_a_run_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"There is no run folder .*nope.*drkl distill CONFIG"):
        RunFolder.open(tmp_path / "nope")
    with pytest.raises(DrklError, match=r"is not a run folder: it has no config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DrklError, match=r"There is no run folder"):
        RunFolder.open(tmp_path / "file")


def test_stages_in_order(run: RunFolder) -> None:
    assert run.stages() == []
    for name in ("02-b", "01-z", "10-a", "not-a-run"):
        (run.root / "stages" / name).mkdir(parents=True)
        if name != "not-a-run":
            write_yaml(run.root / "stages" / name / "config.yaml", {})
    assert [stage.name for stage in run.stages()] == ["01-z", "02-b", "10-a"]


def test_finished_is_what_env_json_says(run: RunFolder) -> None:
    assert not run.is_finished() and run.read_env() == {} and run.read_train_log() == []
    write_json(run.env_path, {"finished": None})
    assert not run.is_finished()
    write_json(run.env_path, {"finished": "2026-01-01T00:00:00+00:00"})
    assert run.is_finished()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    value = {"b": 1e-05, "a": [None, True, "ü – \u2028"], "nested": {"x": 1}}
    write_json(tmp_path / "deep" / "v.json", value)
    write_yaml(tmp_path / "v.yaml", value)
    write_jsonl(tmp_path / "v.jsonl", [value, {"text": "\ud800 half a pair"}])
    assert read_json(tmp_path / "deep" / "v.json") == read_yaml(tmp_path / "v.yaml") == value
    assert read_jsonl(tmp_path / "v.jsonl") == [value, {"text": "\ud800 half a pair"}]
    assert list(read_yaml(tmp_path / "v.yaml")) == list(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_such_numbers(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "v.json", {"x": number})
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_text(path, "old")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_rights(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "theirs").write_text("")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "theirs").stat().st_mode)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DrklError, match=r"Cannot write .*file/v\.json"):
        write_json(tmp_path / "file" / "v.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(DrklError, match=r"Cannot write .*folder': a folder of that name is there"):
        write_text(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_elsewhere_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DrklError, match=r"log\.jsonl:2: not valid json"):
        read_jsonl(path)


@pytest.mark.parametrize("read", [read_text, read_json, read_jsonl, read_yaml])
def test_files_that_cannot_be_read(tmp_path: Path, read) -> None:
    with pytest.raises(DrklError, match=r"There is no file"):
        read(tmp_path / "missing")
    with pytest.raises(DrklError, match=r"Cannot read .*Is a directory"):
        read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"ab\xff\n")
    wrong = r"bytes:1: not valid json: .*can't decode byte 0xff" if read is read_jsonl else r"UTF-8 text \(byte 2\)"
    with pytest.raises(DrklError, match=wrong):
        read(tmp_path / "bytes")


def test_broken_json_and_yaml_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_text("{")
    with pytest.raises(DrklError, match=r"broken is not valid json: .*line 1"):
        read_json(path)
    with pytest.raises(DrklError, match=r"broken is not valid yaml: .*line 1"):
        read_yaml(path)


def test_did_you_mean() -> None:
    assert did_you_mean("trainig", ["training", "teacher"]) == " Did you mean 'training'?"
    assert did_you_mean("xyz", ["training"]) == ""


def test_a_log_has_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    append_jsonl(path, [{"step": 1}])
    whole = path.read_text()
    path.write_text(whole + '{"step": 2, "lo')  # cut off in writing
    append_jsonl(path, [{"step": 2}])
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text("x" * 10_000)
    append_jsonl(path, [{"step": 1}])
    assert path.read_text() == whole

    class Full(io.FileIO):
        def write(self, data: Any, /) -> int:
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Full(path, mode))
    with pytest.raises(CannotWrite, match=r"train\.jsonl': No space left on device\. .*, then resume the run"):
        append_jsonl(path, [{"step": 2}])
    monkeypatch.undo()
    assert path.read_text() == whole


def test_files_are_written_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = tmp_path / "samples.jsonl", tmp_path / "eval.json"
    write_together({first: "1", last: "1"})
    with pytest.raises(DrklError, match=r"samples\.jsonl/below"):
        write_together({first: "2", first / "below": "2", last: "2"})
    assert (first.read_text(), last.read_text()) == ("1", "1")
    replace = os.replace

    def fail(source: str, target: Path) -> None:
        if target == last:
            raise OSError(errno.EROFS, "read-only")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CannotWrite, match=r"eval\.json': Read-only file system"):
        write_together({first: "2", last: "2"})
    assert first.read_text() == "2" and sorted(path.name for path in tmp_path.iterdir()) == ["samples.jsonl"]
