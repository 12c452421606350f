"""Evaluate a student: one loop over models for every kind of task, and `drkl.evaluate`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from pydantic import ValidationError

from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.bookkeeping import Progress, Source, free_memory, placed, reporter
from drkl.evaluation.cached import NOTE
from drkl.evaluation.config import FITS, MINILLM, EvaluationConfig
from drkl.evaluation.pairs import Inputs, Model, pair_inputs
from drkl.evaluation.result import MEASURED, Evaluation
from drkl.evaluation.store import CACHE_BYTES, Store, fingerprint
from drkl.evaluation.tasks import Classification, Generation, Parts, Task
from drkl.locks import EVALUATION, first_holding
from drkl.models.load import one_tokenizer
from drkl.models.memory import memory_told
from drkl.models.precision import DtypeLike
from drkl.models.readout import READING
from drkl.processes import Share
from drkl.runs import RunFolder, cache_dir, check_no_link
from drkl.teachers.cached import TeacherCache


class Settings(TypedDict, total=False):
    """The fields of `EvaluationConfig`, as keyword arguments."""

    prompts: int | None
    samples_per_prompt: int
    sampling_temperature: float
    sweep: Sequence[float]
    max_new_tokens: int
    seed: int
    seeds: Sequence[int]
    batch_size: int
    logit_temperature: float | str | None


def evaluate(
    student: Model,
    teacher: Model | TeacherCache | None,
    rows: Any = None,
    processing_class: Any = None,
    *,
    tokenizer: Any = None,
    suites: Sequence[str] = (),
    protocol: str | None = None,
    template: str = "auto",
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    dtype: DtypeLike = "auto",
    device: str | torch.device | None = None,
    output_dir: str | Path | None = None,
    fresh: bool = False,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Evaluation:
    """Measure how close a student is to its teacher, how varied its answers are, and how calibrated its confidence is.

    Models in memory are handed back as they were: device, training mode, gradients and config.

    >>> result = drkl.evaluate(student, teacher, rows, tokenizer, prompts=8)    # doctest: +SKIP
    >>> result["rkl"].value, result["rkl"].interval                            # doctest: +SKIP

    Args:
        student: a model in memory, or the folder or Hub id of one: decoder-only, encoder-decoder or a classifier.
        teacher: likewise, of the same kind and vocabulary; None leaves out what is measured against one. From the cache
            of its hidden states on these rows everything is measured but its answers.
        rows: held-out rows: a path, a ``datasets.Dataset``, a list of dicts, or tokenised rows; see
            `drkl.data.rows.rows_from`.
        processing_class: the tokenizer that both models share; default the one saved with the student, else the
            teacher's.
        tokenizer: another name for ``processing_class``.
        suites: named test sets in place of ``rows``: ``NAME`` or ``NAME=WHERE``.
        protocol: ``minillm`` for its prompt format, decoding and seeds; None for ours.
        template: how a prompt is written, as ``data.template``.
        max_prompt_tokens: rows with a longer prompt are dropped and counted; default 256, or half of a smaller
            ``max_tokens``, or what the models' context leaves beside a response and a given ``max_new_tokens``.
        max_tokens: longer responses are cut; default 512, or the models' context.
        max_rows: use only the first rows of each file.
        dtype: of models that are loaded; ``auto`` is bf16 where the device is fast at it, else fp32.
        device: default that of a student in memory, else CUDA, MPS or the CPU, the first there is.
        output_dir: write ``eval.json`` and the files beside it there. An evaluation that was killed goes on from the
            parts that were finished.
        fresh: use no finished parts of an earlier evaluation.
        name: what a page calls it; default that of ``output_dir``, else of the student.
        facts: further settings for the record.
        on_progress: called with ("teacher: reading", done, total); the unit is that of the total.
        **settings: the fields of `EvaluationConfig`: ``prompts``, ``samples_per_prompt``, ``sampling_temperature``,
            ``sweep``, ``max_new_tokens``, ``seed``, ``seeds``, ``batch_size``, ``logit_temperature``.

    Raises:
        DrklError: a setting out of range, models of two kinds or vocabularies, classes that differ, a token outside the
            vocabulary, no rows, or an ``output_dir`` that belongs to a run.
    """
    holding = nullcontext() if output_dir is None else first_holding(Path(output_dir), EVALUATION)
    with Share.of_group().joined(), holding:
        config = configured(EvaluationConfig(), protocol, settings)
        if output_dir is not None:
            check_output(Path(output_dir))
        inputs = pair_inputs(
            student,
            teacher,
            rows,
            one_tokenizer(processing_class, tokenizer),
            suites=suites,
            protocol=protocol,
            template=template,
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            max_rows=max_rows,
            max_new_tokens=config.max_new_tokens if "max_new_tokens" in config.model_fields_set else None,
            dtype=dtype,
            device=device,
        )
        return evaluate_inputs(
            inputs, config, output_dir=output_dir, fresh=fresh, name=name, facts=facts, on_progress=on_progress
        )


def evaluate_inputs(
    inputs: Inputs,
    settings: EvaluationConfig,
    *,
    output_dir: str | Path | None = None,
    fresh: bool = False,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Evaluate models on rows that are ready; the arguments are those of `evaluate`.

    Finished parts lie in the output folder's ``.evaluation`` until the files are written. The teacher's stay in the
    user's cache, for other students.
    """
    share = Share.of_group()
    with share.joined(), memory_told("as the models are measured", READING):
        check_fits(settings, inputs.models, inputs.facts.get(NOTE))
        asked = fingerprint(inputs=inputs.digest(), settings=settings.model_dump(mode="json"))
        share.check_same("models, rows or settings", asked)
        folder = None if output_dir is None else RunFolder(Path(output_dir))
        if folder is not None:
            check_no_link(folder.parts_path)
        own = None if folder is None else Store(folder.parts_path)
        if own is not None and fresh and share.is_first:
            own.remove()
        result = run_task(
            _task(inputs, settings, own, fresh, share),
            inputs.models, device=inputs.device, data=inputs.data, facts={**inputs.facts, **(facts or {})},
            on_progress=on_progress,
        )  # fmt: skip
        result = replace(result, name=name or inputs.name)
        if folder is None or own is None:
            return result
        if share.is_first:
            result.save(folder.root)
            own.remove()
        return replace(result, folder=folder.root, name=name or folder.name)


