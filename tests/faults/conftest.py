"""The table of faults: each test is a row of docs/faults.md, by its mark ``fault``, and counts what it injects."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disks import Disk, compiler
from tests.faults.forked import Runner


class Injected:
    """Counts the faults that a test injects, and those after which something was lost."""

    def __init__(self) -> None:
        self.count = 0
        self.losses: list[str] = []

    @contextmanager
    def __call__(self, what: object) -> Iterator[None]:
        """Inside, a fault is injected and what follows is looked at; a failed look is a loss, and the test goes on."""
        self.count += 1
        try:
            yield
        except Exception as error:
            self.losses.append(f"{what}: {error}" if str(error) else f"{what}: {type(error).__name__}")


@pytest.fixture
def injected() -> Injected:
    """``with injected("write 17"): ...`` injects one fault and looks at what follows."""
    return Injected()


@pytest.fixture(scope="session")
def any_disk(tmp_path_factory: pytest.TempPathFactory) -> Disk | None:
    """A disk of the warm process that can be told to fail; None where there is no C compiler."""
    return Disk(tmp_path_factory.mktemp("disk")) if compiler() else None


@pytest.fixture
def disk(any_disk: Disk | None) -> Iterator[Disk]:
    """A disk that fails in commands of the `runner` when it is told to."""
    if any_disk is None:
        pytest.skip("there is no C compiler, which makes the library that fails writes")
    yield any_disk
    any_disk.mend()


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory, any_disk: Disk | None) -> Iterator[Runner]:
    """A warm process that forks a child for each command."""
    runner = Runner(tmp_path_factory.mktemp("commands"), any_disk.variables if any_disk else None)
    yield runner
    runner.close()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Write a row of the table, and fail where something was lost."""
    injected = pyfuncitem.funcargs.get("injected")
    if injected is None:
        return (yield)
    try:
        done = yield
    except Exception as error:
        injected.count += 1
        injected.losses.append(f"outside of an injection: {error}")
        raise
    finally:
        _write(pyfuncitem, injected)
    if injected.losses:
        listed = "\n".join(loss[:1500] for loss in injected.losses[:10])
        pytest.fail(f"{len(injected.losses)} of {injected.count} faults lost something:\n{listed}", pytrace=False)
    assert injected.count, "the test injected nothing"
    return done


def _write(item: pytest.Function, injected: Injected) -> None:
    if folder := os.environ.get("DRKL_FAULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        row = {"test": item.nodeid.partition("[")[0], "injections": injected.count, "losses": injected.losses}
        name = hashlib.sha256(item.nodeid.encode()).hexdigest()[:16]
        (Path(folder) / f"{name}.json").write_text(json.dumps(row))
