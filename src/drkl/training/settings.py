"""The settings of a run that may be others when it goes on, and those that move its numbers, which may not."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainingArguments

from drkl.data.config import DataConfig
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.models.config import StudentConfig
from drkl.rollouts.config import RolloutsConfig
from drkl.teachers.config import TeacherConfig
from drkl.training.config import TrainingConfig

MAY_CHANGE: Mapping[str, str] = {
    "run.name": "where the run lies",
    "run.dir": "where the run lies",
    "run.device": "told as a part of the machine",
    "training.logging_steps": "what is logged",
    "training.arguments.log*": "what is logged",
    "training.arguments.report_to": "what is logged",
    "training.arguments.run_name": "what is logged",
    "training.arguments.project": "what is logged",
    "training.arguments.trackio*": "what is logged",
    "training.arguments.disable_tqdm": "what is logged",
    "training.arguments.include_num_input_tokens_seen": "what is logged",
    "training.arguments.skip_memory_metrics": "what is logged",
    "training.arguments.eval_on_start": "what is logged",
    "training.arguments.save_total_limit": "what is saved",
    "training.arguments.save_on_each_node": "what is saved",
    "training.arguments.enable_jit_checkpoint": "what is saved",
    "training.arguments.hub_*": "what is saved",
    "training.arguments.push_to_hub": "what is saved",
    "peft.export": "what is saved",
    "training.nan": "acts on numbers that are not finite alone",
    "training.nan_skips": "acts on numbers that are not finite alone",
    "training.arguments.dataloader_num_workers": "who reads the batches",
    "training.arguments.dataloader_prefetch_factor": "who reads the batches",
    "training.arguments.dataloader_persistent_workers": "who reads the batches",
    "training.arguments.dataloader_pin_memory": "who reads the batches",
    "training.arguments.dataloader_multiprocessing_context": "who reads the batches",
    "training.arguments.ddp_backend": "how processes talk",
    "training.arguments.ddp_timeout": "how processes talk",
    "training.arguments.torch_empty_cache_steps": "what memory is kept",
    "teacher.remember_mb": "what memory is kept",
    "teacher.fill_cache": "what a cache is given",
    "teacher.server_timeout": "how a server is asked",
    "teacher.server_requests": "how a server is asked",
    "rollouts.server": "how a server is asked",
    "rollouts.server_folder": "how a server is asked",
    "rollouts.server_timeout": "how a server is asked",
    "rollouts.eval_prompts": "what is logged",
    "rollouts.keep_texts": "what is logged",
    "evaluation.*": "what follows the training",
    "analysis.*": "looks on, and leaves the student as it is",
}
"""Settings of a config, with an asterisk for any others that begin so, which move no number of a run: it goes on to
the bytes that it would have had."""
DIVIDES: Mapping[str, str] = {
    "training.arguments.gradient_accumulation_steps": "parts of a step",
    "training.per_device_train_batch_size": "parts of a step, as long as it has as many rows",
    "training.gradient_checkpointing": "layers that are computed twice",
    "training.arguments.activation_checkpointing_kwargs": "layers that are computed twice",
    "training.arguments.ddp_*": "how processes talk",
    "teacher.shard": "parts of the teacher",
    "rollouts.batch_size": "answers that are written at once",
}
"""Those that divide the work of a step, as the number of processes does: the step is the same up to rounding (and to
the draws of a dropout), which is told."""
CHOOSES_BEST: Mapping[str, str] = {
    "training.eval_every": "when the best is looked for",
    "training.save_every": "when the best is looked for",
    "training.eval_rows": "by what the best is chosen",
    "training.arguments.eval_*": "when the best is looked for",
    "training.arguments.save_strategy": "when the best is looked for",
    "training.arguments.per_device_eval_batch_size": "by what the best is chosen",
}
"""Those that may change where no checkpoint is chosen as the best, nor a run stopped, by a held-out loss."""
BY_CONTENT: Mapping[str, str] = {
    "teacher.model": "teacher", "teacher.cache": "teacher", "teacher.server": "teacher", "teacher.tokenizer": "teacher",
    "teacher.dtype": "teacher",
    "student.init": "student", "student.model": "student", "student.layers": "student",
    "student.encoder_layers": "student", "student.config*": "student", "student.dtype": "student",
    "tokenizer*": "tokenizer",
    "data.path": "rows", "data.dataset": "rows", "data.sources": "rows", "data.eval_path": "rows",
    "data.eval_max_rows": "rows", "data.max_rows": "rows", "data.format": "rows", "data.turns": "rows",
    "data.template": "rows",
    "stages": "earlier runs",
} | {
    f"{model}.model_init_kwargs.{name}": model
    for model in ("teacher", "student")
    for name in ("revision", "subfolder", "variant", "cache_dir", "local_files_only", "force_download", "token",
                 "use_safetensors", "proxies", "max_memory", "low_cpu_mem_usage", "offload_folder")
}  # fmt: skip
"""Those that say where weights, texts and rows come from: what comes of them is compared in their place."""
_PLACES = (
    "teacher.model", "teacher.cache", "teacher.server", "teacher.tokenizer", "student.model", "data.path",
    "data.dataset", "data.sources", "data.eval_path", "stages", "*.model_init_kwargs.*",
)  # fmt: skip
"""The ones among them that are places: what lies there is told instead."""
_FITTED = ("data.max_prompt_tokens", "data.max_tokens")
"""What fits the models where it is not given, and so is known once they are."""
STAGES = "the stages before"
ROWS_PER_STEP = "rows in a step over all processes"
BEST = "training.arguments.load_best_model_at_end"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SECTIONS: Mapping[str, type[BaseModel]] = {
    "data": DataConfig, "teacher": TeacherConfig, "student": StudentConfig, "loss": LossConfig,
    "rollouts": RolloutsConfig, "training": TrainingConfig,
}  # fmt: skip


class InputsChanged(DrklError):
    """A run is to go on with other inputs than it began with."""


def changed(run: str | Path, found: Sequence[str]) -> InputsChanged:
    """The error of a run that is to go on with other inputs.

    Args:
        run: its folder.
        found: what is another, each with what it was and what it is.
    """
    return InputsChanged(
        f"The run in {str(run)!r} began with other inputs than it is to go on with: {'; '.join(found)}. Put them back "
        "as they were, or start a new run: choose another run.name, or replace this one."
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by their dotted names.

    >>> dict(flat({"a": {"b": 1, "c": []}, "d": None}))
    {'a.b': 1, 'a.c': [], 'd': None}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_listed(name: str, patterns: Mapping[str, str] | tuple[str, ...]) -> bool:
    """Whether a dotted name is one of some patterns, or begins as one that ends in an asterisk."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def counted(config: Mapping[str, Any], *, chooses_best: bool) -> dict[str, dict[str, Any]]:
    """Sort the settings of a config in which every value is settled; those that may change are left out.

    Args:
        config: the sections of a config.yaml.
        chooses_best: whether a held-out loss chooses a checkpoint, or stops the run.

    Returns:
        The settings by their dotted names: those that move a number under ``settings``, those of `CHOOSES_BEST` under
        ``best`` (empty where nothing is chosen), those of `DIVIDES` under ``divides``, and those of `BY_CONTENT` that
        are no places under ``content``.
    """
    found: dict[str, dict[str, Any]] = {"settings": {}, "best": {}, "divides": {}, "content": {}}
    for name, value in flat(config):
        plain = _plain(value)
        if is_listed(name, MAY_CHANGE) or (name in _arguments() and plain == _arguments()[name]):
            continue
        if is_listed(name, BY_CONTENT):
            kind = None if is_listed(name, _PLACES) else "content"
        elif is_listed(name, DIVIDES):
            kind = "divides"
        elif is_listed(name, CHOOSES_BEST):
            kind = "best" if chooses_best else None
        else:
            kind = "settings"
        if kind is not None:
            found[kind][name] = plain
    found["settings"][STAGES] = [stage["name"] for stage in config.get("stages") or []]
    return found


