"""The page shows the findings, each id once for each run, and names no winner that the paired test calls undecided."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from drkl.evaluation.comparison import compare
from drkl.evaluation.findings import IDS, SHARED
from drkl.evaluation.result import Evaluation
from drkl.reporting import report
from drkl.reporting.inputs import Run, read_run
from drkl.runs import RunFolder, read_json, write_json
from tests.reporting import test_classification
from tests.reporting.conftest import MakeRun, write_analysis, write_heldout, write_pair

ROOT = Path(__file__).resolve().parents[2]
SURE = {"overconfidence": (0.12, 0.16), "calibration_gap": (0.1, 0.2), "target_gap": (0.01, 0.03)}
MADE_UP: dict[str, dict[str, tuple[float, float]]] = {
    "overconfident": SURE,
    "underconfident": {key: (-high, -low) for key, (low, high) in SURE.items()},
    "undecided": {key: (-0.02, 0.03) for key in SURE},
    "by-the-teacher-only": SURE | {"calibration_gap": (-0.2, -0.1)},
    "by-the-data-only": SURE | {"overconfidence": (-0.2, -0.1)},
}


class Answers(HTMLParser):
    """Every answer of a page: (run, id, answer); and the cells that are marked as best."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.shown: dict[str, set[str]] = {}
        self.best: list[tuple[str, str]] = []
        self._answer = self._metric = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        have = dict(attrs)
        if "data-finding" in have:
            self.found.append((have["data-run"] or "", have["data-finding"] or "", have["data-answer"] or ""))
            self._answer = have["data-answer"] or ""
        if have.get("role") == "rowheader":
            self._metric = have["data-value"] or ""
        if tag == "td" and "best" in (have.get("class") or "").split():
            self.best.append((self._metric, have["data-label"] or ""))

    def handle_data(self, data: str) -> None:
        if self._answer:
            self.shown.setdefault(self._answer, set()).add(data.strip())
            self._answer = ""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take most of the time."""
    monkeypatch.setattr("drkl.reporting.curves.training_curves", lambda run: ([], []))
    monkeypatch.setattr("drkl.reporting.figures.bars", lambda run, metric: None)
    monkeypatch.setattr("drkl.reporting.analysis._drawn", lambda analysis: [])
    for name in ("figures.confidence", "figures.profiles", "figures.run_dots", "tradeoff.pictures"):
        monkeypatch.setattr(f"drkl.reporting.{name}", lambda runs: [])


def answers(*runs: Any) -> Answers:
    return Answers(report(list(runs), runs[0].root / "page.html").read_text(encoding="utf-8"))


def made_up(make_run: MakeRun, kind: str, name: str = "") -> RunFolder:
    """A run whose intervals decide the questions as ``MADE_UP`` says."""
    run = make_run(name or kind, swept=True)
    content = read_json(run.eval_path)
    for key, ends in MADE_UP[kind].items():
        content["student"][key] = sum(ends) / 2
        content["intervals"]["student"][key] = list(ends)
    write_json(run.eval_path, content)
    return run


def check(found: Answers, *runs: Run) -> None:
    """Each id once for each run, with the answer of the findings, which is also what the reader sees."""
    given = Counter((run, id) for run, id, _ in found.found if not id.startswith("b_better_"))
    assert set(given.values()) <= {1}
    expected = {
        (run.name, finding.id, finding.answer) for run in runs for finding in (*run.findings, *run.analysis_findings)
    }
    assert {entry for entry in found.found if not entry[1].startswith("b_better_")} == expected
    assert {id for _, id, _ in found.found} <= set(IDS)
    assert max(Counter((run, id) for run, id, _ in found.found).values()) == 1
    words = {"yes": {"Yes", "better"}, "no": {"No", "worse"}, "undecided": {"Undecided", "undecided"}}
    for answer, shown in found.shown.items():
        assert shown <= words.get(answer, {"Not applicable"}), answer


@pytest.mark.parametrize("kind", MADE_UP)
@pytest.mark.parametrize("analysis", [None, "earlier", "with findings"])
def test_a_run_has_one_answer_to_each_question(make_run: MakeRun, kind: str, analysis: str | None) -> None:
    run = made_up(make_run, kind)
    if analysis is not None:
        write_analysis(run, earlier=analysis == "earlier")
    found = answers(run)
    check(found, read_run(run))
    by_id = {id: answer for _, id, answer in found.found}
    for id, key in zip(SHARED, SURE, strict=True):
        low, high = MADE_UP[kind][key]
        assert by_id[id] == ("yes" if low > 0 else "no" if high < 0 else "undecided"), id
    assert ("pushed_when_matched" in by_id) == (analysis is not None)


def test_the_committed_results_do_not_contradict_themselves(tmp_path: Path) -> None:
    runs = []
    for name in ("quickstart", "quickstart-rkl", "quickstart-fkl"):
        run = RunFolder(tmp_path / name)
        for kind in ("eval", "analysis"):
            write_json(run.root / f"{kind}.json", read_json(ROOT / "docs" / "results" / f"{name}.{kind}.json"))
        check(answers(run), read_run(run))
        runs.append(run)
    found = answers(*runs)
    check(found, *map(read_run, runs))
    assert found.best == []  # without the lines behind the numbers nothing can be tested


@pytest.mark.parametrize(
    "make",
    [
        lambda path, make_run: write_pair(path),
        lambda path, make_run: test_classification.write_run(path),
        lambda path, make_run: test_classification.write_run(path, teacher=False, classes=["x", "y"]),
        lambda path, make_run: make_run(teacher=False, warmup=False),
        lambda path, make_run: make_run(warmup=False),
    ],
)
def test_so_has_every_other_kind(tmp_path: Path, make_run: MakeRun, make: Callable[..., RunFolder]) -> None:
    run = make(tmp_path / "x", make_run)
    check(answers(run), read_run(run))


def test_an_analysis_alone_answers_its_questions(tmp_path: Path) -> None:
    run = write_analysis(RunFolder(tmp_path / "analysed"), earlier=True)
    found = answers(run)
    check(found, read_run(run))
    assert {"overconfident_by_teacher", "pushed_when_matched"} <= {id for _, id, _ in found.found}


@pytest.mark.parametrize("output_format", ["html", "md"])
def test_words_are_those_of_the_findings(make_run: MakeRun, tmp_path: Path, output_format: str) -> None:
    runs = [made_up(make_run, "overconfident"), made_up(make_run, "underconfident")]
    for chosen in (runs[:1], runs):
        text = report(chosen, tmp_path / "page", output_format=output_format).read_text(encoding="utf-8")
        for run in chosen:
            finding = read_run(run).findings[0]
            start = finding.text.split(" points")[0].rsplit(" ", 1)[0]  # up to the first number, which may be marked
            assert start in text and finding.question in text


def pair(make_run: MakeRun, **changes: float) -> list[RunFolder]:
    """Two runs of the same rows; the second's means differ."""
    return [
        write_heldout(make_run("one", changes={"student": {}})),
        write_heldout(make_run("two", changes={"student": {"rkl": 2.54 + changes.get("rkl", 0)}}), **changes),
    ]


