"""One metric by model with its resamples: the numbers and the intervals of eval.json, and pairs of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drkl.errors import DrklError
from drkl.evaluation import bootstrap
from drkl.evaluation.answers import AnswerTable
from drkl.evaluation.bootstrap import interval, resample_weights
from drkl.evaluation.comparison import compare
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.evaluate import run_task
from drkl.evaluation.measured import measured
from drkl.evaluation.paired import MATCHED
from drkl.evaluation.result import Evaluation
from drkl.evaluation.tasks import Generation
from tests.evaluation import tiny
from tests.evaluation.conftest import FEW
from tests.evaluation.test_comparison import PROMPTS, SAMPLES, SETTINGS, TEMPERATURES, heldout, lines_of, write
from tests.evaluation.test_scaling import classification

BEST = "rouge_l_best_when_as_varied"
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.fixture(scope="module")
def made() -> Iterator[Evaluation]:
    settings = EvaluationConfig(
        prompts=4, samples_per_prompt=2, max_new_tokens=6, seed=3, sweep=(0.5,), logit_temperature="fit"
    )
    models = {"teacher": tiny.llama, "student": lambda: tiny.llama(3)}
    with tiny.one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap.bootstrap, "__defaults__", (FEW,))
        yield run_task(Generation(tiny.tokenizer(), tiny.rows(8), settings, pad_id=0), models)


WORDS = "the cat sat on a mat by one old red door".split()


def varied(folder: Path, worse: float) -> Path:
    """A student that is less varied than its teacher at each temperature, and as varied at a higher one."""
    lines = []
    for model, flat in (("teacher", 0.0), ("student", worse)):
        rng = np.random.default_rng(len(model))
        for temperature in TEMPERATURES:
            for prompt in range(PROMPTS):
                reference = [WORDS[(prompt + i) % len(WORDS)] for i in range(8)]
                for sample in range(SAMPLES):
                    changed = rng.random(8) < 0.5 * temperature - flat
                    text = [str(rng.choice(WORDS)) if c else r for c, r in zip(changed, reference, strict=True)]
                    lines.append({
                        "model": model, "prompt_id": f"p{prompt}", "prompt": f"say {prompt}", "sample": sample,
                        "reference": " ".join(reference), "sampling_temperature": temperature,
                        "text": " ".join(text), "num_tokens": 9,
                    })  # fmt: skip
    return write(folder, SETTINGS, "student", heldout=heldout({"teacher": 0.0, "student": 0.4}), samples=lines)


@pytest.mark.parametrize("key", ["rkl", "ece", "rouge_l", "distinct_answers", "teacher_nll_of_answers"])
def test_numbers_and_intervals_are_those_of_the_file(made: Evaluation, key: str) -> None:
    found = measured(made, key)
    assert (found.unit, len(found.ids)) == (("held-out rows", 8) if found.metric.of == "tokens" else ("prompts", 4))
    assert set(found.values) == {"teacher", "student"} | ({"scaled"} if found.metric.of == "tokens" else set())
    for model, column in found.values.items():
        assert column.shape == (1 + FEW,) and column[0] == made.value(model, key)
        assert interval(column[1:]) == pytest.approx(made.interval(model, key), rel=1e-12)
    if key == "rkl":
        other = measured(made, key, seed=8).values["student"]
        assert other[0] == found.values["student"][0] and not np.array_equal(other, found.values["student"])


def test_a_classifiers_numbers() -> None:
    evaluation = classification("fit")
    found = measured(evaluation, "ece")
    assert set(found.values) == {"teacher", "student", "scaled"} and found.unit == "texts" and len(found.ids) == 30
    # Predictions are rounded to four digits.
    for model, column in found.values.items():
        assert interval(column[1:]) == pytest.approx(evaluation.interval(model, "ece"), abs=1e-3)


def best_at(lines: list[dict[str, Any]], model: str, temperature: float, weights: np.ndarray) -> tuple[Any, Any]:
    own = [line for line in lines if line["model"] == model and line["sampling_temperature"] == temperature]
    metrics = AnswerTable.from_samples(own, 9).metrics(weights)
    return metrics["distinct_2"], metrics["rouge_l_best"]


def test_the_best_of_k_where_models_are_as_varied(tmp_path: Path) -> None:
    folder = varied(tmp_path / "a", 0.15)
    found = measured(Evaluation.load(folder), BEST, seed=0)
    assert found.metric is MATCHED[BEST] and len(found.ids) == PROMPTS
    lines = lines_of(folder / "samples.jsonl")
    weights = np.concatenate([np.ones((1, PROMPTS)), *resample_weights(PROMPTS, 0, FEW)])
    curves = {
        model: [best_at(lines, model, temperature, weights) for temperature in TEMPERATURES]
        for model in ("teacher", "student")
    }
    goal = curves["teacher"][list(TEMPERATURES).index(1.0)][0]
    checked = 0
    for place in range(1 + FEW):
        expected = []
        points = [(float(variety[place]), float(quality[place])) for variety, quality in curves["student"]]
        for (x, y), (next_x, next_y) in itertools.pairwise(points):
            if min(x, next_x) <= goal[place] <= max(x, next_x) and x != next_x:
                share = (goal[place] - x) / (next_x - x)
                expected.append(y + share * (next_y - y))
        value = found.values["student"][place]
        assert np.isnan(value) if not expected else value == pytest.approx(max(expected), rel=1e-9)
        checked += bool(expected)
    assert checked
    assert (
        found.values["teacher"][0] >= measured(Evaluation.load(folder), "rouge_l_when_as_varied").values["teacher"][0]
    )


def test_two_evaluations_are_paired_as_in_a_comparison(tmp_path: Path) -> None:
    a, b = (Evaluation.load(varied(tmp_path / name, worse)) for name, worse in (("a", 0.1), ("b", 0.15)))
    compared = {difference.metric.key: difference for difference in compare(a, b, seed=0).tables[0].differences}
    assert {BEST, "rouge_l_when_as_varied"} <= compared.keys()
    for key in ("rkl", BEST):
        first, second = (measured(run, key, seed=0) for run in (a, b))
        assert first.ids == second.ids
        ours, theirs = (found.values["student"] for found in (first, second))
        change = theirs - ours
        change = change[~np.isnan(change)]
        known = compared[key]
        if key == BEST:
            assert change[0] == pytest.approx(known.difference)
        else:  # these made-up folders' eval.json has another value than their lines
            assert interval(change[1:]) == pytest.approx(known.interval)


def test_without_lines_there_is_the_number_alone() -> None:
    old = Evaluation.load(RESULTS / "quickstart" / "quickstart-rkl.eval.json")
    found = measured(old, BEST)
    assert found.ids == [] and {len(column) for column in found.values.values()} == {1}
    assert found.values["student"][0] > measured(old, "rouge_l_when_as_varied").values["student"][0] > 0
    assert measured(old, "rkl").values["student"].tolist() == [old.value("student", "rkl")]
    assert measured(old, "teacher_nll_of_answers").values == {}


def test_what_there_is_not(made: Evaluation) -> None:
    with pytest.raises(DrklError, match=r"There is no metric 'rouge' of generation\. Did you mean"):
        measured(made, "rouge")
    with pytest.raises(DrklError, match="There is no metric 'rouge_l_when_as_varied' of classification"):
        measured(classification(2.0), "rouge_l_when_as_varied")
