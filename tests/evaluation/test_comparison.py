"""Two runs side by side: against resampling written out in numpy, and with differences that were planted."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from drkl.cli import main
from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Metrics, Resampled
from drkl.evaluation.comparison import Comparison, compare
from drkl.evaluation.declared import METRICS, TOKEN_KEYS, Metric
from drkl.evaluation.paired import Difference, Side, paired
from drkl.evaluation.positions import PositionTable
from drkl.reporting.differences import FORMATS

ROWS, VOCAB, PROMPTS, SAMPLES = 12, 9, 14, 3
LENGTHS = np.random.default_rng(7).integers(2, 9, ROWS)
OWNER = np.repeat(np.arange(ROWS), LENGTHS)
WORDS = "the cat sat on a mat while dogs ran past old houses and rivers".split()
TEMPERATURES = (0.5, 1.0, 1.5)


def written_out(size: int, seed: int = 0) -> np.ndarray:
    """How often each of ``size`` units is drawn in each of 1,000 resamples."""
    return np.random.default_rng(seed).multinomial(size, [1 / size] * size, size=1000).astype(float)


def ends(values: np.ndarray) -> list[float]:
    return [float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))]


def mean_of(**values: np.ndarray) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    return lambda weights: {name: weights @ column / weights.sum(-1) for name, column in values.items()}


def differences(
    metrics: Mapping[str, Metric], a: Metrics, b: Metrics, ideal: Metrics | None, size: int, seed: int
) -> tuple[list[Difference], dict[str, str]]:
    sides = [Side(Resampled.of(run, size, seed), Resampled.of(ideal, size, seed)) for run in (a, b)]
    return paired(metrics, *sides)


def one(better: str, a: Any, b: Any, teacher: Any = None, seed: int = 0) -> Difference:
    """The difference of two means over the same units, as of a metric with this ideal."""
    metric = replace(METRICS["rkl"], key="x", better=better)
    ideal = None if teacher is None else mean_of(x=np.asarray(teacher, float))
    a, b = np.asarray(a, float), np.asarray(b, float)
    found, missing = differences({"x": metric}, mean_of(x=a), mean_of(x=b), ideal, len(a), seed)
    assert missing == {}
    return found[0]


NOISE = np.random.default_rng(3).normal(0, 1, 40)
SPREAD = np.random.default_rng(4).normal(0, 0.1, 40)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_interval_is_that_of_resampling_written_out(seed: int) -> None:
    a, b, teacher = NOISE + 1, NOISE * 0.7 + SPREAD, NOISE * 2 + 0.4
    weights = written_out(40, seed)
    means = {name: np.array([(w * x).sum() / w.sum() for w in weights]) for name, x in
             (("a", a), ("b", b), ("teacher", teacher))}  # fmt: skip
    for better in ("lower", "higher", "zero", "teacher", "none"):
        found = one(better, a, b, teacher, seed)
        assert found.interval == pytest.approx(ends(means["b"] - means["a"]), rel=1e-12)
        assert found.difference == pytest.approx(b.mean() - a.mean(), rel=1e-12)
        away = {
            "lower": (means["a"], means["b"]),
            "higher": (-means["a"], -means["b"]),
            "zero": (abs(means["a"]), abs(means["b"])),
            "teacher": (abs(means["a"] - means["teacher"]), abs(means["b"] - means["teacher"])),
        }.get(better)
        if away is None:
            assert found.verdict is None
            continue
        low, high = ends(away[1] - away[0])
        assert found.verdict == ("A better" if low > 0 else "B better" if high < 0 else "undecided")


@pytest.mark.parametrize(
    ("better", "a", "b", "teacher", "verdict"),
    [
        ("lower", NOISE + 1, NOISE + SPREAD, None, "B better"),
        ("lower", NOISE + SPREAD, NOISE + 1, None, "A better"),
        ("higher", NOISE + 1, NOISE + SPREAD, None, "A better"),
        ("higher", NOISE + SPREAD, NOISE + 1, None, "B better"),
        ("zero", SPREAD - 1, SPREAD + 0.2, None, "B better"),
        ("zero", SPREAD - 0.2, SPREAD + 1, None, "A better"),
        ("teacher", NOISE + 1, NOISE - 0.5 + SPREAD, NOISE, "B better"),
        ("teacher", NOISE - 0.5 + SPREAD, NOISE - 1, NOISE, "A better"),
        ("none", NOISE, NOISE + 1, NOISE, None),
        ("teacher", NOISE, NOISE + 1, None, None),
    ],
)
def test_a_planted_difference_is_found(better: str, a: Any, b: Any, teacher: Any, verdict: str | None) -> None:
    found = one(better, a, b, teacher)
    assert found.verdict == verdict
    assert found.interval is not None and not found.interval[0] <= 0 <= found.interval[1]
    assert np.sign(found.difference) == np.sign(found.interval[0]) == np.sign(b.mean() - a.mean())


def test_values_that_differ_as_far_from_ideal_as_each_other_are_undecided() -> None:
    found = one("zero", SPREAD - 0.3, SPREAD[::-1] + 0.3)
    assert found.interval is not None and found.interval[0] > 0
    assert found.verdict == "undecided"


def test_what_units_share_falls_out_of_the_difference() -> None:
    hard = np.random.default_rng(0).normal(0, 50, 40)  # alone, the mean of either is uncertain by tens
    assert one("lower", hard, hard + 0.5 + SPREAD).verdict == "A better"
    assert one("teacher", hard + 0.5, hard + 0.1 + SPREAD, hard).verdict == "B better"


def test_what_is_in_one_only_is_listed() -> None:
    metrics = {key: METRICS[key] for key in ("rkl", "fkl", "js", "tvd")}
    b = mean_of(rkl=NOISE, tvd=NOISE, js=NOISE)

    def a(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {**mean_of(rkl=NOISE, fkl=NOISE)(weights), "js": np.full(len(weights), np.inf)}

    found, missing = differences(metrics, a, b, None, 40, 0)
    assert [difference.metric.key for difference in found] == ["rkl"]
    assert missing == {"fkl": "only A has it", "tvd": "only B has it", "js": "undefined or infinite"}


def test_without_an_interval_nothing_is_decided() -> None:
    sometimes = NOISE.copy()

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"rkl": np.where(weights[:, 0] > 0, weights @ sometimes, np.nan)}

    (found,), _ = differences({"rkl": METRICS["rkl"]}, metrics, metrics, None, 40, 0)
    assert (found.interval, found.verdict) == (None, "undecided")


# Folders ----------------------------------------------------------------------------------------------------------


def logits(noise: float) -> np.ndarray:
    """The teacher's, with noise of this size on them."""
    teacher = np.random.default_rng(11).normal(0, 2, (len(OWNER), VOCAB))
    return teacher + noise * np.random.default_rng(12).normal(0, 1, teacher.shape)


