"""One run from its spec to its folder, and several in a row as stages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback

from drkl.data.config import DataConfig
from drkl.data.rows import Rows, make_rows, read_shares
from drkl.data.tokenize import DropReport
from drkl.errors import DrklError
from drkl.models.adapter import add_adapter, merge_adapter, save_adapter
from drkl.models.forward import check_head, decoder_start, is_encoder_decoder, lm_head
from drkl.models.load import load_tokenizer, model_note
from drkl.models.pair import SharedTokens, check_families, check_rows, check_tokenizers, shared_vocabulary
from drkl.models.precision import pick_device
from drkl.models.student import make_student
from drkl.runs import RunFolder, write_json, write_text, write_yaml
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from drkl.training.arguments import training_arguments
from drkl.training.callbacks import BestCheckpoint, EarlyStop, LastStep, OnProgress, TrainLog
from drkl.training.card import model_card
from drkl.training.checkpoints import keep_only, newest_checkpoint, step_of, tokens_seen
from drkl.training.checks import check_device, check_disk, check_folder
from drkl.training.classes import TWO_CLASSES, is_two_class, run_classes
from drkl.training.environment import describe_environment, now
from drkl.training.forward import detach_loss
from drkl.training.heldout import HeldOut
from drkl.training.spec import RunSpec
from drkl.training.tokens import LEARNT, has_encoder, run_tokenizer, tokenizer_name
from drkl.training.trainer import DistillationTrainer

Mode = Literal["new", "overwrite", "resume"]


@dataclass
class Listener:
    """What a front end may want to show; every hook has a default that does nothing."""

    on_message: Callable[[str], None] = lambda text: None
    on_stage: Callable[[RunSpec, int, int], None] = lambda spec, number, of: None
    on_progress: OnProgress | None = None


@dataclass
class Loaded:
    """Rows of one data section under one tokenizer."""

    train: Rows
    heldout: Rows
    report: DropReport


@dataclass
class Resources:
    """What stages share: the teacher, the tokenizer and the rows are loaded once."""

    device: torch.device
    listener: Listener
    classes: tuple[str, ...] | None = None
    """Of a classification run, by number."""
    _teachers: dict[TeacherConfig, LiveTeacher] = field(default_factory=dict)
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _rows: dict[tuple[DataConfig, str, bool], Loaded] = field(default_factory=dict)

    def teacher(self, config: TeacherConfig | None) -> LiveTeacher | None:
        if config is None:
            return None
        if config not in self._teachers:
            self.listener.on_message(f"Loading the teacher {config.model}.")
            self._teachers[config] = LiveTeacher.load(config, self.device, classifier=self.classes is not None)
            if note := model_note(config.model):
                self.listener.on_message(note)
        return self._teachers[config]

    def tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(name, classifier=self.classes is not None)
        return self._tokenizers[name]

    def learn_tokenizer(self, specs: Sequence[RunSpec]) -> None:
        learnt = run_tokenizer(specs)
        self.listener.on_message(f"Learnt a tokenizer of {len(learnt)} tokens from the training text.")
        self._tokenizers[LEARNT] = learnt

    def rows(self, config: DataConfig, tokenizer_name: str, *, encoder_decoder: bool) -> Loaded:
        key = (config, tokenizer_name, encoder_decoder)
        if key not in self._rows:
            shares = read_shares(config, classifier=self.classes is not None)
            kind: dict[str, Any] = {"classes": self.classes, "encoder_decoder": encoder_decoder}
            (train, report), (heldout, heldout_report) = (
                make_rows(share, config, self.tokenizer(tokenizer_name), **kind) for share in shares
            )
            self.listener.on_message(f"Training data: {report.summary()} Held out: {heldout_report.summary()}")
            self._rows[key] = Loaded(train, heldout, report)
        return self._rows[key]


def distill(
    specs: Sequence[RunSpec],
    *,
    mode: Mode = "new",
    listener: Listener | None = None,
    on_trainer: OnTrainer | None = None,
) -> RunFolder:
    """Train every stage in turn and return the folder of the last.

    Args:
        specs: the stages, first to last; each starts from the student of the one before.
        mode: ``new`` refuses a folder that is there, ``overwrite`` replaces it, ``resume`` goes on with it: finished
            stages are kept, the unfinished one continues from its newest whole checkpoint.
        listener: hooks for a front end.
        on_trainer: called with each stage's parts and trainer before it trains, to add callbacks.

    Raises:
        DrklError: anything a user can mend; whatever can be checked is checked before anything is written.
    """
    listener = listener or Listener()
    last = specs[-1].folder
    check_folder(last, mode)
    check_device(specs[-1].run.device)
    resources = Resources(pick_device(specs[-1].run.device), listener, run_classes(specs))
    if is_two_class(specs, resources.classes):
        listener.on_message(TWO_CLASSES)
    first, name = specs[0], tokenizer_name(specs[0])
    teacher_name = first.teacher.model if first.teacher else None
    if first.tokenizer is not None:
        resources.learn_tokenizer(specs)
    if resources.classes is None:
        check_families(first.student, teacher_name, resources.tokenizer(name))
    tokens = check_tokenizers(first.student, teacher_name, classifier=first.classifies)
    apart = resources.classes is None and has_encoder(first, resources.tokenizer(name))
    for spec in specs:
        training_arguments(spec, resources.device)
        resources.rows(spec.data, name, encoder_decoder=apart)
    # The line that made the run is what repeats it, also where another one finished it.
    command = last.read_env().get("command") if mode == "resume" else None
    command = command or ["drkl", *sys.argv[1:]]
    for number, spec in enumerate(specs, start=1):
        if mode == "resume" and spec.folder.is_finished():
            keep_only(spec.folder.checkpoints_path, spec.folder.read_env().get("best_step"))
            continue
        listener.on_stage(spec, number, len(specs))
        prepared = _prepare(spec, resources, name, tokens)
        if number == 1 and mode == "overwrite" and last.root.exists():
            shutil.rmtree(last.root)
        if number == 1:
            write_yaml(last.config_path, specs[-1].resolved)  # from here on `--resume` finds it
            write_json(last.env_path, {"command": command, "finished": None})
        _train(prepared, command, resume=mode == "resume", on_trainer=on_trainer)
    return last


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
    adapter: Any
    """peft's handle on the student, or None."""
    vocabulary: dict[str, int] | None
    """Where the two heads are compared on fewer ids than they have: how many, of how many."""

    @property
    def vocab_size(self) -> int | None:
        return None if self.vocabulary is None else self.vocabulary["shared"]


