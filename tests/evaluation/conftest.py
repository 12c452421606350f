from __future__ import annotations

from collections.abc import Iterator

import pytest

from drkl.evaluation import bootstrap
from tests.evaluation import tiny

FEW = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """`FEW` in place of a thousand, for tests of something else than their spread."""
    monkeypatch.setattr(bootstrap.bootstrap, "__defaults__", (FEW,))