LABELS = np.random.default_rng(13).integers(0, VOCAB, len(OWNER))
NAMES = [f"row-{i}" for i in range(ROWS)]


def heldout(models: Mapping[str, float]) -> list[dict[str, Any]]:
    lines = []
    for name, noise in models.items():
        table = PositionTable(gamma=0.5)
        table.update(torch.tensor(logits(noise)), torch.tensor(logits(0.0)), torch.tensor(LABELS), torch.tensor(OWNER))
        lines += [{"model": name, **row} for row in table.rows(NAMES)]
    return lines


def sampled(models: Mapping[str, float]) -> list[dict[str, Any]]:
    lines = []
    for number, (name, error) in enumerate(models.items()):
        generator = np.random.default_rng(number)
        for temperature in TEMPERATURES:
            for prompt in range(PROMPTS):
                reference = [WORDS[(prompt + i) % len(WORDS)] for i in range(8)]
                for sample in range(SAMPLES):
                    wrong = generator.random(8) < 0.1 + error * 0.3
                    text = [str(generator.choice(WORDS)) if w else r for w, r in zip(wrong, reference, strict=True)]
                    text = text[: int(generator.integers(5, 9))]
                    lines.append({
                        "model": name, "prompt_id": f"p{prompt}", "prompt": f"say {prompt}", "sample": sample,
                        "reference": " ".join(reference), "sampling_temperature": temperature,
                        "text": " ".join(text), "num_tokens": len(text) + 1,
                    })  # fmt: skip
    return lines


SETTINGS = {
    "task": "generation", "models": {"teacher": "big"}, "sampling_temperature": 1.0, "samples_per_prompt": SAMPLES,
    "seeds": [0], "max_new_tokens": 9, "prompts": PROMPTS, "gamma": 0.5, "protocol": None,
}  # fmt: skip


