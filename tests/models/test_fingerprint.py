"""A model is known by its weights and its config, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import torch

from drkl.models.fingerprint import describe_model
from drkl.models.load import load_model
from tests.models import tiny


def test_a_copy_elsewhere_is_the_same_model(tmp_path: Path) -> None:
    model = tiny.llama()
    expected = describe_model(model)
    for name in ("a", "b"):
        assert describe_model(load_model(tiny.save(model, tmp_path / name), "fp32")) == describe_model(
            load_model(tmp_path / "a", "fp32")
        )
    assert describe_model(load_model(tmp_path / "a", "fp32"))["weights"] == expected["weights"]
    assert describe_model(model, keep=False) == {}


def test_one_number_a_dtype_and_a_field_of_the_config_count() -> None:
    model = tiny.llama()
    expected = describe_model(model)
    model.config.attention_dropout = 0.5
    assert describe_model(model)["config"] != expected["config"]
    assert describe_model(model)["weights"] == expected["weights"]
    assert describe_model(tiny.llama().to(torch.bfloat16))["weights"] != expected["weights"]
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    assert describe_model(model)["weights"] != expected["weights"]
    model.register_buffer("noted", torch.empty(2, device="meta"))  # what lies on a disk is known by its shape
    assert describe_model(model)["weights"] != expected["weights"]
