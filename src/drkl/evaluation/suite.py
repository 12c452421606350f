"""Runs every metric on every model and gives one table, ``eval.json``, with the samples it rests on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drkl.data.examples import hash_of_id
from drkl.data.tokenize import Row
from drkl.evaluation import sections
from drkl.evaluation.answers import Answer, AnswerTable
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.measure import MODELS, TRAINED, Progress, Report, free_memory, reporter, timed
from drkl.evaluation.positions import HeldOutStates, PositionTable, compare, held_out_states
from drkl.evaluation.store import Store, fingerprint, model_fingerprint
from drkl.models.forward import lm_head
from drkl.models.generate import sample_texts, sampling_batches
from drkl.runs import RunFolder, write_json, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SWEPT = ("teacher", *TRAINED)
"""The models that answer at every temperature of the sweep, not at the main one alone."""
KEPT_STATES_BYTES = 2**30
"""Larger held-out states of a teacher are not kept for later students."""


class Results(NamedTuple):
    """What one evaluation writes."""

    evaluation: dict[str, Any]
    """``eval.json``."""
    samples: list[dict[str, Any]]
    """``samples.jsonl``: every answer."""
    heldout: list[dict[str, Any]]
    """``heldout.jsonl``: the teacher-forced sums of every held-out row, for every model."""


class Parts(NamedTuple):
    """Where finished parts are kept; ``shared`` outlasts the evaluation and holds the teacher's."""

    own: Store
    shared: Store


class _Work(NamedTuple):
    """What all models are measured on, and with."""

    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    prompts: Sequence[Row]
    settings: EvaluationConfig
    pad_id: int
    device: str | torch.device
    vocab_size: int | None
    gamma: float
    parts: Parts | None

    def part(self, name: str) -> Store | None:
        if self.parts is None:
            return None
        return self.parts.shared if name == "teacher" else self.parts.own


