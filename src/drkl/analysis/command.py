"""One analysis from two models and held-out rows to its files."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drkl.analysis.states import Observed, Reading, observe
from drkl.analysis.tables import Setup, analysis, upward_force
from drkl.analysis.toy_sweep import parse_variants
from drkl.errors import DrklError
from drkl.evaluation.bookkeeping import Progress, free_memory, placed, reporter, timed, versions
from drkl.evaluation.pairs import Inputs
from drkl.models.readout import read
from drkl.objectives import OBJECTIVES, Objective
from drkl.runs import RunFolder, write_text
from drkl.training.environment import now

DEFAULT_OBJECTIVES = (*OBJECTIVES, "drkl@student", "drkl@floor", "drkl~0.1", "srkl+srkl", "rkl+fkl", "rkl+gjs")
POSITION_COLUMNS = ("q_t", "p_t", "B", "K", "D")


def named_objectives(
    specs: Sequence[str], *, own: Objective | None = None, gamma: float | None = None
) -> dict[str, Objective]:
    """The objectives by their names; the run's ``own`` first, as ``this run's NAME``, unless it is among them.

    Args:
        specs: as `toy_sweep.parse_variant` takes them.
        own: of a run.
        gamma: of every DRKL and every decoupled one that names none; None leaves the default.

    Raises:
        DrklError: a name that there is not, or parameters out of their domain.
    """
    variants = parse_variants(specs if gamma is None else [_with_gamma(spec, gamma) for spec in specs])
    found = {
        variant.label if variant.gamma is None else f"{variant.label}, \N{GREEK SMALL LETTER GAMMA} {variant.gamma:g}":
        variant.objective for variant in variants
    }  # fmt: skip
    if own is None or own in found.values():
        return found
    return {f"this run's {own.name}": own, **found}


def _with_gamma(spec: str, gamma: float) -> str:
    name, at, weight = spec.partition("@")
    takes_one = (name.split("~")[0] == "drkl" or "+" in name) and weight not in ("student", "teacher")
    return f"{name}:{gamma!r}{at}{weight}" if takes_one and ":" not in name else spec


def run(
    inputs: Inputs,
    objectives: Mapping[str, Objective],
    folder: RunFolder,
    *,
    gamma: float,
    positions: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    argv: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Read the rows with both models, write ``analysis/positions.csv``, and return what ``analysis.json`` is to hold.

    That file comes last, after the figures: where it is, all of the analysis is. One of before is removed.

    Args:
        inputs: a teacher and a trained student among its models.
        objectives: what is differentiated, by name.
        folder: where the files go.
        gamma: DRKL's constant weight of the tail.
        positions: at how many positions each objective is differentiated.
        temperature: of the losses, above 0.
        seed: of the bootstrap.
        argv: the command's arguments, for the record.
        on_progress: called with ("teacher: reading", done, total).

    Raises:
        DrklError: no teacher, a value out of its domain, or a folder that nobody can write to.
    """
    check(inputs, gamma, positions, temperature)
    _claim(folder)
    started, seconds = time.perf_counter(), dict[str, float]()
    with timed(seconds, "reading"):
        readings = [_read(name, inputs, report) for name, report in _reporters(("student", "teacher"), on_progress)]
    count = len(readings[0].labels)
    with timed(seconds, "differentiating"):
        observed = observe(
            readings[0], readings[1], objectives, positions=positions, temperature=temperature,
            on_reading=reporter("both", on_progress)("comparing", count),
            on_objective=reporter("both", on_progress)("differentiating", len(objectives)),
        )  # fmt: skip
    models = inputs.facts["models"]
    facts = {
        **({} if inputs.classes is None else {"task": "classification"}),
        "models": {"teacher": models["teacher"], "student": models["student"]},
        "data": inputs.data,
        "template": inputs.facts["template"],
        "device": str(inputs.device),
        "command": ["drkl", *argv],
        "versions": versions(),
    }
    tables = analysis(observed, Setup(gamma, seed, facts))
    tables["timing"] = {
        **{name: round(value, 2) for name, value in seconds.items()}, "total": round(time.perf_counter() - started, 2),
        "finished": now(),
    }  # fmt: skip
    write_text(folder.analysis_folder / "positions.csv", positions_csv(observed, [row.id for row in inputs.rows]))
    return tables


def _claim(folder: RunFolder) -> None:
    """Fail before the long work where nobody can write."""
    try:
        folder.analysis_folder.mkdir(parents=True, exist_ok=True)
        folder.analysis_path.unlink(missing_ok=True)
    except OSError as error:
        raise DrklError(f"Cannot write to {str(folder.root)!r}: {error.strerror or error}.") from error


def check(inputs: Inputs, gamma: float, positions: int, temperature: float) -> None:
    """Refuse what cannot be analysed.

    Raises:
        DrklError: no teacher, two classes, or a value out of its domain.
    """
    if "teacher" not in inputs.models:
        raise DrklError(
            "There is no teacher: the analysis compares the student with one. A run that was trained without can be "
            "analysed with `--student PATH --teacher PATH --data FILE --output DIR`."
        )
    if inputs.classes is not None and len(inputs.classes) == 2:
        raise DrklError(
            "With two classes there is no tail: K = 0, and DRKL is reverse KL. There is nothing to analyse."
        )
    for name, value in (("gamma", gamma), ("temperature", temperature)):
        if not 0 < value < float("inf"):
            raise DrklError(f"--{name} is {value:g}; expected a finite number above 0.")
    if positions < 1:
        raise DrklError(f"--positions is {positions}; expected at least 1.")


def _reporters(names: Sequence[str], on_progress: Progress | None) -> list[tuple[str, Any]]:
    return [(name, reporter("teacher" if name == "teacher" else "student", on_progress)) for name in names]


def _read(name: str, inputs: Inputs, report: Callable[[str, int], Any]) -> Reading:
    """One model over the rows; it is dropped afterwards, but for its head."""
    with placed(inputs.models[name], inputs.device) as model:
        found = read(
            model, inputs.rows, pad_id=inputs.tokenizer.pad_token_id, vocab_size=inputs.vocab_size,
            progress=report("reading", len(inputs.rows)),
        )  # fmt: skip
    del model
    free_memory(inputs.device)
    return Reading(found.labels, found.row_index, found.logits)


def positions_csv(observed: Observed, row_ids: Sequence[str]) -> str:
    """A line per position: the row, the observed token's id, q_t, p_t, B, K, D, and reverse KL's pushes."""
    at, factor = observed.columns, observed.columns["q_t"] * observed.columns["rest"] / observed.temperature
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row_id", "label", *POSITION_COLUMNS, "rkl_target_push", "rkl_tail_push"])
    columns = [at[name] for name in POSITION_COLUMNS] + [factor * at["D"], -upward_force(observed)]
    for number, values in enumerate(zip(*columns, strict=True)):
        row_id = row_ids[observed.row[number]]
        safe = f"'{row_id}" if row_id.startswith(("=", "+", "-", "@", "\t")) else row_id
        writer.writerow([safe, int(observed.labels[number]), *(f"{value:.6g}" for value in values)])
    return text.getvalue()
