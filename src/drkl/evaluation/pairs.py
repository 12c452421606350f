"""A student, a teacher and held-out rows, checked and ready to be evaluated or analysed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from drkl.data.config import DataConfig
from drkl.data.lengths import NO_LIMIT, Room, fit_lengths
from drkl.data.rows import Rows, dataset_items, rows_from
from drkl.data.seq2seq import set_languages
from drkl.data.tokenize import DropReport
from drkl.errors import DrklError
from drkl.evaluation.bookkeeping import Source
from drkl.evaluation.cached import as_cache, put_cache
from drkl.evaluation.config import MINILLM_DATA
from drkl.evaluation.store import fingerprint
from drkl.evaluation.suites import name_rows, parse_suite, read_suite
from drkl.models.classes import check_classes, class_names, is_classifier
from drkl.models.config import StudentConfig
from drkl.models.context import room_of
from drkl.models.ends import listed_ends
from drkl.models.forward import is_encoder_decoder
from drkl.models.load import load_classifier, load_config, load_model, load_tokenizer
from drkl.models.pair import check_rows, check_same_family, check_tokenizers, shared_vocabulary
from drkl.models.precision import DtypeLike, has_device, pick_device, resolve_dtype
from drkl.objectives.decoupled import GAMMA
from drkl.runs import IN_MEMORY, RunFolder
from drkl.teachers.cached import TeacherCache
from drkl.teachers.shards import check_is_no_cache

Model = str | os.PathLike[str] | PreTrainedModel
"""A model in memory, or the folder or Hub id of one."""

LOAD = "With the teacher itself in its place everything is measured."


class Inputs(NamedTuple):
    """Everything that is measured, and on what."""

    models: dict[str, Source]
    """By the names in `drkl.evaluation.result.MODELS`."""
    tokenizer: Any
    rows: Rows
    suites: list[str] | None
    """The suite of each row, where named suites were asked for."""
    device: torch.device
    data: dict[str, Any]
    """The source of the rows, and the number of dropped rows."""
    vocab_size: int | None
    """The number of token ids on which the models are compared; None for all."""
    classes: tuple[str, ...] | None
    """The names of a classifier's classes, by number."""
    gamma: float
    """DRKL's, of the run's objective."""
    facts: dict[str, Any]
    """Settings for the record: what the models are, the template, the protocol."""
    name: str = "evaluation"
    """The run's, or the student's."""
    template: str = "auto"
    """How the prompts are written, as `DataConfig.template`."""
    room: Room = NO_LIMIT
    """The models' context."""
    merged_ids: tuple[int, ...] = ()
    """Token ids that are one class when the models are compared."""

    def digest(self) -> str:
        """A hash of what is measured, and on what; the weights aside."""
        return fingerprint(
            rows=self.data, models=self.facts["models"], suites=self.suites, vocab=self.vocab_size,
            merged=list(self.merged_ids), template=self.template, room=list(self.room),
        )  # fmt: skip


