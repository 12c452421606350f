"""Runs from their specs to their folders, several in a row as stages."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from drkl.data.config import DataConfig
from drkl.data.lengths import NO_LIMIT, Room
from drkl.data.rows import Rows
from drkl.data.shares import load_heldout, load_shares
from drkl.data.store import Watch
from drkl.data.streams import RowStream, stream_of
from drkl.data.tokenize import DropReport
from drkl.errors import DrklError
from drkl.folders import remove_empty
from drkl.locks import ANALYSIS, EVALUATION, TRAINING, first_holding
from drkl.models.forward import decoder_start
from drkl.models.load import load_tokenizer, model_note
from drkl.models.options import check_options
from drkl.models.pair import SharedTokens, check_families, check_tokenizers
from drkl.models.precision import DTYPES, pick_device
from drkl.models.student import make_student
from drkl.processes import first_alone, joined, launched
from drkl.runs import RunFolder, check_is_text, write_yaml
from drkl.signals import KEPT
from drkl.teachers.cached import TeacherCache, check_same_text
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from drkl.teachers.served import ServedTeacher
from drkl.teachers.shards import filling
from drkl.teachers.stored import check_kind
from drkl.teachers.teacher import Teacher
from drkl.training.caching import check_made_of, write_cache
from drkl.training.callbacks import OnProgress
from drkl.training.checkpoints import has_checkpoints
from drkl.training.checks import check_apart, check_device, check_folder, is_over
from drkl.training.own_files import remove_run
from drkl.training.pair import TokenisedRows
from drkl.training.placing import keep_only
from drkl.training.record import training_section
from drkl.training.served import check_served_kind
from drkl.training.settings import STAGES, changed, changes, counted, has_other_sources, of_configs
from drkl.training.sparse import check_sparse
from drkl.training.spec import (
    TWO_CLASSES,
    RunSpec,
    fitted,
    has_encoder,
    is_two_class,
    run_classes,
    run_configs,
    run_ends,
    run_room,
    run_tokenizer,
    start_of,
    teacher_tokenizer,
    tokenizer_name,
    training_config,
    with_stand_in,
    without_server,
)
from drkl.training.trainer import DistillationTrainer

Mode = Literal["new", "overwrite", "resume", "auto"]
_SECONDS_TO_SEE = 20
"""Until a file that another machine has written is seen."""


@dataclass
class Listener:
    """Hooks for a front end; each does nothing by default."""

    on_message: Callable[[str], None] = lambda text: None
    on_stage: Callable[[RunSpec, int, int], None] = lambda spec, number, of: None
    on_progress: OnProgress | None = None
    on_fill: Callable[[int, int], None] = lambda done, of: None
    """Called with the batches that the teacher has read for its cache, and that it is to read."""
    on_rows: Callable[[str, int, int], None] = lambda what, done, of: None
    """Called as rows are made for the first time; see `drkl.data.store.Watch`."""


@dataclass
class Loaded:
    """Rows of one data section under one tokenizer; of a stream the first training rows."""

    train: Rows
    heldout: Rows
    report: DropReport
    stream: RowStream | None = None


@dataclass
class Resources:
    """Resources that stages share: the teacher, the tokenizer and the rows are loaded once."""

    device: torch.device
    listener: Listener
    classes: tuple[str, ...] | None = None
    """Names of the classes by number, in a classification run."""
    room: Room = NO_LIMIT
    """The models' context."""
    _teachers: dict[TeacherConfig, Teacher] = field(default_factory=dict)
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    teacher_tokenizer: Any = None
    """The teacher's own, where it reads the prompts in a rendering of its own."""
    _rows: dict[tuple[DataConfig, str, bool, bool], Loaded] = field(default_factory=dict)

    def teacher(self, config: TeacherConfig | None) -> Teacher | None:
        if config is None:
            return None
        if config not in self._teachers and config.cache is not None:
            unused = [f"teacher.{name}" for name in ("remember_mb", "model_init_kwargs") if getattr(config, name)]
            without = f" Without effect on a cache: {', '.join(unused)}." if unused else ""
            self._teachers[config] = cache = TeacherCache.of(config, self.device)
            what = "states" if cache.k is None else f"{cache.k} largest logits"
            self.listener.on_message(f"Reading the teacher's {what} from {config.cache}.{without}")
        if config not in self._teachers and config.is_served:
            self.listener.on_message(f"The teacher {config.model} is asked at {config.server}.")
            self._teachers[config] = ServedTeacher.of(config)
        if config not in self._teachers:
            self.listener.on_message(f"Loading the teacher {config.model}.")
            self._teachers[config] = LiveTeacher.load(config, self.device, classifier=self.classes is not None)
            if note := model_note(config.model):
                self.listener.on_message(note)
        return self._teachers[config]

    def open_again(self, config: TeacherConfig) -> None:
        """Read a cache again that has more rows now."""
        self._teachers[config] = TeacherCache.of(config, self.device)

    def stand_in(self, config: TeacherConfig, student: str) -> str:
        """Ask a teacher's server what it serves; what stands for the teacher here is its tokenizer from now on."""
        teacher = self.teacher(config)
        assert isinstance(teacher, ServedTeacher)
        teacher.settle(student)
        self._teachers[config.model_copy(update={"tokenizer": teacher.source})] = teacher
        return teacher.source

    def tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(name, classifier=self.classes is not None)
        return self._tokenizers[name]

    def learn_tokenizer(self, specs: Sequence[RunSpec]) -> None:
        learnt = run_tokenizer(specs)
        self.listener.on_message(f"Learnt a tokenizer of {len(learnt)} tokens from the training text.")
        self._tokenizers[tokenizer_name(specs)] = learnt

    def rows(
        self,
        config: DataConfig,
        tokenizer_name: str,
        *,
        encoder_decoder: bool,
        ends: Sequence[int] = (),
        needs_responses: bool = True,
    ) -> Loaded:
        key = (config, tokenizer_name, encoder_decoder, needs_responses)
        if key not in self._rows:
            kind: dict[str, Any] = {"classes": self.classes, "encoder_decoder": encoder_decoder, "ends": ends}
            kind |= {"room": self.room, "needs_responses": needs_responses}
            kind["teacher_tokenizer"] = self.teacher_tokenizer
            watch = Watch(self.listener.on_message, self.listener.on_rows)
            tokenizer, stream, cached = self.tokenizer(tokenizer_name), None, False
            if config.streaming:
                stream = stream_of(config, tokenizer, **kind)
                train: Rows
                train, report = stream.sample()
                message = f"The first rows of the training data, which is read as training goes on: {report.summary()}"
                heldout, heldout_report = load_heldout(config, tokenizer, watch=watch, **kind)
            else:
                shares = load_shares(config, tokenizer, watch=watch, **kind)
                train, report, cached = shares.train, shares.report, shares.cached
                heldout, heldout_report = shares.heldout, shares.heldout_report
                message = f"Training data: {report.summary()}"
            if heldout_report is not None:
                heldout_report.difference = None  # said of the training rows already
                message += f" Held out: {heldout_report.summary()}"
            if cached:
                message += " The rows are read from drkl's cache."
            self.listener.on_message(message)
            self._rows[key] = Loaded(train, heldout, report, stream)
        return self._rows[key]


