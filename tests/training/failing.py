"""Started in each of several processes: the command line, one process of which is late or fails at the fourth step."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from drkl.cli import main
from drkl.errors import DrklError
from drkl.training.trainer import DistillationTrainer


def fail(way: str, note: Path) -> None:
    """Let the trainer of this process fail, and leave a note of the time."""
    compute_loss = DistillationTrainer.compute_loss

    def failing(self: DistillationTrainer, *args: Any, **words: Any) -> Any:
        if self.state.global_step == 3:
            note.write_text(str(time.monotonic()))
            if way == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a bug") if way == "bug" else DrklError("The disk of this process is full.")
        return compute_loss(self, *args, **words)

    DistillationTrainer.compute_loss = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    _, way, process, *words = sys.argv
    sys.argv = ["drkl", *words]
    if os.environ["RANK"] == process:
        if way == "late":
            time.sleep(4)
        else:
            fail(way, Path(words[1]).parent / "failed")
    main()
