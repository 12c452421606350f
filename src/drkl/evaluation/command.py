"""One evaluation from its settings to its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from drkl.errors import DrklError
from drkl.evaluation import classification, suite
from drkl.evaluation.config import MINILLM, EvaluationConfig
from drkl.evaluation.declared import CLASS_KEYS, KEYS
from drkl.evaluation.inputs import Inputs, pair_inputs
from drkl.evaluation.measure import Progress
from drkl.evaluation.store import CACHE_BYTES, Store
from drkl.models.smollm2 import cache_dir
from drkl.runs import RunFolder


class Flags(NamedTuple):
    """What a user sets beside the run's own settings; None leaves them."""

    prompts: str | None = None
    samples: int | None = None
    sampling_temperature: float | None = None
    sweep: str | None = None
    seeds: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    protocol: str | None = None

    def applied(self, settings: EvaluationConfig) -> EvaluationConfig:
        """The settings with a protocol's in their place, and what was set one by one over both.

        Raises:
            DrklError: a value out of range, or no number.
        """
        values = settings.model_dump() | (MINILLM if self.protocol is not None else {})
        given = {
            "prompts": None if self.prompts is None else _whole_or_all(self.prompts),
            "samples_per_prompt": self.samples,
            "sampling_temperature": self.sampling_temperature,
            "sweep": None if self.sweep is None else _numbers("--sweep", self.sweep, float),
            "seeds": None if self.seeds is None else _numbers("--seeds", self.seeds, int),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }
        values |= {name: value for name, value in given.items() if value is not None}
        if self.prompts == "all":
            values["prompts"] = None
        try:
            return EvaluationConfig.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            flag = {"samples_per_prompt": "samples"}.get(name, name).replace("_", "-")
            reason = first["msg"].removeprefix("Value error, ")
            raise DrklError(f"--{flag}: {reason[0].lower()}{reason[1:]}; got {first['input']!r}.") from error


def default_settings() -> EvaluationConfig:
    """The settings of an evaluation without a run."""
    return EvaluationConfig()


def output_folder(path: Path | None) -> RunFolder:
    """Where an evaluation that does not stay in its run is written.

    Raises:
        DrklError: no folder was named, it is a file, or it is a run's.
    """
    if path is None:
        raise DrklError("--output is missing: the folder for eval.json and samples.jsonl.")
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise DrklError(f"--output {str(path)!r} is a file; expected a folder, or a name for a new one.")
    if folder.config_path.is_file():
        raise DrklError(
            f"--output {str(path)!r} is a run folder, whose own evaluation would be lost. Name another folder."
        )
    return folder


def pair(
    student: str,
    suites: Sequence[str],
    settings: EvaluationConfig,
    protocol: str | None,
    dtype: str,
    device: str,
    given: dict[str, Any],
) -> Inputs:
    """What is to be measured on a pair.

    Raises:
        DrklError: neither rows nor suites, or both; and what ``pair_inputs`` raises.
    """
    if (given["data"] is None) == (not suites):
        came = "neither" if given["data"] is None else "both"
        raise DrklError(f"Expected exactly one of --data FILE and --suite NAME=WHERE; got {came}.")
    for flag, value, allowed in (("dtype", dtype, "auto fp32 bf16 fp16"), ("device", device, "auto cpu cuda mps")):
        if value not in allowed.split():
            raise DrklError(f"--{flag} is {value!r}; expected one of {', '.join(allowed.split())}.")
    values = {name: value for name, value in given.items() if value is not None and name not in ("teacher", "data")}
    try:
        return pair_inputs(
            student, given["teacher"], given["data"], suites=suites, protocol=protocol, dtype=dtype, device=device,
            max_new_tokens=settings.max_new_tokens, **values,
        )  # fmt: skip
    except DrklError as error:
        # The keys of a config are flags here.
        said = str(error).replace("data.max_prompt_tokens", "--max-prompt-tokens")
        raise DrklError(said.replace("data.max_tokens", "--max-tokens")) from error


def run(
    inputs: Inputs,
    settings: EvaluationConfig,
    folder: RunFolder,
    *,
    fresh: bool,
    argv: Sequence[str],
    on_progress: Progress | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Measure, write the files, and return what ``eval.json`` holds and the keys of its tables.

    Finished parts lie in the folder's ``.evaluation`` until the files are written: the same command after a kill goes
    on from them. The teacher's stay in the user's cache, for other students.
    """
    facts = {**inputs.facts, "command": ["drkl", *argv]}
    shared: dict[str, Any] = {
        "pad_id": inputs.tokenizer.pad_token_id, "device": inputs.device, "data": inputs.data, "facts": facts,
        "on_progress": on_progress,
    }  # fmt: skip
    rows: Any = inputs.rows  # of the kind that the task takes
    if inputs.classes is not None:
        evaluation, lines = classification.evaluate_classes(inputs.models, rows, inputs.classes, settings, **shared)
        classification.write_classification(folder, evaluation, lines)
        return evaluation, CLASS_KEYS
    own = Store(folder.parts_path)
    if fresh:
        own.remove()
    cache = own if fresh else Store(cache_dir() / "evaluation", limit=CACHE_BYTES)
    results = suite.evaluate(
        inputs.models,
        inputs.tokenizer,
        rows,
        settings,
        vocab_size=inputs.vocab_size,
        gamma=inputs.gamma,
        suites=inputs.suites,
        parts=suite.Parts(own, cache),
        **shared,
    )
    suite.write_evaluation(folder, results)
    own.remove()
    return results.evaluation, KEYS


def _whole_or_all(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise DrklError(f"--prompts is {text!r}; expected a whole number, or all.") from error


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    if text.strip() in ("", "none", "[]"):
        return ()
    try:
        return tuple(kind(part) for part in text.strip("[] ").replace(",", " ").split())
    except ValueError as error:
        raise DrklError(f"{flag} is {text!r}; expected numbers with commas between them, or none.") from error
