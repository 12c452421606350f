"""Questions to a vLLM server over HTTP, and what goes wrong with them."""

from __future__ import annotations

import json
import os
import selectors
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, TypeVar
from urllib.parse import urlsplit

from drkl.errors import DrklError

WAITS = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds between two tries of a question whose server cannot be reached for the moment."""
GO_ON = "Then resume the run: it goes on from its last checkpoint."
_MOMENTARY = (408, 429, 502, 503, 504)
"""HTTP statuses of a server, or of a proxy before it, that may answer later."""
_LONGEST = 400
"""Characters of a server's own words in a message."""
_LARGEST = 2**28
"""Bytes of an answer; one token takes about a hundred."""

T = TypeVar("T")


class Lost(Exception):
    """The server cannot be reached, or is gone in the middle of a question; it may be back in a while."""


class Refused(DrklError):
    """The server answers that it does not do what it was asked."""


class Client:
    """Asks one server.

    Args:
        address: ``http://host:port``; a path after it stays, but for vLLM's own ``/v1``.
        timeout: longest wait for an answer, in seconds.
    """

    def __init__(self, address: str, timeout: float) -> None:
        parts = urlsplit(address)  # the section `rollouts` takes nothing else
        self.address, self._timeout = address, timeout
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = str(parts.hostname), parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):
                raise DrklError("VLLM_API_KEY in the environment has characters that a key cannot have; set it anew.")
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: Any = None) -> Any:
        """Return the answer to one question: GET without a body, POST with one.

        Raises:
            Lost: the server cannot be reached.
            DrklError: it does not answer in time, refuses (`Refused`), or answers with something else than json.
        """
        connection = self._connection()
        try:
            self._send(connection, path, body)
            return self._receive(connection, path)
        finally:
            connection.close()

    def ask_all(self, path: str, bodies: Sequence[Any], *, at_once: int, on_answer: Callable[[int, Any], None]) -> None:
        """Ask several questions, ``at_once`` of them at a time; the answers come in any order.

        Args:
            path: where all of them go.
            bodies: the questions.
            at_once: questions that wait for their answer at a time.
            on_answer: called with a question's number and its answer.

        Raises:
            Lost: the server is gone; what it answered before was reported.
            DrklError: as `ask`.
        """
        waiting = deque(range(len(bodies)))
        connections = [self._connection() for _ in range(min(at_once, len(bodies)))]
        try:
            with selectors.DefaultSelector() as selector:

                def send(connection: HTTPConnection) -> None:
                    number = waiting.popleft()
                    self._send(connection, path, bodies[number])
                    selector.register(connection.sock, selectors.EVENT_READ, (connection, number))

                for connection in connections:
                    send(connection)
                while selector.get_map():
                    ready = selector.select(self._timeout)
                    if not ready:
                        raise self._slow(path)
                    for key, _ in ready:
                        connection, number = key.data
                        selector.unregister(key.fileobj)
                        on_answer(number, self._receive(connection, path))
                        if waiting:
                            send(connection)
        finally:
            for connection in connections:
                connection.close()

    def patiently(self, action: Callable[[], T]) -> T:
        """Return what an action returns, tried again after each of `WAITS` while the server cannot be reached.

        Raises:
            DrklError: it still cannot be reached, or the action raised it.
        """
        end = time.monotonic() + self._timeout
        for tries, wait in enumerate((*WAITS, None), start=1):
            try:
                return action()
            except Lost as error:
                if wait is None or time.monotonic() + wait > end:
                    raise DrklError(
                        f"The vLLM server at {self.address} cannot be reached ({error}); tried {tries} times. Start "
                        f"it, or start it again, with `drkl rollout-server CONFIG`. {GO_ON}"
                    ) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _connection(self) -> HTTPConnection:
        return self._kind(self._host, self._port, timeout=self._timeout)

    def _send(self, connection: HTTPConnection, path: str, body: Any) -> None:
        data = None if body is None else json.dumps(body)
        try:
            connection.request("GET" if body is None else "POST", self._prefix + path, data, self._headers)
        except (OSError, HTTPException) as error:
            raise self._failed(error, path) from error

    def _receive(self, connection: HTTPConnection, path: str) -> Any:
        try:
            response = connection.getresponse()
            status, content = response.status, self._read(response, path)
        except (OSError, HTTPException) as error:
            raise self._failed(error, path) from error
        text = content.decode("utf-8", "replace")
        if status in _MOMENTARY:
            raise Lost(f"HTTP {status}: {_words(text)}")
        if 300 <= status < 400:
            raise Refused(
                f"{self.address}{path} sends to another address (HTTP {status}): "
                f"{printable(response.headers.get('Location', '')) or 'it names none'}. Set rollout_server to that of "
                "the vLLM server itself."
            )
        if status != 200:
            raise self._refusal(status, path, _words(text))
        if not text:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DrklError(
                f"{self.address}{path} does not answer with json but with {_words(text)!r}, so it is no vLLM server. "
                "Set rollout_server to the address that `vllm serve` prints."
            ) from error

    def _read(self, response: HTTPResponse, path: str) -> bytes:
        content = b""
        while piece := response.read(_LARGEST + 1 - len(content)):
            content += piece
        if len(content) > _LARGEST:
            raise DrklError(
                f"{self.address}{path} answers with more than {_LARGEST >> 20} MiB, so it is no vLLM server. Set "
                "rollout_server to the address that `vllm serve` prints."
            )
        if response.length:
            raise IncompleteRead(content, response.length)
        return content

    def _failed(self, error: Exception, path: str) -> Exception:
        if isinstance(error, TimeoutError):
            return self._slow(path)
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return DrklError(
                f"The vLLM server at {self.address} cannot be spoken to over https: {_named(error)}. Give its address "
                "with http:// if it has no certificate (rollout_server), or name the file of a certificate of its own "
                f"in the environment variable SSL_CERT_FILE. {GO_ON}"
            )
        return Lost(_named(error))

    def _slow(self, path: str) -> DrklError:
        return DrklError(
            f"The vLLM server at {self.address} has not answered {path} within {self._timeout:g} seconds. Raise "
            f"rollout_server_timeout, or lower rollout_batch_size or rollout_max_new_tokens. {GO_ON}"
        )

    def _refusal(self, status: int, path: str, words: str) -> Refused:
        cure = "The request is wrong for this server."
        if status in (401, 403):
            cure = "Set VLLM_API_KEY in the environment to the key that the server was started with."
        elif status == 404 and path.startswith("/v"):
            cure = "Is it a vLLM server? Set rollout_server to the address that `vllm serve` prints."
        elif status == 404:
            cure = (
                "The routes for new weights exist only where the server was started with VLLM_SERVER_DEV_MODE=1, as "
                "`drkl rollout-server CONFIG` does it."
            )
        elif status >= 500:
            cure = f"See the server's own log, and start it again. {GO_ON}"
        return Refused(f"The vLLM server at {self.address} refuses {path} (HTTP {status}): {words}. {cure}")


def host_and_port(address: str) -> tuple[str, int]:
    """Return the two parts of a server's address, as `address_of` takes them; a port that is not given is known.

    >>> host_and_port("http://10.0.0.7:8100"), host_and_port("https://gpu.example")
    (('10.0.0.7', 8100), ('gpu.example', 443))
    """
    parts = urlsplit(address)
    return str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)


def address_of(host: str, port: object) -> str:
    """Return the address of a server.

    >>> address_of("::1", 8000)
    'http://[::1]:8000'
    """
    return f"http://[{host}]:{port}" if ":" in host and host[0] != "[" else f"http://{host}:{port}"


def printable(text: str) -> str:
    """What a server says, on one line and not too long."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _named(error: Exception) -> str:
    if isinstance(error, IncompleteRead):
        return "it broke off in the middle of an answer"
    return printable(str(error)) or type(error).__name__


def _words(text: str) -> str:
    """What a server says, on one line; of vLLM's json its message alone."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        text = str(error.get("message") or error.get("detail") or text)
    except (ValueError, AttributeError, RecursionError):
        pass
    return printable(text).rstrip(".") or "no words"