def pair_inputs(
    student: Model,
    teacher: Model | TeacherCache | None,
    rows: Any,
    processing_class: Any = None,
    *,
    suites: Sequence[str] = (),
    protocol: str | None = None,
    template: str = "auto",
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    max_new_tokens: int | None = None,
    dtype: DtypeLike = "auto",
    device: str | torch.device | None = None,
) -> Inputs:
    """Check that two models are a pair, and tokenise the rows for them; see `drkl.evaluate`.

    Raises:
        DrklError: neither rows nor suites, or both; models of two kinds or vocabularies, classes that differ, a token
            outside the vocabulary, or no rows.
    """
    if (rows is None) == (not suites):
        raise DrklError(f"Expected exactly one of rows and suites; got {'neither' if rows is None else 'both'}.")
    cache = as_cache(teacher)
    models = {"student": _unwrapped(student)}
    if teacher is not None:
        # The folder of a cache has what is to be known of a teacher beside its weights.
        models["teacher"] = _unwrapped(teacher) if cache is None else str(cache.folder)
    picked = _device(device, models["student"])
    names = {role: _name(model) for role, model in models.items()}
    configs = {role: load_config(model) for role, model in models.items()}
    # A model in memory says by its class what it is; a config only once it was saved.
    kinds_of = {role: configs[role] if isinstance(model, str) else model for role, model in models.items()}
    if cache is not None:
        kinds_of["teacher"] = cache.model
    classifiers = {role: is_classifier(kind) for role, kind in kinds_of.items()}
    classifier = classifiers["student"]
    if classifiers.get("teacher", classifier) != classifier:
        kinds = {True: "a classifier", False: "a language model"}
        raise DrklError(
            f"The student {names['student']!r} is {kinds[classifier]} and the teacher {names['teacher']!r} "
            f"{kinds[not classifier]}: they have no output in common. Choose both of one kind."
        )
    if classifier and (suites or protocol):
        raise DrklError("Suites and protocols are about generated answers; a classifier takes rows with labels.")
    tokenizer = _tokenizer(processing_class, list(models.values()), classifier=classifier)
    encoder_decoder = not classifier and is_encoder_decoder(configs["student"])
    room = room_of(configs.values(), encoder_decoder=encoder_decoder)
    lengths = fit_lengths(max_prompt_tokens, max_tokens, room, max_new_tokens=max_new_tokens)
    section = with_protocol(_section(template, lengths._asdict()), protocol)
    wanted = resolve_dtype(dtype, picked)
    sources: dict[str, Source] = {
        role: _source(models[role], wanted, classifier) for role in ("teacher", "student") if role in models
    }
    facts: dict[str, Any] = {
        "models": {role: names[role] for role in sources}, "protocol": protocol, "template": section.template,
        "dtype": wanted,
    }  # fmt: skip
    tokens = None
    if teacher is not None and all(isinstance(model, str) for model in models.values()):
        pair = StudentConfig(init="pretrained", model=names["student"])
        tokens = check_tokenizers(pair, names["teacher"], classifier=classifier)
    classes = None
    if classifier:
        classes = class_names(kinds_of["student"], names["student"])
        if teacher is not None:
            check_classes(kinds_of["teacher"], classes, names["teacher"])
    elif teacher is not None:
        check_same_family(configs["student"], configs["teacher"], names["student"], names["teacher"])
    ends = [] if classifier else listed_ends(models.get("teacher", models["student"]), tokenizer)
    kind: dict[str, Any] = {"encoder_decoder": encoder_decoder, "ends": ends, "room": room}
    suite_names: list[str] | None = None
    if suites:
        examples: Any
        examples, suite_names, described = suite_rows(suites, section, tokenizer, **kind, max_rows=max_rows)
    else:
        examples, described = _rows(rows, section, tokenizer, classes, max_rows, **kind)
    vocab_size = None
    check_rows(examples, configs)
    if not classifier and teacher is not None:
        sizes = [configs[role].get_text_config().vocab_size for role in ("student", "teacher")]
        shared = shared_vocabulary(sizes[0], sizes[1], tokens, tokenizer, examples)
        vocab_size = shared["shared"] if shared is not None else None
    if cache is not None:
        put_cache(sources, facts, cache, examples, LOAD, classifies=classifier)
    return Inputs(
        sources, tokenizer, examples, suite_names, picked, described, vocab_size, classes, GAMMA, facts,
        Path(names["student"].removeprefix(f"{IN_MEMORY}: ")).name, section.template, room,
    )  # fmt: skip


def suite_rows(
    suites: Sequence[str],
    config: DataConfig,
    tokenizer: Any,
    *,
    encoder_decoder: bool,
    ends: Sequence[int] = (),
    room: Room = NO_LIMIT,
    max_rows: int | None = None,
    teacher_tokenizer: Any = None,
) -> tuple[list[Any], list[str], dict[str, Any]]:
    """The rows of named suites one after the other, the suite of each, and the account of them for the record.

    Raises:
        DrklError: an unknown suite, one named twice, or one without a row that can be used.
    """
    for reader in filter(None, (tokenizer, teacher_tokenizer)):
        set_languages(reader, config.src_lang, config.tgt_lang)
    rows: list[Any] = []
    names: list[str] = []
    described: dict[str, Any] = {}
    for text in suites:
        suite, where = parse_suite(text)
        if suite.name in described:
            raise DrklError(f"The suite {suite.name!r} was named twice.")
        examples = read_suite(suite, where, tokenizer)[:max_rows]
        if len(suites) > 1:
            examples = name_rows(examples, suite.name)
        try:
            tokenised, report = rows_from(
                examples, tokenizer, **config.row_settings, encoder_decoder=encoder_decoder, ends=ends, room=room,
                teacher_tokenizer=teacher_tokenizer,
            )  # fmt: skip
        except DrklError as error:
            raise DrklError(f"Suite {suite.name!r}: {error}") from error
        rows += tokenised
        names += [suite.name] * len(tokenised)
        described[suite.name] = {"from": where or suite.dataset, "rows": len(tokenised), **account(report, tokenised)}
    return rows, names, {"suites": described}


