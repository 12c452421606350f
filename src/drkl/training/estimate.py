"""Estimate the memory and time of a run from its config and a small measurement; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from drkl.data.classification import LabelledRow
from drkl.data.lengths import Lengths, Room, answer_room
from drkl.data.shares import load_heldout, load_shares
from drkl.data.stored import column
from drkl.data.streams import stream_of
from drkl.data.tokenize import DropReport, Row
from drkl.models.forward import decoder_start, is_encoder_decoder
from drkl.models.load import count_parameters, load_config, model_note
from drkl.models.pair import check_families, check_rows, check_tokenizers, shared_vocabulary
from drkl.models.precision import DTYPES, has_device, pick_device, resolve_dtype
from drkl.processes import launched
from drkl.rollouts.steps import planned_lengths
from drkl.teachers.cached import TeacherCache, row_of
from drkl.teachers.stored import DEFAULT_K, Stored, StoredStates, check_kind, topk_to_store
from drkl.training.checks import check_device
from drkl.training.memory import Memory, available_bytes, check_processes
from drkl.training.plan import cuts_by_cost, plan_run
from drkl.training.predict import Known, largest_heldout_batch, micro_batches, predict, sharding_of
from drkl.training.run import Listener, Prepared, check_cached, prepare, rows_to_fill
from drkl.training.sparse import check_sparse
from drkl.training.spec import (
    RunSpec,
    fitted,
    run_classes,
    run_configs,
    run_ends,
    run_room,
    run_tokenizer,
    teacher_tokenizer,
    tokenizer_name,
    training_config,
    with_stand_in,
    without_server,
)

NOT_ASKED = "the time that the teacher's server takes, which was not asked"
WRITING, READING = 2.0, 8
"""Writing answers takes so many times the time of its matrix products. At each token reading all weights from memory
takes as long as so many more positions, which the answers that are written at once share. Measured on a CPU in bf16: 4
to 48 answers at once, of 64 tokens, by a student of 10 layers, took 2.4 to 7.5 times the products. No GPU was tried."""


def estimate(specs: Sequence[RunSpec], processes: int | None = None) -> dict[str, Any]:
    """The resolved config and, stage by stage, sizes, memory and time.

    Args:
        specs: the stages.
        processes: how many the run is divided over, on a machine that need not be this one and may have other devices;
            None is as many as this process is one of, here.

    Raises:
        DrklError: whatever `distill` would refuse before training.
    """
    check_processes(processes)
    here = processes is None
    processes = launched().count if processes is None else processes
    shardings = [sharding_of(spec) for spec in specs]
    there: str = specs[-1].run.device
    specs = with_stand_in(specs if here else list(map(_as_if_here, specs)), without_server)
    first = specs[0]
    check_device(specs[-1].run.device)
    device = pick_device(specs[-1].run.device)
    there = device.type if here or there == "auto" else there
    cache, filled = None, dict[str, int]()
    if first.teacher is not None and first.teacher.cache is not None:
        cache = TeacherCache.of(first.teacher)  # its files are checked before its config and its tokenizer are read
        lacking = rows_to_fill(prepare(specs, Listener()))
        filled = {"rows_added_to_the_cache": len(lacking)} if first.teacher.fill_cache else {}
    teacher_name = first.teacher.source if first.teacher else None
    tokenizer = run_tokenizer(specs)
    classes = run_classes(specs)
    options = first.teacher.source_options if first.teacher else {}
    if classes is None:
        check_families(first.student, teacher_name, tokenizer, **options)
    tokens = check_tokenizers(first.student, teacher_name, classifier=first.classifies)
    configs = run_configs(first, tokenizer, classes)
    room = run_room(configs, classes)
    specs = fitted(specs, room)
    last = specs[-1]
    student, teacher = configs["student"], configs.get("teacher")
    served = first.teacher is not None and first.teacher.is_served
    sizes = {
        "student": count_parameters(student, classifier=first.classifies),
        "teacher": count_parameters(teacher, classifier=first.classifies) if teacher and not served else None,
        "teacher_head": _head_size(teacher) if teacher and (cache is None or cache.kind == "hidden") else 0,
    }
    ends = () if classes is not None else run_ends(first, tokenizer)
    rates: dict[str, float] = {}
    seen: set[tuple[str, ...]] = set()
    stages, encoder_decoder = [], is_encoder_decoder(student)
    own_reader = teacher_tokenizer(specs, tokenizer_name(specs))
    for place, (spec, sharding) in enumerate(zip(specs, shardings, strict=True)):
        check_sparse(cache, training_config(spec, device))
        needed = spec.rollouts.needs_responses
        kind: dict[str, Any] = {"classes": classes, "encoder_decoder": encoder_decoder, "room": room, "ends": ends}
        kind |= {"needs_responses": needed, "teacher_tokenizer": own_reader}
        rows: Any
        held_out: Any
        if spec.data.streaming:
            rows, report = stream_of(spec.data, tokenizer, **kind).sample()
            held_out, _ = load_heldout(spec.data, tokenizer, **kind)
        else:
            shares = load_shares(spec.data, tokenizer, **kind)
            rows, report, held_out = shares.train, shares.report, shares.heldout
        check_rows(rows, configs)
        shared = None
        if teacher is not None and classes is None:
            shared = shared_vocabulary(_vocab_size(student), _vocab_size(teacher), tokens, tokenizer, rows)
        longest = _longest_answer(spec, room)
        stage, steps, arguments = _stage(
            spec, rows, longest, report, student, teacher, sizes, device, rates, seen, processes
        )
        evaluates = spec.training.arguments.get("eval_strategy") != "no"
        heldout = held_out[: spec.training.eval_rows] if evaluates else []
        vocab_size = None if shared is None else shared["shared"]
        known = _known(
            spec, arguments, student, teacher, cache, vocab_size, rows, heldout, steps, longest, there, processes,
            sharding,
        )  # fmt: skip
        memory = predict(replace(known, follows=place > 0))
        said = {"advice": memory.advice(available_bytes(device) if here and there == device.type else None)}
        stage |= {"estimated_memory_gb": float(f"{memory.peak_bytes / 1e9:.3g}"), "memory": memory.to_json() | said}
        stages.append(stage)
    return {
        "config": last.resolved,
        "teacher_note": model_note(teacher_name) if teacher_name and not served else None,
        "parameters": {name: sizes[name] for name in ("student", "teacher")},
        **filled,
        "stages": stages,
        "estimated_minutes": round(sum(stage["estimated_minutes"] for stage in stages), 1),
        **({"not_estimated": NOT_ASKED} if served else {}),
    }


def memory_of(specs: Sequence[RunSpec], processes: int | None = None) -> list[Memory]:
    """The memory of each stage of a run, as `estimate` predicts it."""
    return [Memory.from_json(stage["memory"]) for stage in estimate(specs, processes)["stages"]]


def _as_if_here(spec: RunSpec) -> RunSpec:
    """A stage that is meant for another machine, with what this one can take of it: its device, and no sharding."""
    training, teacher, resolved = spec.training, spec.teacher, spec.resolved
    own = {
        name: value for name, value in training.arguments.items() if name not in ("fsdp", "fsdp_config", "deepspeed")
    }
    change: dict[str, Any] = {"arguments": own}
    run = spec.run
    if not has_device(run.device):
        run = run.model_copy(update={"device": "cpu"})
        change["precision"] = "bf16" if training.precision == "auto" else training.precision
        if teacher is not None and teacher.dtype == "auto" and "dtype" in resolved["teacher"]:
            resolved = {**resolved, "teacher": resolved["teacher"] | {"dtype": "bf16"}}
    return replace(spec, run=run, training=training.model_copy(update=change), resolved=resolved)


def estimate_cache(
    specs: Sequence[RunSpec], *, kind: str = "hidden", k: int | None = None, temperatures: Sequence[float] = ()
) -> dict[str, Any]:
    """The size of a teacher cache of a run, the time of making it, and what each epoch of training then saves.

    Args:
        specs: the stages.
        kind: as `cache_states` takes it, and so are the others.
        k: of kind ``topk``.
        temperatures: of kind ``topk``.

    Raises:
        DrklError: whatever `cache_states` would refuse before the teacher is loaded.
    """
    check_kind(kind, k, temperatures)
    check_cached(specs, kind, k, temperatures)
    prepared = prepare(specs, Listener(), ask_server=False)
    teacher = prepared.specs[0].teacher
    assert teacher is not None
    k = teacher.top_k if teacher.is_served else k
    config = load_config(teacher.source, **teacher.source_options)
    start = decoder_start(config)
    loaded = [prepared.rows(spec) for spec in prepared.specs]
    dtype = DTYPES[resolve_dtype(teacher.dtype, prepared.resources.device)]
    kinds = _kinds(prepared, config, dtype, kind, k, temperatures)
    stored = kinds[kind]
    distinct = {
        row_of(row, start, labelled=stored.labelled): row for part in loaded for row in (*part.train, *part.heldout)
    }
    positions = sum(len(row.positions) for row in distinct)
    head = _head_size(config) * dtype.itemsize if kind == "hidden" and not specs[0].classifies else 0
    index = 8 if stored.labelled else 4
    body = count_parameters(config, classifier=specs[0].classifies) - _head_size(config)
    rate = _flops_per_second(dtype, prepared.resources.device)
    read = [sum(2 * body * row.length for row in part.train) / rate for part in loaded]
    logits = 2 * _head_size(config) * positions if kind == "topk" else 0
    run = 0 if teacher.cache is not None else sum(2 * body * row.length for row in distinct.values())
    time: dict[str, Any] = {
        "estimated_seconds": round((run + logits) / rate, 1),
        "saved_seconds_per_epoch": [round(seconds, 1) for seconds in read],
    }
    if teacher.is_served:
        time = {"not_estimated": NOT_ASKED}
    return {
        **stored.described(),
        "rows": len(distinct),
        "positions": positions,
        "bytes_per_position": stored.bytes_per_position,
        "bytes_per_position_of_kinds": {
            name if isinstance(one, StoredStates) else f"{name}, k {one.k}": one.bytes_per_position
            for name, one in kinds.items()
        },
        "cache_mib": round((positions * (stored.bytes_per_position + index) + head) / 2**20, 1),
        **time,
        "pays": "from the second epoch over the rows on, and with every further student, objective or seed",
    }


def _kinds(
    prepared: Prepared, config: Any, dtype: torch.dtype, kind: str, k: int | None, temperatures: Sequence[float]
) -> dict[str, Stored]:
    """What each kind of cache would store of a run."""
    first, classes = prepared.specs[0], prepared.resources.classes
    if classes is not None:
        if kind == "topk":
            topk_to_store(k, temperatures, 0, dtype, classifies=True)
        return {"hidden": StoredStates(config.num_labels, dtype, has_head=False)}
    tokenizer = prepared.resources.tokenizer(prepared.tokenizer_name)
    student, teacher = _vocab_size(run_configs(first, tokenizer, classes)["student"]), _vocab_size(config)
    shared = shared_vocabulary(student, teacher, prepared.shared, tokenizer, [])
    size = teacher if shared is None else shared["shared"]
    every = [*temperatures, *(spec.loss.temperature for spec in prepared.specs)]
    least = min(DEFAULT_K, size - 1) if kind == "hidden" else k
    return {
        "hidden": StoredStates(config.get_text_config().hidden_size, dtype, has_head=True),
        "topk": topk_to_store(least, every, size, dtype, classifies=False),
    }


def _longest_answer(spec: RunSpec, room: Room) -> int:
    """In tokens; 0 where nothing is sampled."""
    if not spec.rollouts.is_on:
        return 0
    lengths = Lengths(spec.data.max_prompt_tokens, spec.data.max_tokens)
    return answer_room(lengths, room, spec.rollouts.max_new_tokens)


def _stage(
    spec: RunSpec,
    rows: Any,
    longest: int,
    report: DropReport,
    student: Any,
    teacher: Any,
    sizes: dict[str, Any],
    device: torch.device,
    rates: dict[str, float],
    seen: set[tuple[str, ...]],
    processes: int,
) -> tuple[dict[str, Any], Sequence[list[int]], Any]:
    """What is printed of a stage but for its memory, its steps and its arguments."""
    arguments = training_config(spec, device)
    on_policy = spec.rollouts.is_on
    lengths = planned_lengths(rows, longest) if on_policy else column(rows, "length")
    steps, _ = plan_run(lengths, arguments, processes)
    inputs, trained, new = _tokens_per_step(rows, steps, spec, seen)
    answered = _answered(rows, longest) if on_policy else rows
    share = sum(map(spec.rollouts.share_at, range(len(steps)))) / len(steps)
    if on_policy:
        answers = _tokens_per_step(answered, steps, spec, seen)
        inputs, trained, new = (
            (1 - share) * ours + share * theirs for ours, theirs in zip((inputs, trained, new), answers, strict=True)
        )
    frozen = spec.student.freeze_embeddings and getattr(student.get_text_config(), "tie_word_embeddings", False)
    flops = _flops(inputs, trained, student, sizes, frozen=frozen)
    if teacher is not None and spec.uses_teacher and sizes["teacher"] is not None:
        flops += _teacher_flops(new, trained, teacher, sizes)
    precision = resolve_dtype(spec.training.precision, device)
    if precision not in rates:
        rates[precision] = _flops_per_second(DTYPES[precision], device)
    # Everything that is no matrix product (norms, softmax, the optimiser) came to about a third more when measured.
    seconds = 1.35 * flops / rates[precision] * len(steps)
    writing = _writing(answered, steps, spec, share, student, teacher, sizes) if on_policy else None
    if writing is not None:
        seconds += writing.flops / rates[precision] * len(steps)
    stage: dict[str, Any] = {
        "name": spec.folder.name,
        "objective": dict(spec.resolved["objective"]),
        "data": ("The first rows of the stream: " if spec.data.streaming else "") + report.summary(),
        "steps": len(steps),
        "tokens_per_step": {
            "budget": arguments.tokens_per_step,
            "input": round(inputs, 1),
            "trained": round(trained, 1),
            "through_the_teacher": round(new, 1) if spec.uses_teacher else 0,
            "micro_batches": arguments.gradient_accumulation_steps * processes,
        },
        "estimated_minutes": round(seconds / 60, 1),
    }
    if writing is not None:
        stage["answers_per_step"] = writing.as_record(longest, len(steps) / rates[precision] / 60)
    return stage, steps, arguments


def _known(
    spec: RunSpec,
    arguments: Any,
    student: Any,
    teacher: Any,
    cache: TeacherCache | None,
    vocab_size: int | None,
    rows: Any,
    heldout: Any,
    steps: Sequence[list[int]],
    longest: int,
    device: str,
    processes: int,
    sharding: str,
) -> Known:
    """What the memory of a stage depends on."""
    on_policy = spec.rollouts.is_on
    planned = _answered(rows, longest) if on_policy else rows
    parts = arguments.gradient_accumulation_steps * processes
    answers = None
    if on_policy and spec.rollouts.generator != "vllm":
        written = max(map(len, steps)) * spec.rollouts.refresh_every // processes
        most = int(column(rows, "sampling").max()) + longest
        answers = max(1, min(spec.rollouts.batch_size, written)), most
    config = spec.teacher
    held, k = "none", 0
    if config is not None and teacher is not None:
        served = config.is_served
        held = "topk" if served or (cache is not None and cache.k is not None) else "hidden" if cache else "live"
        k = config.top_k if served else 0 if cache is None or cache.k is None else cache.k
    alike = cuts_by_cost(arguments, processes) and not on_policy
    micro, positions = micro_batches(planned, steps, parts, alike=alike)
    return Known(
        spec=spec,
        arguments=arguments,
        student=student,
        teacher=teacher,
        held=held,
        k=k,
        vocab_size=vocab_size,
        micro=micro,
        positions=positions,
        heldout=largest_heldout_batch([row for row in heldout if row.num_trained]),
        heldout_positions=-(-sum(row.num_trained for row in heldout) // processes),
        train_positions=int(column(rows, "trained")[sorted({i for step in steps for i in step})].sum()),
        answers=answers,
        several=arguments.gradient_accumulation_steps > 1 or on_policy,
        sharding=sharding,
        processes=processes,
        device=device,
    )


def _answered(rows: Any, longest: int) -> Any:
    """The rows with answers as long as the data's responses, or as the longest answer where that is less, or all."""
    return [
        replace(
            row,
            prompt_ids=row.sampling_ids,
            response_ids=(row.response_ids or (0,) * longest)[:longest],
            trained=None,
            sampling_context=None,
        )
        for row in rows
    ]