@dataclass
class Prepared:
    """Stages whose rows are read and checked, and what they share."""

    specs: Sequence[RunSpec]
    resources: Resources
    tokenizer_name: str
    shared: SharedTokens | None
    encoder_decoder: bool

    def rows(self, spec: RunSpec) -> Loaded:
        """The rows of a stage."""
        needed = spec.rollouts.needs_responses
        return self.resources.rows(
            spec.data, self.tokenizer_name, encoder_decoder=self.encoder_decoder, needs_responses=needed
        )

    def trainer(self, spec: RunSpec) -> DistillationTrainer:
        """The trainer of a stage; nothing is written yet."""
        return _make_trainer(spec, self)


def prepare(specs: Sequence[RunSpec], listener: Listener, *, ask_server: bool = True) -> Prepared:
    """Load and check what all stages share; nothing is written.

    Args:
        specs: the stages.
        listener: hooks for a front end.
        ask_server: whether the server of a served teacher is asked what it serves.

    Raises:
        DrklError: whatever can be found out before a model is loaded.
    """
    check_device(specs[-1].run.device)
    resources = Resources(pick_device(specs[-1].run.device), listener)
    for spec in specs:
        training_config(spec, resources.device)  # whatever it refuses, before anything is asked or loaded
        for section, name in ((spec.teacher, "teacher"), (spec.student, "student")):
            check_options(section.model_init_kwargs if section else {}, f"{name}.model_init_kwargs")
    specs = with_stand_in(specs, resources.stand_in if ask_server else without_server)
    cached = specs[0].teacher is not None and specs[0].teacher.cache is not None
    if cached:
        resources.teacher(specs[0].teacher)  # first: its files are checked before its config and its tokenizer are read
    resources.classes = run_classes(specs)
    if is_two_class(specs, resources.classes):
        listener.on_message(TWO_CLASSES)
    first, name = specs[0], tokenizer_name(specs)
    teacher_name = first.teacher.source if first.teacher else None
    if first.tokenizer is not None:
        resources.learn_tokenizer(specs)
    if resources.classes is None:
        options = first.teacher.source_options if first.teacher else {}
        check_families(first.student, teacher_name, resources.tokenizer(name), **options)
    shared = check_tokenizers(first.student, teacher_name, classifier=first.classifies)
    encoder_decoder = resources.classes is None and has_encoder(first, resources.tokenizer(name))
    resources.room = run_room(run_configs(first, resources.tokenizer(name), resources.classes), resources.classes)
    specs = fitted(specs, resources.room)
    ends = () if resources.classes is not None else run_ends(first, resources.tokenizer(name))
    resources.teacher_tokenizer = teacher_tokenizer(specs, name)
    for spec in specs:
        check_sparse(resources.teacher(spec.teacher) if cached else None, training_config(spec, resources.device))
        needed = spec.rollouts.needs_responses
        try:
            resources.rows(spec.data, name, encoder_decoder=encoder_decoder, ends=ends, needs_responses=needed)
        except DrklError as error:
            if not needed or all(other.rollouts.needs_responses for other in specs):
                raise
            raise DrklError(
                f"The stage {spec.run.name!r} learns from the data's responses, as its rollouts.share is below 1. Give "
                f"it data of its own (its section data), or leave it out. {error}"
            ) from error
    return Prepared(specs, resources, name, shared, encoder_decoder)


