"""What an evaluation needs: the models of a run or any two, and the rows of a run, a file or named suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from drkl.data.classification import read_labelled, tokenize_labelled
from drkl.data.config import DataConfig
from drkl.data.examples import read_examples
from drkl.data.rows import Rows, make_rows, read_shares
from drkl.data.tokenize import DropReport, tokenize_examples
from drkl.errors import DrklError
from drkl.evaluation.config import MINILLM_DATA
from drkl.evaluation.suites import name_rows, parse_suite, read_suite
from drkl.models.classes import check_classes, class_names, is_classifier
from drkl.models.config import StudentConfig
from drkl.models.forward import is_encoder_decoder
from drkl.models.load import load_classifier, load_config, load_model, load_tokenizer
from drkl.models.pair import check_families, check_rows, check_tokenizers, shared_vocabulary
from drkl.models.precision import has_device, pick_device, resolve_dtype
from drkl.run_models import evaluation_models, trained_classes
from drkl.training.spec import RunSpec, has_encoder

GAMMA = 0.5


class Inputs(NamedTuple):
    """Everything that is measured, and on what."""

    models: dict[str, Callable[[], PreTrainedModel]]
    tokenizer: Any
    rows: Rows
    suites: list[str] | None
    """The suite of each row, where named suites were asked for."""
    device: torch.device
    data: dict[str, Any]
    vocab_size: int | None
    """How many ids the models are compared on, where that is not all."""
    classes: tuple[str, ...] | None
    """Of classifiers, by number."""
    gamma: float
    facts: dict[str, Any]


def run_inputs(specs: Sequence[RunSpec], suites: Sequence[str] = (), protocol: str | None = None) -> Inputs:
    """Models and rows of a finished run: its own held-out rows, or those of ``suites``.

    Raises:
        DrklError: suites or a protocol for a classification run, or rows that cannot be read.
    """
    first, last = specs[0], specs[-1]
    models, tokenizer, device = evaluation_models(specs)
    classes = trained_classes(last)
    if classes is not None and (suites or protocol):
        raise DrklError("Suites and protocols are about generated answers; a classification run has labels instead.")
    if classes is not None and first.student.init == "random":
        del models["before"]  # its numbers are chance, its calibration by chance perfect
    data = _with_protocol(last.data, protocol)
    apart = classes is None and has_encoder(first, tokenizer)
    described: dict[str, Any]
    names: list[str] | None = None
    if suites:
        rows, names, described = suite_rows(suites, data, tokenizer, encoder_decoder=apart)
    else:
        heldout = read_shares(data, classifier=last.classifies)[1]
        rows, report = make_rows(heldout, data, tokenizer, classes=classes, encoder_decoder=apart)
        described = {
            "path": data.path, "dataset": data.dataset, "sources": [source.name for source in data.sources],
            "eval_path": data.eval_path, **_account(report),
        }  # fmt: skip
    shared = (last.folder.read_env().get("vocabulary") or {}).get("shared")
    gamma = getattr(last.objective.make(), "gamma", GAMMA)
    shown = {
        "teacher": last.teacher.model if last.teacher else None,
        "before": f"{first.student.init} of {first.student.model or (first.teacher.model if first.teacher else '')}",
        "warmup": str(specs[-2].folder.student_path) if len(specs) > 1 else None,
        "after": str(last.folder.student_path),
    }
    facts = {"models": {name: shown[name] for name in models}, "protocol": protocol, "template": data.template}
    return Inputs(models, tokenizer, rows, names, device, described, shared, classes, float(gamma), facts)


def pair_inputs(
    student: str,
    teacher: str | None,
    data: str | None,
    *,
    suites: Sequence[str] = (),
    protocol: str | None = None,
    template: str = "auto",
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    max_new_tokens: int = 64,
    dtype: str = "auto",
    device: str = "auto",
) -> Inputs:
    """A student and a teacher that anybody trained: two folders or ids of one kind and one vocabulary.

    Args:
        student: decoder-only, encoder-decoder or classifier, as its config says.
        teacher: of the same kind; None leaves out what is measured against one.
        data: a file of rows (prompt and response, messages, text, or text and label), or a bundled one.
        suites: ``NAME`` or ``NAME=WHERE``; in place of ``data``.
        protocol: ``minillm`` or None.
        template: as ``data.template``.
        max_prompt_tokens: rows with a longer prompt are dropped and counted; default 256, or what the models' context
            leaves beside an answer (of classifiers no matter).
        max_tokens: longer responses are cut; default 512, or the context.
        max_rows: use the first so many rows of each file.
        max_new_tokens: an answer's length, for which the context needs room.
        dtype: fp32, bf16, fp16, or auto: bf16 where the device is fast at it.
        device: auto, cpu, cuda or mps.

    Raises:
        DrklError: models of two kinds or vocabularies, classes that differ, a token outside the vocabulary, no rows.
    """
    if not has_device(device):
        raise DrklError(f"--device is {device!r}, which this machine (or this torch) does not have; try auto or cpu.")
    picked = pick_device(device)
    wanted = resolve_dtype(dtype, picked)
    config = load_config(student)
    classifier = is_classifier(config)
    if teacher is not None and is_classifier(load_config(teacher)) != classifier:
        kinds = {True: "a classifier", False: "a language model"}
        raise DrklError(
            f"The student {student!r} is {kinds[classifier]} and the teacher {teacher!r} {kinds[not classifier]}: they "
            "have no output in common. Choose both of one kind."
        )
    if classifier and (suites or protocol):
        raise DrklError("Suites and protocols are about generated answers; a classifier takes --data with labels.")
    tokenizer = _tokenizer(student, teacher, classifier=classifier)
    names_of_models = [name for name in (student, teacher) if name is not None]
    lengths = _lengths(names_of_models, max_prompt_tokens, max_tokens, max_new_tokens)
    section = _with_protocol(_section(data, template, lengths), protocol)
    load: Any = load_classifier if classifier else load_model
    models = {"student": lambda: load(student, wanted)}
    shown = {"student": student}
    if teacher is not None:
        models = {"teacher": lambda: load(teacher, wanted), **models}
        shown = {"teacher": teacher, **shown}
    facts = {"models": shown, "protocol": protocol, "template": section.template, "dtype": wanted}
    if classifier:
        classes = class_names(config, student)
        if teacher is not None:
            check_classes(load_config(teacher), classes, teacher)
            check_tokenizers(StudentConfig(init="pretrained", model=student), teacher, classifier=True)
        labelled = read_labelled(section.path)[:max_rows]
        texts, report = tokenize_labelled(labelled, tokenizer, classes, max_tokens=section.max_tokens)
        described = {"path": data, **_account(report)}
        return Inputs(models, tokenizer, texts, None, picked, described, None, classes, GAMMA, facts)
    pair = StudentConfig(init="pretrained", model=student)
    check_families(pair, teacher)
    tokens = check_tokenizers(pair, teacher)
    apart = is_encoder_decoder(config)
    names: list[str] | None = None
    if suites:
        rows, names, described = suite_rows(suites, section, tokenizer, encoder_decoder=apart, max_rows=max_rows)
    else:
        assert section.path is not None
        examples = read_examples(section.path, section.format)[:max_rows]
        rows, report = tokenize_examples(examples, tokenizer, **section.row_settings, encoder_decoder=apart)
        described = {"path": data, **_account(report)}
    vocab = None
    for name, whose in zip(names_of_models, ("student", "teacher"), strict=False):
        check_rows(rows, load_config(name), whose)
    if teacher is not None:
        sizes = [load_config(name).get_text_config().vocab_size for name in (student, teacher)]
        found = shared_vocabulary(sizes[0], sizes[1], tokens, tokenizer, rows)
        vocab = found["shared"] if found is not None else None
    return Inputs(models, tokenizer, rows, names, picked, described, vocab, None, GAMMA, facts)


def suite_rows(
    suites: Sequence[str], config: DataConfig, tokenizer: Any, *, encoder_decoder: bool, max_rows: int | None = None
) -> tuple[list[Any], list[str], dict[str, Any]]:
    """The rows of named suites one after the other, the suite of each, and the account of them for the record.

    Raises:
        DrklError: an unknown suite, one named twice, or one without a row that can be used.
    """
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
            made, report = tokenize_examples(
                examples, tokenizer, **config.row_settings, encoder_decoder=encoder_decoder
            )
        except DrklError as error:
            raise DrklError(f"Suite {suite.name!r}: {error}") from error
        rows += made
        names += [suite.name] * len(made)
        described[suite.name] = {"from": where or suite.dataset, "rows": len(made), **_account(report)}
    return rows, names, {"suites": described}


def _tokenizer(student: str, teacher: str | None, *, classifier: bool) -> Any:
    """The student's tokenizer; the teacher's where the student's folder has none."""
    try:
        return load_tokenizer(student, classifier=classifier)
    except DrklError:
        if teacher is None:
            raise
        return load_tokenizer(teacher, classifier=classifier)