def with_protocol(data: DataConfig, protocol: str | None) -> DataConfig:
    """The data section in a protocol's prompt format.

    Raises:
        DrklError: there is no such protocol.
    """
    if protocol is None:
        return data
    if protocol != "minillm":
        raise DrklError(f"There is no protocol {protocol!r}; there is minillm.")
    return data.model_copy(update={**MINILLM_DATA, "turns": "last"})


def account(report: DropReport, rows: Rows) -> dict[str, Any]:
    """Return counts of kept and dropped rows and a digest of the kept ones, for the record."""
    ids = json.dumps([[row.id, *row.all_ids] for row in rows])
    digest = hashlib.sha256(ids.encode()).hexdigest()[:16]
    return {"dropped": dict(report.dropped), "responses_cut": report.responses_cut, "digest": digest}


def _rows(
    rows: Any,
    section: DataConfig,
    tokenizer: Any,
    classes: Sequence[str] | None,
    max_rows: int | None,
    *,
    encoder_decoder: bool,
    ends: Sequence[int],
    room: Room,
) -> tuple[Rows, dict[str, Any]]:
    is_path = isinstance(rows, str | os.PathLike)
    name = str(rows) if is_path else "rows"
    source = name if is_path else f"{IN_MEMORY}: {type(rows).__name__}"
    if max_rows is not None:
        rows = [row for _, row in itertools.islice(dataset_items(rows, name), max_rows)]
    examples, report = rows_from(
        rows, tokenizer, classes=classes, encoder_decoder=encoder_decoder, name=name, ends=ends, room=room,
        **section.row_settings,
    )  # fmt: skip
    return examples, {"path": source, **account(report, examples)}


def _device(device: str | torch.device | None, student: str | PreTrainedModel) -> torch.device:
    """The device that was asked for; else that of a student in memory, or the best there is."""
    if device is None and isinstance(student, PreTrainedModel):
        return student.device
    if isinstance(device, torch.device):
        return device
    name = device or "auto"
    if not has_device(name):
        raise DrklError(f"device is {name!r}, which this machine (or this torch) does not have; try auto or cpu.")
    return pick_device(name)


def _unwrapped(model: Any) -> str | PreTrainedModel:
    """A path as text; the model inside of peft's wrapper."""
    if isinstance(model, PreTrainedModel):
        return model
    if hasattr(model, "get_base_model"):
        base: PreTrainedModel = model.get_base_model()
        return base
    if isinstance(model, TeacherCache):
        check_is_no_cache(str(model.folder))
    if not isinstance(model, str | os.PathLike):
        raise DrklError(
            f"A {type(model).__name__} came as a model; expected a transformers PreTrainedModel, or the folder or Hub "
            "id of one."
        )
    name = os.fspath(model)
    check_is_no_cache(name)
    if RunFolder(Path(name)).config_path.is_file() and not (Path(name) / "config.json").is_file():
        raise DrklError(
            f"{name!r} is a run folder. drkl.evaluate_run({name!r}) evaluates it on its own held-out rows; its student "
            f"alone is {str(RunFolder(Path(name)).student_path)!r}."
        )
    return name


def _name(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else f"{IN_MEMORY}: {type(model).__name__}"


def _source(model: str | PreTrainedModel, dtype: str, classifier: bool) -> Source:
    if not isinstance(model, str):
        return model
    name, load = model, load_classifier if classifier else load_model
    return lambda: load(name, dtype)


def _tokenizer(given: Any, models: Sequence[str | PreTrainedModel], *, classifier: bool) -> Any:
    """The tokenizer that was given, else the student's, else the teacher's."""
    if given is not None:
        return load_tokenizer(given, classifier=classifier)
    names = [model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "")) for model in models]
    first: DrklError | None = None
    for name in filter(None, names):
        try:
            return load_tokenizer(name, classifier=classifier)
        except DrklError as error:
            first = first or error
    if first is not None and isinstance(models[0], str):
        raise first
    raise DrklError(
        "processing_class is missing: a model in memory brings no tokenizer. Pass the tokenizer that both models share."
    )


def _section(template: str, lengths: dict[str, int]) -> DataConfig:
    try:
        return DataConfig.model_validate({"path": "rows", "template": template, **lengths})
    except ValueError as error:
        raise DrklError(_reason(error)) from error


def _reason(error: ValueError) -> str:
    errors: Any = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    return "; ".join(
        f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg'].removeprefix('Value error, ')}"
        for entry in errors()
    )
