from __future__ import annotations

import pytest
import torch

from drkl.errors import DrklError, Halted
from drkl.models.decoding import way_of
from drkl.models.memory import is_out_of_memory, memory_told
from drkl.models.packing import packing_fault
from tests.models import tiny

CPU = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def led_to(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError(CPU), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (led_to(TypeError("x"), MemoryError()), True),
        (led_to(DrklError("told already"), MemoryError()), False),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_is_told() -> None:
    said = r"^The memory ran out as x is read \(.*9 bytes\)\. Read less\.$"
    with pytest.raises(Halted, match=said), memory_told("as x is read", lambda: "Read less.", Halted):
        raise RuntimeError(CPU)
    with pytest.raises(ZeroDivisionError), memory_told("as x is read", "Read less."):
        1 / 0  # noqa: B018


def test_a_trial_of_a_model_that_runs_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(1, layers=1)

    def fail(*args: object, **words: object) -> None:
        raise MemoryError

    for path, trial in (
        ("drkl.models.packing._tried", lambda: packing_fault(model, 8)),
        ("drkl.models.decoding._is_right", lambda: way_of(model, 2, 8)),
        ("drkl.models.check._check_forward", lambda: way_of(tiny.llama(2, layers=1), 2, 8)),
    ):
        monkeypatch.setattr(path, fail)
        with pytest.raises(DrklError, match="ran out as a LlamaForCausalLM is tried on a few tokens"):
            trial()
