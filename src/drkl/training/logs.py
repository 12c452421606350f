"""The logs of a run that goes on: their lines up to the checkpoint, and those that were damaged, made again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drkl.folders import checksum
from drkl.parsing import parse_json
from drkl.runs import RunFolder, readable_log

Lines = list[dict[str, Any]]


def line_of(logs: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """What ``train.jsonl`` has of logged numbers, but for the time; None of the summary that ends training."""
    if not logs or "train_runtime" in logs:
        return None
    return {"step": step} | {name: value for name, value in logs.items() if _is_number(value) and name != "epoch"}


def _is_number(value: Any) -> bool:
    # fp16 logs an infinite gradient norm where it skips a step; json has no infinity.
    return isinstance(value, (int, float)) and math.isfinite(value)


def begun(path: Path, step: int, history: Sequence[Mapping[str, Any]] | None = None) -> tuple[Lines, str | None]:
    """Return the lines of a log that a run which goes on keeps, and what is to be said of the others.

    Args:
        path: of the log.
        step: of the checkpoint; later lines will come again.
        history: every line of the log up to there, as the checkpoint has it; None: damaged lines are left out.
    """
    rows, damaged = readable_log(path)
    kept = [row for row in rows if row["step"] <= step]
    if history is None:
        lost = f"{path}: {damaged}; what could not be read is left out." if damaged and step >= 0 else None
        return kept, lost
    wanted = [line for entry in history if (line := line_of(entry, entry.get("step", 0))) is not None]
    there: dict[str, Lines] = {}
    for row in kept:
        there.setdefault(_key(row), []).append(row)
    lines = [there[key].pop(0) if there.get(key := _key(line)) else None for line in wanted]
    again = sum(line is None for line in lines)
    mended = [line or row for line, row in zip(lines, wanted, strict=True)]
    if again:
        return mended, f"{path}: {again} of its lines were damaged or gone, and are written again from the checkpoint."
    known = {_key(line) for line in wanted}
    # Of the checkpoint's own step, after it was written; a line that comes twice is one.
    return mended + [row for row in kept if row["step"] == step and _key(row) not in known], None


def texts_digest(path: Path, step: int) -> str | None:
    """A digest of the lines of ``rollouts.jsonl`` up to a step; None without any."""
    kept, _ = begun(path, step)
    return checksum(json.dumps(kept, sort_keys=True).encode()) if kept else None


def of_run(run: RunFolder) -> tuple[Lines, str | None]:
    """Return the lines of ``train.jsonl`` that can be read, and what is to be said of the others.

    Those that a checkpoint has too are compared with it, as nothing else tells whether the log of a run that has not
    ended is what was written.
    """
    path = run.train_log_path
    rows, damaged = readable_log(path)
    said = f"{damaged}; what could not be read is left out" if damaged else None
    if (newest := _newest_history(run.checkpoints_path)) is None:
        return rows, said
    step, history = newest
    lines, again = begun(path, step, history)
    if again:
        said = f"lines of it are damaged or gone; those up to step {step} are read from checkpoint-{step}"
    return lines + [row for row in rows if row["step"] > step], said


def _newest_history(folder: Path) -> tuple[int, Lines] | None:
    """The step of the newest checkpoint whose ``trainer_state.json`` is whole, and what was logged until then."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    for step in sorted((int(name) for name in names if name.isascii() and name.isdecimal()), reverse=True):
        path = folder / f"checkpoint-{step}"
        try:
            files = parse_json((path / "complete.json").read_text(encoding="utf-8"))["files"]
            data = (path / "trainer_state.json").read_bytes()
            if files["trainer_state.json"]["xxh3"] == checksum(data):
                return step, [dict(entry) for entry in parse_json(data.decode())["log_history"]]
        except (OSError, ValueError, KeyError, TypeError):  # a checkpoint that is damaged, or none of ours
            continue
    return None


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in line.items() if name != "seconds"}, sort_keys=True)