def _task(inputs: Inputs, settings: EvaluationConfig, own: Store | None, fresh: bool, share: Share) -> Task:
    rows: Any = inputs.rows
    if inputs.classes is not None:
        return Classification(rows, inputs.classes, settings, pad_id=inputs.tokenizer.pad_token_id, share=share)
    parts = None
    if own is not None:
        parts = Parts(own, own if fresh else Store(cache_dir() / "evaluation", limit=CACHE_BYTES))
    return Generation(
        inputs.tokenizer, rows, settings, suites=inputs.suites, vocab_size=inputs.vocab_size,
        merged_ids=inputs.merged_ids, gamma=inputs.gamma, parts=parts, template=inputs.template, room=inputs.room,
        share=share,
    )  # fmt: skip


def run_task(
    task: Task,
    models: Mapping[str, Source],
    *,
    device: str | torch.device = "cpu",
    data: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure every model, one at a time, the teacher first.

    Args:
        task: what is measured.
        models: by the names in `MEASURED`; each is loaded once and dropped before the next one is, and the teacher once
            more to read what all of them answered.
        device: each model is moved there.
        data: where the rows come from, for the record.
        facts: further settings for the record.
        on_progress: see `evaluate`.
    """
    assert "student" in models and set(models) <= set(MEASURED), f"models are named {MEASURED}"
    check_fits(task.settings, models)
    started = time.perf_counter()
    seconds: dict[str, dict[str, float]] = {}
    for name in (model for model in MEASURED if model in models):
        seconds[name] = {}
        _measure(task, name, models[name], device, seconds[name], on_progress)
        # Two models at once may not fit.
        free_memory(device)
    teacher = models.get("teacher")
    if teacher is not None and not isinstance(teacher, TeacherCache) and task.is_to_judge():
        with placed(teacher, device) as model:
            task.judge(model, reporter("teacher", on_progress), seconds["teacher"])
        free_memory(device)
    for name, own in seconds.items():
        task.score(name, own)
    result = task.evaluation({**(facts or {}), "device": str(device)}, data or {}, seconds)
    result.timing["total"] = round(time.perf_counter() - started, 2)
    return result


def _measure(
    task: Task,
    name: str,
    source: Source,
    device: str | torch.device,
    seconds: dict[str, float],
    on_progress: Progress | None,
) -> None:
    started = time.perf_counter()
    if isinstance(source, TeacherCache):
        task.measure(name, source, reporter(name, on_progress), seconds)
        return
    with placed(source, device) as model:
        seconds["load"] = time.perf_counter() - started
        task.measure(name, model, reporter(name, on_progress), seconds)


def check_fits(settings: EvaluationConfig, models: Mapping[str, Source], note: str | None = None) -> None:
    """Raise DrklError where a temperature is to be fitted to a teacher that there is not; ``note`` says why."""
    if settings.logit_temperature == FITS[1] and "teacher" not in models:
        why = f" {note}" if note else ""
        raise DrklError(
            f"logit_temperature is {FITS[1]}, and there is no teacher's distribution to fit the student to.{why} "
            f"{FITS[0]} fits it to the held-out tokens or labels."
        )


def configured(settings: EvaluationConfig, protocol: str | None, changes: Mapping[str, Any]) -> EvaluationConfig:
    """The settings with a protocol's in their place, and ``changes`` over both.

    Raises:
        DrklError: a field that there is not, or a value out of range.
    """
    if unknown := [key for key in changes if key not in EvaluationConfig.model_fields]:
        known = list(EvaluationConfig.model_fields)
        raise DrklError(
            f"There is no setting {unknown[0]!r} of an evaluation; expected {', '.join(known)}."
            f"{did_you_mean(unknown[0], known)}"
        )
    # Without defaults: what was not given fits the models.
    values = {**settings.model_dump(exclude_unset=True), **(MINILLM if protocol is not None else {}), **changes}
    try:
        return EvaluationConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise DrklError(f"{first['loc'][0]}: {reason[:1].lower()}{reason[1:]}; got {first['input']!r}.") from error


def check_output(path: Path) -> None:
    """Raise DrklError unless an evaluation that is no run's own may be written there."""
    if path.exists() and not path.is_dir():
        raise DrklError(f"output_dir {str(path)!r} is a file; expected a folder, or a name for a new one.")
    if RunFolder(path).config_path.is_file():
        raise DrklError(
            f"output_dir {str(path)!r} is a run folder, whose own evaluation would be lost. Name another folder."
        )
