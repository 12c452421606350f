"""A student, its teacher, their tokenizer and their rows, loaded where they are given by name and checked together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.classification import LabelledRow
from drkl.data.lengths import Lengths, Room, answer_room, fit_lengths
from drkl.data.rows import Rows, rows_from
from drkl.data.stored import JoinedRows
from drkl.data.streams import RowStream, has_no_end, stream_from, tokenizing
from drkl.data.tokenize import DropReport, Row
from drkl.errors import DrklError
from drkl.models.adapter import adapter_start
from drkl.models.check import check_student
from drkl.models.classes import class_names, is_classifier
from drkl.models.config import StudentConfig
from drkl.models.context import room_of
from drkl.models.ends import check_languages, listed_ends
from drkl.models.fingerprint import tokenizer_fingerprint
from drkl.models.forward import decoder_start, is_encoder_decoder, lm_head, uses_flash
from drkl.models.load import words_of
from drkl.models.pair import (
    SharedTokens,
    check_rows,
    check_tokenizers,
    own_tokenizer,
    shared_vocabulary,
)
from drkl.models.weights import check_numbers
from drkl.runs import IN_MEMORY
from drkl.teachers.cached import TeacherCache, check_same_text, other_tokenizer
from drkl.teachers.served import ServedTeacher
from drkl.teachers.teacher import Teacher
from drkl.training.arguments import DistillationConfig
from drkl.training.ends import Ends, settle_ends
from drkl.training.loading import (
    check_kinds,
    load_student,
    load_teacher,
    make_trainable,
    place,
    plain_options,
    tokenizer_of_rows,
)
from drkl.training.served import check_lengths, check_served, settle_served
from drkl.training.sparse import check_sparse, check_sparse_vocabulary, sparse_notes
from drkl.training.streaming import check_streaming

_log = logging.getLogger("drkl")


@dataclass(frozen=True)
class TokenisedRows:
    """Rows that a run has tokenised already, with the account of them, and what two tokenizers share.

    Of a stream the ``rows`` are the first.
    """

    rows: Rows
    report: DropReport
    shared_tokens: SharedTokens | None = None
    source: str | None = None
    teacher_tokenizer: Any = None
    """The teacher's, where it read the prompts in a rendering of its own; None where it read the run's."""
    stream: RowStream | None = None


@dataclass
class Pair:
    """The models, tokenizer and rows of a trainer, checked against each other."""

    student: PreTrainedModel
    teacher: Teacher | None
    tokenizer: Any
    rows: Rows
    eval_rows: Rows
    report: DropReport
    classes: tuple[str, ...] | None
    """Names of the classes by number; None for language models."""
    vocabulary: dict[str, int] | None
    """Where the two heads are compared on fewer ids than they have: how many are ``shared``, of how many."""
    student_name: str
    teacher_name: str | None
    data_names: tuple[str, str | None]
    """The sources of the training rows and of the held-out rows."""
    lengths: Lengths
    """The limits of prompts and rows: those that were given, and what fits the models."""
    room: Room
    """The models' context."""
    max_new_tokens: int
    """The longest answer that is sampled in training; nothing is sampled where rollouts are off."""
    eval_dataset: list[dict[str, Any]] | None
    """The held-out rows as they were passed in memory; None where they have a name, or no json."""
    tokenize: Callable[[Any, str], tuple[Rows, DropReport]]
    """Turns a data set, as the trainer takes it and errors call it, into rows as the training rows were made."""
    adapter: Any = None
    """peft's handle on the student, or None."""
    adapter_start: dict[str, Tensor] = field(default_factory=dict)
    """First weights of an adapter whose start changed the base model; empty for any other."""
    student_options: dict[str, Any] = field(default_factory=dict)
    """What a student given by its name was loaded with, as a config.yaml has it."""
    notes: list[str] = field(default_factory=list)
    """Notes on the pair for the user."""
    teacher_tokenizer: Any = None
    """The teacher's, where it reads prompts in a rendering of its own; None where it reads the student's."""
    listed_ends: Sequence[int] = ()
    """The ids that end an answer by the teacher's own settings, or by the student's where there is no teacher."""
    ends: Ends | None = None
    """Where the teacher ends an answer, and where the rows do."""
    merged_ids: tuple[int, ...] = ()
    """The stop tokens that count as one event in the loss; empty where each counts for itself."""
    stream: RowStream | None = None
    """Where the training rows come from while training goes on; ``rows`` are then the first of them."""
    shared_tokens: SharedTokens | None = None
    """What the tokenizers of two models given by name share."""
    teacher_stops: Sequence[int] = ()
    """The ids that end an answer of the teacher's; empty where they are not asked for."""
    packed: bool = False
    """Whether batches have no padding: their rows lie one after the other."""
    varlen: Sequence[PreTrainedModel] = ()
    """The models that then take torch's FlashAttention in place of its SDPA while the student is trained."""

    @property
    def vocab_size(self) -> int | None:
        """The number of token ids, from 0, on which the models are compared; None for all."""
        return None if self.vocabulary is None else self.vocabulary["shared"]

    @property
    def packs_heldout(self) -> bool:
        """Whether held-out batches have no padding either: they are read without autocast, in the weights' dtype."""
        needs_half = any(model is self.student for model in self.varlen)
        return self.packed and not (needs_half and self.student.dtype == torch.float32)

    @property
    def words(self) -> Any:
        """The tokenizer of texts; that of a processor is inside it."""
        return words_of(self.tokenizer)

    @property
    def pad_id(self) -> int:
        """The padding id of batches; its value changes nothing."""
        return _pad_id(self.tokenizer)

    def rows_of(self, dataset: Any) -> Rows:
        """Turn held-out rows, as the trainer takes them, into checked ones."""
        rows, _ = self.tokenize(dataset, "eval_dataset")
        _check_rows(rows, self.student, self.teacher)
        return rows

    def check_more(self, rows: Sequence[Any]) -> None:
        """Raise DrklError where training rows that came later cannot be used as the first ones."""
        _check_rows(rows, self.student, self.teacher)
        if self.classes is None:
            _compare_vocabularies(self.student, self.teacher, self.shared_tokens, self.tokenizer, rows, [])
        if isinstance(self.teacher, TeacherCache):
            self.teacher.check_rows(rows, decoder_start(self.student), "rows of the stream")
        check_lengths(self, rows)


