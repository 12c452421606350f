from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.evaluation import tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield
