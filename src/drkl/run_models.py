"""Load the models and rows of a finished run: evaluate it, or let its models answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drkl.analysis.analyze import analyze_inputs
from drkl.analysis.result import Analysis
from drkl.config import Config, load_config
from drkl.data.classification import tokenize_labelled
from drkl.data.config import NO_ROWS
from drkl.data.lengths import Room
from drkl.data.rows import make_rows
from drkl.data.shares import heldout_of
from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.bookkeeping import Progress, Source
from drkl.evaluation.cached import NOTE, put_cache
from drkl.evaluation.evaluate import Settings, check_output, configured, evaluate_inputs
from drkl.evaluation.pairs import Inputs, account, suite_rows, with_protocol
from drkl.evaluation.result import MEASURED, Evaluation
from drkl.kept import MARK, check_student, note_changes, student_mark
from drkl.locks import ANALYSIS, EVALUATION, TRAINING, check_free, first_holding
from drkl.models.classes import class_names
from drkl.models.fingerprint import model_fingerprint
from drkl.models.load import load_classifier, load_model, load_tokenizer
from drkl.models.load import load_config as load_model_config
from drkl.models.pair import check_rows
from drkl.models.precision import DTYPES, has_device, pick_device, resolve_dtype
from drkl.models.readout import read
from drkl.models.student import make_student
from drkl.objectives import Objective
from drkl.objectives.decoupled import GAMMA
from drkl.processes import Share, first_alone
from drkl.runs import RunFolder
from drkl.teachers.cached import TeacherCache, check_weights
from drkl.teachers.config import TeacherConfig
from drkl.teachers.shards import check_is_no_cache
from drkl.training.spec import (
    RunSpec,
    has_encoder,
    run_ends,
    run_room,
    start_of,
    teacher_tokenizer,
    tokenizer_name,
    with_stand_in,
    without_server,
)

_OTHER_ROWS = (
    " for the evaluation (dolly, or dolly=FILE), or measure the student on other rows, with student, teacher and data "
    "in place of the run: drkl.evaluate or drkl.analyze(student, teacher, rows)."
)
"""What to do where a run's held-out rows are none, or hold nothing to measure on."""


