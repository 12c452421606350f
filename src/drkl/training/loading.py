"""The models and the tokenizer of a pair, loaded where they are given by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.adapter import add_adapter, changes_base, check_adapter
from drkl.models.classes import check_classes, is_classifier
from drkl.models.dropout import disable_dropout
from drkl.models.load import load_classifier, load_config, load_model, load_tokenizer
from drkl.models.pair import check_same_family
from drkl.models.precision import resolve_dtype
from drkl.models.sharded import is_sharded
from drkl.runs import IN_MEMORY
from drkl.teachers.cached import TeacherCache
from drkl.teachers.live import LiveTeacher, placed
from drkl.teachers.served import ServedTeacher
from drkl.teachers.shards import check_is_no_cache
from drkl.teachers.teacher import Teacher
from drkl.training.arguments import DistillationConfig
from drkl.training.sharding import asks_for_fsdp, check_sharded

_log = logging.getLogger("drkl")


def load_student(model: Any, args: DistillationConfig, quantization_config: Any) -> tuple[PreTrainedModel, Any]:
    """The student, and peft's handle on it where it comes with an adapter."""
    if isinstance(model, (str, Path)):
        options = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            if "quantization_config" in options:
                raise DrklError("quantization_config is given twice: to the trainer, and in model_init_kwargs.")
            options["quantization_config"] = quantization_config
        student = _load(str(model), options, "fp32", torch.device("cpu"), "model_init_kwargs")
        if "quantization_config" not in options and student.dtype not in (torch.float32, torch.bfloat16):
            raise DrklError(
                f"model_init_kwargs asks for weights in {student.dtype}; expected float32 or bfloat16, which an "
                "optimiser can update. To compute in fp16, set precision='fp16'."
            )
        return student, None
    for name, value in (("model_init_kwargs", args.model_init_kwargs), ("quantization_config", quantization_config)):
        if value is not None:
            raise DrklError(f"{name} is for a model given by its name, and model is a {type(model).__name__} already.")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        check_sharded(model, args.world_size)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        check_sharded(model.get_base_model(), args.world_size)
        if model.active_peft_config.is_prompt_learning:
            raise DrklError(
                "model has prompts that peft puts before its input; only adapters inside the layers (LoRA and its kin) "
                "can be distilled."
            )
        if changes_base(config := model.active_peft_config):
            raise DrklError(
                f"model is a PeftModel whose start ({config.init_lora_weights!r}) changed its base model, so what is "
                "saved would not be what was trained. Pass the base model, and the same config as peft_config."
            )
        if not is_classifier(model.get_base_model()):
            check_adapter(model)
        return model.get_base_model(), model
    if not isinstance(model, PreTrainedModel):
        raise DrklError(
            f"model is a {type(model).__name__}; expected a name, a transformers.PreTrainedModel or a peft.PeftModel."
        )
    return model, None


def place(student: PreTrainedModel, args: DistillationConfig) -> None:
    """Put a student where it will be trained, if the loop would: a FlashAttention runs there alone, and is tried."""
    apart = is_sharded(student) or asks_for_fsdp(args) or args.deepspeed
    if not apart and getattr(student, "hf_device_map", None) is None and not getattr(student, "is_quantized", False):
        student.to(args.device)  # type: ignore[arg-type]


def load_teacher(teacher: Any, args: DistillationConfig) -> Teacher | None:
    """The teacher on its device; None where there is none."""
    if isinstance(teacher, TeacherCache) and (
        args.teacher_model_init_kwargs or args.teacher_model_revision is not None
    ):
        raise DrklError(
            "teacher_model_init_kwargs and teacher_model_revision say how a teacher is loaded, and teacher_model is a "
            f"cache of one, {str(teacher.folder)!r}. Leave them out, or give them to drkl.cache_teacher."
        )
    if isinstance(teacher, ServedTeacher) and (
        args.teacher_model_init_kwargs or args.teacher_model_revision is not None
    ):
        raise DrklError(
            "teacher_model_init_kwargs and teacher_model_revision say how a teacher is loaded, and teacher_model is "
            "one behind a server. Leave them out."
        )
    if args.teacher_shard and isinstance(teacher, (TeacherCache, ServedTeacher)):
        raise DrklError(
            "teacher_shard spreads a teacher's weights over processes, and teacher_model is a cache or a server, which "
            "has them elsewhere. Leave it out."
        )
    if args.teacher_shard and args.world_size == 1:
        _log.warning("Warning: teacher_shard has no effect: there is one process, which has the whole teacher.")
    if teacher is None or isinstance(teacher, Teacher):
        return teacher.to(args.device) if isinstance(teacher, TeacherCache) else teacher
    device = args.device
    options = dict(args.teacher_model_init_kwargs or {})
    if isinstance(teacher, (str, Path)):
        check_is_no_cache(str(teacher))
        if args.teacher_model_revision is not None:
            options.setdefault("revision", args.teacher_model_revision)
        teacher = _load(str(teacher), options, "auto", device, "teacher_model_init_kwargs")
    elif options or args.teacher_model_revision is not None:
        raise DrklError(
            "teacher_model_init_kwargs and teacher_model_revision are for a teacher given by its name, and "
            f"teacher_model is a {type(teacher).__name__} already."
        )
    teacher = getattr(teacher, "_orig_mod", teacher)
    if not isinstance(teacher, PreTrainedModel):
        raise DrklError(
            f"teacher_model is a {type(teacher).__name__}; expected a name or a transformers.PreTrainedModel."
        )
    return LiveTeacher(placed(teacher, device, shard=args.teacher_shard), args.teacher_remember_mb)