def write(folder: Path, settings: Mapping[str, Any], student: str, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"rkl": 1.0, "distinct_2_corpus": 0.5}
    evaluation = {"settings": dict(settings), "teacher": {"nll": 2.0, "entropy": 1.0}, student: numbers}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def generation(folder: Path, noise: float, student: str = "after", **settings: Any) -> Path:
    models = {"teacher": 0.0, student: noise}
    return write(folder, SETTINGS | settings, student, heldout=heldout(models), samples=sampled(models))


CLASSES = ("cold", "warm", "hot")


def predictions(right: float, sure: float, size: int = 60) -> list[dict[str, Any]]:
    shared, own = np.random.default_rng(0), np.random.default_rng(1)
    lines = []
    for i in range(size):
        label, teacher = CLASSES[i % 3], CLASSES[(i + (shared.random() < 0.1)) % 3]
        student = CLASSES[(i + (own.random() > right)) % 3]
        confidence = float(np.clip(sure + own.normal(0, 0.05), 0.34, 0.999))
        given = confidence if student == label else (1 - confidence) / 2
        lines.append({
            "id": f"t{i}", "text": f"text {i}", "label": label, "student": student, "teacher": teacher,
            "student_confidence": round(confidence, 4), "teacher_confidence": round(shared.uniform(0.8, 1), 4),
            "nll": round(-float(np.log(given)), 4),
        })  # fmt: skip
    return lines


def classified(folder: Path, right: float, sure: float = 0.9) -> Path:
    return write(folder, {"task": "classification"}, "after", predictions=predictions(right, sure))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    changed = [change(line) for line in lines_of(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed if line is not None))


