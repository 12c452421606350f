"""The full description of one run, and facts that follow from it before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from drkl.data.classification import each_labelled, label_set
from drkl.data.config import DataConfig, TokenizerConfig
from drkl.data.lengths import Lengths, Room, answer_room
from drkl.data.shares import each_training_example
from drkl.data.tokenizer import learn_tokenizer, texts_of
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.models.config import PeftConfig, StudentConfig
from drkl.objectives.config import ObjectiveConfig
from drkl.rollouts.config import RolloutsConfig
from drkl.runs import IN_MEMORY, RunFolder
from drkl.teachers.config import TeacherConfig
from drkl.training.config import RunConfig, TrainingConfig

LEARNT = "a tokenizer learnt from the training text"
TWO_CLASSES = (
    "With two classes the tail is one class, and its divergence K is 0: every unskewed drkl equals rkl here (dkd is "
    "its target term alone), so a two-class task cannot show what decoupling does."
)


@dataclass(frozen=True)
class RunSpec:
    """Everything one run needs; its ``resolved`` mapping is what ``config.yaml`` holds."""

    folder: RunFolder
    run: RunConfig
    teacher: TeacherConfig | None
    student: StudentConfig
    data: DataConfig
    objective: ObjectiveConfig
    loss: LossConfig
    training: TrainingConfig
    resolved: dict[str, Any]
    peft: PeftConfig | None = None
    task: str = "generation"
    tokenizer: TokenizerConfig | None = None
    """The tokenizer to train, in the first of several stages; None if a model has its own."""
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)

    @property
    def classifies(self) -> bool:
        """Whether the models give texts a class."""
        return self.task == "classification"

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss reads the teacher; its KLs are reported on held-out rows wherever there is one."""
        return self.loss.kd_weight > 0 and self.objective.make().needs_teacher


def with_stand_in(specs: Sequence[RunSpec], settle: Callable[[TeacherConfig, str], str]) -> list[RunSpec]:
    """The specs of a run, what stands for a served teacher in its ``tokenizer``; others as they are.

    Args:
        specs: the stages.
        settle: from the teacher and the student's folder or id (empty for none) to that.

    Raises:
        DrklError: nothing can stand for it, or the student is to be made of it and its weights are not here.
    """
    teacher, student = specs[0].teacher, specs[0].student
    if teacher is None or not teacher.is_served:
        return list(specs)
    source = settle(teacher, student.model or "")
    if student.model is None and student.model_type is None and source != teacher.model:
        raise DrklError(
            f"student.init is {student.init!r} and student.model names no model, so the student would be made of the "
            f"teacher; but {teacher.model!r} is no folder or id here: its weights are the server's. Name a model in "
            "student.model."
        )
    return [replace(spec, teacher=teacher.model_copy(update={"tokenizer": source})) for spec in specs]


def without_server(teacher: TeacherConfig, student: str) -> str:
    """The folder or id that stands for a served teacher, as far as it is known without its server."""
    from drkl.teachers.served import stand_in

    return stand_in(teacher.model, teacher.tokenizer, "", student)


