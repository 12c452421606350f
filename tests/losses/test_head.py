from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drkl import DrklError, LMHead
from drkl.losses.head import as_head


def test_logits_are_capped_after_the_scale_and_scaled_after_the_bias() -> None:
    generator = np.random.default_rng(0)
    weight, bias, hidden = (generator.normal(size=s) for s in ((7, 4), (7,), (2, 3, 4)))
    product = hidden @ weight.T
    tensor = torch.from_numpy
    plain = LMHead(tensor(weight))
    np.testing.assert_allclose(plain.logits(tensor(hidden)), product, rtol=1e-13)
    assert plain.vocab_size == 7
    full = LMHead(tensor(weight), tensor(bias), scale=2.0, softcap=0.8)
    wanted = 0.8 * np.tanh(2.0 * (product + bias) / 0.8)
    np.testing.assert_allclose(full.logits(tensor(hidden)), wanted, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_come_in_fp32(dtype: torch.dtype) -> None:
    head = LMHead(torch.ones(5, 4, dtype=dtype))
    assert head.logits(torch.ones(2, 4)).dtype == torch.float32
    assert LMHead(torch.ones(5, 4).double()).logits(torch.ones(2, 4)).dtype == torch.float64


def test_a_weight_is_a_head_and_a_head_is_itself() -> None:
    weight = torch.ones(5, 4)
    head = as_head(weight)
    assert head.weight is weight and (head.bias, head.scale, head.softcap) == (None, 1.0, None)
    assert as_head(head) is head


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": torch.ones(5)}, "A head's weight is [vocab, hidden]; got shape [5]."),
        (
            {"weight": torch.ones(5, 4), "bias": torch.ones(4)},
            "A head's bias is [vocab] = [5]; got shape [4].",
        ),
        (
            {"weight": torch.ones(5, 4), "softcap": 0.0},
            "A head's softcap is None or a number above 0; got 0.0.",
        ),
        (
            {"weight": torch.ones(5, 4), "softcap": -30.0},
            "A head's softcap is None or a number above 0; got -30.0.",
        ),
    ],
    ids=["weight", "bias", "zero softcap", "negative softcap"],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as caught:
        LMHead(**fields)
    assert str(caught.value) == message
