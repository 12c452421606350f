from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.evaluation import sampling
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import ANSWER_KEYS, KEYS, TEACHER_NLL
from drkl.evaluation.evaluate import run_task
from drkl.evaluation.result import MODELS, Evaluation
from drkl.evaluation.store import Store
from drkl.evaluation.tasks import Generation, Parts, choose_prompts
from drkl.runs import read_jsonl, read_sealed
from tests.evaluation import tiny

CONTRACT = (
    "fkl rkl tvd agreement nll accuracy entropy confidence overconfidence confidence_gap entropy_gap target_gap "
    "rouge_l distinct_1 distinct_2 self_bleu num_tokens"
).split()
RELATIVE = (
    "rkl fkl js tvd agreement entropy_gap confidence_gap target_gap overconfidence target_log_odds_gap "
    "stronger_tail_share tail_rkl tail_fkl tail_mass overlap_10 rank_correlation"
).split()
SWEEP = (0.5, 1.0)
SETTINGS = EvaluationConfig(prompts=3, samples_per_prompt=2, max_new_tokens=5, seed=1, batch_size=4, sweep=SWEEP)
ROWS = tiny.rows()


class Results(NamedTuple):
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


def evaluate(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    settings: EvaluationConfig = SETTINGS,
    rows: list[Row] = ROWS,
    *,
    data: Any = None,
    facts: Any = None,
    on_progress: Any = None,
    **changes: Any,
) -> Results:
    task = Generation(tiny.tokenizer(), rows, settings, pad_id=0, **changes)
    found = run_task(task, models, data=data, facts=facts, on_progress=on_progress)
    return Results(found.to_json(), found.samples, found.heldout)


def run(names: str, settings: EvaluationConfig = SETTINGS, rows: list[Row] = ROWS, **changes: Any) -> Results:
    seeds = {"teacher": 0, "before": 1, "warmup": 2, "student": 3}
    models = {name: lambda seed=seeds[name]: tiny.llama(seed) for name in names.split()}
    return evaluate(models, settings, rows, **changes)


def test_the_table_of_the_contract() -> None:
    result, samples, _ = run("teacher before warmup student", data={"eval_path": "held.jsonl"})
    assert (
        list(result)
        == (
            "settings teacher before warmup student intervals findings sweep coverage tail reliability distributions "
            "timing format"
        ).split()
    )
    for name in ("teacher", "before", "warmup", "student"):
        assert list(result[name]) == list(KEYS) and set(CONTRACT) <= set(KEYS)
        assert all(value is not None for value in result[name].values())
        assert result[name]["num_tokens"] == sum(len(row.response_ids) for row in ROWS)
        for key in ("entropy", "confidence", "target"):
            counts = result["distributions"][name][key]
            assert sum(counts) == result[name]["num_tokens"]
            assert len(result["distributions"]["edges"][key]) == len(counts) + 1
        parts = {"load", "teacher_forced", "samples", "text", "answers_per_minute"}
        assert set(result["timing"][name]) == parts | ({"answers"} if name == "teacher" else set())
        for key, (low, high) in result["intervals"][name].items():
            assert low <= high, key
    assert result["before"]["fkl"] > 0.1
    json.dumps([result, samples], allow_nan=False)


@pytest.mark.slow
def test_intervals_hold_the_number_and_are_paired() -> None:
    result, _, _ = run("teacher student")
    for name in ("teacher", "student"):
        for key in ("rkl", "nll", "accuracy", "entropy", "rouge_l", "distinct_2"):
            low, high = result["intervals"][name][key]
            assert low <= result[name][key] <= high
    # The same resamples for every model: a student that is its teacher has its teacher's intervals.
    same = evaluate({"teacher": tiny.llama, "student": tiny.llama}).evaluation
    ends = [{key: end for key, (_, end) in same["intervals"][name].items()} for name in ("teacher", "student")]
    assert ends[1] == pytest.approx(ends[0], abs=1e-9)
    assert run("teacher student")[0]["intervals"] == result["intervals"]


