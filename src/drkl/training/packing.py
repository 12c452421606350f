"""Whether a run's batches have no padding: the setting, the device and the two models decide."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.forward import uses_flash
from drkl.models.packing import packing_fault
from drkl.models.precision import DTYPES
from drkl.models.readout import SHORT_TOKENS_PER_BATCH
from drkl.models.varlen import has_varlen, with_varlen
from drkl.processes import gather
from drkl.teachers.live import LiveTeacher
from drkl.training.arguments import DistillationConfig
from drkl.training.loading import place
from drkl.training.pair import Pair

_log = logging.getLogger("drkl")


def settle_packing(pair: Pair, args: DistillationConfig) -> None:
    """Decide whether the batches of a run are packed, and log why not where they might be, or what they cost.

    Every process has to ask, and finds the same.

    Raises:
        DrklError: ``padding_free`` is true, and the rows of one of the models cannot be packed.
    """
    wanted = args.padding_free
    if wanted is False or (wanted == "auto" and args.device.type == "cpu"):
        return
    models = {"student": pair.student}
    if isinstance(pair.teacher, LiveTeacher):
        models["teacher"] = pair.teacher.model
    varlen, most = _varlen(models, args), _most(pair, args)
    if _packs(models, varlen, most, args):
        pair.packed, pair.varlen = True, varlen
    elif wanted is True and varlen:
        pair.packed = _packs(models, [], most, args)


def _packs(
    models: Mapping[str, PreTrainedModel], varlen: Sequence[PreTrainedModel], most: int, args: DistillationConfig
) -> bool:
    """Whether all models read packed rows, those in ``varlen`` by torch's FlashAttention, and say why not."""
    with with_varlen(varlen):
        masked = [f"{role}'s ({_attention(model)})" for role, model in models.items() if not uses_flash(model)]
        where = f"attention of the {' and the '.join(masked)}"
        if args.padding_free == "auto" and masked:
            _log.info("Batches are padded: %s would keep rows apart by a mask.", where)
            return False
        tried = [(role, packing_fault(model, most, _dtype(role, model, args))) for role, model in models.items()]
    found = [(role, fault) for role, fault in gather(tried) if fault is not None]
    if found:
        role, fault = found[0]
        what = f"rows cannot be laid one after the other for the {role} ({type(models[role]).__name__}): {fault}."
        if args.padding_free is True and not varlen:
            raise DrklError(f"padding_free is true, and {what} Leave it out: batches are then padded.")
        lost = "Torch's FlashAttention is not used" if args.padding_free is True else "Batches are padded"
        _log.info("%s: %s", lost, what)
    if masked and not found and args.process_index == 0:
        _log.warning(
            "Warning: padding_free is true, and %s keeps rows apart by a mask: that of N tokens costs N x N, where "
            "padded rows cost the square of the longest, once for each row. On a GPU a FlashAttention needs none.",
            where,
        )
    return not found


def _varlen(models: Mapping[str, PreTrainedModel], args: DistillationConfig) -> list[PreTrainedModel]:
    """The models that take torch's FlashAttention: those with its SDPA, where all could do without a mask."""
    if args.device.type != "cuda":
        return []
    place(models["student"], args)
    able = [model for role, model in models.items() if has_varlen(model, _dtype(role, model, args))]
    return able if all(model in able or uses_flash(model) for model in models.values()) else []


def _dtype(role: str, model: PreTrainedModel, args: DistillationConfig) -> torch.dtype:
    """What a model computes in; on a CPU without the autocast of training, whose rounding would hide more."""
    if role == "teacher" or args.precision == "fp32" or args.device.type == "cpu":
        return model.dtype
    return DTYPES[args.precision]


def _attention(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _most(pair: Pair, args: DistillationConfig) -> int:
    """The most tokens of a packed batch."""
    longest = pair.lengths.max_tokens
    rows = max(args.per_device_train_batch_size or 0, args.per_device_eval_batch_size or 0, 1)
    return max(rows * longest, args.tokens_per_step or 0, SHORT_TOKENS_PER_BATCH)
