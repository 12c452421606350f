"""Arguments of ``from_pretrained`` that need a package: known before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from drkl.errors import DrklError, did_you_mean

_ATTENTIONS = {
    "flash_attention_2": ("flash_attn", "flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4"),
}
_METHODS = {
    "aqlm": ("aqlm", "'aqlm[gpu,cpu]'"), "auto-round": ("auto_round", "auto-round"),
    "awq": ("gptqmodel", "gptqmodel"), "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"), "eetq": ("kernels", "kernels"),
    "fp_quant": ("fp_quant", "fp_quant"), "gptq": ("gptqmodel", "optimum gptqmodel"),
    "hqq": ("hqq", "hqq"), "higgs": ("flute", "flute-kernel fast_hadamard_transform"),
    "quanto": ("optimum.quanto", "optimum-quanto"), "quark": ("quark", "amd-quark"), "sinq": ("sinq", "sinq"),
    "spqr": ("spqr_quant", "'spqr_quant[gpu]'"), "torchao": ("torchao", "torchao"), "vptq": ("vptq", "vptq"),
}  # fmt: skip
"""By the method of a quantization: the module that it needs, and what pip installs."""


def is_there(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package around it that is not there, or is half there
        return False


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise DrklError for arguments of ``from_pretrained`` that need a package which is not there, or name nothing.

    Args:
        options: the arguments.
        where: what they are called.
    """
    for name in ("load_in_4bit", "load_in_8bit"):
        if options.get(name):
            raise DrklError(
                f"{where}: {name} is a field of quantization_config: {{quantization_config: {{{name}: true}}}}."
            )
    if (attention := options.get("attn_implementation")) is not None:
        _check_attention(attention, where)
    if (quantization := options.get("quantization_config")) is not None:
        _check_quantization(quantization, where)


def _check_attention(name: Any, where: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = name.values() if isinstance(name, dict) else [name]  # of a model of several parts, one for each
    known = sorted({"eager", "sdpa", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    for one in map(str, names):
        if "/" in one:
            raise DrklError(
                f"{where}: attn_implementation is {one!r}, code on the hub, which drkl never runs. Name one of "
                f"{', '.join(known)}."
            )
        if one not in known:
            raise DrklError(
                f"{where}: attn_implementation is {one!r}; expected one of {', '.join(known)}."
                f"{did_you_mean(one, known)}"
            )
        module, package = _ATTENTIONS.get(one, ("", ""))
        if module and not (is_there(module) or is_there("kernels")):
            _refuse(f"{where}: attn_implementation is {one!r}", module, package)


def _check_quantization(config: Any, where: str) -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    values = config if isinstance(config, Mapping) else vars(config)
    by_bits = any(values.get(name) or values.get(f"_{name}") for name in ("load_in_4bit", "load_in_8bit"))
    method = values.get("quant_method") or ("bitsandbytes" if by_bits else None)
    method = str(getattr(method, "value", method))
    known = sorted(kind.value for kind in QuantizationMethod)
    if method not in known:
        raise DrklError(
            f"{where}: quantization_config has the quant_method {method!r}; expected one of {', '.join(known)}."
            f"{did_you_mean(method, known)}"
        )
    module, package = _METHODS.get(method, ("", ""))
    if module and not is_there(module):
        _refuse(f"{where}: quantization_config is of the kind {method!r}", module, package)


def _refuse(what: str, module: str, package: str) -> None:
    raise DrklError(
        f"{what}, which needs {module}, and that is not installed. Install it with `pip install {package}`, or leave "
        "the setting out."
    )