@pytest.mark.slow
def test_the_teachers_own_column() -> None:
    teacher = run("teacher student")[0]["teacher"]
    exact = [key for key in RELATIVE if key not in ("stronger_tail_share", "tail_mass")]
    ones = dict.fromkeys(("agreement", "overlap_10", "rank_correlation"), 1.0)
    assert {key: teacher[key] for key in exact} == pytest.approx({**dict.fromkeys(exact, 0.0), **ones}, abs=1e-12)


@pytest.mark.slow
def test_a_student_that_is_the_teacher_scores_as_the_teacher() -> None:
    models = {"teacher": tiny.llama, "student": tiny.llama}
    result, samples, _ = evaluate(models)
    assert result["student"] == pytest.approx(result["teacher"], abs=1e-12)
    half = len(samples) // 2
    assert [row["text"] for row in samples[:half]] == [row["text"] for row in samples[half:]]


@pytest.mark.slow
def test_settings_say_how() -> None:
    settings = run("teacher student", data={"eval_path": "held.jsonl"}, facts={"command": ["drkl"]})[0]["settings"]
    dumped = SETTINGS.model_dump(mode="json") | {"seeds": [1]}
    assert {key: settings[key] for key in EvaluationConfig.model_fields} == dumped
    assert settings["data"] == {"eval_path": "held.jsonl", "heldout_rows": 6} and settings["command"] == ["drkl"]
    assert set(settings["definitions"]) == set(KEYS)
    assert {"drkl", "python", "torch", "transformers", "rouge-score", "sacrebleu"} <= set(settings["versions"])


@pytest.mark.slow
def test_without_a_teacher() -> None:
    result, _, _ = run("before student")
    assert "teacher" not in result and "teacher" not in result["distributions"]
    for name in ("before", "student"):
        assert [key for key, value in result[name].items() if value is None] == [*RELATIVE, TEACHER_NLL]


@pytest.mark.slow
def test_one_answer_per_prompt_has_no_self_bleu() -> None:
    result, samples, _ = run("teacher student", SETTINGS.model_copy(update={"samples_per_prompt": 1}))
    assert result["student"]["self_bleu"] is None and "self_bleu" not in result["intervals"]["student"]
    assert len(samples) == 2 * 2 * 3


def test_no_prompts_no_text_metrics() -> None:
    result, samples, _ = run("teacher student", SETTINGS.model_copy(update={"prompts": 0}))
    assert samples == [] and not {"sweep", "coverage"} & set(result)
    missing = [key for key, value in result["student"].items() if value is None]
    assert missing == [key for key in ANSWER_KEYS if key != "num_answers"]


@pytest.mark.slow
def test_fewer_rows_than_prompts_and_all_of_them() -> None:
    for count in (99, None):
        result, samples, _ = run("student", SETTINGS.model_copy(update={"prompts": count, "sweep": ()}))
        assert result["settings"]["prompts"] == 6 and "sweep" not in result
        assert len(samples) == 6 * 2


@pytest.mark.slow
def test_sample_rows() -> None:
    _, samples, _ = run("teacher before student")
    counts = {"teacher": 12, "before": 6, "student": 12}
    assert [row["model"] for row in samples] == [name for name, count in counts.items() for _ in range(count)]
    by_id = {row.id: row for row in ROWS}
    for row in samples:
        assert list(row)[:8] == "model prompt_id prompt sampling_temperature sample text reference num_tokens".split()
        example = by_id[row["prompt_id"]].example
        assert (row["prompt"], row["reference"]) == (example.prompt_text, example.response)
        assert 1 <= row["num_tokens"] <= 5 and row["sampling_temperature"] in SWEEP
        assert row["ended"] or row["num_tokens"] == 5
    assert [row["sample"] for row in samples] == [0, 1] * 15


@pytest.mark.slow
def test_the_sweep_is_the_teachers_and_the_trained_students() -> None:
    result, samples, _ = run("teacher before student")
    assert list(result["sweep"]) == ["teacher", "student"]
    for name, rows in result["sweep"].items():
        assert [row["sampling_temperature"] for row in rows] == [0.5, 1.0]
        assert all(set(ANSWER_KEYS) <= set(row) and row["intervals"] for row in rows)
        # The main temperature is one of the sweep's: the same answers, not drawn again.
        assert {key: rows[1][key] for key in ANSWER_KEYS} == {key: result[name][key] for key in ANSWER_KEYS}
    alone = run("student", SETTINGS.model_copy(update={"sampling_temperature": 0.5, "sweep": ()}))
    cold = [row["text"] for row in samples if row["model"] == "student" and row["sampling_temperature"] == 0.5]
    assert [row["text"] for row in alone.samples] == cold