def rows_to_fill(prepared: Prepared) -> list[str]:
    """The ids of the rows of all stages that the teacher's cache lacks and that are to be added to it.

    Raises:
        DrklError: the cache lacks rows, and they are not to be added.
    """
    config = prepared.specs[0].teacher
    if config is None or config.cache is None:
        return []
    check_same_text(any(spec.rollouts.is_on for spec in prepared.specs))
    cache = prepared.resources.teacher(config)
    assert isinstance(cache, TeacherCache)
    start = decoder_start(cache.model)
    lacking: dict[str, None] = {}
    for spec in prepared.specs:
        loaded = prepared.rows(spec)
        for rows, what in ((loaded.train, "training rows"), (loaded.heldout, "held-out rows")):
            if not config.fill_cache:
                cache.check_rows(rows, start, what)
            lacking |= dict.fromkeys(cache.lacking(rows, start))
    return list(lacking)


def fill_cache(prepared: Prepared) -> None:
    """Add the rows of all stages that the teacher's cache lacks to it, where the config asks for that.

    One of several processes does it; the others wait, and read what it wrote. The teacher is dropped afterwards.

    Raises:
        DrklError: what `write_cache` refuses.
    """
    if not rows_to_fill(prepared):
        return
    config, listener = prepared.specs[0].teacher, prepared.resources.listener
    assert config is not None and config.cache is not None
    waiting = f"Another process adds rows to {config.cache}; this one waits for it."
    with filling(Path(config.source), lambda: listener.on_message(waiting)):
        prepared.resources.open_again(config)
        if lacking := rows_to_fill(prepared):
            listener.on_message(f"{config.cache} lacks {len(lacking):,} rows, first {lacking[0]!r}; they are added.")
            teacher = prepared.resources.teacher(config)
            assert isinstance(teacher, TeacherCache)
            names = {dtype: name for name, dtype in DTYPES.items()}
            changes: dict[str, Any] = {"cache": None, "fill_cache": False, "remember_mb": 0}
            if config.server is None:
                changes["dtype"] = names[teacher.model.dtype]
            begins = ("Loading the teacher", "The teacher ")  # what else there is to say was said before
            quiet = Listener(lambda text: listener.on_message(text) if text.startswith(begins) else None)
            specs = [replace(spec, teacher=config.model_copy(update=changes)) for spec in prepared.specs]
            cache_states(specs, Path(config.source), fill=True, listener=quiet, progress=listener.on_fill)
            gc.collect()  # the teacher
            if prepared.resources.device.type == "cuda":
                torch.cuda.empty_cache()
    prepared.resources.open_again(config)


