"""The run folder of a training: its config, its environment, and the student at the end."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from drkl.data.config import NO_ROWS, DataConfig
from drkl.data.tokenize import DropReport
from drkl.disk import writing
from drkl.display import markdown_name
from drkl.kept import describe_run_files
from drkl.models.adapter import merge_adapter, save_adapter, whole_adapter
from drkl.models.config import StudentConfig
from drkl.models.forward import is_encoder_decoder
from drkl.models.load import model_note
from drkl.objectives.registry import settings_of
from drkl.runs import IN_MEMORY, RunFolder, write_jsonl, write_text, write_yaml
from drkl.teachers.cached import TeacherCache
from drkl.teachers.config import TeacherConfig
from drkl.teachers.served import ServedTeacher
from drkl.training.arguments import DistillationConfig
from drkl.training.best import heldout_loss_at
from drkl.training.card import model_card, usage_of
from drkl.training.config import OWN_ARGUMENTS, OWNED, TrainingConfig
from drkl.training.environment import describe_environment, now
from drkl.training.loading import plain_options
from drkl.training.own_files import put_in_place, remove_run
from drkl.training.pair import Pair
from drkl.training.placing import drop_extras, keep_only
from drkl.training.sparse import card_note, describe_sparse

_SETTLED = (
    "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "average_tokens_across_devices",
    "full_determinism",
)  # fmt: skip
"""Arguments of transformers that move the weights, written to config.yaml whatever they are."""
_STRATEGIES = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
"""What a config.yaml that says nothing of these means."""
_NOT_RECORDED = (
    "output_dir", "run_name", "hub_token", "logging_dir", "disable_tqdm", "report_to", "log_level", "local_rank",
    "accelerator_config", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "do_train", "do_eval",
    "dataloader_pin_memory", "gradient_checkpointing_kwargs", "logging_nan_inf_filter", "ddp_find_unused_parameters",
    "save_total_limit", "debug",
)  # fmt: skip


class RunRecord:
    """Writes a run folder, piece by piece as training goes on.

    Args:
        run: the folder.
        pair: what is trained on what.
        args: how.
    """

    def __init__(self, run: RunFolder, pair: Pair, args: DistillationConfig) -> None:
        self.run, self.pair, self.args = run, pair, args
        self.config: dict[str, Any] | None = None
        """The content of config.yaml; None: describe the pair and the arguments."""
        self.command: list[str] | None = None
        """The command that repeats the run, where one made it."""
        self.export = "adapter"
        """The saved form of a student with an adapter: ``adapter``, or the ``merged`` model."""
        self.optimizers: tuple[Any, Any] = (None, None)
        """The optimiser and the schedule that were passed as objects."""
        self.inputs: dict[str, Any] = {}
        """What the run is trained on, and how, as `drkl.training.inputs` describes it."""
        self.earlier: dict[str, Any] | None = None
        """The same of a run that was begun in the folder before, and is to go on."""
        self.keeps_folder = False
        """Whether the folder was prepared for this run already."""
        self._environment: dict[str, Any] = {}
        self._student_step: int | None = None
        """The optimiser step after which the student's weights were, once training has ended."""

    def begin(self, num_steps: int, *, resumed: bool) -> None:
        """Write ``config.yaml`` and ``env.json``; a run that lay in the folder is removed unless it is resumed."""
        if not resumed and not self.keeps_folder and self.run.config_path.is_file():
            remove_run(self.run)
        self._student_step = None
        self._environment = describe_environment(self.args.device) | {
            "command": self.command,
            "teacher_note": _teacher_note(self.pair),
            "data": describe_data(self.pair),
            "vocabulary": self.pair.vocabulary,
            "merged_ids": [*self.pair.merged_ids],
            "topk": describe_sparse(self.pair),
            "ends": None if self.pair.ends is None else self.pair.ends.as_record(),
            "parameters": count_parameters(self.pair),
            "started": self.run.read_env().get("started", now()) if resumed else now(),
            "finished": None,
            "inputs": self.inputs,
        }
        self.config = self.settled(num_steps)
        write_yaml(self.run.config_path, self.config)
        if self.pair.eval_dataset is not None:
            write_jsonl(self.run.eval_rows_path, self.pair.eval_dataset)
        self.run.write_env(self._environment)

    def settled(self, num_steps: int) -> dict[str, Any]:
        """The content of ``config.yaml`` with every value settled that trains the model."""
        config = describe_run(self.pair, self.args, self.run, num_steps) if self.config is None else self.config
        training = config["training"] | training_section(self.args, config["training"])
        if training["warmup_steps"] is None:
            training["warmup_steps"] = self.args.get_warmup_steps(num_steps)
        optimizer, schedule = self.optimizers
        if optimizer is not None:
            training["arguments"]["optim"] = f"{IN_MEMORY}: {type(optimizer).__name__}"
        if schedule is not None:
            training["lr_scheduler_type"] = f"{IN_MEMORY}: {type(schedule).__name__}"
        return config | {"training": training}

    def trained(
        self,
        state: TrainerState,
        seconds: float,
        read: dict[str, Any] | None = None,
        *,
        student_step: int | None = None,
    ) -> None:
        """Note in ``env.json`` that training came to its end.

        Args:
            state: the trainer's.
            seconds: how long the run took.
            read: what was read of a stream.
            student_step: the step after which the student's weights were; None is the last.
        """
        self._student_step = state.global_step if student_step is None else student_step
        self._environment["data"] |= read or {}
        self._environment |= {
            "seconds": round(seconds, 1),
            "steps": state.global_step,
            "best_step": state.best_global_step,
            "best_heldout_loss": state.best_metric,
            "student_step": self._student_step,
            "student_heldout_loss": heldout_loss_at(state, self._student_step),
        }
        self.run.write_env(self._environment)

    def save_student(self, folder: Path | None, state: TrainerState, weights: dict[str, Tensor] | None = None) -> None:
        """Write the student, its tokenizer and its model card, whole or not at all.

        Args:
            folder: where to; None is ``student/`` of the run, which is then finished.
            state: the trainer's.
            weights: of a sharded student, the whole weights of it, or of the adapter with it inside.

        Raises:
            CannotWrite: it cannot be written there.
        """
        target = (self.run.student_path if folder is None else folder).resolve()
        staging = target.parent / f".{target.name}.writing"
        shutil.rmtree(staging, ignore_errors=True)
        then = "resume the run: its checkpoints are kept" if folder is None else "save it again"
        with writing(target, what="the student", then=then):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._write(staging, weights)
                self.pair.tokenizer.save_pretrained(staging)
                write_text(staging / "README.md", self._card(state))
                put_in_place(staging, target)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        if folder is None and self._environment:
            self._environment["finished"] = now()
            self._environment |= describe_run_files(self.run)
            self.run.write_env(self._environment, lasting=True)
            with suppress(OSError):  # what stays is in nobody's way
                if self._student_step is not None:
                    keep_only(self.run.checkpoints_path, state.best_global_step)
                drop_extras(self.run.checkpoints_path)
        elif folder is None and (known := self.run.read_env()).get("finished"):
            self.run.write_env(known | describe_run_files(self.run))

    def _write(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        adapter = self.pair.adapter
        if adapter is None:
            self.pair.student.save_pretrained(folder, state_dict=weights)
        elif self.export == "adapter":
            save_adapter(adapter, folder, self.pair.adapter_start, weights)
            self.pair.student.generation_config.save_pretrained(folder)
        else:
            merge_adapter(adapter if weights is None else whole_adapter(adapter, weights)).save_pretrained(folder)

    def _card(self, state: TrainerState) -> str:
        pair = self.pair
        note = "\n\n".join(filter(None, (_teacher_note(pair), card_note(pair, self.args)))) or None
        kind = "classifier" if pair.classes else "encoder_decoder" if is_encoder_decoder(pair.student) else "decoder"
        if pair.adapter is not None and self.export == "adapter":
            base = (self.config or {}).get("student", {}).get("model") or pair.student_name
            adapter_note = (
                f"It is a LoRA adapter for {markdown_name(base)}; to load it, install `peft` too. Where its answers "
                "end stands in its generation_config.json, which peft does not read."
            )
            note = f"{note}\n\n{adapter_note}" if note else adapter_note
            kind = "adapter" if kind == "decoder" else kind
        config = describe_run(pair, self.args, self.run) if self.config is None else self.config
        tokenizer = pair.words
        usage = usage_of(kind, tokenizer, "plain" if pair.report.documents else self.args.template)
        step = state.global_step if self._student_step is None else self._student_step
        loss = heldout_loss_at(state, step)
        return model_card(self.run.name, config, loss, note, usage=usage, kind=kind, steps=state.global_step, step=step)


def count_parameters(pair: Pair) -> dict[str, int | None]:
    """Numbers of parameters, the adapter's apart from the student's."""
    student = list(pair.student.parameters())
    adapter = sum(p.numel() for p in student if p.requires_grad) if pair.adapter is not None else 0
    counts: dict[str, int | None] = {"student": sum(p.numel() for p in student) - adapter}
    if pair.adapter is not None:
        counts["adapter"] = adapter
    teacher = pair.teacher
    known = teacher is not None and not isinstance(teacher, ServedTeacher)  # another model may stand for that one
    counts["teacher"] = sum(p.numel() for p in teacher.model.parameters()) if teacher is not None and known else None
    return counts


def describe_data(pair: Pair) -> dict[str, Any]:
    """Numbers of rows, and what was left out of them."""
    report: DropReport = pair.report
    return {
        **({"train_rows": len(pair.rows)} if pair.stream is None else {"rows_read": 0}),
        "heldout_rows": len(pair.eval_rows),
        "dropped": dict(report.dropped),
        "responses_cut": report.responses_cut,
    }


def training_section(args: DistillationConfig, section: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that complete ``section``, so that config.yaml has every value that trains the model."""
    arguments = dict(section.get("arguments") or {})
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)} | _STRATEGIES
    for name, default in defaults.items():
        known = name in OWNED or name in OWN_ARGUMENTS or name in _NOT_RECORDED or name.startswith(("hub_", "trackio"))
        value = _plain(getattr(args, name))
        differs = not known and default is not dataclasses.MISSING and value != default
        if (name in _SETTLED or differs) and _is_plain(value):
            arguments.setdefault(name, value)
    return {"arguments": arguments}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float))


def describe_run(pair: Pair, args: DistillationConfig, run: RunFolder, num_steps: int | None = None) -> dict[str, Any]:
    """The sections of a config.yaml for a run that was made in Python; what was passed as an object is called so."""
    objective: Any = args.make_objective()
    known = settings_of(objective)
    if known is None:
        fields = {f.name: getattr(objective, f.name) for f in getattr(objective, "__dataclass_fields__", {}).values()}
        known = f"{IN_MEMORY}: {objective.name}", fields
    name, fields = known
    device = args.device.type
    teacher = _teacher_config(pair, args)
    train_path, eval_path = pair.data_names
    if pair.eval_dataset is not None:
        eval_path = str(run.eval_rows_path)
    elif not pair.eval_rows:
        eval_path = NO_ROWS
    is_file = train_path.startswith((IN_MEMORY, "bundled:")) or Path(train_path).expanduser().is_file()
    student = StudentConfig(
        init="pretrained",
        model=pair.student_name,
        freeze_embeddings=args.freeze_embeddings,
        disable_dropout=args.disable_dropout,
        dtype="bf16" if pair.student.dtype == torch.bfloat16 else "fp32",
        model_init_kwargs=pair.student_options,
    )
    data = DataConfig.model_validate(
        {
            "path" if is_file else "dataset": train_path,
            "eval_path": eval_path,
            "turns": args.turns,
            "template": args.template,
            **({} if pair.stream is None else {"streaming": True, "shuffle_buffer": args.shuffle_buffer}),
            **pair.lengths._asdict(),
        }
    )
    training = TrainingConfig.model_validate(
        {
            "max_steps": args.max_steps if args.max_steps > 0 else None,
            "num_train_epochs": args.num_train_epochs if args.max_steps < 0 else None,
            "tokens_per_step": args.tokens_per_step,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "same_batches": args.same_batches,
            "learning_rate": args.learning_rate,
            "nan": args.nan,
            "nan_skips": args.nan_skips,
            "precision": args.precision,
            "eval_rows": args.eval_rows,
            "gradient_checkpointing": bool(args.activation_checkpointing),
            "padding_free": args.padding_free,
            "early_stop_patience": args.early_stop_patience,
        }
        | {name: _plain(getattr(args, name)) for name in OWN_ARGUMENTS}
        | _intervals(args, num_steps)
        | {"arguments": training_section(args, {})["arguments"]}
    )
    return {
        "run": {
            "name": re.sub("[^A-Za-z0-9._-]", "-", run.name).lstrip("-._") or "run",
            "dir": str(run.root.parent),
            "seed": args.seed,
            "device": device,
        },
        "task": "generation" if pair.classes is None else "classification",
        "teacher": None if teacher is None else teacher.model_dump(mode="json"),
        "student": student.model_dump(mode="json"),
        "peft": None if pair.adapter is None else {"export": "adapter"} | _adapter_fields(pair.adapter),
        "tokenizer": None,
        "data": data.model_dump(mode="json"),
        "objective": {name: value for name, value in fields.items() if _is_plain(value)} | {"name": name},
        "loss": args.loss_config.model_dump(mode="json"),
        "training": training.resolved(),
        "rollouts": args.rollouts.model_dump(mode="json"),
        "stages": [],
    }


def _intervals(args: DistillationConfig, num_steps: int | None) -> dict[str, int]:
    """``eval_every`` and ``save_every``; a share of the steps is counted as transformers counts it."""
    every: dict[str, int] = {}
    for name in ("eval", "save"):
        steps = getattr(args, f"{name}_steps")
        if steps < 1 and num_steps is None:
            return {}
        every[f"{name}_every"] = int(steps) if steps >= 1 else math.ceil(num_steps * steps)
    return every


def _adapter_fields(adapter: Any) -> dict[str, Any]:
    """The fields of a LoRA config that differ from peft's defaults."""
    config = adapter.peft_config[adapter.active_adapter]
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    try:
        defaults = type(config)()
    except TypeError:
        return {}
    plain = {name: sorted(value) if isinstance(value, set) else _plain(value) for name, value in fields.items()}
    skipped = ("base_model_name_or_path", "task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version")
    return {
        name: value
        for name, value in plain.items()
        if name not in skipped and _is_plain(value) and value != _plain(getattr(defaults, name))
    }


def _teacher_note(pair: Pair) -> str | None:
    """A note on the teacher for readers of results, or None."""
    if isinstance(pair.teacher, ServedTeacher):
        return None  # what the server has under a name is not known
    return None if pair.teacher_name is None else model_note(pair.teacher_name)


def _teacher_config(pair: Pair, args: DistillationConfig) -> TeacherConfig | None:
    """The ``teacher`` section of the pair's record."""
    if pair.teacher is None or pair.teacher_name is None:
        return None
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
    dtype: Any = names.get(str(pair.teacher.model.dtype), "auto")
    if isinstance(pair.teacher, TeacherCache):
        return TeacherConfig(model=pair.teacher_name, cache=str(pair.teacher.folder), dtype=dtype)
    if isinstance(pair.teacher, ServedTeacher):
        return pair.teacher.config
    options = plain_options(args.teacher_model_init_kwargs)
    if args.teacher_model_revision is not None:
        options.setdefault("revision", args.teacher_model_revision)
    return TeacherConfig(
        model=pair.teacher_name,
        remember_mb=args.teacher_remember_mb,
        shard=args.teacher_shard,
        dtype=dtype,
        model_init_kwargs=options,
    )
