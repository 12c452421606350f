"""One process, and what is done before any speaks with another; several are in the slow tests of the rooms."""

from __future__ import annotations

import pytest

from drkl.errors import DrklError
from drkl.processes import Place, first_alone, gather, joined, launched, lost_another, shared_work


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
