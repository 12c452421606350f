"""`analyze`: what reverse KL and every other objective would do to a student, measured on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drkl.analysis.result import Analysis, claim_folder
from drkl.analysis.states import Observed, observe
from drkl.analysis.tables import make_tables, upward_force
from drkl.errors import DrklError
from drkl.evaluation.bookkeeping import (
    Progress,
    check_same_weights,
    free_memory,
    placed,
    reporter,
    timed,
    versions,
)
from drkl.evaluation.cached import NOTE, no_distribution, read_cached
from drkl.evaluation.evaluate import check_output
from drkl.evaluation.findings import of_analysis
from drkl.evaluation.pairs import Inputs, Model, pair_inputs
from drkl.evaluation.result import Evaluation
from drkl.evaluation.store import fingerprint
from drkl.kept import MARK
from drkl.locks import ANALYSIS, first_holding
from drkl.models.load import one_tokenizer
from drkl.models.memory import memory_told
from drkl.models.precision import DtypeLike
from drkl.models.readout import READING, Readout, read
from drkl.objectives import OBJECTIVES, Objective, make_objective
from drkl.objectives.variants import parse_variants
from drkl.processes import Share
from drkl.runs import RunFolder, check_no_link
from drkl.teachers.cached import TeacherCache
from drkl.training.environment import now

DEFAULT_OBJECTIVES = (*OBJECTIVES, "drkl@student", "drkl@floor", "drkl~0.1", "srkl+srkl", "rkl+fkl", "rkl+gjs")
"""Short names (`drkl.objectives.variants`) of the objectives that are differentiated by default."""


def analyze(
    student: Model,
    teacher: Model | TeacherCache,
    rows: Any,
    processing_class: Any = None,
    *,
    tokenizer: Any = None,
    objectives: Sequence[str | Objective] | None = None,
    positions: int = 512,
    gamma: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    template: str = "auto",
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    dtype: DtypeLike = "auto",
    device: str | torch.device | None = None,
    output_dir: str | Path | None = None,
    command: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Analysis:
    """Measure whether reverse KL makes a student overconfident, and how every objective would push its target.

    At every position the two models are compared; at some of them every objective is differentiated, and its gradient
    is split into the part of the target and the part of the tail. Models in memory are handed back as they were.

    >>> analysis = drkl.analyze(student, teacher, rows, tokenizer)                      # doctest: +SKIP
    >>> analysis.finding("pushed_when_matched").answer, analysis["K"].value            # doctest: +SKIP

    Args:
        student: a model in memory, or the folder or Hub id of one: decoder-only, encoder-decoder, or a classifier of
            three classes or more.
        teacher: its teacher, of the same kind and vocabulary, or the cache of its hidden states on these rows.
        rows: held-out rows: a path, a ``datasets.Dataset``, a list of dicts, or tokenised rows; see
            `drkl.data.rows.rows_from`.
        processing_class: the tokenizer that both models share (default: the one saved with the student, else the
            teacher's).
        tokenizer: another name for ``processing_class``.
        objectives: the objectives to differentiate: objectives, or short names as ``drkl:0.1`` (see
            `drkl.objectives.variants`). Default: all, and some decoupled ones.
        positions: number of evenly spaced positions at which every objective is differentiated. Half as many are added
            from the positions where the target is matched.
        gamma: DRKL's weight of the tail, used where an objective names none (default: 0.5).
        temperature: the temperature of the losses; divides both models' logits.
        seed: random seed of the bootstrap intervals.
        template: how a prompt is written, as ``data.template``.
        max_prompt_tokens: rows with a longer prompt are dropped and counted (default: as in `drkl.evaluate`).
        max_tokens: longer responses are cut (default: as in `drkl.evaluate`).
        max_rows: use only the first rows of a file.
        dtype: precision of models that are loaded; ``auto`` is bf16 where the device is fast at it, else fp32.
        device: default: that of a student in memory, else CUDA, MPS or the CPU, the first that exists.
        output_dir: write ``analysis.json`` and ``analysis/positions.csv`` there.
        command: the command line that repeats the analysis, for the record.
        on_progress: called with ("teacher: reading", done, total).

    Raises:
        DrklError: a value is outside its domain, the models are no pair, the classifier has two classes, there are no
            rows, or ``output_dir`` belongs to a run or cannot be written to.
    """
    holding = nullcontext() if output_dir is None else first_holding(Path(output_dir), ANALYSIS)
    with Share.of_group().joined(), holding:
        if output_dir is not None:
            check_output(Path(output_dir))
        inputs = pair_inputs(
            student,
            teacher,
            rows,
            one_tokenizer(processing_class, tokenizer),
            template=template,
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            max_rows=max_rows,
            dtype=dtype,
            device=device,
        )
        return analyze_inputs(
            inputs,
            objectives=objectives,
            positions=positions,
            gamma=gamma,
            temperature=temperature,
            seed=seed,
            output_dir=output_dir,
            command=command,
            on_progress=on_progress,
        )


def analyze_inputs(
    inputs: Inputs,
    *,
    objectives: Sequence[str | Objective] | None = None,
    own: Objective | None = None,
    positions: int = 512,
    gamma: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    evaluation_seed: int = 0,
    output_dir: str | Path | None = None,
    command: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Analysis:
    """Analyse models and rows that are ready; see `analyze`.

    Args:
        inputs: the models (a teacher and a student among them), and their rows.
        objectives: see `analyze`.
        own: the objective of a run, which is differentiated too.
        positions: see `analyze`.
        gamma: see `analyze`; default: that of ``inputs``.
        temperature: see `analyze`.
        seed: see `analyze`.
        evaluation_seed: random seed of the bootstrap in `drkl.evaluate`, for the means that it has too. Where there is
            an ``eval.json`` in ``output_dir``, its own seed is used.
        output_dir: see `analyze`.
        command: see `analyze`.
        on_progress: see `analyze`.

    Raises:
        DrklError: there is no teacher, a value is outside its domain, or the models cannot be compared.
    """
    share = Share.of_group()
    with share.joined(), memory_told("as the models are compared", READING):
        gamma = inputs.gamma if gamma is None else gamma
        _check(inputs, gamma, positions, temperature)
        chosen = named_objectives(DEFAULT_OBJECTIVES if objectives is None else objectives, own=own, gamma=gamma)
        asked = [repr(chosen), positions, gamma, temperature, seed]
        share.check_same("models, rows or settings", fingerprint(inputs=inputs.digest(), settings=asked))
        shared = True
        if output_dir is not None:
            folder = RunFolder(Path(output_dir))
            check_no_link(folder.analysis_folder)
            evaluation_seed, shared = share.first(lambda: _claimed(folder, inputs, evaluation_seed))
        started, seconds = time.perf_counter(), dict[str, float]()
        with timed(seconds, "reading"):
            student, teacher = (_read(name, inputs, share, on_progress) for name in ("student", "teacher"))
        with timed(seconds, "differentiating"):
            observed = observe(
                student, teacher, chosen, positions=positions, temperature=temperature, share=share,
                on_reading=reporter("both", on_progress)("comparing", len(student.labels)),
                on_objective=reporter("both", on_progress)("differentiating", len(chosen)),
            )  # fmt: skip
        tables = make_tables(observed, gamma=gamma, seed=seed, evaluation_seed=evaluation_seed)
        tables["settings"] = _facts(inputs, command) | tables["settings"]
        tables["timing"] = {
            **{name: round(value, 2) for name, value in seconds.items()},
            "total": round(time.perf_counter() - started, 2),
            "finished": now(),
        }
        columns = _position_columns(observed, [row.id for row in inputs.rows])
        analysis = Analysis(tables, of_analysis(tables, shared=shared), columns)
        if output_dir is not None and share.is_first:
            analysis.save(output_dir)
        return analysis


def _facts(inputs: Inputs, command: Sequence[str] | None) -> dict[str, Any]:
    """What was analysed, for the record."""
    return {
        **({} if inputs.classes is None else {"task": "classification"}),
        "models": {name: inputs.facts["models"][name] for name in ("teacher", "student")},
        "data": inputs.data,
        **{key: inputs.facts[key] for key in ("teacher_cache", MARK) if key in inputs.facts},
        "template": inputs.facts["template"],
        "device": str(inputs.device),
        **({} if command is None else {"command": list(command)}),
        "versions": versions(),
    }


def _claimed(folder: RunFolder, inputs: Inputs, evaluation_seed: int) -> tuple[int, bool]:
    """`_evaluation_beside`, and the folder is made ready for the results."""
    found = _evaluation_beside(folder, inputs, evaluation_seed)
    claim_folder(folder)
    return found


def named_objectives(
    chosen: Sequence[str | Objective], *, own: Objective | None = None, gamma: float | None = None
) -> dict[str, Objective]:
    """The objectives by their titles; ``own`` comes first, as ``this run's NAME``, unless it is one of them.

    Args:
        chosen: objectives, or short names as `drkl.objectives.variants.parse_variant` reads them.
        own: the objective of a run.
        gamma: used by every objective that has a gamma and whose name sets none; None leaves the defaults.

    Raises:
        DrklError: a name is unknown, or a parameter is outside its domain.
    """
    variants = parse_variants([name for name in chosen if isinstance(name, str)], gamma)
    named = {variant.title: variant.objective for variant in variants}
    for objective in (make_objective(given) for given in chosen if not isinstance(given, str)):
        if objective not in named.values():
            named[repr(objective) if objective.name in named else objective.name] = objective
    if own is None or own in named.values():
        return named
    return {f"this run's {own.name}": own, **named}


def _evaluation_beside(folder: RunFolder, inputs: Inputs, seed: int) -> tuple[int, bool]:
    """Return how to decide the findings that ``eval.json`` in the same folder has too.

    Returns:
        The seed of the evaluation (``seed`` where there is none yet), and whether the findings are to be decided: False
        where it measured other models or other rows.
    """
    if not folder.eval_path.is_file():
        return seed, True
    settings = Evaluation.load(folder.root).settings
    data, models = settings.get("data") or {}, settings.get("models") or {}
    same_rows = data.get("heldout_rows") == len(inputs.rows) and all(
        data.get(key) == value for key, value in inputs.data.items()
    )
    same_models = all(models.get(name) == inputs.facts["models"][name] for name in ("teacher", "student"))
    return settings.get("seed", seed), same_rows and same_models


def _check(inputs: Inputs, gamma: float, positions: int, temperature: float) -> None:
    """Refuse what cannot be analysed.

    Raises:
        DrklError: there is no teacher, there are two classes, or a value is outside its domain.
    """
    if "teacher" not in inputs.models and NOTE in inputs.facts:
        raise no_distribution(inputs.facts[NOTE])
    if "teacher" not in inputs.models:
        raise DrklError(
            "There is no teacher, and the analysis compares the student with one. A student that was trained without a "
            "teacher can be analysed beside any teacher of its vocabulary."
        )
    if inputs.classes is not None and len(inputs.classes) == 2:
        raise DrklError(
            "With two classes there is no tail: K = 0, and DRKL is reverse KL. There is nothing to analyse."
        )
    for name, value in (("gamma", gamma), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise DrklError(f"{name} is {value:g}; expected a finite number above 0.")
    if positions < 1:
        raise DrklError(f"positions is {positions}; expected at least 1.")


def _read(name: str, inputs: Inputs, share: Share, on_progress: Progress | None) -> Readout:
    """Run one model over the rows; of a model that was loaded only the head is kept. See `Readout.own`."""
    report = reporter(name, on_progress)("reading", len(inputs.rows))
    rows: Any = inputs.rows
    if name == "teacher" and inputs.classes is None:
        rows = [row.for_teacher for row in rows]
    given: dict[str, Any] = {
        "pad_id": inputs.tokenizer.pad_token_id, "vocab_size": inputs.vocab_size, "merged_ids": inputs.merged_ids,
        "share": share, "progress": report,
    }  # fmt: skip
    source = inputs.models[name]
    if isinstance(source, TeacherCache):
        return read_cached(source, rows, **given)
    with placed(source, inputs.device) as model:
        check_same_weights(name, model, share)
        readout = read(model, rows, **given)
        del model
    free_memory(inputs.device)
    return readout


def _position_columns(observed: Observed, row_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of ``positions.csv``."""
    at, force = observed.columns, observed.columns["q_t"] * observed.columns["rest"] / observed.temperature
    return {
        "row_id": np.array(row_ids)[observed.row],
        "label": observed.labels,
        **{name: at[name] for name in ("q_t", "p_t", "B", "K", "D")},
        "rkl_target_push": force * at["D"],
        "rkl_tail_push": -upward_force(observed),
    }