def evaluate(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationConfig,
    *,
    pad_id: int,
    device: str | torch.device = "cpu",
    data: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    suites: Sequence[str] | None = None,
    vocab_size: int | None = None,
    gamma: float = 0.5,
    parts: Parts | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Measure models on held-out rows.

    Args:
        models: loaders by name, of ``measure.MODELS``; each is called once and its model dropped before the next one is
            called (of the teacher its head and its hidden states stay). Without a teacher, what is measured against it
            is None.
        tokenizer: the one that the rows were made with, and that all the models share.
        rows: the held-out rows, of different ids; the teacher-forced metrics use all, sampling the prompts of some.
        settings: how many are sampled, and how.
        pad_id: fills batches.
        device: each model is moved there.
        data: where the rows come from, for the record.
        facts: further settings for the record: what the models are, the command.
        suites: the name of each row's suite; prompts are then picked from each, and each has numbers of its own.
        vocab_size: how many ids, from 0, the models are compared on where their padding differs; None for all.
        gamma: DRKL's, for the share of positions where it strengthens the tail.
        parts: where finished parts are kept and looked for; an evaluation that was killed goes on from them.
        on_progress: called with ("teacher: sampling", done, total); the unit is that of the total.

    Raises:
        DrklError: vocabularies that differ, or a prompt that leaves no room in a model's context.
    """
    assert models and set(models) <= set(MODELS), f"models are named {MODELS}"
    started = time.perf_counter()
    prompts = choose_prompts(rows, settings.prompts, suites)
    work = _Work(tokenizer, rows, prompts, settings, pad_id, device, vocab_size, gamma, parts)
    names = {row.id: suite for row, suite in zip(rows, suites or [""] * len(rows), strict=True)}
    measured = sections.Measured(settings, [row.id for row in rows], list(names.values()), {}, {}, {}, 0)
    teacher: tuple[str, HeldOutStates] | None = None
    samples: list[dict[str, Any]] = []
    for name in (model for model in MODELS if model in models):
        seconds: dict[str, float] = {}
        report = reporter(name, on_progress)
        with timed(seconds, "load"):
            model: Any = models[name]()
            model.to(device).eval()
            printed = model_fingerprint(model) if parts is not None else ""
        with timed(seconds, "teacher_forced"):
            states, table = _read(name, model, printed, work, teacher, report)
            measured.vocab_size = states.head.vocab_size
        teacher = (printed, states) if name == "teacher" else teacher
        del states
        with timed(seconds, "samples"):
            pools = _sample(name, model, printed, work, report)
        # Two students at once may not fit.
        del model
        free_memory(device)
        with timed(seconds, "text"):
            measured.answers[name] = {t: _score(prompts, pools[t], names) for t in pools}
        measured.tables[name], measured.seconds[name] = table, seconds
        samples += _sample_lines(name, work, pools, names if suites is not None else None)
    evaluation = sections.evaluation(
        measured, gamma=gamma, device=device, data=data, facts=facts, num_prompts=len(prompts)
    )
    evaluation["timing"]["total"] = round(time.perf_counter() - started, 2)
    return Results(evaluation, samples, list(_heldout_lines(measured, suites)))


def write_evaluation(run: RunFolder, results: Results) -> None:
    """Write ``samples.jsonl``, ``heldout.jsonl`` and then ``eval.json``, each whole or not at all."""
    write_jsonl(run.samples_path, results.samples)
    write_jsonl(run.heldout_path, results.heldout)
    write_json(run.eval_path, results.evaluation)


def choose_prompts(rows: Sequence[Row], count: int | None, suites: Sequence[str] | None = None) -> list[Row]:
    """Return ``count`` rows (of each suite; all, if there are fewer) picked by a hash of their ids, in their order.

    A file sorted by subject would otherwise give the first subject only; the choice does not depend on any seed.
    """
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(suites or [""] * len(rows)):
        groups.setdefault(name, []).append(number)
    chosen: list[int] = []
    for members in groups.values():
        chosen += sorted(members, key=lambda i: hash_of_id(rows[i].id))[:count]
    return [rows[i] for i in sorted(chosen)]


def _read(
    name: str,
    model: PreTrainedModel,
    printed: str,
    work: _Work,
    teacher: tuple[str, HeldOutStates] | None,
    report: Report,
) -> tuple[HeldOutStates, PositionTable]:
    """The teacher-forced numbers of one model, and its states, which those that follow the teacher are held against."""
    store = work.part(name)
    facts = {
        "rows": _digest([[row.id, row.prompt_ids, row.response_ids, row.trained] for row in work.rows]),
        "model": printed, "vocab": work.vocab_size, "device": torch.device(work.device).type,
    }  # fmt: skip
    states_key = fingerprint(kind="states", **facts)
    kept = store.read_tensors(states_key) if store is not None and name == "teacher" else None
    if kept is not None:
        head = lm_head(model)
        states = HeldOutStates.from_tensors(kept, head if work.vocab_size is None else head.trimmed(work.vocab_size))
    else:
        states = held_out_states(
            model, work.rows, pad_id=work.pad_id, vocab_size=work.vocab_size, progress=report("reading", len(work.rows))
        )
        if store is not None and name == "teacher" and states.hidden.nbytes <= KEPT_STATES_BYTES:
            # The head is the model's own, which is there whenever its states are.
            kept = {part: tensor for part, tensor in states.to_tensors().items() if not part.startswith("head.")}
            store.write_tensors(states_key, kept)
    other = states if name == "teacher" else None if teacher is None else teacher[1]
    against = printed if name == "teacher" else "" if teacher is None else teacher[0]
    key = fingerprint(kind="positions", against=against, gamma=work.gamma, **facts)
    arrays = store.read_tensors(key) if store is not None else None
    if arrays is not None:
        return states, PositionTable.from_arrays({column: tensor.numpy() for column, tensor in arrays.items()})
    table = compare(states, other, gamma=work.gamma, progress=report("comparing", len(states.labels)))
    if store is not None:
        store.write_tensors(key, {column: torch.from_numpy(array) for column, array in table.to_arrays().items()})
    return states, table


def _sample(
    name: str, model: PreTrainedModel, printed: str, work: _Work, report: Report
) -> dict[float, list[list[Answer]]]:
    """Every prompt's answers by temperature; a batch that was finished before is read instead."""
    settings, prompts = work.settings, work.prompts
    if not prompts:
        return {}
    temperatures = settings.temperatures if name in SWEPT else settings.temperatures[:1]
    lengths = [len(row.sampling_ids) for row in prompts]
    found: dict[float, list[list[Answer]]] = {}
    for temperature in temperatures:
        pools: list[list[Answer]] = [[] for _ in prompts]
        total = len(prompts) * len(settings.all_seeds) * settings.samples_per_prompt * settings.max_new_tokens
        advance = report(f"sampling at {temperature:g}", total)
        for seed in settings.all_seeds:
            for group, numbers in sampling_batches(lengths, settings.samples_per_prompt, settings.batch_size):
                rows = [prompts[i] for i in group]
                answers = _batch(model, printed, work, rows, numbers, temperature, seed, work.part(name), advance)
                for place, pool in zip(group, answers, strict=True):
                    pools[place] += pool
        found[temperature] = pools
    return found


def _batch(
    model: PreTrainedModel,
    printed: str,
    work: _Work,
    rows: Sequence[Row],
    numbers: range,
    temperature: float,
    seed: int,
    store: Store | None,
    advance: Callable[[int], None] | None,
) -> list[list[Answer]]:
    """The answers of one batch: samples ``numbers`` of each row."""
    key = fingerprint(
        kind="answers", model=printed, prompts=_digest([[row.id, row.sampling_ids] for row in rows]), seed=seed,
        temperature=temperature, samples=[numbers.start, numbers.stop], device=torch.device(work.device).type,
        max_new_tokens=work.settings.max_new_tokens,
    )  # fmt: skip
    lines = store.read_lines(key) if store is not None else None
    if lines is not None and len(lines) == len(rows) * len(numbers):
        if advance is not None:
            advance(len(lines) * work.settings.max_new_tokens)
        flat = [Answer(line["text"], line["num_tokens"], line["ended"]) for line in lines]
        return [flat[i : i + len(numbers)] for i in range(0, len(flat), len(numbers))]
    generations = sample_texts(
        model,
        work.tokenizer,
        [row.sampling_ids for row in rows],
        samples_per_prompt=len(numbers),
        first_sample=numbers.start,
        sampling_temperature=temperature,
        max_new_tokens=work.settings.max_new_tokens,
        seed=seed,
        batch_size=len(rows) * len(numbers),
        keys=[row.id for row in rows],
        progress=advance,
    )
    answers = [[Answer(one.text, one.num_tokens, one.finished) for one in pool] for pool in generations]
    if store is not None:
        store.write_lines(key, [answer._asdict() for pool in answers for answer in pool])
    return answers


def _score(
    prompts: Sequence[Row], pools: Sequence[Sequence[Answer]], suite_of: Mapping[str, str]
) -> dict[str, AnswerTable]:
    """The answers' table of each suite."""
    tables: dict[str, AnswerTable] = {}
    for row, pool in zip(prompts, pools, strict=True):
        tables.setdefault(suite_of[row.id], AnswerTable()).update(row.example.all_references, pool)
    return tables


def _heldout_lines(measured: sections.Measured, suites: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for name, table in measured.tables.items():
        for number, line in enumerate(table.rows(measured.row_ids)):
            yield {"model": name, **({} if suites is None else {"suite": suites[number]}), **line}


def _sample_lines(
    name: str, work: _Work, pools: Mapping[float, Sequence[Sequence[Answer]]], suite_of: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    seeds, per_seed = work.settings.all_seeds, work.settings.samples_per_prompt
    for temperature, answers in pools.items():
        for row, pool in zip(work.prompts, answers, strict=True):
            references = row.example.all_references
            for number, answer in enumerate(pool):
                yield {
                    "model": name,
                    "prompt_id": row.id,
                    "prompt": row.example.prompt_text,
                    "sampling_temperature": temperature,
                    "sample": number,
                    "text": answer.text,
                    "reference": references[0] if len(references) == 1 else list(references),
                    "num_tokens": answer.num_tokens,
                    "ended": answer.ended,
                    **({"seed": seeds[number // per_seed]} if len(seeds) > 1 else {}),
                    **({} if suite_of is None else {"suite": suite_of[row.id]}),
                }


def _digest(value: Any) -> str:
    return fingerprint(value=value)
