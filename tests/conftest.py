"""What every test stands on: no network, few threads, the same random choices each time."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.command_line import Cli, Done

torch.set_num_threads(1)  # tensors this small gain nothing from a second one, and lose much on a busy machine
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, and its own library is decorated

# Nothing rests on how fast a machine is.
settings.register_profile(
    "drkl", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("drkl")

LOCAL_HOSTS = {"", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()}


class NetworkInTests(RuntimeError):
    """Code under test tried to leave this machine."""


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    return name in LOCAL_HOSTS or name.startswith("127.")


def _refuse_remote(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any, *args: Any) -> Any:
        # AF_UNIX addresses are strings: files of this machine.
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise NetworkInTests(f"A test tried to connect to {address[0]}:{address[1]}.")
        return connect(self, address, *args)

    return guarded


def _refuse_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkInTests(f"A test tried to look up the host {host!r}.")
        return lookup(host, *args, **kwargs)

    return guarded


COMPUTES = {"analysis", "families", "losses", "models", "objectives", "positions", "teachers", "toy"}
"""The rooms of tests whose numbers come from a processor's kernels."""
COMPUTING_FILES = {
    "evaluation/test_calibration.py",
    "evaluation/test_classification.py",
    "evaluation/test_positions.py",
    "evaluation/test_suite.py",
    "rollouts/test_builtin.py",
    "rollouts/test_stops.py",
    "test_positions.py",
    "training/test_families.py",
    "training/test_heldout_answers.py",
    "training/test_on_policy.py",
    "training/test_trainer.py",
}
"""And those files of the other rooms."""
OTHERS = (
    "_command.py", "_config.py", "_row_kernel.py", "_row_head.py", "_row_terms.py", "_kernel_steps.py",
    "_kernel_statistics.py", "_processes.py",
)  # fmt: skip
"""In those rooms: the command line, configs, Triton's interpreter (numpy's kernels), and processes of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what computes, by where it stands."""
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here)
        in_room = path.parts[0] in COMPUTES and not path.name.endswith(OTHERS)
        if in_room or path.as_posix() in COMPUTING_FILES:
            item.add_marker(pytest.mark.computes)


def pytest_configure(config: pytest.Config) -> None:
    """Close the network for the whole run, collection included, and let Ctrl-C be heard, here and in what is started.

    A shell lets what it starts in the background ignore Ctrl-C, and whoever inherits that ignores it too.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # of nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _refuse_remote(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", _refuse_remote(socket.socket.connect_ex))
    patch.setattr(socket, "getaddrinfo", _refuse_lookup(socket.getaddrinfo))
    config.add_cleanup(patch.undo)
    cache = tempfile.mkdtemp(prefix="drkl-tests-")
    patch.setenv("DRKL_CACHE", cache)
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """``cli("evaluate", run)`` calls the command line in this process, with a cache of its own."""
    from drkl.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "drkl-cache"))
    torch.set_num_threads(1)

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["drkl", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call