OnTrainer = Callable[[Prepared, DistillationTrainer], None]


def _prepare(spec: RunSpec, resources: Resources, tokenizer_name: str, tokens: SharedTokens | None) -> Prepared:
    teacher_name = spec.teacher.model if spec.teacher else None
    teacher = resources.teacher(spec.teacher)
    tokenizer = resources.tokenizer(tokenizer_name)
    student = make_student(spec.student, teacher_name, spec.run.seed, tokenizer, resources.classes)
    apart = resources.classes is None and is_encoder_decoder(student)
    loaded = resources.rows(spec.data, tokenizer_name, encoder_decoder=apart)
    rows = [*loaded.train, *loaded.heldout]
    check_rows(rows, student.config, "student")
    if teacher is not None:
        check_rows(rows, teacher.model.config, "teacher")
    vocabulary = None
    if resources.classes is None:
        check_head(student)
        vocabulary = _compare_vocabularies(student, teacher, tokens, tokenizer, rows, resources.listener)
    elif teacher is not None:
        teacher.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # what the batches are padded with
    if spec.student.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    adapter = None if spec.peft is None else add_adapter(student, spec.peft, spec.run.seed)
    check_disk(spec.folder, student)
    return Prepared(
        spec,
        resources.device,
        teacher,
        tokenizer,
        loaded,
        student,
        resources.listener,
        adapter,
        vocabulary,
    )


def _compare_vocabularies(
    student: PreTrainedModel,
    teacher: LiveTeacher | None,
    tokens: SharedTokens | None,
    tokenizer: Any,
    rows: Sequence[Any],
    listener: Listener,
) -> dict[str, int] | None:
    if teacher is None:
        return None
    sizes = lm_head(student).vocab_size, lm_head(teacher.model).vocab_size
    vocabulary = shared_vocabulary(*sizes, tokens, tokenizer, rows)
    if vocabulary is not None:
        listener.on_message(
            f"The student scores {vocabulary['student']} ids and the teacher {vocabulary['teacher']}; their "
            f"tokenizers share the first {vocabulary['shared']}, and the two are compared on those."
        )
    return vocabulary


