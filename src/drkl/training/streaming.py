"""The micro-batches of a run whose rows come from a stream, read ahead of the training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from torch.utils.data import Dataset

from drkl.data.streams import RowStream, Window
from drkl.errors import DrklError
from drkl.processes import gather
from drkl.runs import read_json, write_json
from drkl.training.arguments import DistillationConfig
from drkl.training.checkpoints import step_of
from drkl.training.plan import cut_step, cuts_by_cost, step_size
from drkl.training.settings import changed

STATE = "stream.json"
"""In a checkpoint: where the window of its step begins in the stream."""
_MEANT = {"rows_per_step": " (per_device_train_batch_size counts for each process and each accumulated gradient)"}


def check_streaming(args: DistillationConfig) -> None:
    """Raise DrklError for settings that need all rows at once, or the end of them."""
    rollouts = args.rollouts.is_on
    refused = [
        (args.max_steps < 0, "has no end that is known: give max_steps in place of num_train_epochs"),
        (args.same_batches, "gives no batch again: leave same_batches out"),
        (args.teacher_remember_mb > 0, "gives no batch again, so there is nothing to remember: leave "
         "teacher_remember_mb out"),
        (rollouts, "is read for its responses: leave rollout_share at 0, or pass rows that are all there"),
    ]  # fmt: skip
    refused += [
        (
            getattr(args, f"{name}_strategy").value == "epoch",
            f"has no epochs: {name}_strategy is 'epoch'; count steps, with 'steps'",
        )
        for name in ("eval", "save", "logging")
    ]
    for wrong, why in refused:
        if wrong:
            raise DrklError(f"train_dataset is a stream, which {why}.")


class StreamedBatches(Dataset[list[Any]]):
    """Every micro-batch of a run, as `MicroBatches` has them, in the order of training only.

    While one window is trained on, the next one is read. Every process reads the whole stream and takes its own
    micro-batches of each step.

    Args:
        stream: where the rows come from.
        args: how to train; ``max_steps`` is given.
        parts: micro-batches in a step, over all processes.
        check: is called with the rows of each window, and raises DrklError where the models cannot read them.
        packed: as of `MicroBatches`.
    """

    def __init__(
        self,
        stream: RowStream,
        args: DistillationConfig,
        parts: int,
        check: Callable[[Sequence[Any]], None],
        *,
        packed: bool = False,
    ) -> None:
        self._stream, self._args, self._parts, self._check, self._packed = stream, args, parts, check, packed
        self._ahead: _Ahead | None = None
        self._windows: deque[Window] = deque(maxlen=2)
        """The newest two: micro-batches are taken a little before they are trained on."""
        self._expected: str | None = None
        """The digest of the first window, where a run goes on."""

    def __len__(self) -> int:
        return self._args.max_steps * self._parts

    def __getitem__(self, index: int) -> list[Any]:
        step, part = divmod(index, self._parts)
        window = self._window(step)
        alike = cuts_by_cost(self._args, self._args.world_size)
        return cut_step(window.rows_of(step), self._parts, alike=alike, packed=self._packed)[part]

    def begin(self, checkpoint: Path | None) -> None:
        """Begin with the stream, or go on where a checkpoint was written.

        Raises:
            DrklError: it was written by a run that read all rows first, or by one with other settings.
        """
        self.end()
        self._windows.clear()
        state: Mapping[str, Any] = {}
        if checkpoint is not None:
            state = _read_state(checkpoint)
            found = [
                f"{name} of the stream: {came} then, {value} now{_MEANT.get(name, '')}"
                for name, value in self._settings().items()
                if (came := state["settings"].get(name)) != value
            ]
            if found:
                raise changed(str(self._args.output_dir), found)
        self._expected = state.get("digest")
        size = step_size(self._args, self._args.world_size)
        windows = self._stream.windows(
            state.get("begin"), seed=self._args.plan_seed, drop_last=self._args.dataloader_drop_last, **size
        )
        self._ahead = _Ahead(windows)
        if checkpoint is not None:
            self._window(int(state["begin"]["step"]))  # before anything of the run is touched

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint where its run goes on."""
        window = self._window_at(step_of(checkpoint) - 1)
        write_json(checkpoint / STATE, {"settings": self._settings(), "begin": window.begin, "digest": window.digest})

    def numbers(self, step: int) -> dict[str, float]:
        """What is logged: the rows that were read up to the window of the last of so many steps, and those dropped."""
        window = self._window_at(step - 1)
        return {"rows_read": window.rows_read, "rows_dropped": sum(window.dropped.values())}

    def account(self, step: int) -> dict[str, Any]:
        """The same for a record, dropped rows by reason."""
        window = self._window(step - 1)  # a run that went on after its last step has read nothing
        return {
            "rows_read": window.rows_read,
            "dropped": dict(window.dropped),
            "responses_cut": window.responses_cut,
        }

    def end(self) -> None:
        """Wait for what is being read, and read no more."""
        if self._ahead is not None:
            self._ahead.stop()
        self._ahead = None

    def _settings(self) -> dict[str, Any]:
        size = step_size(self._args, self._args.world_size)
        return size | {
            "seed": self._args.plan_seed,
            "drop_last": self._args.dataloader_drop_last,
            "shuffle_buffer": self._stream.shuffle_buffer,
            "weights": [source.weight for source in self._stream.sources],
        }

    def _window_at(self, step: int) -> Window:
        """The window of a step that is not far back, or the newest one."""
        return next((window for window in self._windows if window.first_step <= step < window.end), self._windows[-1])

    def _window(self, step: int) -> Window:
        while not self._windows or step >= self._windows[-1].end:
            self._windows.append(self._next_window())
        window = self._window_at(step)
        assert window.first_step <= step, "micro-batches are asked for in order"
        return window

    def _next_window(self) -> Window:
        assert self._ahead is not None, "begin comes first"
        window, error = self._ahead.take()
        if window is not None and error is None:
            try:
                self._check(window.rows)
            except DrklError as found:
                error = found
        error = self._agree(window, error)
        if error is not None:
            raise error
        assert window is not None
        if self._expected not in (None, window.digest):
            raise changed(
                str(self._args.output_dir),
                [f"training rows: those of {self._stream.name} are others, or in another order"],
            )
        self._expected = None
        if window.end < self._args.max_steps:
            self._ahead.read()
        return window

    def _agree(self, window: Window | None, error: DrklError | None) -> DrklError | None:
        """What is wrong with the window of any process; each has to see the same rows."""
        if self._args.world_size == 1:
            return error
        told = gather([(None if window is None else window.digest, None if error is None else str(error))])
        messages = [message for _, message in told if message is not None]
        if messages:
            return error or DrklError(messages[0])
        if len({digest for digest, _ in told}) > 1:
            return DrklError(
                f"The processes read different rows from {self._stream.name}; each has to read the whole stream, in "
                "one order. Give every process the same data, and shuffle it with a seed or not at all."
            )
        return None


