"""Whether a run's batches have no padding: the setting, the device and the two models decide."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.forward import uses_flash
from drkl.models.packing import packing_fault
from drkl.models.readout import SHORT_TOKENS_PER_BATCH
from drkl.processes import gather
from drkl.teachers.live import LiveTeacher
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import Pair

_log = logging.getLogger("drkl")


def packs(pair: Pair, args: DistillationConfig) -> bool:
    """Decide whether the batches of a run are packed, and log why not where they might be, or what they cost.

    Every process has to ask, and finds the same.

    Raises:
        DrklError: ``padding_free`` is true, and the rows of one of the models cannot be packed.
    """
    wanted, on_gpu = args.padding_free, args.device.type != "cpu"
    if wanted is False or (wanted == "auto" and not on_gpu):
        return False
    models = {"student": pair.student}
    if isinstance(pair.teacher, LiveTeacher):
        models["teacher"] = pair.teacher.model
    masked = [f"{role}'s ({_attention(model)})" for role, model in models.items() if not uses_flash(model)]
    if wanted == "auto" and masked:
        return False
    faults = [(role, fault) for role, model in models.items() if (fault := packing_fault(model, _most(pair, args)))]
    found = [fault for of_process in gather([faults]) for fault in of_process]
    if not found:
        if masked:
            _warn(
                args,
                f"padding_free is true, and attention of the {' and the '.join(masked)} keeps rows apart by a mask: "
                "that of N tokens costs N x N, where padded rows cost the square of the longest, once for each row. "
                "It pays on a GPU with attn_implementation=flash_attention_2 in model_init_kwargs.",
            )
        return True
    role, fault = found[0]
    name = type(models[role]).__name__
    if wanted is True:
        raise DrklError(
            f"padding_free is true, and rows cannot be laid one after the other for the {role} ({name}): {fault}. "
            "Leave it out: batches are then padded."
        )
    _warn(args, f"batches are padded: rows cannot be laid one after the other for the {role} ({name}): {fault}.")
    return False


def _warn(args: DistillationConfig, text: str) -> None:
    if args.process_index == 0:
        _log.warning("Warning: %s", text)


def _attention(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _most(pair: Pair, args: DistillationConfig) -> int:
    """The most tokens of a packed batch."""
    longest, rows = pair.lengths.max_tokens, args.per_device_train_batch_size
    of_step = rows * longest if rows is not None else args.tokens_per_step or 0
    of_heldout = (args.per_device_eval_batch_size or 0) * longest
    return max(of_step, of_heldout, longest, SHORT_TOKENS_PER_BATCH)
