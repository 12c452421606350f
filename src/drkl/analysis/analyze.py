"""`analyze`: what reverse KL and every other objective would do to a student, measured on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drkl.analysis.result import Analysis
from drkl.analysis.states import Observed, observe
from drkl.analysis.tables import make_tables, upward_force
from drkl.errors import DrklError
from drkl.evaluation.findings import of_analysis
from drkl.evaluation.inputs import Inputs
from drkl.evaluation.measure import TRAINED, Progress, free_memory, reporter, timed, versions
from drkl.evaluation.result import Evaluation
from drkl.models.readout import Readout, read
from drkl.objectives import OBJECTIVES, Objective
from drkl.objectives.variants import parse_variants
from drkl.runs import RunFolder
from drkl.training.environment import now

DEFAULT_OBJECTIVES = (*OBJECTIVES, "drkl@student", "drkl@floor", "drkl~0.1", "srkl+srkl", "rkl+fkl", "rkl+gjs")
"""Short names (`drkl.objectives.variants`) of the objectives that are differentiated by default."""


def named_objectives(
    specs: Sequence[str], *, own: Objective | None = None, gamma: float | None = None
) -> dict[str, Objective]:
    """The objectives by their titles; ``own`` comes first, as ``this run's NAME``, unless it is one of them.

    Args:
        specs: short names, as `drkl.objectives.variants.parse_variant` reads them.
        own: the objective of a run.
        gamma: used by every objective that has a gamma and whose name sets none; None leaves the defaults.

    Raises:
        DrklError: a name is unknown, or a parameter is outside its domain.
    """
    variants = {variant.title: variant.objective for variant in parse_variants(specs, gamma)}
    if own is None or own in variants.values():
        return variants
    return {f"this run's {own.name}": own, **variants}


def analyze_inputs(
    inputs: Inputs,
    objectives: Mapping[str, Objective],
    *,
    gamma: float,
    positions: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    evaluation_seed: int = 0,
    shared: bool = True,
    command: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Analysis:
    """Read the rows with both models and analyse them; see `analyze`.

    Args:
        inputs: the models (a teacher and a trained student among them), and their rows.
        objectives: the objectives to differentiate, by name.
        gamma: DRKL's constant weight of the tail.
        positions: number of positions at which each objective is differentiated.
        temperature: the temperature of the losses.
        seed: random seed of the bootstrap.
        evaluation_seed: random seed of the bootstrap of the means that `drkl evaluate` has too.
        shared: whether to decide the findings that `drkl evaluate` decides too; False where it measured other rows.
        command: the command line that repeats the analysis, for the record.
        on_progress: called with ("teacher: reading", done, total).

    Raises:
        DrklError: there is no teacher, a value is outside its domain, or the models cannot be compared.
    """
    check(inputs, gamma, positions, temperature)
    started, seconds = time.perf_counter(), dict[str, float]()
    trained = next(name for name in TRAINED if name in inputs.models)
    with timed(seconds, "reading"):
        student, teacher = (_read(name, inputs, on_progress) for name in (trained, "teacher"))
    with timed(seconds, "differentiating"):
        observed = observe(
            student, teacher, objectives, positions=positions, temperature=temperature,
            on_reading=reporter("both", on_progress)("comparing", len(student.labels)),
            on_objective=reporter("both", on_progress)("differentiating", len(objectives)),
        )  # fmt: skip
    tables = make_tables(observed, gamma=gamma, seed=seed, evaluation_seed=evaluation_seed)
    models = inputs.facts["models"]
    tables["settings"] = {
        **({} if inputs.classes is None else {"task": "classification"}),
        "models": {"teacher": models["teacher"], "student": models[trained]},
        "data": inputs.data,
        "template": inputs.facts["template"],
        "device": str(inputs.device),
        **({} if command is None else {"command": list(command)}),
        "versions": versions(),
        **tables["settings"],
    }
    tables["timing"] = {
        **{name: round(value, 2) for name, value in seconds.items()}, "total": round(time.perf_counter() - started, 2),
        "finished": now(),
    }  # fmt: skip
    columns = _position_columns(observed, [row.id for row in inputs.rows])
    return Analysis(tables, of_analysis(tables, shared=shared), columns)


def evaluation_beside(folder: RunFolder, inputs: Inputs, seed: int = 0) -> dict[str, Any]:
    """How to decide the findings that ``eval.json`` in the same folder decides too.

    Args:
        folder: the folder of the analysis.
        inputs: what is analysed.
        seed: the seed of the evaluation where there is no ``eval.json`` yet.

    Returns:
        The arguments ``evaluation_seed`` and ``shared`` of `analyze_inputs`: the seed of the evaluation, and whether it
        measured the same models on the same rows.
    """
    if not folder.eval_path.is_file():
        return {"evaluation_seed": seed, "shared": True}
    settings = Evaluation.load(folder.root).settings
    data, models = settings.get("data") or {}, settings.get("models") or {}
    same_rows = data.get("heldout_rows") == len(inputs.rows) and all(
        data.get(key) == value for key, value in inputs.data.items()
    )
    same_models = all(models.get(name) == inputs.facts["models"][name] for name in ("teacher", "student"))
    return {"evaluation_seed": settings.get("seed", seed), "shared": same_rows and same_models}


def check(inputs: Inputs, gamma: float, positions: int, temperature: float) -> None:
    """Refuse what cannot be analysed.

    Raises:
        DrklError: there is no teacher, there are two classes, or a value is outside its domain.
    """
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


def _read(name: str, inputs: Inputs, on_progress: Progress | None) -> Readout:
    """Run one model over the rows; only its head is kept."""
    report = reporter("teacher" if name == "teacher" else "student", on_progress)
    model: Any = inputs.models[name]()
    model.to(inputs.device).eval()
    readout = read(
        model, inputs.rows, pad_id=inputs.tokenizer.pad_token_id, vocab_size=inputs.vocab_size,
        progress=report("reading", len(inputs.rows)),
    )  # fmt: skip
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
