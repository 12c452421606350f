"""Only what drkl wrote is replaced or removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training import own_files
from drkl.training.own_files import put_in_place, remove_run
from tests.training.test_checkpoints import make
from tests.training.tiny_runs import tree


def write(folder: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


MODEL = (
    "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors", "README.md",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.txt", "merges.txt",
    "spiece.model",
)  # fmt: skip
RUN = (
    "config.yaml", "env.json", "train.jsonl", "eval.json", "samples.jsonl", "predictions.jsonl", "heldout.jsonl",
    "analysis.json", "report.html", "report.md", "report.csv", "eval_rows.jsonl", "rollouts.jsonl",
    "analysis/positions.csv", "analysis/push.svg", ".evaluation/part", ".env.json.a1b2c3d4", ".student.writing/x",
    ".student.before/x", "checkpoints/.writing/checkpoint-9/x", *(f"student/{name}" for name in MODEL),
)  # fmt: skip
MINE = (
    "notes.txt", "checkpoints/checkpoint-notes/a", "checkpoints/checkpoint-30-backup/a", "checkpoints/checkpoint-999",
    "student/notes.txt", "student/model-q4.gguf", "analysis/notes.txt", "stages/notes.txt", "stages/mine/a",
    "stages/01-a/notes.txt", "report-draft.html",
)  # fmt: skip


def written(root: Path) -> RunFolder:
    for folder in (root, root / "stages" / "01-a"):
        write(folder, *RUN)
        make(folder / "checkpoints", 10, 20)
    return RunFolder(root)


def test_a_run_is_removed_and_other_people_s_files_stay(tmp_path: Path) -> None:
    run = written(tmp_path / "r")
    before = tree(write(tmp_path / "mine", "config.yaml", *MINE))
    write(run.root, *MINE)
    remove_run(run)
    assert tree(run.root) == before  # config.yaml is what a run that replaces it writes next


def test_a_run_alone_is_removed_whole(tmp_path: Path) -> None:
    run = written(tmp_path / "r")
    (run.root / "student").rename(tmp_path / "elsewhere")
    run.student_path.symlink_to(tmp_path / "elsewhere")
    remove_run(run)
    assert {path.name for path in run.root.iterdir()} == {"config.yaml", "student"}
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_run_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(own_files, "_remove", refuse)
    with pytest.raises(DrklError, match=r"Cannot replace '.*': Read-only file system"):
        remove_run(RunFolder(tmp_path))


def test_a_model_takes_the_place_of_another(tmp_path: Path) -> None:
    write(tmp_path, *(f"student/{name}" for name in (*MODEL, "notes.txt", "mine/a")), text="old")
    put_in_place(write(tmp_path / "new", "config.json", "model.safetensors", text="new"), tmp_path / "student")
    assert {path.name: path.read_text() for path in (tmp_path / "student").iterdir() if path.is_file()} == {
        "config.json": "new", "model.safetensors": "new", "notes.txt": "old",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"student"}
    assert (tmp_path / "student" / "mine" / "a").read_text() == "old"


def test_the_current_folder_stays_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "here/notes.txt")
    monkeypatch.chdir(tmp_path / "here")
    put_in_place(write(tmp_path / "new", "config.json"), tmp_path / "here")
    assert sorted(os.listdir()) == ["config.json", "notes.txt"]


class CutOff(BaseException):
    """Stands for SIGKILL."""


def test_wherever_it_is_cut_off_a_whole_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, remove, count = Path.rename, shutil.rmtree, 0

    def cut_off_at(number: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise CutOff

    monkeypatch.setattr(Path, "rename", lambda self, to: (cut_off_at(wanted), rename(self, to))[1])
    monkeypatch.setattr(own_files.shutil, "rmtree", lambda *a, **k: (cut_off_at(wanted), remove(*a, **k))[1])
    for wanted in range(1, 99):
        folder = tmp_path / str(wanted)
        write(folder, "student/config.json", "student/notes.txt", text="old")
        made = write(folder / "new", "config.json", text="new")
        count = 0
        try:
            put_in_place(made, folder / "student")
        except CutOff:
            places = [folder / name / "config.json" for name in ("student", ".student.before")]
            assert [path for path in places if path.is_file()]
            count = -99
            put_in_place(write(folder / "newer", "config.json", text="newer"), folder / "student")
            assert (folder / "student" / "config.json").read_text() == "newer"
            assert (folder / "student" / "notes.txt").read_text() == "old"
        else:
            break
    assert wanted == 5


def test_a_move_that_fails_leaves_the_model_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "student/config.json", text="old")
    made = write(tmp_path / "new", "config.json", text="new")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self == made:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        put_in_place(made, tmp_path / "student")
    assert (tmp_path / "student" / "config.json").read_text() == "old"
    write(tmp_path, "file")
    with pytest.raises(NotADirectoryError):
        put_in_place(made, tmp_path / "file")
