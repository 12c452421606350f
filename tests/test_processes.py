"""One process, and what is done before any speaks with another; several are in the slow tests of the rooms."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from drkl import processes
from drkl.errors import DrklError
from drkl.processes import (
    Place,
    Share,
    first_alone,
    gather,
    join_launched,
    joined,
    launched,
    lost_another,
    raised_in_all,
    shared_work,
)
from tests.groups import in_group


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("pieces", [0, 1, 4, 7])
def test_every_piece_is_one_process_s(pieces: int, count: int) -> None:
    shares = [Place(number, count).share_of(pieces) for number in range(count)]
    assert sorted(piece for share in shares for piece in share) == list(range(pieces))
    even = [Place(number, count).share_of(pieces, even=True) for number in range(count)]
    assert {len(share) for share in even} == {-(-pieces // count)}
    assert {piece for share in even for piece in share} == set(range(pieces))


def test_one_process_does_the_plain_thing() -> None:
    assert joined() == Place(0, 1) and joined().is_first
    assert gather(iter("ab")) == ["a", "b"]
    assert first_alone(lambda: 3) == 3
    assert shared_work(3, lambda piece: piece * 2, even=True) == [0, 2, 4]


def test_a_launcher_says_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == Place(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == Place(2, 4) and not launched().is_first
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(
        DrklError, match=r"RANK or WORLD_SIZE of the environment is no whole number .*'two'.*unset both"
    ):
        launched()


def test_the_end_of_another_process_is_told_from_other_errors() -> None:
    assert lost_another(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16775."))
    assert not lost_another(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not lost_another(ValueError("gloo"))


COUNTS = pytest.mark.parametrize("count", [1, 2, 3, 5])


@COUNTS
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_each_item_is_worked_on_once_and_every_process_has_all(items: int, count: int) -> None:
    worked: list[int] = []

    def square(item: int) -> int:
        worked.append(item)
        return item * item

    found = in_group(count, lambda share: list(share.map(square, range(items))))
    assert found == [[item * item for item in range(items)]] * count
    assert sorted(worked) == list(range(items))


@COUNTS
def test_parts_come_together_in_the_order_of_the_processes(count: int) -> None:
    def work(share: Share) -> Any:
        own = share.of("abcdefg")
        return own, share.together(lambda: own), share.first(lambda: share.place.number)

    found = in_group(count, work)
    assert sorted(letter for own, _, _ in found for letter in own) == list("abcdefg")
    assert all(together == [letter for own, _, _ in found for letter in own] for _, together, _ in found)
    assert [first for _, _, first in found] == [0] * count


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("place", ["before", "in a round", "between rounds", "after"])
def test_an_error_in_one_process_ends_all(place: str, failing: int) -> None:
    """Wherever it happens: the next part that the others wait for is the error."""

    def fail(share: Share, here: str) -> None:
        if (share.place.number, here) == (failing, place):
            raise DrklError(f"{place} {failing}")

    def work(share: Share) -> None:
        with share.joined():
            fail(share, "before")
            with share.joined():
                for item in share.map(lambda item: fail(share, "in a round") or item, range(7)):
                    fail(share, "between rounds") if item == 4 else None
            fail(share, "after")

    found = in_group(3, work)
    assert [(type(error), str(error)) for error in found] == [(DrklError, f"{place} {failing}")] * 3
    assert all(map(raised_in_all, found))


def test_an_error_that_is_nobody_s_mistake_names_its_process() -> None:
    def work(share: Share) -> None:
        with share.joined():
            if share.place.number == 1:
                raise MemoryError("no room")
            share.together(list)

    first, own, third = in_group(3, work)
    assert isinstance(own, MemoryError) and str(first) == str(third)
    assert str(first).startswith("Process 1 of 3, counted from 0, failed:\nTraceback (most recent call last)")
    assert str(first).endswith("\nMemoryError: no room\n")


def test_each_process_has_its_own_error_where_all_fail() -> None:
    def work(share: Share) -> None:
        with share.joined():
            raise DrklError(f"of {share.place.number}")

    assert list(map(str, in_group(2, work))) == ["of 0", "of 1"]


def test_processes_of_different_work_are_refused() -> None:
    def work(share: Share) -> None:
        with share.joined():
            share.check_same("letters", "a")
            share.check_same("numbers", str(share.place.number))

    for error in in_group(2, work):
        assert str(error).startswith("The processes of the group have different numbers. They divide one piece of work")


def test_a_process_that_is_gone_is_no_traceback_and_is_told_nothing() -> None:
    def gather(own: list[Any]) -> list[Any]:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    share = Share(Place(0, 2), gather)
    with pytest.raises(DrklError, match="Another process of the group has ended") as caught, share.joined():
        list(share.map(lambda item: item, [1, 2]))
    assert lost_another(caught.value)
    with pytest.raises(KeyError), share.joined():
        raise KeyError("own")


def test_a_process_that_comes_alone_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LONG", 0.0)
    said = threading.Event()
    monkeypatch.setattr(logging.getLogger("drkl"), "warning", lambda text: said.set() if "waits for" in text else None)

    def gather(own: list[Any]) -> list[Any]:
        assert said.wait(20)
        return [*own, *own]

    Share(Place(0, 2), gather).check_same("rows", "a")


def test_one_process_is_not_held_up() -> None:
    """Results come as they are made, and errors are what they were."""
    share, made = Share.of_group(), list[int]()
    first = next(share.map(lambda item: made.append(item) or item, [5, 6]))  # type: ignore[func-returns-value]
    assert (first, made, share.is_divided, share.is_first) == (5, [5], False, True)
    error = KeyError("a")
    with pytest.raises(KeyError) as caught, share.joined():
        raise error
    assert caught.value is error and not raised_in_all(error)
    assert join_launched() == share


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_process_may_do_everything(number: int) -> None:
    share = Share(Place(number, 2), first_alone=True)
    assert share.of([3, 1, 2]) == ([] if number else [3, 1, 2])
    assert Share(Place(number, 2)).of([3, 1, 2]) == ([1] if number else [3, 2])


def test_an_error_that_is_raised_from_itself_is_none_of_another_process() -> None:
    error = DrklError("learning_rate is -1.0; expected a number above 0.")
    error.__cause__ = error
    assert not lost_another(error)