def make_pair(
    model: Any,
    teacher_model: Any,
    args: DistillationConfig,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: Any,
    *,
    quantization_config: Any = None,
    peft_config: Any = None,
) -> Pair:
    """Load what was named, tokenise the rows, and check that everything fits.

    Args:
        model: the student, as `DistillationTrainer` takes it.
        teacher_model: the teacher, likewise; None takes ``args.teacher_model_name_or_path``, if any.
        args: how to load and to tokenise.
        train_dataset: training rows, or `TokenisedRows`.
        eval_dataset: held-out rows, or `TokenisedRows`; None for none.
        tokenizer: the tokenizer; None takes that of the student's name, else the teacher's.
        quantization_config: for loading the student.
        peft_config: the adapter of the student; None for none.

    Raises:
        DrklError: something is missing, or does not fit.
    """
    named_teacher = args.teacher_model_name_or_path
    if teacher_model is not None and named_teacher is not None and teacher_model != named_teacher:
        raise DrklError("teacher_model and args.teacher_model_name_or_path are both given; give one of them.")
    teacher_model = named_teacher if teacher_model is None else teacher_model
    if train_dataset is None:
        raise DrklError("train_dataset is missing: a data set, a list of rows, or a file.")
    streams = _is_stream(train_dataset, args)
    if streams:
        check_streaming(args)
    student, adapter = load_student(model, args, quantization_config)
    check_numbers(student, f"The student, a {type(student).__name__},")
    if uses_flash(student):
        place(student, args)
    classes = class_names(student, _name(model)) if is_classifier(student) else None
    teacher = load_teacher(teacher_model, args)
    source = settle_served(teacher, model, student, tokenizer, args) or teacher_model
    if teacher is not None and teacher.model is student:
        raise DrklError(
            "model and teacher_model are the same object: the student is trained in place, so its teacher would move "
            "with it. Pass copy.deepcopy(model) as one of them."
        )
    check_kinds(student, teacher, classes, _name(model), _name(teacher_model))
    shared = train_dataset.shared_tokens if isinstance(train_dataset, TokenisedRows) else None
    if shared is None and all(isinstance(name, (str, Path)) for name in (model, source)):
        config = StudentConfig(init="pretrained", model=str(model))
        shared = check_tokenizers(config, str(source), classifier=classes is not None)
    if tokenizer is None:
        tokenizer = tokenizer_of_rows(model, source, classifier=classes is not None)
    _pad_id(tokenizer)
    words = words_of(tokenizer)
    ends = [] if classes is not None else listed_ends(student if teacher is None else teacher.model, words)
    room = _room(student, teacher, classes)
    lengths, max_new_tokens = _lengths(args, room)
    own_reader = None
    if isinstance(train_dataset, TokenisedRows):
        own_reader = train_dataset.teacher_tokenizer
    elif teacher is not None and args.rollouts.is_on and classes is None:
        own_reader = own_tokenizer(teacher.model, tokenizer)
    settings: dict[str, Any] = {"classes": classes, "ends": ends, "room": room, "teacher_tokenizer": own_reader}
    tokenize = partial(_tokenize, args=args, tokenizer=tokenizer, **settings, **lengths._asdict())
    stream = None
    if streams:
        stream, rows, report = _first_rows(train_dataset, args, tokenizer, **settings, **lengths._asdict())
    else:
        rows, report = tokenize(train_dataset, "train_dataset")
    eval_rows: Rows = []
    if eval_dataset is not None:
        eval_rows, _ = tokenize(eval_dataset, "eval_dataset")
    everything = JoinedRows(rows, eval_rows)
    _check_rows(everything, student, teacher)
    # The command line says what there is to say of its rows where it reads them.
    notes = [] if isinstance(train_dataset, TokenisedRows) else list(report.notes)
    if stream is not None and args.dataloader_num_workers:
        notes.append("dataloader_num_workers has no effect: a stream is read ahead by a thread of its own.")
    vocabulary = None
    if classes is None:
        check_student(student)
        vocabulary = _compare_vocabularies(student, teacher, shared, tokenizer, everything, notes)
        check_languages(words, {"student": student, "teacher": None if teacher is None else teacher.model})
    else:
        student.config.get_text_config().pad_token_id = _pad_id(tokenizer)  # decoders find a text's end by it
        if teacher is not None:
            teacher.pad_id = _pad_id(tokenizer)
    pair = Pair(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        rows=rows,
        eval_rows=eval_rows,
        report=report,
        classes=classes,
        vocabulary=vocabulary,
        student_name=_name(model),
        teacher_name=None if teacher is None else _name(teacher_model),
        data_names=(_data_name(train_dataset), None if eval_dataset is None else _data_name(eval_dataset)),
        lengths=lengths,
        room=room,
        max_new_tokens=max_new_tokens,
        eval_dataset=_plain_rows(eval_dataset),
        student_options=plain_options(
            {**(args.model_init_kwargs or {})}
            | ({} if quantization_config is None else {"quantization_config": quantization_config})
        ),
        tokenize=tokenize,
        notes=notes,
        stream=stream,
        shared_tokens=shared,
        teacher_tokenizer=own_reader,
        listed_ends=ends,
    )
    check_cache(pair, args)
    check_served(pair, args)
    pair.notes += sparse_notes(pair, args)
    if classes is None:
        settle_ends(pair, args)
    # Last, so that a student that is refused is left as it was passed.
    pair.adapter = make_trainable(student, adapter, args, peft_config)
    pair.adapter_start = {} if pair.adapter is None else adapter_start(pair.adapter)
    return pair


