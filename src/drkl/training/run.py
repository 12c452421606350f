"""One run from its spec to its folder, and several in a row as stages."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments

from drkl.data.config import DataConfig
from drkl.data.examples import load_examples
from drkl.data.tokenize import DropReport, Row, tokenize_examples
from drkl.errors import DrklError
from drkl.losses.common import check_vocabularies
from drkl.losses.config import LossConfig
from drkl.models.config import StudentConfig
from drkl.models.forward import check_head
from drkl.models.load import check_same_tokens, load_tokenizer, model_note
from drkl.models.precision import pick_device, resolve_dtype
from drkl.models.student import make_student, source_model
from drkl.objectives.config import ObjectiveConfig
from drkl.runs import RunFolder, write_json, write_text, write_yaml
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from drkl.training.callbacks import LastStep, OnProgress, TrainLog
from drkl.training.card import model_card
from drkl.training.config import RunConfig, TrainingConfig
from drkl.training.environment import describe_environment, now
from drkl.training.forward import detach_loss
from drkl.training.heldout import HeldOut
from drkl.training.trainer import DistillationTrainer, newest_checkpoint

Mode = Literal["new", "overwrite", "resume"]


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

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss reads the teacher; its KLs are reported on held-out rows wherever there is one."""
        return self.loss.kd_weight > 0 and self.objective.make().needs_teacher


@dataclass
class Listener:
    """What a front end may want to show; every hook has a default that does nothing."""

    on_message: Callable[[str], None] = lambda text: None
    on_stage: Callable[[RunSpec, int, int], None] = lambda spec, number, of: None
    on_progress: OnProgress | None = None


@dataclass
class Loaded:
    """Rows of one data section under one tokenizer."""

    train: list[Row]
    heldout: list[Row]
    report: DropReport


@dataclass
class Resources:
    """What stages share: the teacher, the tokenizer and the rows are loaded once."""

    device: torch.device
    listener: Listener
    _teachers: dict[TeacherConfig, LiveTeacher] = field(default_factory=dict)
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _rows: dict[tuple[DataConfig, str], Loaded] = field(default_factory=dict)

    def teacher(self, config: TeacherConfig | None) -> LiveTeacher | None:
        if config is None:
            return None
        if config not in self._teachers:
            self.listener.on_message(f"Loading the teacher {config.model}.")
            self._teachers[config] = LiveTeacher.load(config, self.device)
            if note := model_note(config.model):
                self.listener.on_message(note)
        return self._teachers[config]

    def tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(name)
        return self._tokenizers[name]

    def rows(self, config: DataConfig, tokenizer_name: str) -> Loaded:
        key = (config, tokenizer_name)
        if key not in self._rows:
            tokenizer = self.tokenizer(tokenizer_name)
            train, heldout = load_examples(config)
            limits = {"max_prompt_tokens": config.max_prompt_tokens, "max_tokens": config.max_tokens}
            train_rows, report = tokenize_examples(train, tokenizer, **limits)
            heldout_rows, heldout_report = tokenize_examples(heldout, tokenizer, **limits)
            self.listener.on_message(f"Training data: {report.summary()} Held out: {heldout_report.summary()}")
            self._rows[key] = Loaded(train_rows, heldout_rows, report)
        return self._rows[key]


def distill(specs: Sequence[RunSpec], *, mode: Mode = "new", listener: Listener | None = None) -> RunFolder:
    """Train every stage in turn and return the folder of the last.

    Args:
        specs: the stages, first to last; each starts from the student of the one before.
        mode: ``new`` refuses a folder that is there, ``overwrite`` replaces it, ``resume`` goes on with it: finished
            stages are kept, the unfinished one continues from its newest whole checkpoint.
        listener: hooks for a front end.

    Raises:
        DrklError: anything a user can mend; whatever can be checked is checked before anything is written.
    """
    listener = listener or Listener()
    last = specs[-1].folder
    _check_folder(last, mode)
    resources = Resources(pick_device(specs[-1].run.device), listener)
    for spec in specs:
        resources.rows(spec.data, _tokenizer_name(specs[0]))
    for number, spec in enumerate(specs, start=1):
        if mode == "resume" and spec.folder.is_finished():
            continue
        listener.on_stage(spec, number, len(specs))
        prepared = _prepare(spec, resources, _tokenizer_name(specs[0]))
        if number == 1 and mode == "overwrite" and last.root.exists():
            shutil.rmtree(last.root)
        if number == 1:
            write_yaml(last.config_path, specs[-1].resolved)  # from here on `--resume` finds it
        _train(prepared, resume=mode == "resume")
    return last


def _check_folder(run: RunFolder, mode: Mode) -> None:
    exists = run.root.exists()
    if mode == "resume":
        if run.is_finished():
            raise DrklError(f"The run {str(run.root)!r} is finished; there is nothing to resume.")
    elif exists and mode == "new":
        raise DrklError(
            f"The run folder {str(run.root)!r} exists. `--overwrite` replaces it, `--resume {run.root}` continues it, "
            "run.name=OTHER makes another."
        )
    elif exists and any(run.root.iterdir()) and not (run.config_path.is_file() or (run.root / "stages").is_dir()):
        raise DrklError(
            f"{str(run.root)!r} exists and is no run folder (it has no config.yaml), so it is not replaced."
        )


def _tokenizer_name(first: RunSpec) -> str:
    return first.teacher.model if first.teacher is not None else source_model(first.student, None)


@dataclass
class Prepared:
    """A run whose parts are loaded and checked; nothing is written yet."""

    spec: RunSpec
    device: torch.device
    teacher: LiveTeacher | None
    tokenizer: Any
    loaded: Loaded
    student: PreTrainedModel
    listener: Listener