class _Ahead:
    """Reads one window while another is trained on."""

    def __init__(self, windows: Iterator[Window]) -> None:
        self._windows = windows
        self.read()

    def read(self) -> None:
        """Begin to read the next window."""
        self._found: Window | None = None
        self._error: BaseException | None = None
        # A daemon: a stream that waits for its network does not keep a process that has ended.
        self._thread = Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = next(self._windows)
        except BaseException as error:  # raised again where the window is needed
            self._error = error

    def take(self) -> tuple[Window | None, DrklError | None]:
        """The window, or what was wrong with it."""
        self._thread.join()
        found, self._found = self._found, None
        if self._error is not None and not isinstance(self._error, DrklError):
            raise self._error
        return found, self._error

    def stop(self) -> None:
        """Wait a moment for what is being read."""
        self._thread.join(timeout=10)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    if not path.is_file():
        raise DrklError(
            f"{str(checkpoint)!r} has no {STATE}: its run read all rows before its first step. Set data.streaming to "
            "false to go on with it, or start a new run."
        )
    try:
        state = read_json(path)
        if not all(isinstance(state[name], dict) for name in ("settings", "begin")):
            raise TypeError("it is no state of a stream")
    except (KeyError, TypeError, ValueError) as error:
        raise DrklError(
            f"{str(path)!r} does not say where the stream was ({error}). Remove that checkpoint to go on from the one "
            "before it."
        ) from error
    return dict(state)