class _Writing(NamedTuple):
    """Answers that are written for a step."""

    answers: float
    tokens: float
    flops: float
    """Products that take as long, or 0 where a server writes."""
    served: bool

    def as_record(self, longest: int, minutes_per_flop: float) -> dict[str, Any]:
        """For people; the number of steps is in ``minutes_per_flop``."""
        record = {"written": round(self.answers, 1), "tokens": round(self.tokens, 1), "longest": longest}
        if self.served:
            return record | {"not_estimated": "the time that the server takes to write them"}
        return record | {"estimated_minutes": round(self.flops * minutes_per_flop, 1)}


def _writing(
    rows: Any,
    steps: Sequence[Sequence[int]],
    spec: RunSpec,
    share: float,
    student: Any,
    teacher: Any,
    sizes: dict[str, Any],
) -> _Writing:
    config = spec.rollouts
    written = share * (1 - config.replay) / len(steps)
    answers = written * sum(map(len, steps))
    prompts = written * sum(len(rows[i].prompt_ids) for step in steps for i in step)
    tokens = written * sum(len(rows[i].response_ids) for step in steps for i in step)
    together = max(1.0, min(config.batch_size, answers * config.refresh_every))
    flops = 0.0
    models = {"student": (student,), "teacher": (teacher,), "mixed": (student, teacher)}[config.source]
    for model in models:
        size = sizes["teacher" if model is teacher else "student"]
        flops += 2 * (size - _head_size(model)) * prompts + 2 * size * tokens * (1 + READING / together)
    served = config.generator == "vllm"
    return _Writing(answers, tokens, 0.0 if served else WRITING * flops, served)


