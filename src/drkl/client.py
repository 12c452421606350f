"""Questions to a server over HTTP, and what goes wrong with them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, TypeVar
from urllib.parse import urlsplit

from drkl.errors import DrklError

WAITS = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds between two tries of a question whose server cannot be reached for the moment."""
GO_ON = "Then start again, or resume the run where it has begun: it goes on from its last checkpoint."
MOMENTARY = frozenset((408, 429, 502, 503, 504))
"""HTTP statuses of a server, or of a proxy before it, that may answer later."""
_LONGEST = 400
"""Characters of a server's own words in a message."""
_LEAST = 1.0
"""Seconds for an answer that has begun to come, however many came before it."""
_LARGEST = 2**28
"""Bytes of an answer; one token takes about a hundred."""

T = TypeVar("T")


class Lost(Exception):
    """The server cannot be reached, or is gone in the middle of a question; it may be back in a while."""


class Slow(DrklError):
    """The server has not answered in time."""


class Refused(DrklError):
    """The server answers that it does not do what it was asked."""


@dataclass(frozen=True)
class Caller:
    """What a client says of its server and of the settings that lead to it, and what it asks again.

    Args:
        server: the server, at the beginning of a sentence.
        setting: the setting that has its address.
        start: how to start it, a sentence.
        faster: what to do where it does not answer in time, without a full stop.
        no_route: why a route outside of ``/v1`` may not be there, a sentence.
        keys: environment variables that may hold its key; the first that is set counts.
        momentary: HTTP statuses after which it is asked again.
        slow_tries: how often it is asked what it does not answer in time.
    """

    server: str
    setting: str
    start: str
    faster: str
    no_route: str
    keys: tuple[str, ...]
    momentary: frozenset[int] = MOMENTARY
    slow_tries: int = 1