def _load(name: str, options: dict[str, Any], dtype: str, device: torch.device, where: str) -> PreTrainedModel:
    """Load a model by its name, a classifier where its config says so."""
    if options.pop("trust_remote_code", False):
        raise DrklError(f"{where} has trust_remote_code: drkl never runs code that comes with a model.")
    wanted = options.pop("dtype", options.pop("torch_dtype", dtype))
    load = load_classifier if is_classifier(load_config(name, **options)) else load_model
    return load(name, resolve_dtype(wanted, device), **options)


def make_trainable(student: PreTrainedModel, adapter: Any, args: DistillationConfig, peft_config: Any) -> Any:
    """Freeze what is not to be trained, and return peft's handle on the student; None where it has no adapter.

    Args:
        student: as it was loaded.
        adapter: the handle that it came with, or None.
        args: what is frozen.
        peft_config: the adapter to be added; None for none.

    Raises:
        DrklError: an adapter that cannot be added, or nothing is left to train.
    """
    if args.disable_dropout:
        disable_dropout(student)
    if args.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    if peft_config is not None:
        if adapter is not None:
            raise DrklError("model is a PeftModel, which has its adapter; leave peft_config out.")
        if is_sharded(student):
            raise DrklError(
                "peft_config adds an adapter to a student that is sharded already, so that it would lie whole in each "
                "process beside its parts. Call peft.get_peft_model first, then fully_shard on what get_base_model() "
                "of it returns, and pass the PeftModel."
            )
        if is_classifier(student):
            raise DrklError("peft_config goes with language models: LoRA leaves a classifier's head as it is.")
        adapter = add_adapter(student, peft_config, args.seed)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DrklError("No parameter of the student requires a gradient, so there is nothing to train.")
    return adapter


def tokenizer_of_rows(model: Any, teacher: Any, *, classifier: bool) -> Any:
    """The tokenizer of the student's name, else of the teacher's.

    Where both have one vocabulary and the teacher alone a chat template, it is the teacher's: the rows are then written
    as the teacher reads conversations, as they are for a config.
    """
    names = [str(name) for name in (model, teacher) if isinstance(name, (str, Path))]
    if not names:
        raise DrklError(
            "processing_class is missing: both models were passed as objects, so their tokenizer cannot be looked up. "
            "Pass the tokenizer."
        )
    try:
        ours = load_tokenizer(names[0], classifier=classifier)
    except DrklError:
        if len(names) == 1:
            raise
        return load_tokenizer(names[1], classifier=classifier)
    if len(names) == 1 or classifier or ours.chat_template:
        return ours
    theirs = load_tokenizer(names[1])
    return theirs if theirs.chat_template and theirs.get_vocab() == ours.get_vocab() else ours


def check_kinds(
    student: PreTrainedModel, teacher: Teacher | None, classes: Sequence[str] | None, name: str, teacher_name: str
) -> None:
    """Raise DrklError where the two models are of kinds that have no output in common."""
    if teacher is None:
        return
    if is_classifier(teacher.model) != (classes is not None):
        kinds = {True: "a classifier", False: "a language model"}
        raise DrklError(
            f"The student ({name}) is {kinds[classes is not None]} and the teacher ({teacher_name}) "
            f"{kinds[classes is None]}: they have no output in common. Choose both of one kind."
        )
    if classes is not None:
        check_classes(teacher.model, classes, teacher_name)
    else:
        check_same_family(student.config, teacher.model.config, name, teacher_name)


def plain_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` as a config.yaml has them: dtype is a key of its own, a token is secret."""
    kept = {name: value for name, value in (options or {}).items() if name not in ("dtype", "torch_dtype", "token")}
    return {
        name: value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else f"{IN_MEMORY}: {value!r}"
        for name, value in kept.items()
    }