def training_config(spec: RunSpec, device: torch.device) -> Any:
    """The `DistillationConfig` of a run; ``training.arguments`` has the last word where it may speak at all.

    Raises:
        DrklError: a value that transformers or drkl refuses.
    """
    from drkl.training.arguments import DistillationConfig

    training = spec.training
    names = (
        "num_train_epochs", "tokens_per_step", "per_device_train_batch_size", "same_batches", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "eval_rows",
        "early_stop_patience", "precision", "padding_free", "nan", "nan_skips",
    )  # fmt: skip
    values = {name: value for name in names if (value := getattr(training, name)) is not None}
    arguments: dict[str, Any] = values | {
        "max_steps": training.max_steps or -1,
        "eval_steps": training.eval_every,
        "save_steps": training.save_every,
        "activation_checkpointing": training.gradient_checkpointing,
        "disable_tqdm": True,
        "freeze_embeddings": spec.student.freeze_embeddings,
        "disable_dropout": spec.student.disable_dropout,
        "max_prompt_tokens": spec.data.max_prompt_tokens,
        "max_tokens": spec.data.max_tokens,
        "turns": spec.data.turns,
        "template": spec.data.template,
        "streaming": spec.data.streaming,
        "shuffle_buffer": spec.data.shuffle_buffer,
        # A cache remembers everything, which is said where it is opened.
        "teacher_remember_mb": 0 if spec.teacher is None or spec.teacher.cache else spec.teacher.remember_mb,
        "teacher_shard": spec.teacher is not None and spec.teacher.shard,
        **spec.loss.model_dump(),
        **(spec.rollouts.as_arguments() if spec.rollouts.is_on else {}),
    }
    for name in ("optim", "lr_scheduler_type"):
        value = str((arguments | training.arguments).get(name))
        if value.startswith(IN_MEMORY):
            raise DrklError(
                f"training: {name} is {value!r}, which was passed to a trainer as an object and cannot be made again "
                "from a config. Train in Python, or name one of transformers' own."
            )
    try:
        return DistillationConfig(
            output_dir=str(spec.folder.root),
            objective=spec.objective.name,
            objective_params=spec.objective.params,
            seed=spec.run.seed,
            use_cpu=device.type == "cpu",
            **(arguments | training.arguments),
        )
    except (DrklError, TypeError, ValueError) as error:
        message = str(error).removeprefix("DistillationConfig: ")
        raise DrklError(f"training: {message}") from error


def start_of(student: StudentConfig, teacher: TeacherConfig | None) -> str | None:
    """What a student of the teacher's is made from. Random weights need its config alone, which a cache has too; of a
    served teacher no more is known."""
    if teacher is None:
        return None
    return teacher.source if student.init == "random" or teacher.is_served else teacher.model


def run_classes(specs: Sequence[RunSpec]) -> tuple[str, ...] | None:
    """The names of the classes by number, one set for all stages; None where the task is generation.

    They are the teacher's, the student's, or the labels of the training rows.

    Raises:
        DrklError: a teacher that is no classifier, or training rows of fewer than two labels.
    """
    from drkl.models.classes import class_names, is_classifier
    from drkl.models.load import load_config

    first = specs[0]
    if first.task != "classification":
        return None
    if first.teacher is not None:
        config = load_config(first.teacher.source, **first.teacher.source_options)
        return class_names(config, first.teacher.source)
    student = first.student
    if student.model is not None and student.init != "random":
        config = load_config(student.model, **student.model_init_kwargs)
        if is_classifier(config):
            return class_names(config, student.model)
    if any(spec.data.streaming for spec in specs):
        raise DrklError(
            "data.streaming is true, and nothing names the classes: without a teacher or a student that is a "
            "classifier they are the labels of all training rows, which a stream never has. Name a classifier in "
            "teacher.model or student.model (its config.json has id2label), or set data.streaming to false."
        )
    sections = dict.fromkeys(spec.data for spec in specs)
    examples = (example for data in sections for example in each_training_example(data, classifier=True))
    return label_set(each_labelled(examples))


def is_two_class(specs: Sequence[RunSpec], classes: Sequence[str] | None) -> bool:
    """Whether decoupling changes nothing in this run, though its objective decouples."""
    decouples = any(spec.objective.name in ("drkl", "dkd") for spec in specs)
    return classes is not None and len(classes) == 2 and decouples


def tokenizer_name(specs: Sequence[RunSpec]) -> str:
    """Return the source of a run's tokenizer; ``LEARNT`` if the run trains one.

    It is the teacher's. Where a student of its own folder is to write answers and has a chat template of its own, it is
    the student's: each model is then given the prompts in its own rendering.
    """
    from drkl.data.views import has_own_view
    from drkl.models.load import load_tokenizer
    from drkl.models.student import source_model

    first = specs[0]
    if first.tokenizer is not None:
        return LEARNT
    if first.teacher is None:
        return source_model(first.student, None)
    own = None if first.student.init == "random" else first.student.model
    teachers = (first.teacher.model, first.teacher.source)
    if own in (None, *teachers) or first.classifies or not any(spec.rollouts.is_on for spec in specs):
        return first.teacher.source
    try:
        ours = load_tokenizer(own)
    except DrklError:  # a folder without a tokenizer
        return first.teacher.source
    theirs = load_tokenizer(first.teacher.source)
    return own if ours.chat_template and has_own_view(ours, theirs, first.data.template) else first.teacher.source