def evaluate_run(
    run: str | Path,
    *,
    models: Sequence[str] = MEASURED,
    suites: Sequence[str] = (),
    protocol: str | None = None,
    teacher_model: str | Path | None = None,
    output_dir: str | Path | None = None,
    fresh: bool = False,
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Evaluation:
    """Evaluate a finished run on its own held-out rows, with the ``evaluation`` section of its config.

    Args:
        run: the run folder.
        models: which of ``teacher``, ``before``, ``warmup`` and ``student`` are measured, as far as the run has them.
            Each costs as much; the student has to be among them.
        suites: named test sets in place of the held-out rows: ``NAME`` or ``NAME=WHERE``.
        protocol: ``minillm`` for its prompt format, decoding and seeds; None for the run's own.
        teacher_model: path or Hub id of the teacher. Default: that of the run, or the cache that it was trained from,
            without the teacher's answers then.
        output_dir: where ``eval.json`` and the files beside it are written; default the run folder.
        fresh: use no finished parts of an earlier evaluation.
        facts: further settings for the record.
        on_progress: called with ("teacher: reading", done, total).
        **settings: fields of `EvaluationConfig` in place of the config's.

    Raises:
        DrklError: no run, or one without a student; a setting out of range; suites or a protocol for a classifier; a
            model that there is not.
    """
    check_models(models)
    root, into = RunFolder.open(run).root, None if output_dir is None else Path(output_dir)
    with Share.of_group().joined(), first_holding(root if into is None else into, EVALUATION):
        first_alone(lambda: check_free(root, TRAINING))
        folder, config, specs = open_finished(run)
        wanted = configured(config.evaluation, protocol, settings)
        if output_dir is not None:
            check_output(Path(output_dir))
        inputs = run_inputs(specs, suites, protocol, teacher_model=teacher_model, measured=models)
        if mark := student_mark(folder.read_env()):
            inputs.facts[MARK] = mark
        target = folder.root if output_dir is None else output_dir
        return evaluate_inputs(
            inputs, wanted, output_dir=target, fresh=fresh, facts=facts, on_progress=on_progress,
            name=config.run.name if output_dir is None else None,
        )  # fmt: skip


def analyze_run(
    run: str | Path,
    *,
    objectives: Sequence[str | Objective] | None = None,
    positions: int = 512,
    gamma: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    teacher_model: str | Path | None = None,
    output_dir: str | Path | None = None,
    command: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Analysis:
    """Analyse a finished run on its own held-out rows, with its own objective among the others; see `drkl.analyze`.

    Args:
        run: the run folder.
        objectives: see `drkl.analyze`.
        positions: see `drkl.analyze`.
        gamma: DRKL's weight of the tail, used where an objective names none (default: that of the run's objective,
            else 0.5).
        temperature: see `drkl.analyze`.
        seed: see `drkl.analyze`.
        teacher_model: see `evaluate_run`.
        output_dir: where ``analysis.json`` and ``analysis/positions.csv`` are written (default: the run folder).
        command: the command line that repeats the analysis, for the record.
        on_progress: called with ("teacher: reading", done, total).

    Raises:
        DrklError: there is no run, it has no student or no teacher, or a value is outside its domain.
    """
    root, into = RunFolder.open(run).root, None if output_dir is None else Path(output_dir)
    with Share.of_group().joined(), first_holding(root if into is None else into, ANALYSIS):
        first_alone(lambda: check_free(root, TRAINING))
        folder, config, specs = open_finished(run)
        if output_dir is not None:
            check_output(Path(output_dir))
        inputs = run_inputs(specs, teacher_model=teacher_model)
        if mark := student_mark(folder.read_env()):
            inputs.facts[MARK] = mark
        return analyze_inputs(
            inputs,
            objectives=objectives,
            own=None if specs[-1].objective.in_memory else specs[-1].objective.make(),
            positions=positions,
            gamma=gamma,
            temperature=temperature,
            seed=seed,
            evaluation_seed=config.evaluation.seed,
            output_dir=folder.root if output_dir is None else output_dir,
            command=command,
            on_progress=on_progress,
        )


def open_finished(run: str | Path) -> tuple[RunFolder, Config, list[RunSpec]]:
    """Open a run that has a student: return its folder, its config, and the specs of its stages at their present paths.

    Raises:
        DrklError: no run folder, or no student in it yet.
    """
    folder = RunFolder.open(run)
    config = config_of(folder)
    check_student(folder.student_path)
    note_changes(folder)
    if not any((folder.student_path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise DrklError(f"The run {str(folder.root)!r} has no student yet; resume its training first.")
    return folder, config, relocated(config, folder.root).specs()


def config_of(run: RunFolder) -> Config:
    """Return the config that a run was made with.

    Raises:
        DrklError: it is damaged.
    """
    try:
        return load_config(run.read_config())[0]
    except DrklError as error:
        text = str(error)
        where = "" if str(run.config_path) in text else f"{run.config_path}: "
        raise DrklError(f"{where}{text} The run wrote it: bring it back from a copy.") from error


def relocated(config: Config, folder: Path) -> Config:
    """Return the config of a moved run with its present path."""
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    run = config.run.model_copy(update={"dir": str(folder.parent), "name": folder.name})
    return config.model_copy(update={"run": run})


def run_inputs(
    specs: Sequence[RunSpec],
    suites: Sequence[str] = (),
    protocol: str | None = None,
    *,
    teacher_model: str | Path | None = None,
    measured: Sequence[str] = MEASURED,
) -> Inputs:
    """Models and rows of a finished run: its own held-out rows, or those of ``suites``.

    Args:
        specs: of the run.
        suites: see `evaluate_run`.
        protocol: see `evaluate_run`.
        teacher_model: see `evaluate_run`.
        measured: the ``models`` of `evaluate_run`.

    Raises:
        DrklError: suites or a protocol for a classification run, rows that cannot be read, or a teacher's cache that is
            not there, or lacks rows.
    """
    compared: TeacherCache | str | None = None
    if teacher_model is not None:
        specs, compared = _with_teacher(specs, str(teacher_model))
    specs = with_stand_in(specs, without_server)
    first, last = specs[0], specs[-1]
    made = compared if isinstance(compared, TeacherCache) else None
    loaders, tokenizer, device = evaluation_models(specs, [name for name in MEASURED if name in measured], made)
    models: dict[str, Source] = {**loaders}
    if served := "teacher" in models and last.teacher is not None and last.teacher.is_served:
        del models["teacher"]
    cache = _run_cache(last.teacher, device) if "teacher" in models else None
    if start_missing := "before" in models and cache is not None and _is_made_of_teacher(first):
        del models["before"]
    classes = trained_classes(last)
    if classes is not None and (suites or protocol):
        raise DrklError("Suites and protocols are about generated answers; a classification run has labels instead.")
    if classes is not None and first.student.init == "random":
        models.pop("before", None)  # its numbers are chance, its calibration by chance perfect
    try:
        configs = trained_configs(last)
    except DrklError as error:
        if last.teacher is None:
            raise
        raise DrklError(
            f"{error} teacher.model=PATH on the command line (in Python teacher_model) says where the teacher is now."
        ) from error
    room = run_room(configs, classes)
    data = with_protocol(last.data.fitted(room), protocol)
    encoder_decoder = classes is None and has_encoder(first, tokenizer)
    ends = () if classes is not None else run_ends(first, tokenizer)
    reader = None if classes is not None else teacher_tokenizer(specs, tokenizer_name(specs))
    described: dict[str, Any]
    names: list[str] | None = None
    rows: Any
    if suites:
        rows, names, described = suite_rows(
            suites, data, tokenizer, encoder_decoder=encoder_decoder, ends=ends, room=room, teacher_tokenizer=reader
        )
    else:
        if data.eval_path == NO_ROWS:
            raise DrklError(
                f"The run {str(last.folder.root)!r} has no held-out rows: it was trained without an eval_dataset. Name "
                f"a suite{_OTHER_ROWS}"
            )
        needed = last.rollouts.needs_responses
        heldout = heldout_of(data, classifier=last.classifies, needs_responses=needed)
        if heldout and all(example.is_prompt_alone for example in heldout):
            raise DrklError(
                f"The held-out rows of the run {str(last.folder.root)!r} are prompts alone: there are no responses to "
                f"measure its models on. Name a suite, which has responses,{_OTHER_ROWS}"
            )
        rows, report = make_rows(
            heldout,
            data,
            tokenizer,
            classes=classes,
            encoder_decoder=encoder_decoder,
            ends=ends,
            room=room,
            teacher_tokenizer=reader,
        )
        described = {
            "path": data.path, "dataset": data.dataset, "sources": [source.name for source in data.sources],
            "eval_path": data.eval_path, **account(report, rows),
        }  # fmt: skip
    check_rows(rows, configs)
    environment = last.folder.read_env()
    shared = (environment.get("vocabulary") or {}).get("shared")
    gamma = getattr(last.objective.make(), "gamma", GAMMA)
    descriptions = {
        "teacher": last.teacher.model if last.teacher else None,
        "before": f"{first.student.init} of {first.student.model or (first.teacher.model if first.teacher else '')}",
        "warmup": str(specs[-2].folder.student_path) if len(specs) > 1 else None,
        "student": str(last.folder.student_path),
    }
    facts: dict[str, Any] = {
        "models": {name: descriptions[name] for name in models},
        "protocol": protocol,
        "template": data.template,
    }
    merged_ids = tuple(environment.get("merged_ids") or ())
    if merged_ids:
        facts["merged_ids"] = [*merged_ids]
    if cache is not None:
        assert last.teacher is not None
        put_cache(
            models, facts, cache, rows, _load(last.teacher), classifies=classes is not None,
            start_missing=start_missing,
        )  # fmt: skip
    elif isinstance(compared, str):
        facts[NOTE] = compared
    elif served and last.teacher is not None:
        facts[NOTE] = (
            f"The teacher is served, and a server gives its {last.teacher.top_k} most probable tokens, of which there "
            "are no exact numbers: the teacher is left out. teacher.model=PATH on the command line (in Python "
            "teacher_model) loads it."
        )
    name = str(last.run.name)
    return Inputs(
        models, tokenizer, rows, names, device, described, shared, classes, float(gamma), facts, name,
        data.template, room, merged_ids,
    )  # fmt: skip


def check_models(names: Sequence[str]) -> None:
    """Raise DrklError unless these are models of an evaluation, the student among them."""
    for name in names:
        if name not in MEASURED:
            known = ", ".join(MEASURED)
            raise DrklError(f"models has {name!r}; expected some of {known}.{did_you_mean(name, MEASURED)}")
    if "student" not in names:
        raise DrklError("models leaves the student out, which is what an evaluation is of. Add student.")


def _with_teacher(specs: Sequence[RunSpec], name: str) -> tuple[Sequence[RunSpec], TeacherCache | str | None]:
    """The specs with a teacher of that name, which is loaded, and the cache that it is to be compared with.

    Where the run's cache cannot be read, a sentence that says so in its place; None without one.
    """
    teacher = specs[-1].teacher
    if teacher is None:
        raise DrklError(
            f"teacher.model is {name!r}, and the run was trained without a teacher. Measure its student beside one "
            "with drkl.evaluate(student, teacher, rows)."
        )
    check_is_no_cache(name)
    options = teacher.model_init_kwargs if name == teacher.model else {}
    loaded = TeacherConfig(model=name, dtype=teacher.dtype, model_init_kwargs=options)
    made: TeacherCache | str | None = None
    if teacher.cache is not None:
        try:
            made = TeacherCache.open(teacher.source)
            names: dict[torch.dtype, Any] = {dtype: key for key, dtype in DTYPES.items()}
            loaded = loaded.model_copy(update={"dtype": names[made.stored.dtype]})
        except DrklError as error:
            made = f"The teacher was not compared with the cache that the student was trained from: {error}"
    return [replace(spec, teacher=loaded) for spec in specs], made


def _run_cache(teacher: TeacherConfig | None, device: torch.device) -> TeacherCache | None:
    """The cache that a run was trained from."""
    if teacher is None or teacher.cache is None:
        return None
    try:
        return TeacherCache.of(teacher, device)
    except DrklError as error:
        raise DrklError(f"{error} {_load(teacher)}") from error


def _load(teacher: TeacherConfig) -> str:
    return f"teacher.model={teacher.model} on the command line (in Python teacher_model) loads the teacher itself."


def _is_made_of_teacher(first: RunSpec) -> bool:
    """Whether the weights of the student before training are some of the teacher's."""
    teacher, student = first.teacher, first.student
    return teacher is not None and student.init == "prune" and student.model in (None, teacher.model)


def evaluation_models(
    specs: Sequence[RunSpec], names: Sequence[str] = MEASURED, made: TeacherCache | None = None
) -> tuple[dict[str, Callable[[], PreTrainedModel]], Any, torch.device]:
    """Loaders by name, the tokenizer and the device.

    ``before`` is the first stage's init, made again from its config; ``warmup`` the student of the stage before the
    last, where there is one; ``student`` the run's student. A cache ``made`` of the teacher is compared with it.
    """
    first, last = specs[0], specs[-1]
    # A run may have been made on another machine.
    wanted = last.run.device
    device = pick_device(wanted if has_device(wanted) else "auto")
    tokenizer = load_tokenizer(str(last.folder.student_path), classifier=last.classifies)
    classes = trained_classes(last)
    load: Callable[..., PreTrainedModel] = load_model if classes is None else load_classifier
    loaders: dict[str, Callable[[], PreTrainedModel]] = {}
    if last.teacher is not None:
        teacher = last.teacher

        def load_teacher() -> PreTrainedModel:
            model = load(teacher.model, resolve_dtype(teacher.dtype, device), **teacher.model_init_kwargs)
            if made is not None:
                check_weights(made.manifest, made.folder, teacher.model, model_fingerprint(model))
            return model

        loaders["teacher"] = load_teacher
    teacher_name = start_of(first.student, first.teacher)
    loaders["before"] = lambda: make_student(first.student, teacher_name, first.run.seed, tokenizer, classes)
    if len(specs) > 1:
        loaders["warmup"] = lambda: load(str(specs[-2].folder.student_path), last.student.dtype)
    loaders["student"] = lambda: load(str(last.folder.student_path), last.student.dtype)
    return {name: loaders[name] for name in names if name in loaders}, tokenizer, device


def answering_models(
    specs: Sequence[RunSpec], teacher_model: str | None = None
) -> tuple[dict[str, Callable[[], PreTrainedModel]], Any, torch.device, Room, str | None]:
    """What `evaluation_models` gives of teacher and student, the room for an answer, and what is to be said.

    A teacher that was read from a cache, or asked through a server, is left out: it has no weights here.

    Args:
        specs: of a finished run.
        teacher_model: see `evaluate_run`.
    """
    teacher, made, note = specs[-1].teacher, None, None
    if teacher_model is not None:
        specs, compared = _with_teacher(specs, teacher_model)
        made, note = (compared, None) if isinstance(compared, TeacherCache) else (None, compared)
    elif teacher is not None and (teacher.cache is not None or teacher.server is not None):
        cached = teacher.cache is not None
        where = f"read from the cache {teacher.cache!r}" if cached else f"asked at {teacher.server}"
        note = (
            f"The teacher was {where}, so that its weights are not here: it is left out. teacher.model=PATH on the "
            "command line loads it."
        )
        specs = [replace(spec, teacher=None) for spec in specs]
    last = specs[-1]
    models, tokenizer, device = evaluation_models(specs, ("teacher", "student"), made)
    return models, tokenizer, device, run_room(trained_configs(last), trained_classes(last)), note


def trained_classes(last: RunSpec) -> tuple[str, ...] | None:
    """The classes of a finished run's student; None of a language model."""
    if not last.classifies:
        return None
    folder = str(last.folder.student_path)
    return class_names(load_model_config(folder), folder)


def trained_configs(last: RunSpec) -> dict[str, Any]:
    """The model configs of a finished run's student and of its teacher."""
    configs = {"student": load_model_config(str(last.folder.student_path))}
    return configs if last.teacher is None else {**configs, "teacher": load_model_config(last.teacher.source)}


def most_probable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int, count: int = 5
) -> list[tuple[str, float]]:
    """The ``count`` most probable classes of a text, with their probabilities; cut at ``max_tokens`` as in training."""
    classes = class_names(model, type(model).__name__)
    rows, _ = tokenize_labelled([("text", text, classes[0])], tokenizer, classes, max_tokens=max_tokens)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    probabilities = read(model, rows, pad_id=pad_id).hidden[0].softmax(-1)
    best = probabilities.topk(min(count, len(classes)))
    return [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
