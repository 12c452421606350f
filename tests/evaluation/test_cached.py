"""An evaluation and an analysis that read the teacher from its cache: its numbers are the same, its answers missing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import drkl
from drkl.errors import DrklError
from drkl.evaluation.declared import TOKEN_KEYS
from drkl.evaluation.result import Evaluation
from drkl.reporting import page
from drkl.run_models import analyze_run, evaluate_run
from drkl.runs import RunFolder, read_json, write_jsonl
from drkl.training.run import cache_states
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_python import ROWS, TOKENIZER, config

HELDOUT = [{"prompt": f"w{i} w{i + 2}", "response": f"w{i + 1} w3 w{2 * i}"} for i in range(6)]
SMALL: dict[str, Any] = {"prompts": 2, "samples_per_prompt": 1, "max_new_tokens": 3, "sweep": ()}


def cached(folder: Path, student: Any, teacher: Any, tokenizer: Any = TOKENIZER, **words: Any) -> drkl.TeacherCache:
    """The cache of other training rows and of `HELDOUT`, which an evaluation reads in one batch as the pass did."""
    rows = words.pop("rows", (ROWS, HELDOUT))
    made = drkl.cache_teacher(
        teacher, *rows, model=student, args=config(folder), output_dir=folder / "cache", processing_class=tokenizer,
        **words,
    )  # fmt: skip
    assert made is not None
    return made


@pytest.mark.slow
def test_the_numbers_are_those_of_the_teacher(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    cache = cached(tmp_path, student, teacher)
    live = drkl.evaluate(student, teacher, HELDOUT, TOKENIZER, **SMALL)
    result = drkl.evaluate(student, cache, HELDOUT, TOKENIZER, output_dir=tmp_path / "eval", **SMALL)
    for model in ("teacher", "student"):
        for key in TOKEN_KEYS:
            assert result.value(model, key) == live.value(model, key)
        assert result.interval(model, "rkl") == live.interval(model, "rkl")
    assert result.value("teacher", "rouge_l") is None and result.value("student", "rouge_l") is not None
    assert result.tail == live.tail and {line["model"] for line in result.samples} == {"student"}
    assert result.settings["models"] == live.settings["models"]
    assert result.settings["teacher_cache"] == str(cache.folder)
    note = "has no weights: its answers are left out. With the teacher itself in its place everything is measured."
    assert Evaluation.load(tmp_path / "eval").settings["teacher_note"].endswith(note)
    finding = result.finding("varied")
    assert finding is not None and finding.text == "No answers of the teacher's were sampled."


@pytest.mark.slow
def test_the_analysis_is_that_of_the_teacher(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    cache = cached(tmp_path, student, teacher)
    words: dict[str, Any] = {"objectives": ["rkl", "drkl"], "positions": 8}
    live = drkl.analyze(student, teacher, HELDOUT, TOKENIZER, **words)
    result = drkl.analyze(student, cache, HELDOUT, TOKENIZER, **words)
    assert result.to_json()["totals"] == live.to_json()["totals"]
    assert result.to_json()["settings"]["teacher_cache"] == str(cache.folder)


def test_rows_that_the_cache_lacks(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    cache = cached(tmp_path, student, teacher)
    rows = [*HELDOUT[:2], {"id": "new", "prompt": "w9", "response": "w9"}]
    message = (
        r"lacks 1 of 3 held-out rows, first 'new'.* With the teacher itself .* drkl.cache_teacher\(..., fill=True\)"
    )
    for measure in (drkl.evaluate, drkl.analyze):
        with pytest.raises(DrklError, match=message):
            measure(student, cache, rows, TOKENIZER)


def test_a_cache_of_largest_logits_has_no_exact_numbers(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    cache = cached(tmp_path, student, teacher, kind="topk", k=5)
    result = drkl.evaluate(student, cache, HELDOUT, TOKENIZER, **SMALL)
    assert result.models == ["student"] and result.value("student", "nll") is not None
    assert (
        "has the teacher's 5 largest logits, which give no exact numbers: the teacher is left out."
        in (result.settings["teacher_note"])
    )
    with pytest.raises(DrklError, match=r"compares the student with the whole distribution of its teacher. The cache"):
        drkl.analyze(student, cache, HELDOUT, TOKENIZER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [(tiny.t5(1), tiny.t5(2)), (tiny.llama(1, vocab=70, layers=2), tiny.llama(9))], ids=["t5", "vocabularies"]
)
def test_other_models(tmp_path: Path, pair: tuple[Any, Any]) -> None:
    cache = cached(tmp_path, *pair)
    live = drkl.evaluate(*pair, HELDOUT, TOKENIZER, **SMALL)
    result = drkl.evaluate(pair[0], cache, HELDOUT, TOKENIZER, **SMALL)
    for key in TOKEN_KEYS:
        assert result.value("student", key) == live.value("student", key)


@pytest.mark.slow
def test_a_classifier_leaves_nothing_out(tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(12)]
    student, teacher = tiny_classifiers.make(seed=1), tiny_classifiers.make(seed=2)
    cache = cached(tmp_path, student, teacher, tiny_classifiers.tokenizer(), rows=(rows[3:], rows[:3]))
    live = drkl.evaluate(student, teacher, rows[:3], tiny_classifiers.tokenizer())
    result = drkl.evaluate(student, cache.folder, rows[:3], tiny_classifiers.tokenizer())
    assert result.numbers == live.numbers and "teacher_note" not in result.settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one teacher, one from its cache; the teacher's folder is moved away."""
    root = tmp_path_factory.mktemp("runs")
    values = tiny_runs.config(root, training={"max_steps": 2})
    cache_states(tiny_runs.specs(values), root / "cache")
    for name, cache in (("live", None), ("cached", str(root / "cache"))):
        values["run"]["name"], values["teacher"]["cache"] = name, cache
        tiny_runs.train(values)
    shutil.move(root / "teacher", root / "moved")
    return root


