from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from drkl.training.heap import freed_memory_kept

MIB = 2**20
CPU = torch.device("cpu")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def resident() -> int:
    """The bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def use_and_free() -> None:
    # Below what glibc takes from the system by itself, and above what it would hand back.
    tensors = [torch.ones(16 * MIB, dtype=torch.uint8) for _ in range(8)]
    del tensors


@glibc
def test_freed_memory_stays_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    before = resident()
    with freed_memory_kept(CPU):
        use_and_free()
        assert resident() - before > 100 * MIB
    assert resident() - before < 20 * MIB


@pytest.mark.parametrize(
    ("device", "variables"),
    [
        (torch.device("cuda"), {}),
        (CPU, {"MALLOC_TRIM_THRESHOLD_": "1000000"}),
        (CPU, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}),
    ],
    ids=["a GPU", "a variable", "tunables"],
)
def test_what_others_decide_is_left_alone(
    device: torch.device, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("drkl.training.heap.ctypes", None)
    with freed_memory_kept(device):
        pass