def by_key(comparison: Comparison, place: int = 0) -> dict[str, Difference]:
    return {difference.metric.key: difference for difference in comparison.tables[place].differences}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A is noisier than B, and B is a pair of models from elsewhere: its student has another name."""
    return generation(tmp_path / "a", 2.0), generation(tmp_path / "b", 0.5, "student")


def test_a_run_and_itself_do_not_differ(tmp_path: Path) -> None:
    for run in (generation(tmp_path / "g", 1.0), classified(tmp_path / "c", 0.8)):
        found = compare(run, run)
        assert found.warnings == []
        for table in found.tables:
            assert table.differences
            for difference in table.differences:
                assert difference.difference == 0
                assert difference.interval in ((0.0, 0.0), None)
                assert difference.verdict == (None if difference.metric.better == "none" else "undecided")
        assert "The data decide nothing" in " ".join(found.summary())


def test_the_nearer_student_is_the_better_one(pair: tuple[Path, Path]) -> None:
    found = by_key(compare(*pair))
    for key in ("rkl", "fkl", "js", "tvd", "agreement", "tail_rkl", "rouge_l", "bleu"):
        assert found[key].verdict == "B better", key
    back = by_key(compare(*reversed(pair)))
    for key, difference in back.items():
        swapped = {"A better": "B better", "B better": "A better"}.get(str(found[key].verdict), found[key].verdict)
        assert difference.verdict == swapped
        assert difference.difference == pytest.approx(-found[key].difference, abs=1e-12)


def test_tokens_and_answers_are_those_of_loops(pair: tuple[Path, Path]) -> None:
    found = by_key(compare(*pair))
    weights = written_out(ROWS)
    sums = []
    for noise in (2.0, 0.5):
        nll = -log_softmax(logits(noise), -1)[np.arange(len(OWNER)), LABELS]
        sums.append(np.array([nll[row == OWNER].sum() for row in range(ROWS)]))
    drawn = [np.array([(w * total).sum() / (w * LENGTHS).sum() for w in weights]) for total in sums]
    assert found["nll"].interval == pytest.approx(ends(drawn[1] - drawn[0]), rel=1e-6)
    assert found["nll"].b == pytest.approx(sums[1].sum() / len(OWNER), rel=1e-6)

    weights, means = written_out(PROMPTS), []
    for run, student in zip(pair, ("after", "student"), strict=True):
        pools: dict[str, list[int]] = {}
        for line in lines_of(run / "samples.jsonl"):
            if line["model"] == student and line["sampling_temperature"] == 1.0:
                pools.setdefault(line["prompt_id"], []).append(line["num_tokens"])
        means.append(np.array([np.mean(pools[f"p{i}"]) for i in range(PROMPTS)]))
    drawn = [np.array([(w * mean).sum() / PROMPTS for w in weights]) for mean in means]
    assert found["answer_tokens"].interval == pytest.approx(ends(drawn[1] - drawn[0]), rel=1e-9)


def test_the_sweep_is_compared_where_both_have_it(pair: tuple[Path, Path]) -> None:
    rewrite(pair[1] / "samples.jsonl", lambda line: None if line["sampling_temperature"] == 0.5 else line)
    found = compare(*pair)
    assert [table.sampling_temperature for table in found.tables] == [1.0, 1.5]
    assert found.tables[0].not_compared == {"distinct_2_corpus": "cannot be resampled by prompt"}
    assert found.tables[0].units == {"held-out rows": ROWS, "prompts": PROMPTS}
    assert found.tables[1].not_compared == {}
    assert found.tables[1].units == {"prompts": PROMPTS}
    assert {d.metric.of for d in found.tables[1].differences} == {"answers"}
    assert found.warnings == ["Only A has answers at sampling temperature 0.5: not compared."]


def test_suites_are_compared_each_by_itself(pair: tuple[Path, Path]) -> None:
    for run in pair:
        rewrite(
            run / "samples.jsonl", lambda line: line | {"suite": "dolly" if int(line["prompt_id"][1:]) < 8 else "uni"}
        )
    found = compare(*pair)
    places = [(table.suite, table.sampling_temperature, *table.units.values()) for table in found.tables]
    swept = [("dolly", t, 8) for t in (1.0, 0.5, 1.5)] + [("uni", t, 6) for t in (1.0, 0.5, 1.5)]
    assert places == [(None, None, ROWS), *swept]


def test_nothing_sampled_leaves_the_tokens(tmp_path: Path) -> None:
    runs = [generation(tmp_path / name, noise, prompts=0) for name, noise in (("a", 1.0), ("b", 0.5))]
    for run in runs:
        (run / "samples.jsonl").unlink()
    (table,) = compare(*runs).tables
    assert table.sampling_temperature is None and {d.metric.of for d in table.differences} == {"tokens"}


def test_the_order_of_the_lines_does_not_matter(pair: tuple[Path, Path]) -> None:
    before = compare(*pair)
    for name in ("heldout.jsonl", "samples.jsonl"):
        path = pair[1] / name
        path.write_text("".join(line + "\n" for line in reversed(path.read_text().splitlines())))
    after = compare(*pair)
    for key, difference in by_key(before).items():
        again = by_key(after)[key]
        assert again.verdict == difference.verdict
        assert again.interval == pytest.approx(difference.interval, rel=1e-9)


def test_without_a_teacher_there_is_no_verdict_towards_it(pair: tuple[Path, Path]) -> None:
    for name in ("heldout.jsonl", "samples.jsonl"):
        rewrite(pair[1] / name, lambda line: None if line["model"] == "teacher" else line)
    found = compare(*pair)
    assert by_key(found)["entropy"].verdict is None and by_key(found)["distinct_2"].verdict is None
    assert by_key(found)["nll"].verdict is not None
    assert "No verdict without a teacher's value: Entropy" in " ".join(found.summary())


def test_classifiers_are_compared_text_by_text(tmp_path: Path) -> None:
    a, b = classified(tmp_path / "a", 0.6, 0.95), classified(tmp_path / "b", 0.95, 0.95)
    comparison = compare(a, b)
    found = by_key(comparison)
    assert comparison.tables[0].not_compared["rkl"] == "not in predictions.jsonl"
    assert "Not compared (not in predictions.jsonl): rkl." in " ".join(comparison.summary())
    assert set(found) >= set("accuracy agreement macro_f1 nll confidence ece calibration_gap confidence_gap".split())
    assert {found[key].verdict for key in ("accuracy", "macro_f1", "nll", "ece", "calibration_gap")} == {"B better"}
    weights = written_out(60)
    right = [
        np.array([line["student"] == line["label"] for line in lines_of(run / "predictions.jsonl")]) for run in (a, b)
    ]
    assert found["accuracy"].interval == pytest.approx(ends(weights @ right[1] / 60 - weights @ right[0] / 60))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heldout", lambda line: None if line["row_id"] == "row-3" else line,
         r"The held-out rows differ: 1 of 12 are in .*a only, such as 'row-3'\."),
        ("heldout", lambda line: line | {"row_id": "x" + line["row_id"]}, r"The held-out rows differ: 12 of 12 "),
        ("heldout", lambda line: line | {"num_tokens": 99}, r"'row-0' has as num_tokens \d and 99\."),
        ("samples", lambda line: None if line["prompt_id"] == "p1" else line, r"The prompts differ: 1 of 14 .* 'p1'\."),
        ("samples", lambda line: line | {"prompt": "sing"}, r"'p0' has as prompt 'say 0' and 'sing'\."),
        ("samples", lambda line: line | {"reference": ["a"]}, r"'p0' has as reference 'the .* and \['a'\]"),
        ("samples", lambda line: {k: v for k, v in line.items() if k != "prompt"}, r"samples\.jsonl:1 lacks prompt\."),
    ],
)  # fmt: skip
def test_runs_on_other_data_are_refused(pair: tuple[Path, Path], name: str, change: Any, message: str) -> None:
    rewrite(pair[1] / f"{name}.jsonl", change)
    with pytest.raises(DrklError, match=message):
        compare(*pair)


def test_fewer_than_five_units_decide_nothing(pair: tuple[Path, Path]) -> None:
    rows = {line["row_id"] for line in lines_of(pair[0] / "heldout.jsonl")[:3]}
    for run in pair:
        rewrite(run / "heldout.jsonl", lambda line: line if line["row_id"] in rows else None)
    found = compare(*pair)
    keys = [key for key in by_key(found) if key in TOKEN_KEYS]
    assert {by_key(found)[key].verdict for key in keys} == {"undecided", None}
    assert by_key(found)["rkl"].verdict == "undecided" and by_key(found)["distinct_2"].verdict is not None
    assert "3 held-out rows decide nothing; it takes 5 or more." in found.warnings


def test_texts_that_differ_are_refused(tmp_path: Path) -> None:
    runs = [classified(tmp_path / name, 0.8) for name in "ab"]
    rewrite(runs[1] / "predictions.jsonl", lambda line: line | {"label": "hot"})
    with pytest.raises(DrklError, match=r"The texts differ: 't0' has as label 'cold' and 'hot'\."):
        compare(*runs)


def test_other_tasks_and_what_is_no_evaluation_are_refused(tmp_path: Path) -> None:
    run, classifier = generation(tmp_path / "g", 1.0), classified(tmp_path / "c", 0.8)
    with pytest.raises(DrklError, match=r"The tasks differ: generation in .*g, classification in .*c"):
        compare(run, classifier)
    with pytest.raises(DrklError, match="There is no folder"):
        compare(run, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DrklError, match=r"has no eval\.json; `drkl evaluate"):
        compare(run, tmp_path / "empty")
    (run / "heldout.jsonl").unlink()
    with pytest.raises(DrklError, match=r"has no heldout\.jsonl"):
        compare(run, run)
    (run / "eval.json").write_text('{"teacher": {}}')
    with pytest.raises(DrklError, match=r"eval\.json: student: the numbers of the student are missing"):
        compare(run, run)


def test_sets_that_share_nothing_are_refused(pair: tuple[Path, Path]) -> None:
    for name in ("heldout.jsonl", "samples.jsonl"):
        rewrite(pair[0] / name, lambda line: line | {"suite": "dolly"})
    with pytest.raises(DrklError, match="they share no row and no prompt"):
        compare(*pair)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"max_new_tokens": 8}, "max_new_tokens is 9 in A and 8 in B."),
        ({"samples_per_prompt": 2}, "samples_per_prompt is 3 in A and 2 in B."),
        ({"seeds": [10, 20]}, "seeds is [0] in A and [10, 20] in B."),
        ({"models": {"teacher": "bigger"}}, "The teachers differ: 'big' in A, 'bigger' in B."),
    ],
)
def test_other_settings_are_warned_of(pair: tuple[Path, Path], settings: dict[str, Any], warning: str) -> None:
    generation(pair[1], 0.5, "student", **settings)
    found = compare(*pair)
    assert found.warnings == [warning]
    assert warning in FORMATS["text"](found) and warning in FORMATS["md"](found).replace("\\", "")
    assert warning in json.loads(FORMATS["json"](found))["warnings"]


def test_a_teacher_of_the_same_name_with_other_numbers_is_warned_of(pair: tuple[Path, Path]) -> None:
    evaluation = json.loads((pair[1] / "eval.json").read_text())
    evaluation["teacher"]["entropy"] = 1.5
    (pair[1] / "eval.json").write_text(json.dumps(evaluation))
    assert compare(*pair).warnings == ["The teachers differ: Entropy 1.00 in A, 1.50 in B."]


def test_every_format_says_the_same(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    text, markdown = FORMATS["text"](found), FORMATS["md"](found)
    for shown in (text, markdown):
        assert "B − A" in shown and "not over training seeds" in shown and "The data do not decide" in shown
        assert "Reverse KL, nats ↓" in shown and "sampling temperature 0.5" in shown
    data = json.loads(FORMATS["json"](found))
    assert (data["difference"], data["resamples"], data["seed"]) == ("B - A", 1000, 0)
    assert data["summary"] == found.summary()
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](found))))
    entries = [(table, entry) for table in data["tables"] for entry in table["metrics"]]
    assert len(rows) == len(entries) == sum(len(table.differences) for table in found.tables)
    for row, (table, entry) in zip(rows, entries, strict=True):
        assert (row["key"], row["verdict"]) == (entry["key"], entry["verdict"] or "")
        assert float(row["sampling_temperature"]) == table["sampling_temperature"]
        assert float(row["difference"]) == entry["difference"] == entry["b"] - entry["a"]
        assert [float(row["low"]), float(row["high"])] == entry["interval"]
        assert f"| {row['metric'].replace('|', chr(92) + '|')}, " in markdown
    assert {len(line.split(" | ")) for line in markdown.splitlines() if line.startswith("| Reverse KL")} == {6}


def test_the_sentences_name_what_is_decided_and_what_is_not(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    sentences = found.summary()
    main_table = found.tables[0]
    for verdict, start in (("B better", "B better in"), ("undecided", "The data do not decide")):
        titles = [d.metric.title for d in main_table.differences if d.verdict == verdict]
        (sentence,) = [s for s in sentences if start in s and "Sampling temperature 1:" in s]
        assert sentence.endswith("; ".join(titles) + ".")
    judged = sum(d.verdict is not None for table in found.tables for d in table.differences)
    assert f"Of {judged} verdicts about {judged * 0.05:.0f} would be decided by chance alone" in sentences[-1]


def test_a_difference_without_a_better_one_is_said_to_be_one(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, {"task": "classification"}, "after", predictions=[
        line | {"teacher_confidence": 0.8, "student_confidence": sure} for line in predictions(0.8, 0.9)
    ]) for name, sure in (("a", 0.7), ("b", 0.9))]  # fmt: skip
    found = compare(*runs)
    gap = by_key(found)["confidence_gap"]
    assert (gap.difference, gap.verdict) == (pytest.approx(0.2), "undecided")
    (sentence,) = [s for s in found.summary() if "not in which is nearer to ideal" in s]
    assert sentence.endswith("Confidence; Confidence minus the teacher's.")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "argv", ["drkl", *map(str, arguments)])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.slow
def test_the_command(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "compare", *pair) == 0
    out = capsys.readouterr().out
    assert "B better" in out and "The data do not decide" in out
    assert max(map(len, out.splitlines())) <= 140

    for name in ("csv", "json"):
        assert call(monkeypatch, "compare", *pair, "--format", name, "--seed", 3) == 0
        printed = capsys.readouterr()
        assert "The data do not decide" in printed.err
        assert (json.loads(printed.out)["seed"] == 3) if name == "json" else printed.out.startswith("suite,")

    assert call(monkeypatch, "compare", *pair, "--format", "md", "--output", tmp_path / "new" / "c.md") == 0
    assert f"Written: {tmp_path / 'new' / 'c.md'}" in capsys.readouterr().out
    assert "| Reverse KL" in (tmp_path / "new" / "c.md").read_text()

    for arguments, message in (
        ((*pair, "--format", "xml"), "--format is 'xml'; expected text, md, csv, json."),
        ((pair[0], tmp_path / "none"), "There is no folder"),
    ):
        assert call(monkeypatch, "compare", *arguments) == 2
        assert message in capsys.readouterr().err
    assert call(monkeypatch, "compare", pair[0]) == 2