def check_cache(pair: Pair, args: DistillationConfig) -> None:
    """Raise DrklError where the teacher is a cache that has not what the run asks for."""
    teacher = pair.teacher
    if not isinstance(teacher, TeacherCache):
        return
    check_same_text(args.rollouts.is_on)
    if args.teacher_remember_mb:
        pair.notes.append("teacher_remember_mb has no effect: teacher_model is a cache, which remembers everything.")
    if teacher.manifest["tokenizer"]["fingerprint"] != tokenizer_fingerprint(pair.words):
        raise other_tokenizer(teacher.folder)
    check_sparse(teacher, args)
    check_sparse_vocabulary(pair)
    start = decoder_start(pair.student)
    teacher.check_rows(pair.rows, start, "training rows")
    teacher.check_rows(pair.eval_rows, start, "held-out rows")


def _lengths(args: DistillationConfig, room: Room) -> tuple[Lengths, int]:
    """The limits of prompts and rows, and the longest sampled answer; 0 where none is sampled."""
    if not (rollouts := args.rollouts).is_on:
        return fit_lengths(args.max_prompt_tokens, args.max_tokens, room), 0
    reserved = rollouts.reserved(room)
    lengths = fit_lengths(args.max_prompt_tokens, args.max_tokens, room, max_new_tokens=reserved)
    return lengths, answer_room(lengths, room, rollouts.max_new_tokens)