def _train(prepared: Prepared, command: list[str], *, resume: bool, on_trainer: OnTrainer | None) -> None:
    spec, run = prepared.spec, prepared.spec.folder
    checkpoint = newest_checkpoint(run.checkpoints_path) if resume else None
    environment = describe_environment(prepared.device) | {
        "command": command,
        "teacher_note": model_note(spec.teacher.model) if spec.teacher else None,
        "data": _describe_data(prepared.loaded),
        "vocabulary": prepared.vocabulary,
        "parameters": _count_parameters(prepared),
        "started": run.read_env().get("started", now()) if resume else now(),
        "finished": None,
    }
    write_yaml(run.config_path, spec.resolved)
    write_json(run.env_path, environment)
    if checkpoint is not None:
        prepared.listener.on_message(f"Going on from {checkpoint.name}.")
    log = TrainLog(run, step_of(checkpoint) if checkpoint else 0, prepared.listener.on_progress)
    trainer = _make_trainer(prepared, log)
    if on_trainer is not None:
        on_trainer(prepared, trainer)
    if checkpoint is not None:
        trainer.num_tokens_seen = tokens_seen(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        _finish(prepared, trainer, environment | {"seconds": round(log.seconds, 1)})
    trainer.accelerator.wait_for_everyone()


def _count_parameters(prepared: Prepared) -> dict[str, int | None]:
    student = list(prepared.student.parameters())
    adapter = sum(p.numel() for p in student if p.requires_grad) if prepared.adapter is not None else 0
    counts: dict[str, int | None] = {"student": sum(p.numel() for p in student) - adapter}
    if prepared.adapter is not None:
        counts["adapter"] = adapter
    counts["teacher"] = sum(p.numel() for p in prepared.teacher.model.parameters()) if prepared.teacher else None
    return counts


def _describe_data(loaded: Loaded) -> dict[str, Any]:
    return {
        "train_rows": len(loaded.train),
        "heldout_rows": len(loaded.heldout),
        "dropped": dict(loaded.report.dropped),
        "responses_cut": loaded.report.responses_cut,
    }


def _make_trainer(prepared: Prepared, log: TrainLog) -> DistillationTrainer:
    spec, pad_id = prepared.spec, prepared.tokenizer.pad_token_id
    training = spec.training
    heldout = HeldOut(
        prepared.loaded.heldout[: training.eval_rows],
        pad_id,
        prepared.teacher,
        4096,
        decoder_start=decoder_start(prepared.student),
        vocab_size=prepared.vocab_size,
    )
    callbacks: list[TrainerCallback] = [log, LastStep(), BestCheckpoint()]
    if training.early_stop_patience:
        callbacks.append(EarlyStop(training.early_stop_patience))
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
        same_batches=training.same_batches,
        vocab_size=prepared.vocab_size,
        pad_id=pad_id,
        callbacks=callbacks,
    )


def _save_student(prepared: Prepared, folder: Path) -> None:
    if prepared.spec.peft is None:
        prepared.student.save_pretrained(folder)
    elif prepared.spec.peft.export == "adapter":
        save_adapter(prepared.adapter, folder)
    else:
        merge_adapter(prepared.adapter).save_pretrained(folder)


def _finish(prepared: Prepared, trainer: DistillationTrainer, environment: dict[str, Any]) -> None:
    spec, run = prepared.spec, prepared.spec.folder
    student = prepared.student
    detach_loss(student)
    student.config.use_cache = True  # the trainer turns it off
    staging = run.root / ".student"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _save_student(prepared, staging)
        prepared.tokenizer.save_pretrained(staging)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise DrklError(
            f"Could not write the student to {str(run.root)!r}: {reason}. Make room, then `drkl distill --resume`."
        ) from error
    note = environment["teacher_note"]
    if spec.peft is not None and spec.peft.export == "adapter":
        adapter_note = f"It is a LoRA adapter for `{spec.student.model}`; to load it, install `peft` too."
        note = f"{note}\n\n{adapter_note}" if note else adapter_note
    kind = "classifier" if spec.classifies else "encoder_decoder" if is_encoder_decoder(student) else "decoder"
    card = model_card(run.name, spec.resolved, trainer.state.best_metric, note, kind=kind)
    write_text(staging / "README.md", card)
    shutil.rmtree(run.student_path, ignore_errors=True)
    staging.rename(run.student_path)
    outcome = {
        "finished": now(),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "best_heldout_loss": trainer.state.best_metric,
    }
    write_json(run.env_path, environment | outcome)
    keep_only(run.checkpoints_path, trainer.state.best_global_step)
