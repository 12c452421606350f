"""Whether the weights in a file are those of the model: transformers' load report, read and refused by name."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.sharded import is_sharded, local
from drkl.parsing import parse_json
from drkl.processes import gather

_WRAPPERS = {
    "_orig_mod.": "torch.compile was around it",
    "_fsdp_wrapped_module.": "FSDP was around it",
    "_checkpoint_wrapped_module.": "activation checkpointing was around it",
    "base_model.model.": "peft was around it",
    "module.": "DataParallel was around it",
}
"""What a wrapper adds to the names of a model's weights, and which one it was."""

_FOREIGN = (
    (
        ("lora_", "base_layer.", "hada_", "ia3_l", "modules_to_save.", "original_module."),
        "These are layers of peft that were not merged: call merge_and_unload() on the peft model before it is saved.",
    ),
    (
        ("qweight", "qzeros", "scale_inv", "weight_scale", "weight_packed", ".scales", ".SCB", "absmax", "quant_state"),
        "These belong to quantised weights, and config.json has no quantization_config: put it back, or save the model "
        "dequantised.",
    ),
    (
        (".score.", ".classifier.", ".classification_head.", ".qa_outputs.", ".v_head.summary."),
        "This is another task's head: name a language model here, or train a classifier with task: classification.",
    ),
)
"""Parts of names that say where weights that a model has no place for come from."""

_MADE_ANEW = re.compile(
    r"(^|\.)((attn|attention|self_attention|crossattention)\.(bias|masked_bias|causal_mask)|inv_freq|position_ids"
    r"|(en|de)coder\.version|embed_positions\.(weights|_float_tensor))$"
)
"""Causal masks, positions and versions that files of older releases hold, and that models now make themselves."""

_REPORT = ("LOAD REPORT", "This checkpoint seem corrupted")


@contextmanager
def own_report() -> Iterator[None]:
    """Keep transformers from printing its load report, which `check_weights` reads."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _REPORT)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_weights(model: PreTrainedModel, report: Mapping[str, Any], name: str, *, new_head: bool = False) -> list[str]:
    """Raise DrklError unless every weight of a loaded model came from its file, and is a finite number.

    What the family ties or makes anew (a tied head, buffers, masks) is left out of the report by transformers.

    Args:
        model: as loaded.
        report: ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys`` of ``output_loading_info``.
        name: what an error calls the model; a folder or a Hugging Face id.
        new_head: whether the head is meant to be new: what lies outside of the base model may be missing, and the
            head of another task is dropped.

    Returns:
        The names of the weights that are new.
    """
    missing = {key for key in report["missing_keys"] if not _is_sinusoidal(model, key)}
    unexpected = {key for key in report["unexpected_keys"] if not _is_unused(model, key)}
    new: set[str] = set()
    if new_head:
        new = {key for key in missing if not _in_body(model, key)}
        missing -= new
        unexpected = {key for key in unexpected if _in_body(model, key) or missing}
    shapes = sorted(report["mismatched_keys"])
    if missing or unexpected or shapes:
        raise DrklError(_difference(model, missing, unexpected, shapes, name))
    check_numbers(model, repr(name))
    return sorted(new)


def _is_unused(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight of a file is one that transformers' model of this family does without."""
    config = model.config.get_text_config()
    layer = re.search(r"(^|\.)layers\.(\d+)\.", key)
    beyond = int(layer[2]) - config.num_hidden_layers if layer else -1
    return (
        _MADE_ANEW.search(key) is not None
        # An encoder's pooler stays in the files of models that never use it.
        or "pooler" in key.split(".")[:2]
        # Layers that guess the tokens after the next one: DeepSeek-V3 and GLM-4.5 have them after their own.
        or 0 <= beyond < (getattr(config, "num_nextn_predict_layers", None) or 0)
    )


