"""`DistillationConfig`: `TrainingArguments` with the defaults of drkl and the fields that distillation adds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from drkl.data.config import SHUFFLE_BUFFER
from drkl.errors import DrklError, did_you_mean
from drkl.losses.config import LossConfig
from drkl.models.precision import pick_device, resolve_dtype
from drkl.objectives import Objective, make_objective
from drkl.parsing import parse_json, parse_yaml
from drkl.rollouts.config import PREFIX, RolloutsConfig
from drkl.training import trl
from drkl.training.config import DEFAULT_TOKENS_PER_STEP, default_warmup
from drkl.training.fields import (
    check_accelerator,
    check_refused,
    check_together,
    check_values,
    has_warmup,
)
from drkl.training.needs import check_installed, check_made
from drkl.training.sharding import check_deepspeed, check_fsdp

_log = logging.getLogger("drkl")
_EVAL_STEPS, _SAVE_STEPS = 50, 100
"""Steps between held-out losses and between checkpoints, where neither is given."""

# Numbers, and whether they have to be above 0.
_NUMBERS = {
    "learning_rate": True, "weight_decay": False, "max_grad_norm": False, "eval_steps": True, "save_steps": True,
    "logging_steps": True,
}  # fmt: skip
_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "tokens_per_step": 1,
    "gradient_accumulation_steps": 1, "eval_rows": 1, "early_stop_patience": 1, "teacher_remember_mb": 0,
    "max_tokens": 2, "max_prompt_tokens": 1, "shuffle_buffer": 1, "nan_skips": 1,
}  # fmt: skip
"""Whole numbers, and the least that they can be."""
_TWO_OBJECTIVES = "beta is TRL's name for an objective and stands in its place; give one of the two."
_CHOICE = (str, bool, type(None))
_TEXTS = ("objective_params", "model_init_kwargs", "teacher_model_init_kwargs", "rollout_stop_map")


@dataclass
class DistillationConfig(TrainingArguments):
    """The arguments of a `DistillationTrainer`: every field of `transformers.TrainingArguments`, and those below.

    Defaults that differ from transformers': ``learning_rate`` 5e-4, ``lr_scheduler_type`` cosine, ``warmup_steps`` a
    twentieth of the steps, ``weight_decay`` 0.01, ``logging_steps`` 10, ``seed`` 0, ``save_total_limit`` 2, ``bf16``
    wherever the device has it in hardware, a held-out loss every 50 steps where there is an ``eval_dataset``, a
    checkpoint every 100, and the best of those at the end. ``output_dir`` is a run folder.

    Args:
        objective: a name in `drkl.OBJECTIVES`, an objective, or a function
            ``(student_logp, teacher_logp, labels) -> [n]``.
        objective_params: the hyper-parameters of an objective given by its name.
        temperature: divides both models' logits in the loss; ``rollout_sampling_temperature`` is that of the sampling.
        kd_weight: weight of the objective, in [0, 1]; the rest is cross-entropy with the data, at temperature 1.
        t2_scaling: multiply the objective by the temperature squared.
        per_device_train_batch_size: rows in a micro-batch of one device, in place of ``tokens_per_step``.
        tokens_per_step: input positions, padding included, in a step over all devices; 1024 if neither is set.
        same_batches: give every epoch the batches of the first one, in another order.
        max_prompt_tokens: rows with a longer prompt are dropped. Default: 256, or half of a smaller ``max_tokens``,
            or what leaves room for a response.
        max_tokens: prompt and response together; a longer response is cut at its end (and counted). Default: 512, or
            the models' context.
        turns: "last" (learn the last assistant turn of a conversation) or "all".
        template: how a prompt is written: auto, chat, chat:NAME, alpaca, minillm, plain, or jinja text.
        streaming: read ``train_dataset`` while training goes on, as a `datasets.IterableDataset` always is; needs
            ``max_steps``.
        shuffle_buffer: rows of a stream that are shuffled among each other.
        padding_free: lay the rows of a batch one after the other, without padding, in one line without attention
            across rows: "auto" (on a GPU where both models run a FlashAttention), True or False. For decoder-only
            models; the losses are the same up to rounding.
        freeze_embeddings: keep the token embeddings, and a head tied to them, as they are.
        eval_rows: rows of ``eval_dataset`` for the losses during training, at most.
        early_stop_patience: stop after this number of held-out losses without a new best; None: never.
        nan: what follows where a step's loss or gradient is not finite: "stop" the run, or "skip" the step. A skipped
            step counts as a step and changes nothing; the schedule waits. Weights that are not finite stop every run.
        nan_skips: steps in a row that may be skipped; those that fp16 skips count too, once it has found its scale.
        teacher_remember_mb: memory, in MiB, for the teacher's states of batches already seen (see ``same_batches``).
        teacher_shard: spread the teacher's weights over the processes (FSDP2), in place; without effect in one process.
        precision: auto, fp32, bf16 or fp16; the same as transformers' ``bf16`` and ``fp16`` flags.
        model_init_kwargs: for a ``model`` given by its name: ``dtype``, and what ``from_pretrained`` takes.
        teacher_model_init_kwargs: the same for ``teacher_model``.
        teacher_model_name_or_path: the teacher's name, where the trainer is given no ``teacher_model``.
        teacher_model_revision: a branch, tag or commit of that name.
        beta: TRL's name for the divergence: 0 is ``fkl``, 1 is ``rkl``, between is ``gjs``; in place of ``objective``.
        disable_dropout: set the student's dropout to 0.
        rollout_share: share of the rows of each step that a model answers in place of the data, in [0, 1]; 0 is off.
            A ramp: ``{"from": 0, "to": 1, "steps": 200}``.
        rollout_source: who writes these answers: "student", "mixed" or "teacher".
        rollout_teacher_share: the teacher's weight in "mixed".
        rollout_sampling_temperature: temperature of the sampling (``temperature`` is that of the loss).
        rollout_top_p: sample from the most probable tokens that together have this probability.
        rollout_max_new_tokens: longest answer in tokens. Default: ``max_tokens`` less ``max_prompt_tokens``.
        rollout_refresh_every: optimiser steps that one set of answers serves.
        rollout_replay: share of the answered rows that take an earlier answer.
        rollout_replay_memory: earlier answers that are kept.
        rollout_generator: "builtin", or "vllm" for a vLLM server.
        rollout_server: the server's address.
        rollout_server_folder: folder that the server reads the student's weights from.
        rollout_server_timeout: longest wait for the server, in seconds.
        rollout_stop_map: stop tokens that mean one event, the student's to the teacher's.
        rollout_batch_size: answers that are written at once.
        rollout_eval_prompts: held-out prompts that the student answers in each evaluation during training.
        rollout_keep_texts: answers that each evaluation keeps as text, in ``rollouts.jsonl``.

    Raises:
        DrklError: a field that contradicts another, a value outside its domain, or one that means nothing here.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Warm-up: number of steps, or a share below 1. Default: 5 % of the steps."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Optimiser steps between two lines of train.jsonl."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the log."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed for data order and weight initialisation."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bf16. Default: if the hardware is fast at it."}
    )  # type: ignore[assignment]
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Rows in a micro-batch of one device, in place of tokens_per_step."}
    )
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Rows in a held-out batch. Default: batches of 4096 positions."}
    )
    eval_strategy: Any = field(default=None, metadata={"help": "no, steps or epoch. Default: as save_strategy."})
    eval_steps: float | None = field(default=None, metadata={"help": "Steps between held-out losses. Default: 50."})
    save_steps: float | None = field(default=None, metadata={"help": "Steps between checkpoints. Default: 100."})  # type: ignore[assignment]
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, with the best."})
    load_best_model_at_end: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "End with the weights of the best held-out loss. Default: if it is known."}
    )
    metric_for_best_model: str | None = field(default="eval_loss", metadata={"help": "Number that selects the best."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "False only: unread columns are ignored."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As in transformers."})

    objective: Any = field(default="drkl", metadata={"help": "Name of the objective, an objective, or a function."})
    objective_params: dict[str, Any] | None = field(
        default=None, metadata={"help": "Hyper-parameters of the objective."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits in the loss."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the objective; the rest is cross-entropy."})
    t2_scaling: bool = field(default=False, metadata={"help": "Multiply the objective by temperature squared."})
    tokens_per_step: int | None = field(
        default=None, metadata={"help": "Input positions in an optimiser step. Default: 1024."}
    )
    same_batches: bool = field(default=False, metadata={"help": "Give every epoch the same batches."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Longest prompt, in tokens. Default: 256."})
    max_tokens: int | None = field(default=None, metadata={"help": "Longest row, in tokens. Default: 512."})
    turns: str = field(default="last", metadata={"help": "Turns of the assistant to learn: last or all."})
    template: str = field(default="auto", metadata={"help": "Prompt template, as data.template."})
    streaming: bool = field(default=False, metadata={"help": "Read train_dataset while training goes on."})
    shuffle_buffer: int = field(
        default=SHUFFLE_BUFFER, metadata={"help": "Rows of a stream that are shuffled among each other."}
    )
    padding_free: Any = field(
        default="auto",
        metadata={"help": "Batches without padding: auto (on a GPU with FlashAttention), true or false."},
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Do not train the token embeddings."})
    eval_rows: int = field(default=48, metadata={"help": "Maximum number of rows in a held-out loss."})
    early_stop_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many losses without a new best."}
    )
    nan: str = field(default="stop", metadata={"help": "Of a step that is not finite: stop, or skip it."})
    nan_skips: int = field(default=3, metadata={"help": "Steps in a row that may be skipped."})
    teacher_remember_mb: int = field(default=0, metadata={"help": "Memory in MiB for the teacher's states."})
    teacher_shard: bool = field(default=False, metadata={"help": "Spread the teacher over the processes (FSDP2)."})
    precision: str = field(default="auto", metadata={"help": "Compute precision: auto, fp32, bf16, fp16."})
    model_init_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "For from_pretrained (student)."})
    teacher_model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "For from_pretrained (teacher)."}
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "The teacher's id or folder."})
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the id."})
    beta: float | None = field(default=None, metadata={"help": "TRL's divergence: 0 fkl, 1 rkl, between gjs."})
    disable_dropout: bool = field(default=False, metadata={"help": "Set the student's dropout to 0."})
    rollout_share: Any = field(default=0.0, metadata={"help": "Share of the rows that a model answers. 0 is off."})
    rollout_source: str = field(default="student", metadata={"help": "Writer: student, mixed or teacher."})
    rollout_teacher_share: float = field(default=0.2, metadata={"help": "Weight of the teacher in 'mixed'."})
    rollout_sampling_temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling."})
    rollout_top_p: float = field(default=1.0, metadata={"help": "Probability of the tokens to sample from."})
    rollout_max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer, in tokens."})
    rollout_refresh_every: int = field(default=1, metadata={"help": "Steps that one set of answers serves."})
    rollout_replay: float = field(default=0.0, metadata={"help": "Share of answers taken from earlier ones."})
    rollout_replay_memory: int = field(default=1000, metadata={"help": "Earlier answers that are kept."})
    rollout_generator: str = field(default="builtin", metadata={"help": "Program that samples: builtin or vllm."})
    rollout_server: str | None = field(default=None, metadata={"help": "Address of the vLLM server."})
    rollout_server_folder: str | None = field(default=None, metadata={"help": "Folder for the server's weights."})
    rollout_server_timeout: float = field(default=600.0, metadata={"help": "Longest wait for it, in seconds."})
    rollout_stop_map: dict[str, str] | None = field(
        default=None, metadata={"help": "Stop tokens that mean one event, the student's to the teacher's."}
    )
    rollout_batch_size: int = field(default=64, metadata={"help": "Answers that are written at once."})
    rollout_eval_prompts: int = field(default=16, metadata={"help": "Held-out prompts answered in an evaluation."})
    rollout_keep_texts: int = field(default=4, metadata={"help": "Answers that an evaluation keeps as text."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise DrklError("output_dir is missing: name the run folder, for instance output_dir='runs/x'.")
        for name in _TEXTS:
            self._read_json(name)
        self._check_objective()
        self._check_refused()
        self._check_sizes()
        self._check_padding_free()
        check_together(self)
        check_installed(self)
        self._choose_strategies()
        self._choose_precision()
        warmup_steps, rows = self.warmup_steps, self.per_device_train_batch_size
        try:
            self.warmup_steps = warmup_steps or 0  # transformers compares it with 0
            # For DeepSpeed it is multiplied with. A micro-batch is one item of the training data.
            self.per_device_train_batch_size = 1 if rows is None else rows
            super().__post_init__()
            self.warmup_steps, self.per_device_train_batch_size = warmup_steps, rows
        except (TypeError, ValueError, ImportError) as error:
            raise DrklError(f"DistillationConfig: {' '.join(str(error).split())}") from error
        check_fsdp(self)
        check_deepspeed(self.deepspeed_plugin)
        check_accelerator(self)
        check_made(self)

    def _read_json(self, name: str) -> None:
        """Read a mapping that a command line has as text, as transformers does with its own."""
        if not isinstance(value := getattr(self, name), str):
            return
        with contextlib.suppress(json.JSONDecodeError):
            value = parse_json(value)
        if not isinstance(value, dict):
            raise DrklError(f"{name} is {value!r}; expected a dict, or the json text of one.")
        setattr(self, name, value)

    def _check_objective(self) -> None:
        if self.beta is not None:
            if self.objective != "drkl" or self.objective_params:
                raise DrklError(_TWO_OBJECTIVES)
            self.objective, self.objective_params = trl.objective_of(self.beta)
            self.beta = None
        self.make_objective()
        self.loss_config  # noqa: B018  (checks the numbers of the loss)
        self._check_rollouts()

    def _check_rollouts(self) -> None:
        """Refuse what contradicts sampled answers."""
        if isinstance(self.rollout_share, str):
            with contextlib.suppress(yaml.YAMLError):
                self.rollout_share = parse_yaml(self.rollout_share)
        rollouts = self.rollouts
        for name, value in rollouts.model_dump(mode="json").items():  # plain values, whatever kind of number came
            setattr(self, PREFIX + name, value)
        if not rollouts.is_on:
            return
        objective = self.make_objective()
        if self.kd_weight == 0:
            raise DrklError(
                "kd_weight is 0 and rollout_share is not: cross-entropy sees the data's responses alone, so nothing "
                "would be learnt from the answers that are sampled. Raise kd_weight, or leave rollout_share out."
            )
        if objective.name == "ce" and rollouts.source == "teacher":
            return
        if not objective.needs_teacher:
            raise DrklError(
                f"Objective {objective.name!r} compares with no teacher: on its own answers a student would learn what "
                "it does already. Choose another objective, or rollout_source='teacher'."
            )
        if objective.needs_labels:
            raise DrklError(
                f"Objective {objective.name!r} reads the label (target='label'): in a sampled answer the label is the "
                "sampled token and not the data's, which is another method. Leave target out: it is then the teacher's "
                "most probable token."
            )

    @property
    def plan_seed(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def rollouts(self) -> RolloutsConfig:
        """The settings of sampled answers, as the `rollouts` section of a config has them."""
        values = {name: getattr(self, PREFIX + name) for name in RolloutsConfig.model_fields}
        values["stop_map"] = values["stop_map"] or {}
        try:
            return RolloutsConfig.model_validate(values)
        except ValueError as error:
            errors: Any = error
            first = errors.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            if first["loc"]:
                name = PREFIX + ".".join(str(part) for part in first["loc"])
                reason = f"{name} is {first['input']!r}: {reason[0].lower()}{reason[1:]}"
            raise DrklError(f"{reason}.") from error

    def _check_sizes(self) -> None:
        if self.per_device_train_batch_size is not None and self.tokens_per_step is not None:
            raise DrklError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size} and tokens_per_step "
                f"{self.tokens_per_step}: both say how large a step is. Give rows or tokens, not both."
            )
        for name, lowest in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise DrklError(f"{name} is {value!r}; expected a whole number of at least {lowest}.")
        for name, positive in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in ("eval_steps", "save_steps"):
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (positive and value == 0):
                raise DrklError(f"{name} is {value!r}; expected a number {'above 0' if positive else 'of at least 0'}.")
        if not 0 <= self.seed < 2**32:
            raise DrklError(f"seed is {self.seed}; expected a whole number from 0 to 2**32 - 1.")
        if self.early_stop_patience and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise DrklError("early_stop_patience counts held-out losses, but eval_strategy is 'no'.")
        if self.per_device_train_batch_size is None and self.tokens_per_step is None:
            self.tokens_per_step = DEFAULT_TOKENS_PER_STEP
        if self.max_steps == 0 or self.max_steps < -1:
            raise DrklError(f"max_steps is {self.max_steps}; expected a number of steps, or -1 for num_train_epochs.")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < float("inf"):
            raise DrklError(f"num_train_epochs is {self.num_train_epochs}; expected a number above 0.")
        if self.nan not in ("stop", "skip"):
            raise DrklError(f"nan is {self.nan!r}; expected 'stop' or 'skip'.")
        if self.nan == "skip" and self.deepspeed:
            raise DrklError("nan is 'skip', but DeepSpeed takes a step before it can be left out; use nan='stop'.")
        if self.turns not in ("last", "all"):
            raise DrklError(f"turns is {self.turns!r}; expected 'last' or 'all'.")
        limits = self.max_prompt_tokens, self.max_tokens
        if limits[0] is not None and limits[1] is not None and limits[1] <= limits[0]:
            raise DrklError(
                f"max_tokens ({self.max_tokens}) must be larger than max_prompt_tokens ({self.max_prompt_tokens}): it "
                "counts prompt and response together."
            )

    def _check_padding_free(self) -> None:
        known = {"auto": "auto", "true": True, "false": False, True: True, False: False, None: "auto"}
        value = self.padding_free
        found = known.get(value.lower() if isinstance(value, str) else value) if isinstance(value, _CHOICE) else None
        if found is None:
            raise DrklError(f"padding_free is {value!r}; expected 'auto', True or False.")
        self.padding_free = found

    def _check_refused(self) -> None:
        if self.metric_for_best_model in (None, "loss"):
            self.metric_for_best_model = "eval_loss"
        check_refused(self)
        check_values(self, checked=(*_NUMBERS, *_LEAST))
        if self.dataloader_drop_last and self.per_device_train_batch_size is None:
            raise DrklError(
                "dataloader_drop_last goes with per_device_train_batch_size: steps of tokens_per_step differ in rows."
            )

    def _choose_strategies(self) -> None:
        """When to evaluate and to save, and whether the best can be known."""
        save = str(getattr(self.save_strategy, "value", self.save_strategy))
        if self.eval_strategy is None:
            self.eval_strategy = "epoch" if save == "epoch" else "steps"
        evaluate = str(getattr(self.eval_strategy, "value", self.eval_strategy))
        if self.eval_steps is None:
            self.eval_steps = _EVAL_STEPS if self.save_steps is None else self.save_steps
        if self.save_steps is None:
            self.save_steps = 2 * self.eval_steps if self.eval_steps >= 1 else self.eval_steps
        fits = evaluate == save and (save != "steps" or _is_multiple(self.save_steps, self.eval_steps))
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = fits or save == "best"
        elif self.load_best_model_at_end and save not in ("no", "best") and evaluate != "no" and not fits:
            raise DrklError(
                f"load_best_model_at_end needs a held-out loss at every checkpoint, but save_strategy is {save!r} "
                f"(save_steps {self.save_steps}) and eval_strategy {evaluate!r} (eval_steps {self.eval_steps}). Make "
                "save_steps a multiple of eval_steps, or leave load_best_model_at_end out."
            )
        if save == "no" or evaluate == "no":
            self.load_best_model_at_end = False
        self.greater_is_better = False

    def _choose_precision(self) -> None:
        flags = {"bf16": self.bf16, "fp16": self.fp16}
        chosen = [name for name, value in flags.items() if value]
        if len(chosen) == 2:
            raise DrklError("bf16 and fp16 are both set; choose one.")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise DrklError(f"precision is {self.precision!r}; expected auto, fp32, bf16 or fp16.")
        if chosen and self.precision not in ("auto", chosen[0]):
            raise DrklError(f"{chosen[0]} is set and precision is {self.precision!r}; give one of the two.")
        device = torch.device("cpu") if self.use_cpu else pick_device("auto")
        self.use_cpu = device.type == "cpu"  # without it transformers refuses bf16 on a CPU
        if chosen:
            self.precision = chosen[0]
        elif self.precision == "auto":
            self.precision = "fp32" if self.bf16 is False else resolve_dtype("auto", device)
        if self.precision == "fp16" and device.type != "cuda":
            raise DrklError(f"The precision is fp16, which needs CUDA, but the device is {device.type}; use bf16.")
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"

    def make_objective(self) -> Objective:
        """The objective itself."""
        return make_objective(self.objective, **(self.objective_params or {}))

    @property
    def loss_config(self) -> LossConfig:
        """The loss around the objective."""
        try:
            return LossConfig(temperature=self.temperature, kd_weight=self.kd_weight, t2_scaling=self.t2_scaling)
        except ValueError as error:
            errors: Any = error
            first = errors.errors()[0]
            raise DrklError(f"{first['loc'][0]} is {first['input']!r}: {first['msg'].lower()}.") from error

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps of a run of so many steps."""
        if not has_warmup(self):
            return 0
        if self.warmup_steps is None:
            return default_warmup(num_training_steps)
        return int(super().get_warmup_steps(num_training_steps))

    @property
    def train_batch_size(self) -> int:
        """The data loader's batch size, 1: an item of the training data is a micro-batch already."""
        return 1

    @property
    def eval_batch_size(self) -> int:
        """Rows in a held-out batch, where they are counted."""
        return self.per_device_eval_batch_size or 1

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with an objective by its name."""
        values: dict[str, Any] = _by_name(self)._plain_dict()
        return values

    def _plain_dict(self) -> dict[str, Any]:
        return super().to_dict()

    def __getstate__(self) -> dict[str, Any]:
        # transformers pickles its arguments beside a checkpoint; a function of one's own may have no pickle.
        return self.__dict__ | {"objective": _name(self.objective)}


def _name(objective: Any) -> str:
    return objective if isinstance(objective, str) else make_objective(objective).name


def _by_name(config: DistillationConfig) -> DistillationConfig:
    if isinstance(config.objective, str):
        return config
    copy = object.__new__(type(config))
    copy.__dict__ |= config.__dict__ | {"objective": _name(config.objective)}
    return copy


def _is_multiple(large: float, small: float) -> bool:
    ratio = large / small
    return abs(ratio - round(ratio)) < 1e-9 and ratio >= 1


_generated = DistillationConfig.__init__


@functools.wraps(_generated)
def _init(self: DistillationConfig, *args: Any, **kwargs: Any) -> None:
    known = [f.name for f in dataclasses.fields(DistillationConfig)]
    fields = trl.translate(kwargs, known)
    for name in fields:
        if name not in known:
            raise DrklError(f"DistillationConfig has no field {name!r}.{did_you_mean(name, known)}")
    # A command line gives every field, those that were not named too.
    if kwargs.get("beta") is not None and "objective" in kwargs and not kwargs.keys() >= set(known):
        raise DrklError(_TWO_OBJECTIVES)
    try:
        _generated(self, *args, **fields)
    except DrklError as error:
        named = trl.in_words_of(error, kwargs)
        raise named from (None if named is error else error)
    if self.process_index == 0:
        for note in trl.notes(kwargs, self) or self.rollouts.notes(PREFIX):
            _log.warning("Warning: %s", note)


# The generated one says of a name from TRL only that it is unexpected.
DistillationConfig.__init__ = _init  # type: ignore[method-assign]
# HfArgumentParser makes a flag of a field by its annotation; on a command line these are texts.
for _field in ("objective", "lr_scheduler_type", "eval_strategy", "rollout_share", "padding_free", *_TEXTS):
    DistillationConfig.__annotations__[_field] = "dict[str, Any] | str | None"