def teacher_tokenizer(specs: Sequence[RunSpec], name: str) -> Any:
    """The teacher's own tokenizer, where it reads prompts for itself; None where it reads those of the run's tokenizer.

    Args:
        specs: the stages.
        name: `tokenizer_name` of them.
    """
    from drkl.models.load import load_tokenizer

    teacher = specs[0].teacher
    return None if teacher is None or name in (LEARNT, teacher.source) else load_tokenizer(teacher.source)


def run_tokenizer(specs: Sequence[RunSpec]) -> Any:
    """Load the tokenizer of a run, or learn it from the training rows of all stages.

    Raises:
        DrklError: there is none, or no rows.
    """
    from drkl.models.load import load_tokenizer

    config, classifier = specs[0].tokenizer, specs[0].classifies
    if config is None:
        return load_tokenizer(tokenizer_name(specs), classifier=classifier)
    sections = dict.fromkeys(spec.data for spec in specs)
    examples = (example for data in sections for example in each_training_example(data, classifier=classifier))
    if classifier:
        return learn_tokenizer(config, (text for _, text, _ in each_labelled(examples)), classifier=True)
    return learn_tokenizer(config, texts_of(examples))


def run_ends(first: RunSpec, tokenizer: Any) -> Sequence[int]:
    """The ids that end an answer by the settings of the teacher, or of the model that a student starts from."""
    from drkl.models.ends import listed_ends

    if first.teacher is not None:
        return listed_ends(first.teacher.source, tokenizer, **first.teacher.source_options)
    return () if first.student.model is None else listed_ends(first.student.model, tokenizer)


def has_encoder(first: RunSpec, tokenizer: Any) -> bool:
    """Whether the models of a run are encoder-decoders; student and teacher are of one kind."""
    from drkl.models.forward import is_encoder_decoder
    from drkl.models.load import load_config
    from drkl.models.student import student_config

    if first.teacher is not None:
        return is_encoder_decoder(load_config(first.teacher.source, **first.teacher.source_options))
    return is_encoder_decoder(student_config(first.student, None, tokenizer))


def run_configs(first: RunSpec, tokenizer: Any, classes: Sequence[str] | None) -> dict[str, Any]:
    """The model configs of a run, the student's and the teacher's, before anything is loaded or made.

    Raises:
        DrklError: a config that cannot be read, or fields of a student that do not fit.
    """
    from drkl.models.load import load_config
    from drkl.models.student import student_config

    teacher = first.teacher
    configs = {"student": student_config(first.student, teacher.source if teacher else None, tokenizer, classes)}
    return configs | ({"teacher": load_config(teacher.source, **teacher.source_options)} if teacher else {})


def run_room(configs: dict[str, Any], classes: Sequence[str] | None) -> Room:
    """The positions that the models of a run have for a row."""
    from drkl.models.context import room_of
    from drkl.models.forward import is_encoder_decoder

    encoder_decoder = classes is None and is_encoder_decoder(configs["student"])
    return room_of(configs.values(), encoder_decoder=encoder_decoder)


def fitted(specs: Sequence[RunSpec], room: Room) -> list[RunSpec]:
    """The specs with the lengths of rows that the user did not give, as they fit the models, also in ``resolved``.

    Raises:
        DrklError: a given length of prompts leaves no room for a response, or for a sampled answer.
    """
    sections = [spec.data.fitted(room, spec.rollouts.reserved(room)) for spec in specs]
    for spec, data in zip(specs, sections, strict=True):
        if spec.rollouts.is_on:
            answer_room(Lengths(data.max_prompt_tokens, data.max_tokens), room, spec.rollouts.max_new_tokens)
    lengths = [{name: getattr(data, name) for name in Lengths._fields} for data in sections]
    fitting = []
    for spec, data, own in zip(specs, sections, lengths, strict=True):
        resolved = {**spec.resolved, "data": {**spec.resolved["data"], **own}}
        if spec is specs[-1]:
            # Written out for each: a stage would inherit those of the last one.
            stages = zip(resolved["stages"], lengths, strict=False)
            resolved["stages"] = [{**stage, "data": {**stage["data"], **own}} for stage, own in stages]
        fitting.append(replace(spec, data=data, resolved=resolved))
    return fitting