def check_cached(
    specs: Sequence[RunSpec], kind: str = "hidden", k: int | None = None, temperatures: Sequence[float] = ()
) -> TeacherConfig:
    """Return the teacher of which a cache can be made for a run, or raise DrklError; arguments as `cache_states`'s."""
    teacher = specs[0].teacher
    if teacher is None:
        raise DrklError("The config has teacher: null, so there is nothing to cache.")
    check_same_text(any(spec.rollouts.is_on for spec in specs))
    if any(spec.data.streaming for spec in specs):
        raise DrklError(
            "data.streaming is true, and a cache holds every row of a run: a stream has no end that is known. Set it "
            "to false, with the rows that are to be cached as the training data."
        )
    if teacher.cache is not None:
        check_made_of(TeacherCache.of(teacher), kind)
    if teacher.is_served:
        check_served_kind(kind, k, teacher.top_k, temperatures)
    return teacher


def cache_states(
    specs: Sequence[RunSpec],
    folder: Path,
    *,
    kind: str = "hidden",
    k: int | None = None,
    temperatures: Sequence[float] = (),
    part: int = 0,
    parts: int = 1,
    fill: bool = False,
    listener: Listener | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TeacherCache | None:
    """Write what the teacher knows of the rows of every stage; None where other parts are not there yet.

    Args:
        specs: the stages.
        folder: of the cache.
        kind: ``hidden`` or ``topk``.
        k: of kind ``topk``.
        temperatures: of kind ``topk``, besides 1 and those of the stages.
        part: the part that this process writes, from 0.
        parts: the number of parts.
        fill: add the rows that a finished cache lacks; see `write_cache`.
        listener: hooks for a front end.
        progress: called with the batches that are read, and that are to be read.

    Raises:
        DrklError: there is no teacher, answers are sampled, or what `write_cache` refuses.
    """
    check_kind(kind, k, temperatures)
    check_apart(folder, specs[-1].folder)
    check_cached(specs, "topk" if fill else kind, k, temperatures)  # a cache that is filled has its kind
    specs = [_with_whole_teacher(spec) for spec in specs]
    prepared = prepare(specs, listener or Listener())
    with TemporaryDirectory() as unused:
        # A later stage starts from a student that is not trained yet; any student has the same rows.
        stages = [replace(spec, student=specs[0].student, folder=RunFolder(Path(unused))) for spec in prepared.specs]
        trainers = [prepared.trainer(spec) for spec in stages]
        runs = [(trainer.pair, trainer.config) for trainer in trainers]
        what: Any = {"kind": kind, "k": k, "temperatures": temperatures}
        return write_cache(runs, folder, **what, part=part, parts=parts, fill=fill, progress=progress)


def _with_whole_teacher(spec: RunSpec) -> RunSpec:
    """The spec with a teacher that each process has whole: those that write a cache read rows of their own."""
    return spec if spec.teacher is None else replace(spec, teacher=spec.teacher.model_copy(update={"shard": False}))


def distill(
    specs: Sequence[RunSpec],
    *,
    mode: Mode = "new",
    listener: Listener | None = None,
    on_trainer: Callable[[DistillationTrainer], None] | None = None,
    command: Sequence[str] | None = None,
) -> RunFolder:
    """Train every stage in turn and return the folder of the last.

    Args:
        specs: the stages, first to last; each starts from the student of the one before.
        mode: ``new`` refuses a folder that is there, ``overwrite`` replaces it, ``resume`` goes on with it: finished
            stages are kept, the unfinished one continues from its newest whole checkpoint. ``auto`` is for a job that
            may be started again: it resumes a run of this config that is there, starts one that is not, and leaves a
            finished one as it is.
        listener: hooks for a front end.
        on_trainer: called with each stage's trainer before it trains, to add callbacks.
        command: the command line that repeats the run, for ``env.json``.

    Raises:
        DrklError: wrong input; whatever can be checked is checked before anything is written.
    """
    check_is_text(specs[-1].folder.root)
    if launched().count > 1:
        check_device(specs[-1].run.device)
        training_config(specs[-1], pick_device(specs[-1].run.device))  # makes the process group
    listener = listener if listener is not None and joined().is_first else Listener()
    with first_holding(specs[-1].folder.root, TRAINING, EVALUATION, ANALYSIS):
        try:
            return _distill(specs, mode, listener, on_trainer, command)
        finally:
            if not specs[-1].folder.config_path.is_file():  # it did not begin, and transformers makes its folder early
                for spec in specs:
                    remove_empty(spec.folder.checkpoints_path)


def _distill(
    specs: Sequence[RunSpec],
    mode: Mode,
    listener: Listener,
    on_trainer: Callable[[DistillationTrainer], None] | None,
    command: Sequence[str] | None,
) -> RunFolder:
    """`distill` in a folder that is held."""
    last, teacher = specs[-1].folder, specs[-1].teacher
    if teacher is not None and teacher.cache is not None and mode != "resume":
        check_apart(teacher.cache, last)
    mode = first_alone(lambda: _settled_mode(specs[-1], mode))
    if mode == "auto":
        if first_alone(lambda: has_other_sources(last.read_config(), specs[-1].resolved)):
            _check_finished(prepare(specs, listener))
        listener.on_message(f"The run {str(last.root)!r} is finished; nothing is left to do.")
        return last
    prepared = prepare(specs, listener)
    if mode == "resume":
        _check_finished(prepared)
    fill_cache(prepared)
    specs = prepared.specs
    # The line that made the run is what repeats it, also where another one finished it.
    made_by = last.read_env().get("command") if mode == "resume" else None
    command = made_by or (None if command is None else list(command))
    for number, spec in enumerate(specs, start=1):
        if mode == "resume" and first_alone(functools.partial(_is_over, spec.folder)):
            continue
        listener.on_stage(spec, number, len(specs))
        trainer = prepared.trainer(spec)
        if on_trainer is not None:
            on_trainer(trainer)
        if number == 1:
            trainer.on_begin = functools.partial(_begin_in_all, specs[-1], mode, command)
        if mode == "resume":
            trainer.record.earlier = first_alone(spec.folder.read_env).get("inputs")
        trainer.record.command = command
        trainer.on_message = listener.on_message
        goes_on = mode == "resume" and first_alone(functools.partial(has_checkpoints, spec.folder.checkpoints_path))
        if mode == "resume" and not goes_on and spec.folder.train_log_path.is_file():
            listener.on_message("There is no checkpoint, so the run begins at its first step.")
        trainer.train(resume_from_checkpoint=goes_on)
        trainer.save_model()
    return last


def _settled_mode(spec: RunSpec, mode: Mode) -> Mode:
    """The mode that a run goes on in; ``auto`` where it is finished already.

    Raises:
        DrklError: a run of this mode must not touch the folder.
    """
    run = spec.folder
    if mode == "auto":
        mode = "resume" if run.config_path.is_file() else "overwrite"  # of what is empty
        if mode == "resume":
            section = spec.resolved["training"]
            settled = training_section(training_config(spec, pick_device(spec.run.device)), section)
            if found := of_configs(run.read_config(), spec.resolved | {"training": section | settled}):
                raise changed(run.root, found)
            if _is_over(run):
                return "auto"
    if mode == "resume":
        _is_over(run)
    check_folder(run, mode)
    return mode


def _check_finished(prepared: Prepared) -> None:
    """Raise DrklError where a stage that is finished began with other inputs than it has now.

    Stages that came before a run that has begun are the same ones: before one more is trained.
    """
    last = prepared.specs[-1]
    then = first_alone(last.folder.read_env).get("inputs")
    if then and first_alone(functools.partial(has_checkpoints, last.folder.checkpoints_path)):
        now = counted(last.resolved, chooses_best=True)
        if found := list(changes({STAGES: then["settings"][STAGES]}, {STAGES: now["settings"][STAGES]})):
            raise changed(last.folder.root, found)
    for spec in prepared.specs:
        known = first_alone(spec.folder.read_env)
        if known.get("finished") is not None and known.get("inputs"):
            prepared.trainer(spec).check_inputs(known["inputs"])


def _begin(spec: RunSpec, mode: Mode, command: Sequence[str] | None) -> None:
    """Make the folder of a run; one that is to be replaced is removed. Called in one process."""
    run = spec.folder
    if mode == "overwrite" and run.config_path.is_file():
        remove_run(run)
    if mode == "new":
        KEPT.begun("No step was taken yet.")  # which counts once its config is there
    write_yaml(run.config_path, spec.resolved)
    KEPT.begun("No step was taken yet.")  # from here on a resume finds it
    known = run.read_env() if mode == "resume" else {}
    run.write_env(known | {"command": command, "finished": None})


def _begin_in_all(spec: RunSpec, mode: Mode, command: Sequence[str] | None) -> None:
    """`_begin` in the first process, while the others wait to see what it made."""
    first_alone(lambda: _begin(spec, mode, command))
    _check_shared(spec.folder)
    KEPT.begun("No step was taken yet.")


def _check_shared(run: RunFolder) -> None:
    """Raise DrklError in a process that does not see the folder that the first one has made."""
    for _ in range(_SECONDS_TO_SEE):
        if run.config_path.is_file():
            return
        time.sleep(1)  # of a network's file system
    raise DrklError(
        f"The run folder {str(run.root.absolute())!r} was made by the first process, and this one does not see it. All "
        "processes need one run folder, on a disk that all machines share; set run.dir to its absolute path."
    )


def _is_over(run: RunFolder) -> bool:
    """Whether a run has ended; then checkpoints that it should have removed go. Called in one process."""
    if not is_over(run):
        return False
    with suppress(OSError):  # they are of no use, and in nobody's way
        keep_only(run.checkpoints_path, run.read_env().get("best_step"))
    return True


def _make_trainer(spec: RunSpec, prepared: Prepared) -> DistillationTrainer:
    """The trainer of a run whose parts are loaded and checked; nothing is written yet."""
    resources, shared = prepared.resources, prepared.shared
    teacher = resources.teacher(spec.teacher)
    tokenizer = resources.tokenizer(prepared.tokenizer_name)
    teacher_name = spec.teacher.model if spec.teacher else None
    start = start_of(spec.student, spec.teacher)
    student = make_student(spec.student, start, spec.run.seed, tokenizer, resources.classes)
    loaded = prepared.rows(spec)
    reader = resources.teacher_tokenizer
    train = TokenisedRows(loaded.train, loaded.report, shared, spec.data.name, reader, loaded.stream)
    heldout = TokenisedRows(loaded.heldout, loaded.report, shared, spec.data.eval_path) if loaded.heldout else None
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=training_config(spec, resources.device),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=spec.peft,
    )
    for note in trainer.pair.notes:
        resources.listener.on_message(note)
    if resources.listener.on_progress is not None:
        trainer.on_progress(resources.listener.on_progress)
    trainer.pair.teacher_name = teacher_name
    trainer.record.config, trainer.record.keeps_folder = spec.resolved, True
    trainer.record.export = "adapter" if spec.peft is None else spec.peft.export
    return trainer
