"""The distillation loss of two models on a batch, for custom training loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX, LMHead, TopK, distillation_loss, fused_distillation_loss
from drkl.models.at_head import (
    CLASSIFIER,
    DECODER_ONLY,
    ENCODER_DECODER,
    Wrapped,
    call_at_head,
    head_module,
    head_of,
    is_deepspeed,
    is_fsdp1,
    kind_of,
    unwrap,
)
from drkl.models.classes import class_names
from drkl.models.forward import PACKED, decoder_start, in_eval_mode, named_arguments, output_head, row_bounds
from drkl.models.pair import check_same_family
from drkl.objectives import ObjectiveLike, make_objective

NOT_INPUTS = frozenset(
    {"labels", "past_key_values", "use_cache", "return_dict", "logits_to_keep", "num_items_in_batch"}
)
"""Keys of a batch that change what a model returns, not what it reads."""


def pair_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    *,
    objective: ObjectiveLike = "drkl",
    objective_params: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    t2_scaling: bool = False,
    num_tokens: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    merged_ids: Sequence[int] | None = None,
    teacher_hidden: Tensor | TopK | None = None,
    teacher_head: Tensor | LMHead | None = None,
) -> Tensor:
    """The mean distillation loss of a student and its teacher over the tokens of a batch that count.

    It takes the place of ``student(**batch).loss``: the batch is what a transformers collator makes, the student is
    called once, through whatever is wrapped around it, and no ``[tokens, vocab]`` tensor is made. For decoder-only
    models it equals::

        student_logits, teacher_logits = student(**inputs).logits, teacher(**inputs).logits
        drkl.distillation_loss(student_logits[:, :-1], teacher_logits[:, :-1], batch["labels"][:, 1:], ...)

    and for encoder-decoders and sequence classifiers the same without the shift.

    Args:
        student: a decoder-only model, an encoder-decoder or a sequence classifier of transformers, as it is, in peft's
            `PeftModel`, compiled, in `DistributedDataParallel`, or sharded by `torch.distributed.fsdp.fully_shard` or
            its predecessor. Pass the wrapper, never its ``.module``.
        teacher: a model of the same kind. It runs without gradients and in eval mode; each of its parts is put back
            into the mode it was in. None where the objective needs none, or with ``teacher_head``.
        batch: ``input_ids`` and ``labels``, `[batch, tokens]`, unshifted, -100 where a token does not count; for an
            encoder-decoder the labels `[batch, decoder tokens]` are what the decoder writes, and
            ``decoder_input_ids`` are made from them where they are left out; for a classifier they are class numbers
            `[batch]`. ``attention_mask`` and whatever else a model's forward names are passed on; other keys are not.
            With padding on the left, ``position_ids`` count from the first real token, as in ``generate``; give that
            token the label -100, for only padding comes before it.
        objective, temperature, kd_weight, t2_scaling, vocab_size, merged_ids: as in `drkl.distillation_loss`.
        objective_params: the parameters of an objective given by its name, e.g. ``{"gamma": 0.5}``.
        num_tokens: what the sum is divided by, in place of the tokens that count in this batch (on all processes): with
            gradient accumulation those of all micro-batches (`count_tokens`) on all processes.
        teacher_hidden: the states that the teacher's head is given, where they are known already (its last hidden
            states, after the final norm; T5's after their scaling): `[batch, tokens, hidden]`, or `[n, hidden]` at the
            n positions that count, in order; for a classifier its class logits `[batch, classes]`. The teacher is then
            not run, and gives its head only. A `TopK` of those n positions, without a teacher or a head, does as well.
        teacher_head: that head, `[vocab, hidden]` or an `LMHead`, in place of a teacher.

    Returns:
        A scalar in nats per token. With no token that counts it is 0 and has a graph. Under DDP and FSDP2 every process
        returns the sum over its own tokens, times the number of processes, over the tokens of all of them: gradients
        are averaged there, and so become those of one process with all rows. The mean of the returned values over the
        processes is the loss.

    Raises:
        DrklError: two kinds of model, or vocabularies of two sizes; a batch without labels; a wrapper, a head or an
            adapter that cannot be gone through; several processes with a student that nothing wraps.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes)) for _ in range(2))
    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])}
    >>> pair_loss(student, teacher, batch, objective="drkl", objective_params={"gamma": 0.25}).backward()
    """
    chosen = make_objective(objective, **(objective_params or {}))
    ours = unwrap(student, "student")
    kind = kind_of(ours.model, "student")
    labels = _aligned_labels(batch, kind)
    inputs = model_inputs(ours.model, batch, "student")
    keep = labels != IGNORE_INDEX
    known: tuple[Tensor | TopK | None, LMHead | None] = (None, None)
    if kd_weight > 0 and chosen.needs_teacher:
        known = _teacher(teacher, batch, keep, kind, ours.model, teacher_hidden, teacher_head)
    processes, count = _processes(ours, keep, num_tokens)
    settings: dict[str, Any] = {
        "objective": chosen,
        "temperature": temperature,
        "kd_weight": kd_weight,
        "t2_scaling": t2_scaling,
        "vocab_size": vocab_size,
        "merged_ids": merged_ids,
        "num_tokens": count if processes == 1 or count is None else count / processes,
    }

    def at_head(hidden: Tensor, head: LMHead | None) -> Tensor:
        _check_positions(hidden, keep, ours.model, "student")
        where = keep.to(hidden.device)
        states, targets = hidden[where], labels.to(hidden.device)[where]
        states_of_teacher = None if known[0] is None else known[0].to(hidden.device)
        if head is None:
            return distillation_loss(states, states_of_teacher, targets, **settings)
        return fused_distillation_loss(states, head, states_of_teacher, known[1], targets, **settings)

    return call_at_head(student, inputs, at_head, "student")


def count_tokens(batch: Mapping[str, Any], student: nn.Module) -> Tensor:
    """Count the tokens of a batch that have a loss in `pair_loss`, as a scalar int64 tensor.

    A decoder-only model predicts no first token, so the first column of its labels never counts.

    Args:
        batch: as in `pair_loss`.
        student: the model, for its kind alone.
    """
    return (_aligned_labels(batch, kind_of(unwrap(student, "student").model, "student")) != IGNORE_INDEX).sum()


def _aligned_labels(batch: Mapping[str, Any], kind: str) -> Tensor:
    """Labels `[batch, positions]`: what is predicted at each position, -100 where that does not count."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        keys = ", ".join(repr(key) for key, value in batch.items() if value is not None)
        raise DrklError(
            f"The batch has {keys or 'no keys'}; expected 'labels', token ids or class numbers "
            "in a tensor, -100 where one does not count. transformers' DataCollatorForLanguageModeling(mlm=False), "
            "DataCollatorForSeq2Seq and DataCollatorWithPadding make them."
        )
    if labels.is_floating_point():
        raise DrklError(f"The batch's labels are {labels.dtype}; expected whole numbers, token ids or class numbers.")
    if kind == CLASSIFIER:
        if labels.dim() == 2 and labels.shape[1] == 1:
            return labels
        if labels.dim() != 1:
            raise DrklError(
                f"labels have shape {list(labels.shape)}; expected [batch], one class number for each text."
            )
        return labels.unsqueeze(1)
    if labels.dim() != 2:
        raise DrklError(f"labels have shape {list(labels.shape)}; expected [batch, tokens].")
    if kind == ENCODER_DECODER:
        return labels
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape != labels.shape:
        raise DrklError(
            f"input_ids have shape {list(ids.shape)} and labels {list(labels.shape)}; expected the same, unshifted: "
            "labels[b, t] is input_ids[b, t], or -100."
        )
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE_INDEX)], 1)


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Return the inputs of a model: the keys of the batch that its forward accepts."""
    if batch.get("input_ids") is None:
        raise DrklError("The batch has no 'input_ids'; student and teacher read the same token ids.")
    names, takes_more = named_arguments(type(model).forward)
    inputs = {k: v for k, v in batch.items() if v is not None and k in names and k not in NOT_INPUTS}
    if takes_more:
        inputs |= {key: batch[key] for key in PACKED if key in batch} | row_bounds(model, batch)
    if takes_more or "use_cache" in names:
        inputs["use_cache"] = False
    kind = kind_of(model, role)
    if kind == ENCODER_DECODER and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        inputs["decoder_input_ids"] = _decoder_inputs(model, batch["labels"])
    mask = batch.get("attention_mask")
    wanted = kind == DECODER_ONLY and "position_ids" in names and "position_ids" not in inputs
    # A model of text and images counts positions in its own way.
    wanted = wanted and model.config.get_text_config() is model.config
    if wanted and isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, :1] == 0).any()):
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


def _decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The start token and the labels but the last, padding in place of -100."""
    start = decoder_start(model)
    assert start is not None
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    fed = labels.new_full(labels.shape, start)
    fed[:, 1:] = labels[:, :-1]
    return fed.masked_fill(fed == IGNORE_INDEX, start if pad is None else pad)