def _name(model: Any) -> str:
    """Return a model's name for the record: the name it was loaded by, or its class."""
    if model is None or isinstance(model, (str, Path)):
        return str(model)
    if isinstance(model, TeacherCache):
        return str(model.manifest["teacher"]["name"])
    if isinstance(model, ServedTeacher):
        return model.name
    if isinstance(model, Teacher):
        model = model.model
    return f"{IN_MEMORY}: {type(model).__name__}"


def _data_name(dataset: Any) -> str:
    if isinstance(dataset, TokenisedRows):
        return dataset.source or IN_MEMORY
    return str(dataset) if isinstance(dataset, (str, Path)) else f"{IN_MEMORY}: {type(dataset).__name__}"


def _plain_rows(dataset: Any) -> list[dict[str, Any]] | None:
    """The rows of a data set in memory, as a json file can hold them; None for any other."""
    if dataset is None or isinstance(dataset, (str, Path, TokenisedRows)):
        return None
    try:
        rows = [dict(row) for row in dataset]
        json.dumps(rows, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return rows


def _pad_id(tokenizer: Any) -> int:
    tokenizer = words_of(tokenizer)
    for name in ("pad_token_id", "eos_token_id", "sep_token_id"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return int(token)
    raise DrklError(
        f"processing_class is a {type(tokenizer).__name__} without a padding, end-of-sequence or separator token; "
        "expected a tokenizer."
    )


def _tokenize(
    dataset: Any, name: str, /, *, tokenizer: Any, args: DistillationConfig, **settings: Any
) -> tuple[Rows, DropReport]:
    """Turn a data set, as the trainer takes it, into rows; ``settings`` are those of `rows_from`."""
    if isinstance(dataset, TokenisedRows):
        return dataset.rows, dataset.report
    rows, report = rows_from(
        dataset,
        tokenizer,
        name=name,
        encoder_decoder=settings["room"].separate,
        turns=args.turns,
        template=args.template,
        needs_responses=args.rollouts.needs_responses,
        **settings,
    )
    if name != "train_dataset":
        report.difference = None  # said of the training rows already
    _warn_of(report, name, args)
    return rows, report


def _warn_of(report: DropReport, name: str, args: DistillationConfig) -> None:
    lost = report.dropped or report.responses_cut
    said = f"{name}: {report.summary()}" if lost else report.difference
    if said and args.process_index == 0:
        _log.warning("Warning: %s", said)


def _is_stream(dataset: Any, args: DistillationConfig) -> bool:
    if isinstance(dataset, TokenisedRows):
        return dataset.stream is not None
    return args.streaming or has_no_end(dataset)


def _first_rows(
    dataset: Any, args: DistillationConfig, tokenizer: Any, **settings: Any
) -> tuple[RowStream, Rows, DropReport]:
    """The training rows as a stream, and the first of them; ``settings`` are those of `rows_from`."""
    if isinstance(dataset, TokenisedRows):
        assert dataset.stream is not None
        return dataset.stream, dataset.rows, dataset.report
    settings |= {"turns": args.turns, "template": args.template, "encoder_decoder": settings["room"].separate}
    stream = stream_from(dataset, "train_dataset", tokenizing(tokenizer, **settings), args.shuffle_buffer)
    rows, report = stream.sample()
    _warn_of(report, "train_dataset, its first rows", args)
    return stream, rows, report


def _configs(student: PreTrainedModel, teacher: Teacher | None) -> dict[str, Any]:
    return {"student": student.config} | ({} if teacher is None else {"teacher": teacher.model.config})


def _room(student: PreTrainedModel, teacher: Teacher | None, classes: Sequence[str] | None) -> Room:
    """The positions that both models have for a row."""
    encoder_decoder = classes is None and is_encoder_decoder(student)
    return room_of(_configs(student, teacher).values(), encoder_decoder=encoder_decoder)


def _check_rows(rows: Sequence[Row | LabelledRow], student: PreTrainedModel, teacher: Teacher | None) -> None:
    check_rows(rows, _configs(student, teacher))


def _compare_vocabularies(
    student: PreTrainedModel,
    teacher: Teacher | None,
    tokens: SharedTokens | None,
    tokenizer: Any,
    rows: Sequence[Any],
    notes: list[str],
) -> dict[str, int] | None:
    if teacher is None:
        return None
    sizes = lm_head(student).vocab_size, lm_head(teacher.model).vocab_size
    vocabulary = shared_vocabulary(*sizes, tokens, tokenizer, rows)
    if vocabulary is not None:
        notes.append(
            f"The student scores {vocabulary['student']} ids and the teacher {vocabulary['teacher']}; their "
            f"tokenizers share the first {vocabulary['shared']}, and the two are compared on those."
        )
    return vocabulary
