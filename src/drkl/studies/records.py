"""What a study notes of everything that it makes: its cells, the students they start from, the teacher's caches."""

from __future__ import annotations

import datetime
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from drkl.errors import DrklError
from drkl.locks import EVALUATION, STUDY, TRAINING, is_held
from drkl.runs import OF_A_STUDY, RunFolder, read_sealed, write_json, write_yaml
from drkl.sealed import sealed
from drkl.studies.cells import State
from drkl.training.environment import now

Kind = Literal["cell", "start", "cache"]
ENDED_BY_SIGNAL = tuple(128 + signum for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
"""The status of a command that was ended from outside, and has saved what it could."""
LONGEST = 500
"""Characters of a message that are kept."""


@dataclass(frozen=True)
class Record:
    """The folder of something that a study makes, and what is noted of it there.

    The file is ``cell.json``, ``start.json`` or ``cache.json``: what it was made of, ``tries`` (each with when it
    ``began`` and ``ended``, the ``status`` it ended with and its last ``message``), ``seconds`` by part over all tries,
    ``finished``, when it was whole, and of a cell ``not_begun``: why its last try could not even begin.
    """

    folder: Path
    kind: Kind

    @property
    def path(self) -> Path:
        return self.folder / OF_A_STUDY[self.kind][0]

    @property
    def config_path(self) -> Path:
        """The config that is run in the folder."""
        return self.folder / OF_A_STUDY[self.kind][1]

    @property
    def log_path(self) -> Path:
        """What the commands printed."""
        return self.folder / OF_A_STUDY[self.kind][2]

    def read(self) -> dict[str, Any]:
        """Return what is noted; nothing where there is no file yet.

        Raises:
            DrklError: the file is damaged.
        """
        return read_sealed(self.path) if self.path.exists() else {}

    def readable(self) -> dict[str, Any]:
        """Return what is noted; nothing where there is no file, or where it is damaged."""
        try:
            return self.read()
        except DrklError:
            return {}

    def write(self, values: Mapping[str, Any]) -> None:
        """Note something in place of what was there."""
        write_json(self.path, sealed(values), lasting=True)

    @property
    def is_finished(self) -> bool:
        """Whether it is whole."""
        return self.read().get("finished") is not None

    @property
    def is_done(self) -> bool:
        """Whether a cell is whole, and its results are there."""
        return self.state()[0] == "done"

    @property
    def has_begun(self) -> bool:
        """Whether a cell was run with the settings that are noted of it; a damaged record may have been of one."""
        try:
            known = self.read()
        except DrklError:
            return True
        return known.get("settings_digest") is not None or known.get("finished") is not None

    def _gone(self, known: Mapping[str, Any]) -> Path | None:
        """The results of a finished cell, where they are gone; those of a cell of another study are in its run."""
        if self.kind != "cell":
            return None
        run = RunFolder(self.folder.parent.parent / known["run"] if "run" in known else self.folder)
        return None if run.eval_path.is_file() else run.eval_path

    def begin(self, config: Mapping[str, Any], **facts: Any) -> None:
        """Note that a try begins, and write the config that it runs; one that was killed before is closed.

        Args:
            config: as a yaml file has it.
            **facts: what it is made of; of ``seconds`` those that are known already.
        """
        known = self._closed()
        tries = [*known.get("tries", []), {"began": now(), "ended": None, "status": None, "message": None}]
        spent = known.get("seconds", {}) | facts.pop("seconds", {})
        self.write(known | facts | {"tries": tries, "seconds": spent, "finished": None, "not_begun": None})
        self.rewrite(config)

    def rewrite(self, config: Mapping[str, Any]) -> None:
        """Write the config that is run next in the folder."""
        write_yaml(self.config_path, dict(config))

    def add(self, part: str, seconds: float) -> None:
        """Note how long a part of the work took."""
        known = self.read()
        last = known["tries"][-1]
        last = last | {"seconds": round(last.get("seconds", 0.0) + seconds, 1)}
        self.write(known | {"tries": [*known["tries"][:-1], last], "seconds": _plus(known["seconds"], part, seconds)})

    def end(self, status: int, message: str | None = None, **facts: Any) -> None:
        """Note that a try has ended, as a whole with status 0, and how."""
        known = self.read()
        last = known["tries"][-1] | {"ended": now(), "status": status, "message": message and message[:LONGEST]}
        finished = {"finished": last["ended"]} if status == 0 else {}
        self.write(known | facts | {"tries": [*known["tries"][:-1], last]} | finished)

    def not_begun(self, message: str, **facts: Any) -> None:
        """Note why a cell could not even begin: its start or its cache could not be made.

        Args:
            message: why.
            **facts: what the cell is.
        """
        self.write({"tries": [], "seconds": {}} | self.read() | facts | {"not_begun": message[:LONGEST]})

    def _closed(self) -> dict[str, Any]:
        """What is noted, with an end for a try that was killed: the last sign of it."""
        known = self.read()
        if not known.get("tries") or known["tries"][-1]["ended"] is not None:
            return known
        last = known["tries"][-1]
        signs = [p.stat().st_mtime for p in (self.log_path, RunFolder(self.folder).train_log_path) if p.is_file()]
        began = datetime.datetime.fromisoformat(last["began"])
        seconds = max(0.0, max(signs, default=0.0) - began.timestamp())
        ended = (began + datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds")
        last = last | {"ended": ended, "message": "It was killed."}
        # What was counted already is of parts that ended.
        spent = _plus(known["seconds"], "train", max(0.0, seconds - last.get("seconds", 0.0)))
        return known | {"tries": [*known["tries"][:-1], last], "seconds": spent}

    def state(self) -> tuple[State, str | None]:
        """Whether it is done, failed, running, interrupted or missing, and the last message of one that failed.

        One whose record is damaged has failed.
        """
        try:
            known = self.read()
        except DrklError as error:
            return "failed", str(error)
        gone = self._gone(known)
        if known.get("finished") is not None and gone is None:
            return "done", None
        if is_held(self.folder, STUDY, TRAINING, EVALUATION):
            return "running", None
        if known.get("not_begun") is not None:
            return "failed", str(known["not_begun"])
        if known.get("finished") is not None:
            return "failed", f"It was finished, and {str(gone)!r} is gone."
        if not known.get("tries"):
            return "missing", None
        last = known["tries"][-1]
        if last["status"] is None or last["status"] in ENDED_BY_SIGNAL:
            return "interrupted", None
        return "failed", last["message"]


def began_at(known: Mapping[str, Any]) -> str | None:
    """When a cell began, by what is noted of it; one of another study has that of its first try there."""
    tries = (str(one["began"]) for one in known.get("tries", ()))
    return min(tries, default=None) or known.get("began")


def was_finished(known: Mapping[str, Any]) -> bool:
    """Whether a cell was whole once, by what is noted of it; it may be evaluated again since."""
    return known.get("finished") is not None or any(one.get("status") == 0 for one in known.get("tries", ()))


def _plus(spent: Mapping[str, float], part: str, seconds: float) -> dict[str, float]:
    return {**spent, part: round(spent.get(part, 0.0) + seconds, 1)}


def cell_record(folder: str | Path) -> Record:
    """The record of a cell, in its run folder."""
    return Record(Path(folder), "cell")