def _teacher(
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    keep: Tensor,
    kind: str,
    student: PreTrainedModel,
    hidden: Tensor | TopK | None,
    head: Tensor | LMHead | None,
) -> tuple[Tensor | TopK, LMHead | None]:
    """The teacher's states `[n, hidden]` at the positions that count, and its head; of a classifier its logits."""
    if isinstance(hidden, TopK):
        if teacher is not None or head is not None:
            raise DrklError(
                "teacher_hidden is a TopK, which takes the place of a teacher; leave that and its head out."
            )
        return hidden, None
    if teacher is not None and head is not None:
        raise DrklError("teacher and teacher_head are both given; teacher_head takes the place of a teacher's.")
    model = None
    if teacher is not None:
        model = unwrap(teacher, "teacher").model
        _check_pair(student, kind, model, batch)
    if hidden is None:
        if teacher is None or model is None:
            raise DrklError(
                "The objective compares with a teacher, and there is none. Pass a teacher, or its teacher_hidden with "
                "its teacher_head; kd_weight=0 or objective='ce' need neither."
            )
        return _run(teacher, model, batch, keep)
    if hidden.dim() == keep.dim() + 1 or (kind == CLASSIFIER and hidden.shape[0] == keep.shape[0]):
        states = hidden.unsqueeze(1) if hidden.dim() == 2 else hidden
        _check_positions(states, keep, model, "teacher")
        hidden = states[keep.to(states.device)]
    if hidden.dim() != 2 or hidden.shape[0] != int(keep.sum()):
        raise DrklError(
            f"teacher_hidden has shape {list(hidden.shape)}; expected {[*keep.shape, 'hidden']}, or "
            f"{[int(keep.sum()), 'hidden']} at the positions that count."
        )
    if kind == CLASSIFIER:
        return hidden.detach(), None
    if model is not None:
        head_module(model, "teacher")  # refuses what `output_head` would misread
        head = output_head(model)
    if head is None:
        raise DrklError("teacher_hidden is given without a head. Pass the teacher, or its head as teacher_head.")
    return hidden.detach(), _whole(head)


