from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.suite import KEYS, choose_prompts, evaluate, write_evaluation
from drkl.runs import RunFolder, read_json, read_jsonl
from tests.evaluation import tiny

CONTRACT = (
    "fkl rkl tvd agreement nll accuracy entropy confidence overconfidence confidence_gap entropy_gap target_gap "
    "rouge_l distinct_1 distinct_2 self_bleu num_tokens"
).split()
RELATIVE = "fkl rkl tvd agreement overconfidence confidence_gap entropy_gap target_gap".split()
SETTINGS = EvaluationConfig(prompts=3, samples_per_prompt=2, max_new_tokens=5, seed=1, batch_size=4)
ROWS = tiny.rows()


def run(
    names: str, settings: EvaluationConfig = SETTINGS, rows: list[Row] = ROWS, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    seeds = {"teacher": 0, "before": 1, "warmup": 2, "after": 3}
    models = {name: lambda seed=seeds[name]: tiny.llama(seed) for name in names.split()}
    return evaluate(models, tiny.tokenizer(), rows, settings, pad_id=0, **changes)


def test_the_table_of_the_contract() -> None:
    result, samples = run("teacher before warmup after", data={"eval_path": "held.jsonl"})
    assert list(result) == ["settings", "teacher", "before", "warmup", "after", "distributions", "timing"]
    for name in ("teacher", "before", "warmup", "after"):
        assert list(result[name]) == CONTRACT == list(KEYS)
        assert all(value is not None for value in result[name].values())
        assert result[name]["num_tokens"] == sum(len(row.response_ids) for row in ROWS)
        for key in ("entropy", "confidence"):
            counts = result["distributions"][name][key]
            assert sum(counts) == result[name]["num_tokens"]
            assert len(result["distributions"]["edges"][key]) == len(counts) + 1
        assert set(result["timing"][name]) == {"load", "teacher_forced", "samples", "text"}
    assert result["before"]["fkl"] > 0.1
    json.dumps([result, samples], allow_nan=False)


def test_the_teachers_own_column() -> None:
    teacher = run("teacher after")[0]["teacher"]
    assert {key: teacher[key] for key in RELATIVE} == {**dict.fromkeys(RELATIVE, 0.0), "agreement": 1.0}


def test_a_student_that_is_the_teacher_scores_as_the_teacher() -> None:
    models = {"teacher": tiny.llama, "after": tiny.llama}
    result, samples = evaluate(models, tiny.tokenizer(), ROWS, SETTINGS, pad_id=0)
    assert result["after"] == pytest.approx(result["teacher"], abs=1e-12)
    half = len(samples) // 2
    assert [row["text"] for row in samples[:half]] == [row["text"] for row in samples[half:]]


def test_settings_say_how() -> None:
    settings = run("teacher after", data={"eval_path": "held.jsonl"})[0]["settings"]
    assert {key: settings[key] for key in EvaluationConfig.model_fields} == SETTINGS.model_dump()
    assert settings["data"] == {"eval_path": "held.jsonl", "heldout_rows": 6}
    assert set(settings["definitions"]) == set(CONTRACT)
    assert {"drkl", "python", "torch", "transformers", "rouge-score", "sacrebleu"} <= set(settings["versions"])


def test_without_a_teacher() -> None:
    result, _ = run("before after")
    assert "teacher" not in result and "teacher" not in result["distributions"]
    for name in ("before", "after"):
        assert [key for key, value in result[name].items() if value is None] == RELATIVE


def test_one_answer_per_prompt_has_no_self_bleu() -> None:
    result, samples = run("teacher after", SETTINGS.model_copy(update={"samples_per_prompt": 1}))
    assert result["after"]["self_bleu"] is None
    assert len(samples) == 2 * 3


def test_no_prompts_no_text_metrics() -> None:
    result, samples = run("teacher after", SETTINGS.model_copy(update={"prompts": 0}))
    assert samples == []
    assert [key for key, value in result["after"].items() if value is None] == CONTRACT[12:16]


def test_fewer_rows_than_prompts() -> None:
    result, samples = run("after", SETTINGS.model_copy(update={"prompts": 99}))
    assert result["settings"]["prompts"] == 6
    assert len(samples) == 6 * 2


def test_sample_rows() -> None:
    _, samples = run("teacher before after")
    assert [row["model"] for row in samples] == ["teacher"] * 6 + ["before"] * 6 + ["after"] * 6
    by_id = {row.id: row for row in ROWS}
    for row in samples:
        assert list(row) == "model prompt_id prompt sampling_temperature sample text reference num_tokens".split()
        example = by_id[row["prompt_id"]].example
        assert (row["prompt"], row["reference"]) == (example.prompt_text, example.response)
        assert 1 <= row["num_tokens"] <= 5 and row["sampling_temperature"] == 1.0
    assert [row["sample"] for row in samples] == [0, 1] * 9


def test_same_again_and_with_another_batch_size() -> None:
    first, second = run("teacher after"), run("teacher after", SETTINGS.model_copy(update={"batch_size": 1}))
    assert first[1] == second[1]
    assert {key: first[0][key] for key in ("teacher", "after")} == {key: second[0][key] for key in ("teacher", "after")}
    other = run("teacher after", SETTINGS.model_copy(update={"seed": 2}))
    assert other[1] != first[1]
    assert [row["prompt_id"] for row in other[1]] == [row["prompt_id"] for row in first[1]]


def test_one_model_at_a_time() -> None:
    alive: list[weakref.ref[PreTrainedModel]] = []

    def loader(seed: int) -> Callable[[], PreTrainedModel]:
        def load() -> PreTrainedModel:
            gc.collect()
            assert not [model for model in alive if model() is not None]
            model = tiny.llama(seed)
            alive.append(weakref.ref(model))
            return model

        return load

    names = ("teacher", "before", "warmup", "after")
    models = {name: loader(seed) for seed, name in enumerate(names)}
    evaluate(models, tiny.tokenizer(), ROWS, SETTINGS, pad_id=0)
    assert len(alive) == 4


def test_order_is_that_of_the_table_whatever_the_mappings() -> None:
    result, _ = run("after before teacher")
    assert list(result)[1:4] == ["teacher", "before", "after"]
    assert result["after"]["fkl"] is not None


def test_progress() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    run("teacher after", on_progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert list(seen) == [
        f"{name}: {part}" for name in ("teacher", "after") for part in ("reading", "comparing", "sampling")
    ]
    for steps in seen.values():
        assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] and steps == sorted(steps)


def test_vocabularies_that_differ_are_refused() -> None:
    models = {"teacher": tiny.llama, "after": lambda: tiny.llama(vocab=70)}
    with pytest.raises(DrklError, match="The teacher scores 64 tokens and the student 70"):
        evaluate(models, tiny.tokenizer(), ROWS, SETTINGS, pad_id=0)


def test_an_infinite_distance_is_null() -> None:
    def excluding() -> PreTrainedModel:
        model = tiny.llama()
        head = torch.nn.Linear(16, tiny.VOCAB).double()
        head.bias.data.zero_()[5] = -torch.inf
        model.set_output_embeddings(head)
        return model

    models = {"teacher": excluding, "after": lambda: tiny.llama(3)}
    result, samples = evaluate(models, tiny.tokenizer(), ROWS, SETTINGS, pad_id=0)
    assert [key for key, value in result["after"].items() if value is None] == ["rkl"]
    assert result["teacher"]["rkl"] == 0 and None not in result["teacher"].values()
    json.dumps([result, samples], allow_nan=False)


def test_files_of_a_run(tmp_path: Path) -> None:
    result, samples = run("teacher after")
    folder = RunFolder(tmp_path)
    write_evaluation(folder, result, samples)
    assert read_json(folder.eval_path) == json.loads(json.dumps(result))
    assert read_jsonl(folder.samples_path) == samples
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "samples.jsonl"]


def test_prompts_are_chosen_by_their_ids() -> None:
    chosen = choose_prompts(ROWS, 3)
    assert [ROWS.index(row) for row in chosen] == sorted(ROWS.index(row) for row in chosen)
    assert {row.id for row in choose_prompts(ROWS[::-1], 3)} == {row.id for row in chosen}
    assert {row.id for row in choose_prompts(ROWS, 2)} < {row.id for row in chosen}
    assert choose_prompts(ROWS, 0) == [] and choose_prompts(ROWS, 9) == ROWS
