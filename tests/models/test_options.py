"""Arguments of from_pretrained that need a package say which one, before anything is loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest

from drkl.errors import DrklError
from drkl.models import load_model, options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True}, "x: load_in_4bit is a field of quantization_config"),
        ({"attn_implementation": "flash_attention_2"}, "Install it with `pip install flash-attn --no-build-isolation`"),
        ({"attn_implementation": {"text_config": "flash_attention_3"}}, "which needs flash_attn_interface"),
        ({"attn_implementation": "some/kernel"}, "code on the hub, which drkl never runs"),
        ({"attn_implementation": "spda"}, "Did you mean 'sdpa'?"),
        ({"quantization_config": {"load_in_8bit": True}}, "Install it with `pip install bitsandbytes`"),
        ({"quantization_config": {"quant_method": "hqq"}}, "is of the kind 'hqq', which needs hqq"),
        ({"quantization_config": {"bits": 4}}, "has the quant_method 'None'; expected one of "),
    ],
)
def test_what_is_not_there(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "is_there", lambda module: False)
    with pytest.raises(DrklError, match=re.escape(message)):
        options.check_options(given, "x")


def test_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "is_there", lambda module: True)
    for given in ({"attn_implementation": "flash_attention_2"}, {"quantization_config": {"quant_method": "gptq"}}):
        options.check_options(given, "x")
    options.check_options({"attn_implementation": "eager", "revision": "main"}, "x")


def test_a_package_that_is_half_there() -> None:
    assert not options.is_there("nothing_there.core")
    assert options.is_there("torch.nn")


def test_a_loader_says_so_too(tmp_path: Any) -> None:
    with pytest.raises(DrklError, match="attn_implementation is 'banana'; expected one of eager"):
        load_model(tmp_path, attn_implementation="banana")