def _prepare(spec: RunSpec, resources: Resources, tokenizer_name: str) -> Prepared:
    teacher_name = spec.teacher.model if spec.teacher else None
    loaded = resources.rows(spec.data, tokenizer_name)
    if spec.student.init == "pretrained" and teacher_name is not None and spec.student.model != teacher_name:
        source = source_model(spec.student, teacher_name)
        check_same_tokens(resources.tokenizer(source), resources.tokenizer(teacher_name), source, teacher_name)
    teacher = resources.teacher(spec.teacher)
    student = make_student(spec.student, teacher_name, spec.run.seed)
    if teacher is not None:
        check_vocabularies(student.get_output_embeddings().weight.shape[0], teacher.head.vocab_size)
    check_head(student)
    _check_disk(spec.folder.root, student)
    student.config.use_cache = True
    return Prepared(
        spec, resources.device, teacher, resources.tokenizer(tokenizer_name), loaded, student, resources.listener
    )


def _check_disk(root: Path, student: PreTrainedModel) -> None:
    """Three checkpoints (best, newest, the one being written) of weights and two Adam moments, and the student."""
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    needed = weights * (3 * 3 + 1)
    there = next(p for p in (root, *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DrklError(
            f"Checkpoints of this student need about {needed / 1e9:.1f} GB where {str(root)!r} lies; "
            f"{free / 1e9:.1f} GB are free. Make room, or put the run elsewhere with run.dir=FOLDER."
        )


def _train(prepared: Prepared, *, resume: bool) -> None:
    spec, run = prepared.spec, prepared.spec.folder
    run.root.mkdir(parents=True, exist_ok=True)
    checkpoint = newest_checkpoint(run.checkpoints_path) if resume else None
    started = time.monotonic()
    environment = describe_environment(prepared.device) | {
        "command": ["drkl", *sys.argv[1:]],
        "teacher_note": model_note(spec.teacher.model) if spec.teacher else None,
        "data": _describe_data(prepared.loaded),
        "parameters": {
            "student": sum(p.numel() for p in prepared.student.parameters()),
            "teacher": sum(p.numel() for p in prepared.teacher.model.parameters()) if prepared.teacher else None,
        },
        "started": run.read_env().get("started", now()) if resume else now(),
        "finished": None,
    }
    write_yaml(run.config_path, spec.resolved)
    write_json(run.env_path, environment)
    if checkpoint is not None:
        prepared.listener.on_message(f"Going on from {checkpoint.name}.")
    trainer = _make_trainer(prepared, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        _finish(prepared, trainer, environment, time.monotonic() - started)


def _describe_data(loaded: Loaded) -> dict[str, Any]:
    return {
        "train_rows": len(loaded.train),
        "heldout_rows": len(loaded.heldout),
        "dropped": dict(loaded.report.dropped),
        "responses_cut": loaded.report.responses_cut,
    }


def _make_trainer(prepared: Prepared, checkpoint: Path | None) -> DistillationTrainer:
    spec, pad_id = prepared.spec, prepared.tokenizer.pad_token_id
    training = spec.training
    heldout = HeldOut(prepared.loaded.heldout[: training.eval_rows], pad_id, prepared.teacher, 4096)
    step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    callbacks: list[TrainerCallback] = [TrainLog(spec.folder, step, prepared.listener.on_progress), LastStep()]
    if training.early_stop_patience:
        callbacks.append(EarlyStoppingCallback(training.early_stop_patience))
    prepared.student.to(prepared.device)  # type: ignore[arg-type]
    return DistillationTrainer(
        prepared.student,
        training_arguments(spec, prepared.device),
        rows=prepared.loaded.train,
        heldout=heldout,
        teacher=prepared.teacher if spec.uses_teacher else None,
        objective=spec.objective.make(),
        loss=spec.loss,
        tokens_per_step=training.tokens_per_step,
        pad_id=pad_id,
        callbacks=callbacks,
    )


def training_arguments(spec: RunSpec, device: torch.device) -> TrainingArguments:
    """The `TrainingArguments` of a run; ``training.arguments`` has the last word where it may speak at all.

    Raises:
        DrklError: a value that transformers refuses.
    """
    training = spec.training
    precision = resolve_dtype(training.precision, device)
    arguments: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, training.max_steps // 20),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
    } | training.arguments
    try:
        return TrainingArguments(
            output_dir=str(spec.folder.checkpoints_path),
            seed=spec.run.seed,
            use_cpu=device.type == "cpu",
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            eval_strategy="steps",
            eval_steps=training.eval_every,
            save_strategy="steps",
            save_steps=training.save_every,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise DrklError(f"training.arguments: {error}") from error


def _finish(prepared: Prepared, trainer: DistillationTrainer, environment: dict[str, Any], seconds: float) -> None:
    spec, run = prepared.spec, prepared.spec.folder
    student = prepared.student
    detach_loss(student)
    staging = run.root / ".student"
    shutil.rmtree(staging, ignore_errors=True)
    student.save_pretrained(staging)
    prepared.tokenizer.save_pretrained(staging)
    note = environment["teacher_note"]
    write_text(staging / "README.md", model_card(run.name, spec.resolved, trainer.state.best_metric, note))
    shutil.rmtree(run.student_path, ignore_errors=True)
    staging.rename(run.student_path)
    best = trainer.state.best_model_checkpoint
    for path in run.checkpoints_path.glob("checkpoint-*"):
        if best is None or path.resolve() != Path(best).resolve():
            shutil.rmtree(path, ignore_errors=True)
    previous = run.read_env().get("seconds", 0.0)
    outcome = {
        "finished": now(),
        "seconds": round(previous + seconds, 1),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "best_heldout_loss": trainer.state.best_metric,
    }
    write_json(run.env_path, environment | outcome)
