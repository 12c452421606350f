"""One typed config per run: a yaml file plus dotted overrides; an unknown key is an error."""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drkl.analysis.config import AnalysisConfig
from drkl.data.config import DataConfig, TokenizerConfig
from drkl.data.lengths import Lengths
from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.config import EvaluationConfig
from drkl.losses.config import LossConfig
from drkl.models.config import PeftConfig, StudentConfig
from drkl.objectives.config import ObjectiveConfig
from drkl.objectives.registry import settings_of
from drkl.parsing import parse_yaml
from drkl.recipes import find_recipe
from drkl.rollouts.config import RolloutsConfig, in_words_of_config
from drkl.runs import RunFolder, read_yaml, unexpanded
from drkl.teachers.config import TeacherConfig
from drkl.training.config import (
    NAME_PATTERN,
    RunConfig,
    TrainingConfig,
    as_name,
    choose_one,
    default_warmup,
)
from drkl.training.served import check_settings
from drkl.training.spec import RunSpec

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class StageConfig(BaseModel):
    """A run before the last one: what it changes; whatever it leaves out is as in the sections above."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name of the stage; its run folder is stages/NN-name/.", pattern=NAME_PATTERN)
    data: dict[str, Any] = Field(default_factory=dict, description="Fields of data that differ in this stage.")
    objective: dict[str, Any] = Field(default_factory=dict, description="Objective of the stage.")
    loss: dict[str, Any] = Field(default_factory=dict, description="Fields of loss that differ in this stage.")
    training: dict[str, Any] = Field(default_factory=dict, description="Fields of training that differ in this stage.")
    rollouts: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of rollouts that differ in this stage. Without a share of its own a stage trains on the "
        "data's responses alone.",
    )


class Config(BaseModel):
    """A whole run. The sections describe the last stage; ``stages`` come before it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunConfig = Field(default_factory=RunConfig)
    task: Literal["generation", "classification"] = Field(
        "generation", description="generation, or classification of texts by sequence classifiers."
    )
    teacher: TeacherConfig | None = Field(default_factory=TeacherConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    peft: PeftConfig | None = Field(None, description="Fields of peft.LoraConfig for a LoRA student; null for none.")
    tokenizer: TokenizerConfig | None = None
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    rollouts: RolloutsConfig = Field(default_factory=RolloutsConfig)
    stages: list[StageConfig] = Field(default_factory=list, description="Runs before this one, first to last.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = Field(default_factory=AnalysisConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        needs = self.loss.kd_weight > 0 and self.objective.make().needs_teacher
        if self.teacher is None and needs:
            raise ValueError(f"objective {self.objective.name!r} compares with a teacher, but teacher is null")
        if self.teacher is None and self.analysis.watch_every is not None:
            raise ValueError(
                "analysis.watch_every looks at what pushes the student towards its teacher, but teacher is null; leave "
                "it out"
            )
        scratch = self.student.model_type is not None
        if self.teacher is None and self.student.model is None and not scratch:
            raise ValueError(
                f"student.init is {self.student.init!r} and teacher is null; name a model in student.model, or an "
                "architecture with init: random and config: {model_type: gpt2, ...}"
            )
        if self.tokenizer is not None and (self.teacher is not None or not scratch):
            raise ValueError(
                "tokenizer learns a new one, which fits no model that is there: it goes with teacher: null and "
                "student.config: {model_type: gpt2, ...} only. Drop the tokenizer section otherwise"
            )
        if scratch and self.teacher is None and self.tokenizer is None:
            raise ValueError(
                "student.config names an architecture, but nothing brings a tokenizer; set tokenizer: {train: bpe, "
                "vocab_size: 8192}, or a teacher"
            )
        if self.student.init == "pretrained" and self.student.model is None:
            raise ValueError("student.init is 'pretrained', but student.model names no model")
        if self.peft is not None and self.peft.export == "adapter" and self.student.init != "pretrained":
            raise ValueError(
                f"peft.export is 'adapter', but student.init is {self.student.init!r}: the weights that the adapter "
                "belongs to would lie nowhere. Use export: merged, or start from a pretrained student"
            )
        if self.rollouts.is_on and self.teacher is None:
            raise ValueError("rollouts.share is above 0, but teacher is null: nothing would judge the sampled answers")
        if self.teacher is not None and self.teacher.is_served:
            check_settings(self.objective.make(), self.loss, self.rollouts)
        self._check_classification()
        self._check_streaming()
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages have the same name: {', '.join(names)}")
        return self

    def _check_classification(self) -> None:
        """Refuse settings that contradict ``task: classification``."""
        if self.task != "classification":
            return
        formats = {source.format for source in self.data.all_sources()}
        checks = [
            (self.peft is not None, "peft is set: LoRA leaves the head as it is, and a classifier's is new"),
            (not formats <= {"auto", "text_label"}, "data.format takes text_label only: rows with text and label"),
            (self.data.turns != "last", "data.turns is about conversations"),
            (self.data.template != "auto", "data.template is about prompts; a classifier reads the text as it is"),
            (self.student.encoder_layers is not None, "student.encoder_layers is about language models"),
            (
                self.teacher is not None and self.teacher.server is not None,
                "teacher.server is of language models",
            ),
            (self.rollouts.is_on, "rollouts.share is above 0: classifiers write no answers"),
            (any(s.weight != 1 for s in self.data.sources), "data.sources[].weight repeats rows of language models"),
        ]
        for wrong, why in checks:
            if wrong:
                raise ValueError(f"task is 'classification', and {why}; leave it out")

    def _check_streaming(self) -> None:
        """Refuse settings that need all training rows at once, or the end of them."""
        if not self.data.streaming:
            return
        training, teacher = self.training, self.teacher
        strategies = ("eval_strategy", "save_strategy", "logging_strategy")
        by_epoch = next((name for name in strategies if training.arguments.get(name) == "epoch"), None)
        checks = [
            (training.max_steps is None, "a stream has no end that is known: give training.max_steps in place of "
             "num_train_epochs"),
            (training.same_batches, "a stream gives no batch again: leave training.same_batches out"),
            (teacher is not None and teacher.remember_mb > 0, "a stream gives no batch again, so there is nothing to "
             "remember: leave teacher.remember_mb out"),
            (teacher is not None and teacher.fill_cache, "the rows that a cache lacks are added before the first step: "
             "leave teacher.fill_cache out, and use a cache that has the rows of the stream"),
            (self.tokenizer is not None, "a tokenizer is learnt from all of the text: leave the section tokenizer out, "
             "and name a model or a folder that has one"),
            (self.rollouts.is_on, "a stream is read for its responses: leave rollouts.share at 0"),
            (by_epoch is not None, f"a stream has no epochs: training.arguments.{by_epoch} is 'epoch'; count steps"),
        ]  # fmt: skip
        for wrong, why in checks:
            if wrong:
                raise ValueError(f"data.streaming is true, and {why}")

    def specs(self) -> list[RunSpec]:
        """The runs, first to last; the last one's folder is ``run.dir/run.name``."""
        *stages, last = self.runs()
        specs = [_spec(stage, stage.folder, resolve(stage)) for stage in stages]
        return [*specs, _spec(last, self.folder, resolve(self))]

    @property
    def folder(self) -> RunFolder:
        """The run's own folder, ``run.dir/run.name``; that of the last stage."""
        return RunFolder(unexpanded(Path(self.run.dir) / self.run.name))

    def runs(self) -> list[Config]:
        """The config of each run by itself, first to last, with what a stage inherits and the student it starts from.

        The last one has the sections of this config, and no stages.
        """
        root = self.folder.root
        runs, student = [], self.student
        for number, stage in enumerate(self.stages, start=1):
            folder = RunFolder(root / "stages" / f"{number:02d}-{stage.name}")
            runs.append(self._stage(stage, student, folder, number - 1))
            student = self.student_from(folder.student_path)
        # A later stage has the tokenizer of the first.
        changes = {"student": student, "stages": [], "tokenizer": None if runs else self.tokenizer}
        return [*runs, self.model_copy(update=changes)]

    def student_from(self, folder: Path) -> StudentConfig:
        """The student's section of a run that starts from the student of another one."""
        return StudentConfig(
            init="pretrained",
            model=str(folder),
            dtype=self.student.dtype,
            freeze_embeddings=self.student.freeze_embeddings,
            disable_dropout=self.student.disable_dropout,
        )

    def values(self, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """The config as a mapping that is read as the same one; what fits the models where it is not given stays so."""
        values = self.model_dump(mode=mode)
        for length in Lengths._fields:
            if length not in self.data.given_lengths:
                del values["data"][length]
        if "max_new_tokens" not in self.evaluation.model_fields_set:
            del values["evaluation"]["max_new_tokens"]
        return values

    def _stage(self, stage: StageConfig, student: StudentConfig, folder: RunFolder, index: int) -> Config:
        values = self.values()
        values["run"] |= {"name": folder.name, "dir": str(folder.root.parent)}
        values["student"] = student.model_dump()
        values["stages"] = []
        if self.peft is not None:
            values["peft"]["export"] = "merged"  # the next stage starts from an ordinary model
        if index:
            values["tokenizer"] = None
        values["rollouts"] |= {"share": 0.0}
        for section in ("data", "loss", "training", "rollouts"):
            values[section] = _merge(values[section], getattr(stage, section))
        choose_one(values["training"], stage.training)
        other = stage.objective.get("name", self.objective.name) != self.objective.name
        values["objective"] = stage.objective if other else values["objective"] | stage.objective
        return _validate(values, prefix=f"stages.{index}.")


def _spec(config: Config, folder: RunFolder, resolved: dict[str, Any]) -> RunSpec:
    parts = (config.run, config.teacher, config.student, config.data, config.objective, config.loss, config.training)
    return RunSpec(
        folder,
        *parts,
        resolved,
        peft=config.peft,
        task=config.task,
        tokenizer=config.tokenizer,
        rollouts=config.rollouts,
    )


def resolve(config: Config) -> dict[str, Any]:
    """The config with every default written out, ``auto`` replaced by what it means on this machine."""
    from drkl.models.precision import pick_device, resolve_dtype

    values = config.model_dump(mode="json")
    if "max_new_tokens" not in config.evaluation.model_fields_set:
        del values["evaluation"]["max_new_tokens"]  # an evaluation fits it to the models and the prompts
    values["run"]["name"] = as_name(config.run.name)  # of a run whose folder was renamed
    device = pick_device(config.run.device)
    values["run"]["device"] = device.type
    # What a cache or a server has is in the dtype that it is in, whatever this machine is fast at.
    if config.teacher is not None and config.teacher.cache is None and not config.teacher.is_served:
        values["teacher"]["dtype"] = resolve_dtype(config.teacher.dtype, device)
    values["training"] = config.training.resolved()
    values["training"]["precision"] = resolve_dtype(config.training.precision, device)
    for stage in values["stages"]:
        # Written out for each: a stage would inherit the warm-up of the last one.
        stage["training"].setdefault("warmup_steps", _warmup_of_stage(config.training, stage["training"]))
    known = None if config.objective.in_memory else settings_of(config.objective.make())
    values["objective"] = {"name": config.objective.name} | (config.objective.params if known is None else known[1])
    return values


def _warmup_of_stage(training: TrainingConfig, stage: dict[str, Any]) -> Any:
    """The warm-up steps of a stage that says nothing of them; None where its number of steps is not known yet."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    merged = _merge(training.model_dump(), stage)
    choose_one(merged, stage)
    steps = merged["max_steps"]
    return default_warmup(steps) if isinstance(steps, int) and steps > 0 else None


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Read a config and apply dotted overrides.

    Args:
        source: a yaml file, the name of a recipe that ships with drkl, or the mapping itself.
        overrides: ``section.key=value`` with a yaml value; a stage's by its number or name:
            ``stages.warmup.training.max_steps=20``.

    Returns:
        The config, and what has to be said about the overrides and about settings without an effect.

    Raises:
        DrklError: a missing or broken file, an unknown key, a value out of range.
    """
    values = plain_numbers(copy.deepcopy(source) if isinstance(source, dict) else read_yaml(find_recipe(source)))
    notes: list[str] = []
    parsed = [_parse_override(text) for text in overrides]
    _drop_other_objective(values, parsed, notes)
    for keys, value in parsed:
        _set(values, keys, value)
    _choose_steps(values, [keys for keys, _ in parsed], notes)
    config = _validate(values)
    return config, notes + _rollout_notes(config)


def _rollout_notes(config: Config) -> list[str]:
    """Settings of sampled answers that no stage reads."""
    rollouts = [spec.rollouts for spec in config.specs()]
    notes = []
    for number, stage in enumerate(config.stages):
        names = [name for name in stage.rollouts if name != "share"]
        if names and not rollouts[number].is_on:
            where = f"stages.{number}.rollouts"
            notes.append(
                f"{where} has no share, so that its stage samples no answer: {', '.join(names)} has no effect."
            )
    if config.rollouts.is_on or not any(section.is_on for section in rollouts):
        notes += config.rollouts.notes("rollouts.")
    return notes


def _choose_steps(values: dict[str, Any], overridden: Sequence[Sequence[str]], notes: list[str]) -> None:
    """An override of how long training goes on, or how large a step is, replaces what the recipe says of it."""
    for keys in overridden:
        section = _find(values, keys[:-1]) if len(keys) > 1 and keys[-2] == "training" else None
        if isinstance(section, dict):
            same_section = {other[-1] for other in overridden if other[:-1] == keys[:-1]}
            for name in choose_one(section, same_section):
                notes.append(f"{'.'.join(keys)}: the recipe's {name} is dropped; the two exclude each other.")


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip(" ."):
        raise DrklError(f"{text!r} is no override; expected section.key=value, e.g. training.max_steps=50.")
    try:
        value = parse_yaml(raw)
    except yaml.YAMLError as error:
        raise DrklError(
            f"The value of the override {text[:200]!r} is not valid yaml: {' '.join(str(error).split())}. Put text "
            "with braces or colons into quotes of its own, as in 'data.template=\"Q: {{ prompt }}\"'."
        ) from error
    return key.strip().split("."), plain_numbers(value)


def plain_numbers(value: Any) -> Any:
    """A value of yaml 1.1, which reads 1e-3 as text, as a person means it: as a number."""
    if isinstance(value, dict):
        return {key: plain_numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _drop_other_objective(values: dict[str, Any], parsed: list[tuple[list[str], Any]], notes: list[str]) -> None:
    """Another objective's name leaves the recipe's fields of the old one without meaning."""
    for keys, value in parsed:
        if len(keys) < 2 or keys[-2:] != ["objective", "name"]:
            continue
        section = _find(values, keys[:-1])
        kept = {other[-1] for other, _ in parsed if other[:-1] == keys[:-1]}
        if not isinstance(section, dict) or section.get("name", "drkl") == value:
            continue
        dropped = {k: v for k, v in section.items() if k not in kept}
        for key in dropped:
            del section[key]
        if dropped:
            fields = ", ".join(f"{k}={v}" for k, v in dropped.items())
            notes.append(
                f"{'.'.join(keys)}={value}: the recipe's {fields} belonged to another objective and is dropped."
            )


def _find(values: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(values, list):
            values = values[_stage_index(values, key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return None
    return values


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    place: Any = values
    for key in keys[:-1]:
        if isinstance(place, list):
            place = place[_stage_index(place, key)]
            continue
        if not isinstance(place, dict):
            break
        if not isinstance(place.get(key), (dict, list)):
            place[key] = [] if key == "stages" else {}
        place = place[key]
    if not isinstance(place, (dict, list)):
        raise DrklError(f"{'.'.join(keys)}: there is no section to set this in, only {place!r}.")
    if isinstance(place, list):
        place[_stage_index(place, keys[-1])] = value
    else:
        place[keys[-1]] = value


def _stage_index(stages: list[Any], key: str) -> int:
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(stages):
        return int(key)
    known = ", ".join(f"{i} ({name})" for i, name in enumerate(names)) or "none"
    raise DrklError(f"There is no stage {key!r}; the config's stages: {known}.")


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validate(values: dict[str, Any], prefix: str = "") -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise DrklError(_explain(error, prefix)) from error
    if not prefix:
        config.specs()  # every stage has to be valid too
    return config


def _explain(error: ValidationError, prefix: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        where = prefix + ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _keys_beside(problem["loc"])
            message = f"unknown key.{did_you_mean(str(problem['loc'][-1]), known)} Known here: {', '.join(known)}."
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, got {reprlib.repr(problem['input'])}"
        message = in_words_of_config(message)
        named = where == "rollouts" and message.startswith("rollouts.")
        lines.append(message if named else f"{where or 'config'}: {message}")
    return "\n".join(lines)


def _keys_beside(loc: Sequence[int | str]) -> list[str]:
    model: Any = Config
    for part in loc[:-1]:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = _section_of(model.model_fields[part].annotation)
    return list(model.model_fields) if model is not None else []


def _section_of(annotation: Any) -> Any:
    """The model that a field holds, or holds many of; None where it may be a plain value too."""
    candidates = [c for c in getattr(annotation, "__args__", (annotation,)) if c not in (type(None), ...)]
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return models[0] if models and len(models) == len(candidates) else None


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Every key of a config: (dotted name, default, one-line meaning)."""
    yield from _describe(Config, "")


def _describe(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        if section is not None:
            many = name in ("stages", "sources")
            if many:
                yield f"{prefix}{name}", "[]", info.description or ""
            yield from _describe(section, f"{prefix}{name}{'[]' if many else ''}.")
            continue
        default = info.get_default(call_default_factory=True)
        text = "required" if info.is_required() else "null" if default is None else _yaml(default)
        yield f"{prefix}{name}", text, info.description or ""


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n...\n").strip()