@pytest.mark.slow
def test_several_seeds() -> None:
    settings = SETTINGS.model_copy(update={"seeds": (1, 2), "sweep": ()})
    result, samples, _ = run("student", settings)
    assert [(row["seed"], row["sample"]) for row in samples[:4]] == [(1, 0), (1, 1), (2, 2), (2, 3)]
    first = run("student", SETTINGS.model_copy(update={"sweep": ()})).samples
    assert [row["text"] for row in samples if row["seed"] == 1] == [row["text"] for row in first]
    assert result["coverage"]["student"]["samples"] == [1, 2, 3, 4] and result["settings"]["seeds"] == [1, 2]


@pytest.mark.slow
def test_suites_have_numbers_of_their_own() -> None:
    rows, names = ROWS, ["one", "two"] * 3
    result, samples, _ = run("teacher student", suites=names)
    assert result["settings"]["suites"] == ["one", "two"] and list(result["suites"]) == ["one", "two"]
    assert {row["prompt_id"]: row["suite"] for row in samples} == {
        row.id: name for row, name in zip(rows, names, strict=True)
    }, "three prompts of each"
    for part in ("one", "two"):
        alone = run("teacher student", rows=[row for row, name in zip(rows, names, strict=True) if name == part])
        for name in ("teacher", "student"):
            apart = {key: value for key, value in alone[0][name].items() if key != "ece_mass"}
            assert {key: result["suites"][part][name][key] for key in apart} == pytest.approx(apart, abs=1e-9)
        assert set(result["suites"][part]["intervals"]) == {"teacher", "student"}
    sizes = [result["suites"][part]["student"]["num_tokens"] for part in ("one", "two")]
    assert sum(sizes) == result["student"]["num_tokens"]


@pytest.mark.slow
def test_same_again_and_with_another_batch_size() -> None:
    first, second = run("teacher student"), run("teacher student", SETTINGS.model_copy(update={"batch_size": 1}))
    assert first.samples == second.samples
    for section in ("teacher", "student", "intervals", "sweep"):
        assert first.evaluation[section] == second.evaluation[section]
    other = run("teacher student", SETTINGS.model_copy(update={"seed": 2}))
    assert other.samples != first.samples
    assert [row["prompt_id"] for row in other.samples] == [row["prompt_id"] for row in first.samples]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "stop_at",
    [
        "reading",
        *(pytest.param(part, marks=pytest.mark.slow) for part in ("sampling at 0.5", "sampling at 1", "later")),
    ],
)
def test_an_evaluation_that_was_stopped_goes_on(tmp_path: Path, stop_at: str) -> None:
    parts = Parts(Store(tmp_path / "own"), Store(tmp_path / "shared"))
    whole = run("teacher student")
    calls = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if (what.endswith(stop_at) and done > total / 3) or (stop_at == "later" and what == "student: comparing"):
            raise Stopped

    with pytest.raises(Stopped):
        run("teacher student", parts=parts, on_progress=stop)
    seen: dict[str, list[int]] = {}
    results = run(
        "teacher student", parts=parts, on_progress=lambda what, done, _: seen.setdefault(what, []).append(done)
    )
    assert results.samples == whole.samples and results.heldout == whole.heldout
    for result in (results.evaluation, whole.evaluation):
        result.pop("timing")
    assert results.evaluation == whole.evaluation
    if stop_at == "later":
        assert "teacher: reading" not in seen and len(seen["teacher: sampling at 1"]) < 5


