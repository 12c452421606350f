"""Code of somebody else's ends soon, or is refused."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from drkl.data import limits
from drkl.data.limits import bounded, no_panic
from drkl.errors import DrklError

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks are tried on Linux alone")


def within(key: str, action: Callable[[], Any]) -> Any:
    return bounded(key, "The action", "Take another.", action)


def endless() -> None:
    while True:
        pass


def test_what_ends_is_given_back_and_errors_are_its_own() -> None:
    assert within("ends", lambda: 5) == 5
    with pytest.raises(KeyError, match="of its own"):
        within("fails", lambda: {}["of its own"])


@linux
@pytest.mark.slow
def test_the_first_action_is_stopped_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    with pytest.raises(DrklError, match=r"The action takes more than 1 seconds\. It is broken, or .* Take another\."):
        within("first", endless)


@linux
def test_memory_is_limited_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMORY", 1 << 28)
    with pytest.raises(DrklError, match="more than 0 GiB of memory"):
        within("memory", lambda: b"a" * (1 << 40))
    with pytest.raises(DrklError, match="more than 0 GiB of memory"):
        within("memory", lambda: 1)  # the same template is refused at once


def test_a_later_action_is_stopped_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert within("later", lambda: 1) == 1
    monkeypatch.setattr(limits, "SECONDS", 0.01)
    with pytest.raises(DrklError, match=r"more than 0\.01 seconds"):
        within("later", endless)
    with pytest.raises(DrklError, match=r"more than 0\.01 seconds"):
        within("later", lambda: 1)


def test_other_threads_run_without_a_timer() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(within("thread", lambda: 7)))
    thread.start()
    thread.join()
    assert found == [7]


def test_a_panic_is_an_error() -> None:
    class PanicException(BaseException):
        pass

    with (
        pytest.raises(DrklError, match="Encoding ended in a fault of the library tokenizers: retry limit"),
        no_panic("Encoding"),
    ):
        raise PanicException("retry limit")
    with pytest.raises(KeyboardInterrupt), no_panic("Encoding"):
        raise KeyboardInterrupt