@pytest.mark.slow
def test_a_run_from_a_cache_without_the_teachers_folder(runs: Path, cli: Cli) -> None:
    run, words = RunFolder(runs / "runs" / "cached"), ("--sweep", "none")
    done = cli("evaluate", run.root, *words)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "its answers are left out, and so is the student before training, which is made of the teacher's" in said
    assert f"teacher.model={runs / 'teacher'} on the command line" in said
    done = cli("evaluate", run.root, *words, f"teacher.model={runs / 'moved'}", "--output", runs / "whole")
    assert done.code == 0, done.err
    ours, whole = Evaluation.load(run.root), Evaluation.load(runs / "whole")
    assert whole.models == ["teacher", "before", "student"] and ours.models == ["teacher", "student"]
    assert "teacher_note" not in whole.settings and whole.value("teacher", "rouge_l") is not None
    for key in TOKEN_KEYS:
        mine, theirs = ours.value("student", key), whole.value("student", key)
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or math.isclose(mine, theirs, rel_tol=0, abs_tol=1e-5), key
    done = cli("analyze", run.root)
    assert done.code == 0, done.err
    text = page.report([run.root], output_format="md").read_text()
    assert "its answers are left out, and so is the student before training" in " ".join(text.split())


@pytest.mark.slow
def test_a_run_whose_teacher_is_gone(runs: Path, cli: Cli) -> None:
    for command in ("evaluate", "analyze"):
        done = cli(command, runs / "runs" / "live")
        assert done.code == 2 and "There is no folder" in done.err
        assert "teacher.model=PATH on the command line (in Python teacher_model) says where the teacher is" in done.err
    done = cli("generate", runs / "runs" / "cached", "--prompt", "w1")
    assert done.code == 0 and "student" in done.out and "weights are not here: it is left out." in done.out
    done = cli("generate", runs / "runs" / "cached", f"teacher.model={runs / 'moved'}", "--prompt", "w1")
    assert done.code == 0 and "student" in done.out and "left out" not in done.out, done.err
    other = tiny.save(tiny.llama(7), runs / "not-it")
    done = cli("generate", runs / "runs" / "cached", f"teacher.model={other}", "--prompt", "w1")
    assert done.code == 2 and "is not the one of the cache" in done.err
    assert evaluate_run(runs / "runs" / "live", teacher_model=runs / "moved", output_dir=runs / "live-whole", sweep=())
    assert read_json(runs / "live-whole" / "eval.json")["settings"]["models"]["teacher"] == str(runs / "moved")


@pytest.mark.slow
def test_another_teacher_beside_a_cache(runs: Path) -> None:
    other = tiny.save(tiny.llama(8), runs / "other")
    for measure in (evaluate_run, analyze_run):
        with pytest.raises(DrklError, match=r"The teacher '.*other' is not the one of the cache"):
            measure(runs / "runs" / "cached", teacher_model=other, output_dir=runs / "none")
    with pytest.raises(DrklError, match=r"is a teacher cache, which has no weights"):
        evaluate_run(runs / "runs" / "cached", teacher_model=runs / "cache")


@pytest.mark.slow
def test_other_rows_of_a_run(runs: Path) -> None:
    suite = runs / "suite.jsonl"
    write_jsonl(suite, [{"instruction": "w1", "input": "", "output": "w2 w3"} for _ in range(2)])
    with pytest.raises(DrklError, match=r"lacks 2 of 2 held-out rows.* teacher.model=.* loads the teacher itself"):
        evaluate_run(runs / "runs" / "cached", suites=[f"self-instruct={suite}"])


@pytest.mark.slow
def test_a_cache_that_is_gone(runs: Path) -> None:
    shutil.move(runs / "cache", runs / "away")
    try:
        with pytest.raises(
            DrklError, match=r"There is no folder '.*cache'.* teacher.model=.* loads the teacher itself"
        ):
            evaluate_run(runs / "runs" / "cached")
        whole = evaluate_run(
            runs / "runs" / "cached", teacher_model=runs / "moved", output_dir=runs / "alone", sweep=()
        )
        assert whole.settings["teacher_note"].startswith("The teacher was not compared with the cache")
    finally:
        shutil.move(runs / "away", runs / "cache")


@pytest.mark.parametrize("word", ["evaluation.prompts=3", "teacher.model=", "teacher.model"])
def test_a_run_brings_the_rest_of_its_config(word: str, cli: Cli) -> None:
    for command in ("evaluate", "analyze"):
        done = cli(command, "run", word)
        assert done.code == 2 and f"{word!r} is given beside a run; expected teacher.model=PATH or nothing" in done.err