def _tokens_per_step(
    rows: Any, steps: Sequence[Sequence[int]], spec: RunSpec, seen: set[tuple[str, ...]]
) -> tuple[float, float, float]:
    """Input and trained positions, and those that the teacher has to read: not in a cache nor remembered."""
    inputs = new = 0.0
    trained = 0
    remembers = spec.teacher is not None and spec.teacher.remember_mb > 0 and not spec.rollouts.is_on
    cached = spec.teacher is not None and spec.teacher.cache is not None
    for step in steps:
        positions = _positions([rows[i] for i in step])
        inputs += positions
        trained += sum(rows[i].num_trained for i in step)
        ids = tuple(rows[i].id for i in step)  # not the indices: stages may differ in their data
        if not cached and (not remembers or ids not in seen):
            new += positions
        if remembers:
            seen.add(ids)
    return inputs / len(steps), trained / len(steps), new / len(steps)


def _positions(rows: Sequence[Row | LabelledRow]) -> float:
    """Padded positions of a batch; of an encoder-decoder the mean of its two sides, each of about half the weights."""
    longest: float = max(row.length for row in rows)
    if isinstance(rows[0], Row) and rows[0].encoder_decoder:
        sides = [(len(row.prompt_ids), len(row.response_ids)) for row in rows if isinstance(row, Row)]
        longest = sum(map(max, zip(*sides, strict=True))) / 2
    return len(rows) * longest


def _vocab_size(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _flops(inputs: float, trained: float, student: Any, sizes: dict[str, Any], *, frozen: bool) -> float:
    head = _head_size(student)
    return 6 * (sizes["student"] - head) * inputs + (4 if frozen else 6) * head * trained


def _teacher_flops(inputs: float, trained: float, teacher: Any, sizes: dict[str, Any]) -> float:
    return 2 * (sizes["teacher"] - _head_size(teacher)) * inputs + 2 * sizes["teacher_head"] * trained


def _head_size(config: Any) -> int:
    text = config.get_text_config()
    return int(text.vocab_size * text.hidden_size)


def _flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """The speed of a matrix product of the size that training is made of."""
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return float(2 * 1024**3 / best)
