"""A vLLM server in a process group of its own, for the benchmarks and for `make test-vllm`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit


def free_address() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


class Server:
    """A command that serves at an address; ``pipes`` are where its messages go, as `subprocess.Popen` takes them."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], address: str, **pipes: Any) -> None:
        self.address = address
        self.process = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)

    def wait(self, seconds: float) -> bool:
        """Whether it answers within so many seconds, and before it ends."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            connection = HTTPConnection(urlsplit(self.address).netloc, timeout=10)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return True
            except OSError:
                time.sleep(1)
            finally:
                connection.close()
        return False

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
            self.process.wait(60)