@torch.no_grad()
def _run(
    teacher: nn.Module, model: PreTrainedModel, batch: Mapping[str, Any], keep: Tensor
) -> tuple[Tensor, LMHead | None]:
    def at_head(hidden: Tensor, head: LMHead | None) -> Tensor:
        _check_positions(hidden, keep, model, "teacher")
        return hidden[keep.to(hidden.device)]

    with in_eval_mode(teacher):
        hidden = call_at_head(teacher, model_inputs(model, batch, "teacher"), at_head, "teacher")
    if kind_of(model, "teacher") == CLASSIFIER:
        return hidden, None
    # Read anew: what FSDP2 gathered for the forward may be freed by now.
    return hidden, _whole(head_of(model, "teacher"))


@torch.no_grad()
def _whole(head: Tensor | LMHead) -> LMHead:
    """The head gathered here: a collective within the student's forward would meet FSDP2's own."""
    return (head if isinstance(head, LMHead) else LMHead(head)).detached().gathered()


def _check_pair(student: PreTrainedModel, kind: str, teacher: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raise DrklError where one batch cannot feed both models, or their classes mean different things."""
    other = kind_of(teacher, "teacher")
    if other != kind:
        raise DrklError(
            f"The student {type(student).__name__} is {kind} and the teacher {type(teacher).__name__} is {other}: they "
            "read a row in different ways, so their positions cannot be compared. Choose both of one kind."
        )
    if kind == CLASSIFIER:
        ours, theirs = class_names(student, "student"), class_names(teacher, "teacher")
        if ours != theirs and sorted(ours) == sorted(theirs):
            first = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            raise DrklError(
                f"The student has the teacher's classes in another order (class {first}: {ours[first]!r}, its own "
                f"{theirs[first]!r}), and the two are compared by number. Give the student the teacher's id2label."
            )
    elif kind == ENCODER_DECODER and batch.get("decoder_input_ids") is None:
        check_same_family(student.config, teacher.config, type(student).__name__, type(teacher).__name__)


def _check_positions(hidden: Tensor, keep: Tensor, model: PreTrainedModel | None, role: str) -> None:
    if hidden.dim() != 3 or hidden.shape[:2] != keep.shape:
        name = "" if model is None else f" ({type(model).__name__})"
        raise DrklError(
            f"The {role}{name} has hidden states of shape {list(hidden.shape)}; expected {[*keep.shape, 'hidden']}, "
            "one for each label."
        )


def _processes(
    student: Wrapped, keep: Tensor, num_tokens: int | float | Tensor | None
) -> tuple[int, int | float | Tensor | None]:
    """Over how many processes the student's gradients are averaged, and the count over all of them.

    None leaves the count to the loss itself, which has only its own tokens to count.
    """
    if any(is_deepspeed(wrapper) for wrapper in student.wrappers):
        raise DrklError(
            "The student is in a DeepSpeedEngine, which scales and averages gradients in its own backward. Use "
            "DistributedDataParallel or torch.distributed.fsdp.fully_shard."
        )
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1, num_tokens
    parallel = data_parallel(student)
    if parallel is None:
        if num_tokens is None and torch.is_grad_enabled() and torch.distributed.get_world_size() > 1:
            raise DrklError(
                f"There are {torch.distributed.get_world_size()} processes, and nothing around the student averages "
                "their gradients. Pass the DistributedDataParallel object itself (not its .module), or shard the model "
                "with fully_shard. If you average the gradients yourself, say what to divide by: num_tokens."
            )
        return 1, num_tokens
    if parallel.size == 1 or num_tokens is not None:
        return parallel.size, num_tokens
    count = keep.sum().to(parallel.device)
    for group in parallel.groups:
        torch.distributed.all_reduce(count, group=group)
    return parallel.size, count.clamp(min=1)


class DataParallel(NamedTuple):
    """The processes over which DDP or FSDP averages gradients."""

    groups: list[Any]
    size: int
    device: Any
    """The devices on which the groups' collectives run."""


def data_parallel(student: Wrapped) -> DataParallel | None:
    """Find the processes over which a student's gradients are averaged; None where nothing wraps it.

    Raises:
        DrklError: a wrapper that leaves some gradients out, or divides them by another number.
    """
    from torch.distributed.fsdp import FSDPModule

    wrapper: Any
    for wrapper in student.wrappers:
        if is_fsdp1(wrapper) and wrapper.sharding_strategy.name.startswith(("HYBRID", "_HYBRID")):
            raise DrklError(
                "The student is in a hybrid FullyShardedDataParallel; use fully_shard on a two-dimensional mesh."
            )
        if isinstance(wrapper, nn.parallel.DistributedDataParallel) or is_fsdp1(wrapper):
            group = wrapper.process_group
            device = next(student.model.parameters()).device
            return DataParallel([group], torch.distributed.get_world_size(group), device)
    outermost = (*student.wrappers, student.model)[0]
    sharded = [module for module in outermost.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        return None
    if not any(isinstance(module, FSDPModule) for module in (*student.wrappers, student.model)):
        raise DrklError(
            f"fully_shard was applied to parts of the student and not to the {type(outermost).__name__} itself, so the "
            "gradients of its other weights would stay those of one process. Call fully_shard(student) last."
        )
    states = [module._get_fsdp_state() for module in sharded]
    groups = [
        group
        for state in states
        for group in (getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)])
        if group is not None
    ]
    if any(getattr(group, "gradient_divide_factor", None) is not None for group in groups):
        raise DrklError(
            "The student has a gradient divide factor of its own (set_gradient_divide_factor). The loss is scaled for "
            "the average that fully_shard takes by itself; leave the factor out."
        )
    meshes = {group.mesh_info.mesh for group in groups}
    if len(meshes) != 1:
        raise DrklError(f"The student is sharded over {len(meshes)} device meshes; expected one for all of its parts.")
    mesh = meshes.pop()
    return DataParallel([mesh.get_group(dim) for dim in range(mesh.ndim)], mesh.size(), mesh.device_type)