def _lengths(
    models: Sequence[str], max_prompt_tokens: int | None, max_tokens: int | None, max_new_tokens: int
) -> dict[str, int]:
    """The limits that were given, and for the others what fits into the smallest context."""
    configs = [load_config(name).get_text_config(decoder=True) for name in models]
    known = [getattr(config, "max_position_embeddings", None) for config in configs]
    context = min((length for length in known if isinstance(length, int)), default=None)
    whole = max_tokens or max(512, 256 + (max_prompt_tokens or 0))
    prompt = max_prompt_tokens or min(256, whole // 2)
    if context is not None:
        whole = max_tokens or min(whole, context)
        prompt = max_prompt_tokens or max(1, min(prompt, context - max_new_tokens, whole - 1))
    return {"max_prompt_tokens": prompt, "max_tokens": whole}


def _section(data: str | None, template: str, lengths: dict[str, int]) -> DataConfig:
    try:
        return DataConfig.model_validate({"path": data or "suites", "template": template, **lengths})
    except ValueError as error:
        raise DrklError(_reason(error)) from error


def _with_protocol(data: DataConfig, protocol: str | None) -> DataConfig:
    """The data section in a protocol's prompt format."""
    if protocol is None:
        return data
    if protocol != "minillm":
        raise DrklError(f"There is no protocol {protocol!r}; there is minillm.")
    return data.model_copy(update={**MINILLM_DATA, "turns": "last"})


def _account(report: DropReport) -> dict[str, Any]:
    return {"dropped": dict(report.dropped), "responses_cut": report.responses_cut}


def _reason(error: ValueError) -> str:
    errors: Any = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    return "; ".join(
        f"{'.'.join(str(part) for part in one['loc'])}: {one['msg'].removeprefix('Value error, ')}" for one in errors()
    )