class Client:
    """Asks one server.

    Args:
        address: as `is_address` takes it; a path after the port stays, but for vLLM's own ``/v1``.
        timeout: longest wait for an answer, in seconds.
        caller: who asks.
    """

    def __init__(self, address: str, timeout: float, caller: Caller) -> None:
        parts = urlsplit(address)
        self.address, self._timeout, self._caller = address, timeout, caller
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = str(parts.hostname), parts.port
        self.on_return: Callable[[], None] | None = None
        """Called before a server is asked again that could not be reached: it may have been started anew."""
        self._was_lost = False
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        name = next((name for name in caller.keys if name in os.environ), caller.keys[0])
        self._key = os.environ.get(name, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise DrklError(f"{name} in the environment has characters that a key cannot have; set it anew.")
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"

    def ask(self, path: str, body: Any = None) -> Any:
        """Return the answer to one question: GET without a body, POST with one.

        Raises:
            Lost: the server cannot be reached.
            DrklError: it does not answer in time, refuses (`Refused`), or answers with something else than json.
        """
        connection, end = self._connection(), self._deadline()
        try:
            self._send(connection, path, body, end)
            return self._receive(connection, path, end)
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
            Lost: a question has no answer. Those that were asked before it are answered still, and no other is asked.
            DrklError: as `ask`.
        """
        waiting = deque(range(len(bodies)))
        lost: list[Lost] = []
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:

            def send(connection: HTTPConnection) -> None:
                if not waiting or lost:
                    return
                number, end = waiting.popleft(), self._deadline()
                try:
                    self._send(connection, path, bodies[number], end)
                except Lost as error:
                    lost.append(error)
                    return
                selector.register(connection.sock, selectors.EVENT_READ, (connection, number, end))

            for _ in range(min(at_once, len(bodies))):
                send(stack.enter_context(contextlib.closing(self._connection())))
            while due := [key.data[2] for key in selector.get_map().values()]:
                ready = selector.select(max(0.0, min(due) - time.monotonic()))
                if not ready:
                    raise self._slow(path)
                for key, _ in ready:
                    connection, number, end = key.data
                    selector.unregister(key.fileobj)
                    try:
                        answer = self._receive(connection, path, end)
                    except Lost as error:
                        lost.append(error)
                        continue
                    on_answer(number, answer)
                    send(connection)
        if lost:
            raise lost[0]

    def ask_each(
        self, path: str, bodies: Sequence[Any], *, at_once: int, on_answer: Callable[[int, Any], None]
    ) -> None:
        """As `ask_all`, and what has no answer is asked again as in `patiently`, from the first try after each answer.

        Raises:
            DrklError: as `patiently`.
        """
        left = list(range(len(bodies)))

        def ask() -> None:
            asked, before = list(left), len(left)

            def take(number: int, answer: Any) -> None:
                on_answer(asked[number], answer)
                left.remove(asked[number])

            try:
                self.ask_all(path, [bodies[i] for i in asked], at_once=at_once, on_answer=take)
            except (Lost, Slow) as error:
                self._was_lost |= isinstance(error, Lost)
                if len(left) == before:
                    raise

        while left:
            self.patiently(ask)

    def patiently(self, action: Callable[[], T]) -> T:
        """Return what an action returns, tried again after each of `WAITS` while the server cannot be reached.

        Raises:
            DrklError: it still cannot be reached, or the action raised it.
        """
        end, slow = self._deadline(), 0
        for tries, wait in enumerate((*WAITS, None), start=1):
            try:
                if self._was_lost and self.on_return is not None:
                    self.on_return()
                self._was_lost = False
                return action()
            except Slow:
                slow, end = slow + 1, self._deadline()
                if slow >= self._caller.slow_tries:
                    raise
            except Lost as error:
                self._was_lost = True
                if wait is None or time.monotonic() + wait > end:
                    raise DrklError(
                        f"{self._caller.server} at {self.address} cannot be reached ({error}); tried {tries} times. "
                        f"{self._caller.start} {GO_ON}"
                    ) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _connection(self) -> HTTPConnection:
        return self._kind(self._host, self._port, timeout=self._timeout)

    @contextlib.contextmanager
    def _until(self, end: float, connection: HTTPConnection, path: str) -> Iterator[None]:
        """Break a connection off at a moment: its own limit is for each byte, and a server may send a byte at a time.

        Raises:
            Slow: the moment came.
        """
        late, opened = threading.Event(), connection.sock

        def stop() -> None:
            late.set()
            # Of an answer without a length the connection lets its socket go before it is read.
            open_now = connection.sock or opened
            with contextlib.suppress(OSError, AttributeError):  # closed meanwhile, or never open
                open_now.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(_LEAST, end - time.monotonic()), stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, HTTPException, ValueError) as error:
            if late.is_set():
                raise self._slow(path) from error
            raise
        finally:
            timer.cancel()
        if late.is_set():  # an answer without a length ends where it was broken off
            raise self._slow(path)

    def _send(self, connection: HTTPConnection, path: str, body: Any, end: float) -> None:
        data = None if body is None else json.dumps(body)
        try:
            with self._until(end, connection, path):
                connection.request("GET" if body is None else "POST", self._prefix + path, data, self._headers)
        except (OSError, HTTPException) as error:
            raise self._failed(error, path) from error

    def _receive(self, connection: HTTPConnection, path: str, end: float) -> Any:
        try:
            with self._until(end, connection, path):
                response = connection.getresponse()
                status, content = response.status, self._read(response, path)
        except (OSError, HTTPException) as error:
            raise self._failed(error, path) from error
        text = content.decode("utf-8", "replace")
        if status in self._caller.momentary:
            raise Lost(f"HTTP {status}: {self._words(text)}")
        if 300 <= status < 400:
            raise Refused(
                f"{self.address}{path} sends to another address (HTTP {status}): "
                f"{printable(response.headers.get('Location', '')) or 'it names none'}. Set {self._caller.setting} "
                "to that of the vLLM server itself."
            )
        if status != 200:
            raise self._refusal(status, path, self._words(text))
        if not text:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DrklError(
                f"{self.address}{path} does not answer with json but with {self._words(text)!r}, so it is no vLLM "
                f"server. Set {self._caller.setting} to the address that `vllm serve` prints."
            ) from error

    def _read(self, response: HTTPResponse, path: str) -> bytes:
        content = b""
        while piece := response.read(_LARGEST + 1 - len(content)):
            content += piece
        if len(content) > _LARGEST:
            raise DrklError(
                f"{self.address}{path} answers with more than {_LARGEST >> 20} MiB, so it is no vLLM server. Set "
                f"{self._caller.setting} to the address that `vllm serve` prints."
            )
        if response.length:
            raise IncompleteRead(content, response.length)
        return content

    def _words(self, text: str) -> str:
        """What the server says; some repeat what they were sent."""
        return _words(text.replace(self._key, "…") if self._key else text)

    def _failed(self, error: Exception, path: str) -> Exception:
        if isinstance(error, TimeoutError):
            return self._slow(path)
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return DrklError(
                f"{self._caller.server} at {self.address} cannot be spoken to over https: {_named(error)}. Give its "
                f"address with http:// if it has no certificate ({self._caller.setting}), or name the file of a "
                f"certificate of its own in the environment variable SSL_CERT_FILE. {GO_ON}"
            )
        return Lost(_named(error))

    def _slow(self, path: str) -> Slow:
        return Slow(
            f"{self._caller.server} at {self.address} has not answered {path} within {self._timeout:g} seconds. "
            f"{self._caller.faster}. {GO_ON}"
        )

    def _refusal(self, status: int, path: str, words: str) -> Refused:
        cure = "The request is wrong for this server."
        if status in (401, 403):
            cure = f"Set {self._caller.keys[0]} in the environment to the key that the server was started with."
        elif status == 404 and path.startswith("/v"):
            cure = f"Is it a vLLM server? Set {self._caller.setting} to the address that `vllm serve` prints."
        elif status == 404:
            cure = self._caller.no_route
        elif status >= 500:
            cure = f"See the server's own log, and start it again. {GO_ON}"
        return Refused(f"{self._caller.server} at {self.address} refuses {path} (HTTP {status}): {words}. {cure}")


def is_address(text: str) -> bool:
    """Whether this is http or https, a host, and a port and a path or neither: nothing that would not be sent."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # as a socket does
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text and not parts.query and not parts.fragment
    is_path = re.fullmatch(r"(/[\w.~@-]+)*/*", parts.path, re.ASCII) is not None
    return is_plain and is_path and parts.scheme in ("http", "https") and bool(host.strip(".")) and port != 0


def has_name_or_password(address: str) -> bool:
    """Whether an address has something before its host that would stand in a run's files.

    >>> has_name_or_password("http://me:word@host:8000"), has_name_or_password("http://host:8000")
    (True, False)
    """
    return "@" in urlsplit(address).netloc


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
