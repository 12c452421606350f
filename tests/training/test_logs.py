"""The log of a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drkl.folders import describe_files
from drkl.runs import RunFolder
from drkl.training.logs import begun, line_of, of_run

HISTORY: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5, "epoch": 0.1, "grad_norm": float("inf")},
    {"step": 2, "loss": 2.25, "epoch": 0.2},
    {"step": 2, "eval_loss": 3.0, "epoch": 0.2},
]
LINES = [
    {"step": 1, "loss": 2.5, "seconds": 0.1},
    {"step": 2, "loss": 2.25, "seconds": 0.2},
    {"step": 2, "eval_loss": 3.0, "seconds": 0.3},
]
LATER = {"step": 3, "loss": 9.0, "seconds": 0.4}


def text(lines: list[Any]) -> str:
    return "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def mended(*numbers: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds" or n not in numbers} for n, line in enumerate(LINES)]


@pytest.mark.parametrize(
    ("lines", "again"),
    [
        ([*LINES, LATER], ()),
        ([*LINES, LATER, '{"step": 4, "lo'], ()),
        ([LINES[2], LINES[0], LINES[1]], ()),  # out of order
        ([LINES[0], *LINES], ()),  # twice
        ([LINES[0], "x\n", *LINES[2:]], (1,)),
        ([LINES[0], '{"step": "2", "loss": 2.25}\n', LINES[2]], (1,)),
        ([LINES[0], LINES[1] | {"loss": 2.24}, LINES[2]], (1,)),
        ([LINES[0], "[1]\n", '{"step": 1' + "0" * 5000 + "}\n", "[" * 100_000 + "\n", *LINES[1:]], ()),
        ([], (0, 1, 2)),
        (["\0" * 200], (0, 1, 2)),
    ],
)
def test_lines_are_kept_or_made_again(tmp_path: Path, lines: list[Any], again: tuple[int, ...]) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(text(lines))
    kept, said = begun(path, 2, HISTORY)
    assert kept == mended(*again)
    assert (said is None) == (not again)
    if said:
        assert said == (
            f"{path}: {len(again)} of its lines were damaged or gone, and are written again from the checkpoint."
        )


def test_what_is_gone_is_made_again_and_what_came_after_the_checkpoint_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    assert begun(path, 2, HISTORY)[0] == mended(0, 1, 2)
    more = {"step": 2, "other_eval_loss": 1.0}
    path.write_text(text([*LINES, more]))
    assert begun(path, 2, HISTORY) == ([*LINES, more], None)


def test_without_a_history_what_can_be_read_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(text([LINES[0], "x\n", LATER]))
    kept, said = begun(path, 2)
    assert kept == LINES[:1] and said == f"{path}: line 2 is damaged; what could not be read is left out."
    assert begun(path, -1) == ([], None)
    path.unlink()
    path.mkdir()
    assert begun(path, 2)[0] == [] and "Is a directory" in str(begun(path, 2)[1])


def test_the_log_of_a_run_that_has_not_ended_is_compared_with_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (2, 3):
        folder = run.checkpoints_path / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
        (folder / "complete.json").write_text(json.dumps({"files": describe_files(folder)}))
        (run.checkpoints_path / "checkpoint-notes").mkdir(exist_ok=True)
    (run.checkpoints_path / "checkpoint-3" / "trainer_state.json").write_text('{"log_history": []}')
    run.train_log_path.write_text(text([*LINES, LATER]))
    assert of_run(run) == ([*LINES, LATER], None)
    run.train_log_path.write_text(text([LINES[0], LINES[1] | {"loss": 2.24}, *LINES[2:], LATER, "x\n"]))
    said = "lines of it are damaged or gone; those up to step 2 are read from checkpoint-2"
    assert of_run(run) == ([*mended(1), LATER], said)
    (run.checkpoints_path / "checkpoint-2" / "complete.json").write_text("[]")
    assert of_run(run)[1] == "line 5 is damaged; what could not be read is left out"


def test_the_summary_that_ends_training_is_no_line() -> None:
    assert line_of({"train_runtime": 1.0}, 3) is None
    assert line_of({"loss": 1.0, "epoch": 1.0, "nan": float("nan"), "x": "text"}, 3) == {"step": 3, "loss": 1.0}