def test_a_winner_is_named_where_the_paired_test_decides(make_run: MakeRun, tmp_path: Path) -> None:
    runs = pair(make_run, rkl=-0.5)
    found = answers(*runs)
    check(found, *map(read_run, runs))
    assert ("two", "b_better_rkl", "yes") in found.found
    assert ("Reverse KL", "two · drkl") in found.best
    text = report(runs, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Reverse KL: two · drkl 2.04, one · drkl 2.54; two · drkl is better." in text
    assert "**2.04**" in text and "2.04** (better)" in text


def test_no_winner_is_named_where_the_paired_test_is_undecided(make_run: MakeRun, tmp_path: Path) -> None:
    """A number that is better by the digits shown is not better."""
    runs = pair(make_run, rkl=0.0)
    content = read_json(runs[1].eval_path)
    content["student"]["rkl"] = 2.4  # nearer to ideal by what the table shows; the rows do not say so
    write_json(runs[1].eval_path, content)
    found = answers(*runs)
    assert ("two", "b_better_rkl", "undecided") in found.found
    assert not any(metric == "Reverse KL" for metric, _ in found.best)
    text = report(runs, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "the data do not decide between" in text and "**2.40**" not in text


def test_no_cell_is_best_that_compare_calls_undecided(make_run: MakeRun) -> None:
    runs = []
    for place in range(3):
        changes = {"rkl": 2.54 - 0.1 * place, "fkl": 2.62 + 0.0001 * place}
        run = make_run(f"run-{place}", changes={"student": changes})
        runs.append(write_heldout(run, rkl=-0.1 * place, fkl=0.0001 * place))
    found = answers(*runs)
    decided = {}
    for a, b in itertools.combinations(range(3), 2):
        comparison = compare(Evaluation.load(runs[a].root), Evaluation.load(runs[b].root))
        for difference in comparison.tables[0].differences:
            verdict = {"A better": a, "B better": b}.get(str(difference.verdict))
            decided[difference.metric.title, a, b] = verdict
    for metric, label in found.best:
        winner = int(label[len("run-") : len("run-") + 1])
        others = [place for place in range(3) if place != winner]
        assert all(decided[metric, *sorted((winner, other))] == winner for other in others), metric
    assert ("Reverse KL", "run-2 · drkl") in found.best


def test_classifiers_are_compared_by_their_texts(tmp_path: Path) -> None:
    runs = [test_classification.write_run(tmp_path / name) for name in ("a", "b")]
    found = answers(*runs)
    check(found, *map(read_run, runs))
    assert ("b", "b_better_accuracy", "undecided") in found.found and found.best == []


def test_runs_with_suites_are_compared_suite_by_suite(tmp_path: Path) -> None:
    pairs = [write_heldout(write_pair(tmp_path / name)) for name in ("a", "b")]
    for run in pairs:
        lines = (run.root / "heldout.jsonl").read_text().splitlines()
        text = "".join(line.replace("{", f'{{"suite": "{name}", ', 1) + "\n" for name in ("x", "y") for line in lines)
        (run.root / "heldout.jsonl").write_text(text)
    path = report(pairs, tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    found = Answers(text)
    check(found, *map(read_run, pairs))
    assert found.best == [] and "each suite is compared by itself" in text and "The paired test of" in text
