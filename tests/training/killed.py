"""The command line in a process that sends itself SIGKILL at a chosen moment: no other process has to be fast enough.

    python -m tests.training.killed MOMENT NUMBER ARGUMENTS...

MOMENT is ``log FOLDER``, ``begin FOLDER`` or ``checkpoint FOLDER``, with a part of the path of the checkpoints, and
NUMBER the optimiser step; or ``file``, and NUMBER counts the finished files of rows or tensors; or ``write``, and
NUMBER counts the forward passes in which answers are written.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_training(moment: str, folder: str, number: int) -> None:
    """After the line of this step is in the log; before the first step; or with half of a checkpoint written."""
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    call_event, save_state = CallbackHandler.call_event, Trainer._save_rng_state
    event = {"log": "on_log", "begin": "on_train_begin"}.get(moment)

    def is_there(args: Any, state: Any) -> bool:
        return folder in str(args.output_dir) and state.global_step == number

    def watched_event(self: Any, name: str, args: Any, state: Any, control: Any, **words: Any) -> Any:
        control = call_event(self, name, args, state, control, **words)
        if name == event and is_there(args, state):
            kill()
        return control

    def watched_save(self: Any, *args: Any, **words: Any) -> Any:
        if moment == "checkpoint" and is_there(self.args, self.state):
            kill()
        return save_state(self, *args, **words)

    CallbackHandler.call_event = watched_event
    Trainer._save_rng_state = watched_save


def kill_in_writing(number: int) -> None:
    """In the midst of an answer: once a model was read so many times while answers are written."""
    from transformers.models.llama.modeling_llama import LlamaModel

    from drkl.rollouts.builtin import BuiltInWriter

    write, forward = BuiltInWriter.write, LlamaModel.forward
    inside = passes = 0

    def watched_write(self: Any, *args: Any, **words: Any) -> Any:
        nonlocal inside
        inside += 1
        try:
            return write(self, *args, **words)
        finally:
            inside -= 1

    def watched_forward(self: Any, *args: Any, **words: Any) -> Any:
        nonlocal passes
        passes += inside > 0
        if passes == number:
            kill()
        return forward(self, *args, **words)

    BuiltInWriter.write, LlamaModel.forward = watched_write, watched_forward  # type: ignore[method-assign]


def kill_after_files(number: int) -> None:
    """Once so many files of rows or tensors are whole."""
    replace, finished = os.replace, 0

    def counted(source: Any, target: Any, **words: Any) -> None:
        nonlocal finished
        replace(source, target, **words)
        finished += os.path.splitext(str(target))[1] in (".jsonl", ".safetensors")
        if finished == number:
            kill()

    os.replace = counted


def main(moment: str, number: str, *arguments: str) -> None:
    kind, _, folder = moment.partition(" ")
    if kind == "file":
        kill_after_files(int(number))
    elif kind == "write":
        kill_in_writing(int(number))
    else:
        kill_in_training(kind, folder, int(number))
    from drkl.cli import main as run

    sys.argv = ["drkl", *arguments]
    run()


if __name__ == "__main__":
    main(*sys.argv[1:])
