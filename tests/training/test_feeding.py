from __future__ import annotations

import pytest
import torch

from drkl.training import feeding
from drkl.training.feeding import Fed, Feeding


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for line, length in enumerate(lengths):
        mask[line, :length] = 1
    return {"input_ids": mask, "attention_mask": mask}


def test_padding_and_waiting_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Feeding(), Feeding()
    mine.add(batch(3, 5), ["a", "b"])
    mine.add(batch(4), ["c"])
    other.add(batch(2), ["d"])
    other.add(batch(1), [])  # no row: one position of padding
    parts = [(one._fed, one._tokens) for one in (mine, other)]
    monkeypatch.setattr(feeding, "gather", lambda part: parts)
    found = mine.of_all()
    assert found == Fed(10 + 4 + 2 + 1, 8 + 4 + 2, 2 * (10 + 4))
    assert found.shares() == {"padding_share": 1 - 14 / 17, "idle_share": 1 - 17 / 28}


def test_packed_rows_have_no_padding() -> None:
    feeding = Feeding()
    ids = torch.ones(1, 8, dtype=torch.int64)
    feeding.add({"input_ids": ids, "position_ids": ids}, ["a", "b"])
    assert feeding.of_all() == Fed(8, 8, 8)
    feeding.add({"input_ids": ids[:, :1], "position_ids": ids[:, :1]}, [])  # no row: one position of padding
    assert feeding.of_all() == Fed(9, 8, 9)


def test_both_sides_of_an_encoder_decoder_count_and_one_process_never_waits() -> None:
    feeding = Feeding()
    assert feeding.of_all() == Fed() and Fed().shares() == {}
    sides = batch(3) | {"decoder_input_ids": torch.ones(1, 2), "decoder_attention_mask": torch.tensor([[1, 0]])}
    feeding.add(sides, ["a"])
    assert feeding.of_all() == Fed(5, 4, 5)
    feeding.begin(Fed(10, 6, 20))
    feeding.add(batch(2), ["b"])
    assert feeding.of_all() == Fed(12, 8, 22)