def _is_sinusoidal(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight is the table of sines that Pegasus and FSMT make themselves."""
    return "Sinusoid" in type(model.get_submodule(key.rpartition(".")[0])).__name__


def _in_body(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the base model and not to a head on it, of this task or of another."""
    first, _, rest = key.partition(".")
    if first == model.base_model_prefix:
        return not rest.startswith("pooler.")  # a masked language model has none
    return first != "pooler" and hasattr(model.base_model, first)


def _difference(
    model: PreTrainedModel, missing: Collection[str], unexpected: Collection[str], shapes: list[Any], name: str
) -> str:
    parts = []
    if missing:
        of = len(model.state_dict())
        parts.append(f"{len(missing)} of {of} weights are not in the file ({listed(missing)})")
    if unexpected:
        parts.append(f"the file has {len(unexpected)} that the model has no place for ({listed(unexpected)})")
    if shapes:
        key, found, expected = shapes[0]
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        parts.append(f"{key} is {list(found)} in the file and {list(expected)} by config.json{more}")
    cure = rename_cure(missing, unexpected, name) or next(
        (hint for marks, hint in _FOREIGN if any(mark in f".{key}" for key in unexpected for mark in marks)),
        "Save the model again whole, with a config.json that describes it.",
    )
    return (
        f"The weights of {name!r} are not those of a {type(model).__name__} by its config.json: {'; '.join(parts)}. "
        f"Nothing is put in their place at random. {cure}"
    )


def not_loaded(model: nn.Module, missing: Collection[str]) -> list[str]:
    """Names that a file lacks, of weights that it has under no other name either."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return [name for name in missing if id(parameters.get(name)) not in loaded]


def listed(keys: Collection[str], count: int = 3) -> str:
    """The first few of some names."""
    names = sorted(keys)
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")


def rename_cure(missing: Collection[str], unexpected: Collection[str], name: str) -> str | None:
    """What renames a file's weights where one change of all names makes them match; None where nothing does."""
    if not missing or not unexpected:
        return None
    missing, unexpected = set(missing), set(unexpected)
    for part, cause in _WRAPPERS.items():
        if all(part in key for key in unexpected) and any(key.replace(part, "") in missing for key in unexpected):
            what = f"Every name has {part!r} in it: the model was saved while {cause}"
            return _rename(what, f'k.replace({_quoted(part)}, "")', name)
    if (extra := _prefix(unexpected, missing)) is not None:
        what = f"Every name begins with {extra!r}, which the model does not know"
        return _rename(what, f"k.removeprefix({_quoted(extra)})", name)
    if (lost := _prefix(missing, unexpected)) is not None:
        return _rename(f"Every name lacks {lost!r} at its beginning", f"{_quoted(lost)} + k", name)
    return None


def _quoted(text: str) -> str:
    """A Python string in double quotes, for a command in single ones."""
    return json.dumps(text, ensure_ascii=False)


def _prefix(longer: Collection[str], shorter: Collection[str]) -> str | None:
    """The one prefix without which all of the longer names, or all that have a shorter one, are shorter ones."""
    found = set()
    for key in longer:
        rest = key
        while "." in rest:
            rest = rest.partition(".")[2]
            if rest in shorter:
                found.add(key[: len(key) - len(rest)])
                break
    if len(found) != 1 or not all(key.startswith(tuple(found)) for key in longer):
        return None
    return found.pop()


def _rename(what: str, new_name: str, name: str) -> str:
    folder = name if Path(name).is_dir() else "FOLDER"
    line = (
        "import pathlib, safetensors.torch as s; "
        f'[s.save_file({{{new_name}: v for k, v in s.load(f.read_bytes()).items()}}, f, {{"format": "pt"}}) '
        f'for f in pathlib.Path({_quoted(folder)}).glob("*.safetensors")]'
    )
    first = "" if folder == name else f" (after hf download {name} --local-dir FOLDER)"
    return f"{what}. Rename them{first}: python -c {shlex.quote(line)}"


class BrokenWeights(DrklError):
    """Weights of a model are not finite numbers."""


def check_numbers(model: nn.Module, name: str) -> None:
    """Raise BrokenWeights where a weight of a model is not finite, as `broken_weights` tells.

    Of a model whose weights are spread over several processes each of them has to ask.

    Args:
        model: its weights are read once, and nothing of their size is made.
        name: the model as the error calls it.
    """
    bad = broken_weights(model)
    if is_sharded(model):
        bad = list(dict.fromkeys(gather(bad)))
    if bad:
        dtype = str(getattr(model, "dtype", "torch.float32")).removeprefix("torch.")
        raise BrokenWeights(
            f"{name} has weights that are not finite numbers in {dtype}: {len(bad)} tensors ({listed(bad)}). Every "
            "loss would be NaN. Take a model from before it broke; fp16 overflows where bf16 does not."
        )


@torch.no_grad()
def broken_weights(model: nn.Module) -> list[str]:
    """The names of weights that are not finite, in the order of the model; no process waits for another.

    Minus infinity in a bias is none of them: in that of a head it excludes a token.
    """

    def is_right(name: str, weight: torch.Tensor) -> bool:
        return is_finite(weight) or (name.endswith("bias") and bool(torch.isfinite(weight.max())))

    return [name for name, weight in model.named_parameters() if not is_right(name, local(weight))]


@torch.no_grad()
def is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight has finite numbers only; True where its dtype has no others."""
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.is_meta or not weight.numel():
        return True
    low, high = torch.aminmax(weight)  # NaN goes through; no tensor of the weight's size is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_stored_dtypes(model: PreTrainedModel, folder: str, subfolder: str = "") -> None:
    """Raise DrklError for other numbers than floats in a weight's place where the config names no quantisation.

    transformers would turn the codes of quantised weights into as many floats.

    Args:
        model: as loaded.
        folder: what it was loaded from; only a local folder is looked at.
        subfolder: of the folder.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    prefix = f"{model.base_model_prefix}."
    floats = {key for key, parameter in model.named_parameters() if parameter.is_floating_point()}
    for path in weight_files(Path(folder, subfolder)):
        codes = {key: dtype for key, dtype in _stored_dtypes(path).items() if not dtype.startswith(("F", "BF"))}
        # A layer's experts lie one by one in the file and have one name together in the model.
        bad = [k for k in codes if k.endswith(".weight") or floats & {k, prefix + k, k.removeprefix(prefix)}]
        if bad:
            what = "integers" if all(codes[key][0] in "IU" for key in bad) else "other numbers than floats"
            raise DrklError(
                f"{folder!r} holds {what} where a {type(model).__name__} has weights: {len(bad)} tensors "
                f"({listed(bad)}). They are the codes of a quantised model, and its config.json has no "
                "quantization_config. Put it back, or save the model dequantised."
            )


def _stored_dtypes(path: Path) -> dict[str, str]:
    """The dtype of every tensor, from the header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {key: entry["dtype"] for key, entry in header.items() if key != "__metadata__"}


def conversion_errors(error: BaseException) -> list[str]:
    """The weights that transformers could not put together (a layer's experts, say) when it raised this error."""
    trace = error.__traceback__
    while trace is not None:
        if errors := getattr(trace.tb_frame.f_locals.get("loading_info"), "conversion_errors", None):
            return sorted(errors)
        trace = trace.tb_next
    return []


def check_index(folder: str | os.PathLike[str]) -> None:
    """Raise DrklError where a folder's index of weights names files outside of the folder.

    Args:
        folder: of a model; one without an index is let through.

    Raises:
        DrklError: it does.
    """
    for path in weight_files(Path(folder)):
        name = os.path.relpath(path, folder)
        if name.split(os.sep)[0] == os.pardir:
            raise DrklError(
                f"model.safetensors.index.json in {os.fspath(folder)!r} names a file outside of that folder: {name!r}. "
                "Name files beside it."
            )


def file_faults(folder: str | os.PathLike[str]) -> str | None:
    """What is wrong with the weight files of a folder that cannot be loaded, and the way out; None where unknown."""
    files = weight_files(Path(folder))
    if lost := [path.name for path in files if not path.is_file()]:
        return f"its index names {len(lost)} file(s) that are not there ({listed(lost)}). Copy or download them, too."
    for path in files:
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return f"{path.name} is a pointer of git-lfs and not the file itself. Fetch it: git lfs pull."
    return None


_POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the whole one, else those that the index names, there or not."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    try:
        index = parse_json((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