@pytest.mark.slow
def test_a_finished_teacher_is_used_for_the_next_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Store(tmp_path / "shared")
    first = run("teacher student", parts=Parts(Store(tmp_path / "a"), shared))
    sampled: list[float] = []
    original = sampling.sample_texts

    def counted(*arguments: Any, **named: Any) -> Any:
        sampled.append(named["sampling_temperature"])
        return original(*arguments, **named)

    monkeypatch.setattr(sampling, "sample_texts", counted)
    second = run("teacher student", parts=Parts(Store(tmp_path / "b"), shared))
    assert len(sampled) == 2 * 2, "two temperatures, two batches, the student's alone"
    assert second.evaluation["teacher"] == first.evaluation["teacher"]
    assert second.evaluation["student"] == first.evaluation["student"]
    changed = SETTINGS.model_copy(update={"max_new_tokens": 4})
    run("teacher student", changed, parts=Parts(Store(tmp_path / "c"), shared))
    assert len(sampled) == 4 + 8, "other settings are other answers"


@pytest.mark.slow
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

    names = ("teacher", "before", "warmup", "student")
    models = {name: loader(seed) for seed, name in enumerate(names)}
    evaluate(models)
    assert len(alive) == 5, "the teacher a second time, to read what all of them wrote"


@pytest.mark.slow
def test_order_is_that_of_the_table_whatever_the_mappings() -> None:
    result, _, _ = run("student before teacher")
    assert [name for name in result if name in MODELS] == ["teacher", "before", "student"]
    assert result["student"]["fkl"] is not None


@pytest.mark.slow
def test_progress() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    run("teacher student", on_progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert list(seen) == [
        f"{name}: {part}"
        for name in ("teacher", "student")
        for part in ("reading", "comparing", "sampling at 1", "sampling at 0.5")
    ] + ["teacher: reading answers"]
    for steps in seen.values():
        assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] and steps == sorted(steps)


def test_vocabularies_that_differ_are_refused() -> None:
    models = {"teacher": tiny.llama, "student": lambda: tiny.llama(vocab=70)}
    with pytest.raises(DrklError, match="The teacher scores 64 tokens and the student 70"):
        evaluate(models)


@pytest.mark.slow
def test_an_infinite_distance_is_null() -> None:
    def excluding() -> PreTrainedModel:
        model = tiny.llama()
        head = torch.nn.Linear(16, tiny.VOCAB).double()
        head.bias.data.zero_()[5] = -torch.inf
        model.set_output_embeddings(head)
        return model

    models = {"teacher": excluding, "student": lambda: tiny.llama(3)}
    result, samples, _ = evaluate(models)
    assert [key for key, value in result["student"].items() if value is None] == ["rkl", "tail_rkl", TEACHER_NLL]
    assert "inf" in {line.get("teacher_nll") for line in samples}
    assert result["teacher"]["rkl"] == 0 and None not in result["teacher"].values()
    json.dumps([result, samples], allow_nan=False)


def test_files_of_a_run(tmp_path: Path) -> None:
    models = {"teacher": tiny.llama, "student": lambda: tiny.llama(3)}
    found = run_task(Generation(tiny.tokenizer(), ROWS, SETTINGS, pad_id=0), models)
    assert found.save(tmp_path) == tmp_path
    written = read_sealed(tmp_path / "eval.json")
    assert set(written.pop("files")) == {"samples.jsonl", "heldout.jsonl"}
    assert written == json.loads(json.dumps(found.to_json()))
    assert read_jsonl(tmp_path / "samples.jsonl") == found.samples
    lines = read_jsonl(tmp_path / "heldout.jsonl")
    assert lines == json.loads(json.dumps(found.heldout))
    assert [(line["model"], line["row_id"]) for line in lines] == [
        (name, row.id) for name in ("teacher", "student") for row in ROWS
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "heldout.jsonl", "samples.jsonl"]
    again = Evaluation.load(tmp_path)
    assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(found.to_json()))
    assert again.samples == found.samples
    assert again["rkl"] == found["rkl"] and again.models == ["teacher", "student"]


def test_prompts_are_chosen_by_their_ids() -> None:
    chosen = choose_prompts(ROWS, 3)
    assert [ROWS.index(row) for row in chosen] == sorted(ROWS.index(row) for row in chosen)
    assert {row.id for row in choose_prompts(ROWS[::-1], 3)} == {row.id for row in chosen}
    assert {row.id for row in choose_prompts(ROWS, 2)} < {row.id for row in chosen}
    assert choose_prompts(ROWS, 0) == [] and choose_prompts(ROWS, 9) == choose_prompts(ROWS, None) == ROWS