def _plain(value: Any) -> Any:
    """A value as json has it; of an object in memory without its address."""
    return json.loads(_ADDRESS.sub("", json.dumps(value, default=str)))


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names that have another value, each with both of them.

    >>> list(changes({"objective.gamma": 0.5, "run.seed": 1}, {"objective.gamma": 0.3, "run.seed": 1}))
    ['objective.gamma: 0.5 then, 0.3 now']
    """
    for name in {**then, **now}:
        # Defaults are left out of some configs; a setting that an older version did not have is as if it were left out.
        before, after = (values[name] if name in values else _default(name) for values in (then, now))
        if before != after:
            yield f"{name}: {_told(before)} then, {_told(after)} now"


def _default(name: str) -> Any:
    if name in (defaults := _arguments()):
        return defaults[name]
    section, _, key = name.partition(".")
    field = _SECTIONS[section].model_fields.get(key) if section in _SECTIONS else None
    return None if field is None else _plain(field.get_default(call_default_factory=True))


@functools.cache
def _arguments() -> dict[str, Any]:
    """The defaults of transformers' own arguments, by their names in a config."""
    return {f"training.arguments.{f.name}": _plain(f.default) for f in dataclasses.fields(TrainingArguments)}


def _told(value: Any) -> str:
    """A value in a message.

    >>> [_told(value) for value in (None, True, 0.5, "a", ["a", 1])]
    ['not set', 'true', '0.5', "'a'", '["a", 1]']
    """
    if value is None:
        return "not set"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def of_configs(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What moves a number and is another in a config that is to go on with a run, before anything is loaded for it.

    Args:
        then: the run's config.yaml.
        now: the other config, with every value that is settled before anything is loaded.
    """
    sides = [counted(config, chooses_best=True) for config in (then, now)]
    before, after = (side["settings"] | side["best"] for side in sides)
    for name in {**before, **after}:
        # What was left to be settled: here it still is, or the run was cut off before it was written there.
        is_open = name == "training.warmup_steps" and None in (before.get(name), after.get(name))
        is_open |= name.startswith("training.arguments.") and name not in before
        if is_open or name in _FITTED:
            before.pop(name, None)
            after.pop(name, None)
    return list(changes(before, after))


def has_other_sources(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two configs take weights, texts or rows from other places, or in another way."""
    before, after = (
        {name: _plain(value) for name, value in flat(config) if is_listed(name, BY_CONTENT) or name in _FITTED}
        for config in (then, now)
    )
    return before != after
