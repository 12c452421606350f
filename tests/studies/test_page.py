"""The page of a study says what the study says, in words, and nothing that it does not."""

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import scipy.stats
from markupsafe import Markup

from drkl.display import clean
from drkl.evaluation.declared import METRICS
from drkl.evaluation.result import Fold, Scaling
from drkl.studies import budgets, curves, figures, words
from drkl.studies.cells import CellResult, Foretold, Verdict
from drkl.studies.definition import Prediction
from drkl.studies.kinds import Names, kinds_of
from drkl.studies.page import as_html
from drkl.studies.result import Study
from tests.reporting.test_page import HOSTILE, Page
from tests.studies import made
from tests.studies.example import OBJECTIVES, example

FEW = ("rkl", "overconfidence", "distinct_2")
SECTIONS = "answer predictions primary verdicts seeds frontier calibration budgets cost failed limits repeat".split()


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of a study with a cell that failed, with its real figures."""
    return as_html(example(states={("fkl", 4): ("failed", "The loss is not finite at step 211.")}))


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without their drawing, which is what takes the time."""
    monkeypatch.setattr(figures, "new_figure", lambda width, height: (MagicMock(), MagicMock()))
    monkeypatch.setattr(figures, "_name_temperatures", lambda ax, drawn: None)
    drawn = Markup('<svg role="img" aria-label="{}"></svg>')
    monkeypatch.setattr(figures, "to_svg", lambda figure, name, alt: drawn.format(clean(alt)))


def test_a_whole_page(whole: str) -> None:
    page = Page(whole)
    assert [id for id in page.values("id") if id in SECTIONS] == SECTIONS
    for wanted in (
        "14 of 15 runs are finished; 1 failed.", "drkl is better than rkl in overconfidence by the teacher",
        "0123abcdef45", "2026-11-29 08:12 UTC", "before the first run began", "Held", "Did not hold", "In words alone",
        "drkl against rkl: overconfidence by the teacher", "The loss is not finite at step 211.", "fkl-seed4",
        "hold the held-out rows and prompts fixed", "hold the seeds fixed", "drkl study instruction.yaml",
        "torch", "2.13.0+cpu", "equal within each seed", "3.7 hours in all",
    ):  # fmt: skip
        assert wanted in page.words, wanted
    assert page.tags.count("h1") == 1 and "/tmp" not in whole


def test_the_page_needs_nothing_but_itself_and_every_figure_has_words(whole: str) -> None:
    page = Page(whole)
    assert not {"link", "img", "iframe", "object"} & set(page.tags) and not page.values("src")
    (script,) = page.scripts
    policy = next(value for value in page.values("content") if value.startswith("default-src 'none'"))
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}';" in policy
    assert "http" not in whole.replace("http-equiv", "") and "@import" not in whole
    assert all(value.startswith("#") for value in (*page.values("href"), *page.values("xlink:href")))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and {value[1:] for value in page.values("xlink:href")} <= set(ids)
    pictures = page.values("role").count("img")
    assert pictures == 6 + 10 + 1 + 3 + 1  # differences, strips, frontier, reliability, cost
    labels = [label for tag, name, label in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == pictures and all(labels)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert "drkl 2.53 (2.51 to 2.56)" in " ".join(map(str, labels))


def said(page: Page) -> list[str]:
    """The verdicts of a page in their order."""
    return page.values("data-verdict")


@pytest.mark.usefixtures("sketchy")
def test_every_verdict_stands_in_words_and_the_exploratory_are_marked() -> None:
    study = example(metrics=FEW)
    outcomes = ("better", "worse", "no difference", "undecided")
    rows = tuple(replace(row, verdict=outcomes[place % 4]) for place, row in enumerate(study.verdicts))
    page = Page(as_html(replace(study, verdicts=rows)))
    primary = [row for row in rows if not row.exploratory]
    assert len(said(page)) == len(rows) + len(primary) and said(page)[: len(primary)] == [r.verdict for r in primary]
    for outcome in outcomes:
        assert said(page).count(outcome) == page.text.count(f"{words.SIGNS[outcome]}{outcome}") > 0
    assert page.text.count("(exploratory)") == len(rows) - len(primary)
    assert sum("exploratory" in value for value in page.values("class")) == len(rows) - len(primary) + 1  # and the key


@pytest.mark.usefixtures("sketchy")
def test_nobody_wins_where_nothing_is_decided() -> None:
    study = example(metrics=FEW)
    rows = tuple(replace(row, verdict="undecided") for row in study.verdicts)
    page = Page(as_html(replace(study, verdicts=rows, predictions=())))
    assert "All 6 primary comparisons are undecided." in page.words
    assert set(said(page)) == {"undecided"}
    assert not {"best", "better", "worse"} & {name for value in page.values("class")[:-2] for name in value.split()} - {
        "better"  # the key of the table
    }
    assert "better than" not in page.text and "worse than" not in page.text and "(best)" not in page.text


def hostile() -> Study:
    """A study whose every text is hostile."""
    study = example(variants=["rkl", "drkl", HOSTILE.replace("\ud800", "")], seeds=(0, 1), primary=(), metrics=FEW)
    name = study.cells[2].axes["variant"]
    definition = study.definition.model_copy(
        update={"base": HOSTILE, "primary": [], "axes": study.definition.axes | {HOSTILE: [HOSTILE]}}
    )
    cells = [
        replace(cell, name=cell.name + HOSTILE, budget={HOSTILE: HOSTILE, "steps": {HOSTILE: [HOSTILE]}},
                start=HOSTILE, why=HOSTILE, state="failed" if place == 0 else cell.state)
        for place, cell in enumerate(study.cells)
    ]  # fmt: skip
    for cell in cells:
        if cell.evaluation is not None:
            cell.evaluation.settings["versions"] = {HOSTILE: HOSTILE}
    rows = [replace(row, why=HOSTILE, budget_differs=(HOSTILE,), exploratory=False) for row in study.verdicts]
    odd = replace(rows[0], metric=HOSTILE)
    asked = [Prediction(text=HOSTILE), Prediction(text=HOSTILE, metric="rkl", cell={"variant": name}, expect="better")]
    asked.append(Prediction(metric=HOSTILE, cell={HOSTILE: HOSTILE}, expect="worse"))
    return replace(
        study, definition=definition, cells=tuple(cells), verdicts=(*rows, odd), notes=(HOSTILE,), began=HOSTILE,
        predictions=tuple(Foretold(one, "undecided", None) for one in asked),
        predicted={"commit": HOSTILE, "date": HOSTILE, "is_changed": True},
    )  # fmt: skip


@pytest.mark.usefixtures("sketchy")
def test_hostile_text_stays_text() -> None:
    text = as_html(hostile())
    page = Page(text)
    assert len(page.scripts) == 1 and page.tags.count("script") == 1
    assert "img" not in page.tags and "\x00" not in text and "\u202e" not in text
    assert "{{ 7*7 }}" in page.text
    assert page.text.count("<script>alert(1)</script>") > 20
    text.encode()


@pytest.mark.usefixtures("sketchy")
@pytest.mark.parametrize("seeds", [(), (7,)])
def test_with_no_more_than_one_seed_nothing_is_decided(seeds: tuple[int, ...]) -> None:
    study = example(seeds=seeds or (0,), metrics=FEW)
    if not seeds:
        cells = [replace(cell, axes={"objective.name": cell.axes["objective.name"]}) for cell in study.cells]
        definition = study.definition.model_copy(update={"axes": {"objective.name": ["fkl", "rkl", "drkl"]}})
        study = replace(study, cells=tuple(cells), definition=definition)
    page = Page(as_html(study))
    assert set(said(page)) == {"undecided"}
    assert "There are fewer than two seeds, so nothing is decided" in page.words
    assert ("one, of the base" in page.words) == (not seeds)
    assert "1 pair of seeds: at least two are needed." in page.words and "better than" not in page.words


@pytest.mark.usefixtures("sketchy")
def test_before_any_run_the_page_says_so() -> None:
    every: dict[tuple[str, int], Any] = {
        (name, seed): ("missing", None) for name in ("fkl", "rkl", "drkl") for seed in (0, 1)
    }
    page = Page(as_html(example(seeds=(0, 1), states=every, began=None, metrics=FEW)))
    assert "No run has finished, so there is nothing to compare." in page.words
    assert "0 of 6 runs are finished; 6 are missing." in page.words and "No run has begun yet." in page.words
    assert "fkl-seed0, rkl-seed0, drkl-seed0, fkl-seed1, rkl-seed1 and drkl-seed1" in page.words
    assert not {"seeds", "verdicts", "frontier", "calibration", "cost"} & set(page.values("id"))


@pytest.mark.usefixtures("sketchy")
def test_a_study_of_classes_has_no_answers() -> None:
    page = Page(
        as_html(example(task="classification", seeds=(0, 1), metrics=("rkl", "ece", "overconfidence", "macro_f1")))
    )
    assert "frontier" not in page.values("id") and "Macro-F1" in page.text and "Calibration" in page.text


@pytest.mark.usefixtures("sketchy")
def test_a_metric_that_some_cells_lack_is_drawn_from_the_others() -> None:
    study = example(metrics=(*FEW, "rouge_l"))
    lacking = [
        replace(cell, metrics={key: value for key, value in cell.metrics.items() if key != "rouge_l"})
        if place != 4
        else cell
        for place, cell in enumerate(study.cells)
    ]
    definition = study.definition.model_copy(update={"decide": [*study.definition.decide, "not_measured"]})
    page = Page(as_html(replace(study, cells=tuple(lacking), definition=definition)))
    alts = " ".join(page.values("aria-label"))
    assert "ROUGE-L, every seed a dot; mean with its 95 % interval over seeds: rkl" in alts
    assert "not measured" in page.text and "Not measured, every seed" not in alts


@pytest.mark.slow
def test_thirteen_objectives_have_names_and_curves_of_their_own() -> None:
    page = Page(as_html(example(objectives=OBJECTIVES)))
    assert page.values("role").count("img") == 6 + 10 + 1 + 13 + 1
    assert "it scrolls sideways" in page.text
    assert {f"run-{place}" for place in range(13)} | {"teacher"} == set(page.values("data-toggle"))


@pytest.mark.parametrize(
    ("known", "began", "text", "doubtful"),
    [
        (None, "2026-11-29T10:00:00", "Git could not say when", True),
        ({"commit": None}, None, "in no commit", True),
        ({"commit": "a", "date": "2026-11-29T09:00:00+00:00", "is_changed": True}, None, "was changed after", True),
        ({"commit": "a", "date": "2026-11-29T12:00:00+02:00"}, "2026-11-29T10:01:00+00:00", "before the first", False),
        ({"commit": "a", "date": "2026-11-29T09:00:00-02:00"}, "2026-11-29T10:01:00+00:00", "is later than", True),
        ({"commit": "a", "date": "2026-11-29T09:00:00"}, None, "No run has begun yet.", False),
    ],
)
def test_the_date_of_the_predictions(known: Any, began: str | None, text: str, doubtful: bool) -> None:
    found = words.dated(example(predicted=known, began=began))
    assert text in found.text and found.is_doubtful == doubtful


def test_runs_that_were_known_when_the_predictions_were_committed_are_counted() -> None:
    study = example(predicted={"commit": "a", "date": "2026-11-29T12:00:00+00:00"}, began="2026-11-29T10:00:00+00:00")
    cells = [
        replace(cell, began=f"2026-11-29T{10 + 2 * (place > 2)}:30:00+00:00") for place, cell in enumerate(study.cells)
    ]
    study = replace(study, cells=tuple(cells))
    of_all = f"start of the first run: 3 of {len(cells)} runs had begun"
    assert words.dated(study).text.endswith(f"{of_all}.")
    for taken, said in ((1, ", 1 of them from other studies."), (3, ", all of them from other studies.")):
        moved = [replace(cell, run=study.folder.parent / "o" / cell.name) for cell in cells[:taken]]
        assert words.dated(replace(study, cells=(*moved, *cells[taken:]))).text.endswith(of_all + said)


def test_the_primary_comparisons_were_named_before_the_runs_or_not() -> None:
    before = {"commit": "a", "date": "2026-11-29T09:00:00+00:00"}
    study = example(predicted=before, began="2026-11-29T10:00:00+00:00")
    assert words.named(study) == "These were named before the runs, and they alone decide."
    assert "nothing shows that it did so before every run" in words.named(replace(study, predicted=None))
    assert "They were changed after the first run had begun" in words.named(replace(study, changed=("primary",)))
    assert words.named(replace(study, changed=("decide",))) == words.named(study)


def test_what_is_not_known_of_the_budgets_is_said() -> None:
    known = {"steps": 3, "tokens": 5, "training rows": "r", "evaluated rows": "e"}
    cells = (cell("drkl", 0, **known), cell("rkl", 0, **known | {"tokens": None}))
    study = replace(example(curves=False), cells=cells)
    assert budgets.unknown(study) == ["the tokens of 1 of the 2 finished runs"]
    assert budgets.unknown(replace(study, cells=cells[:1])) == []
    page = as_html(replace(study, verdicts=(row(budget_differs=()),)))
    assert "As far as they are known: no comparison differs" in page
    assert "Not known: the tokens of 1 of the 2 finished runs." in page


def test_runs_of_other_studies_are_no_cost_of_this_one() -> None:
    study = example(curves=False)
    cells = [replace(cell, seconds={"train": 3600.0}) for cell in study.cells]
    elsewhere = replace(cells[0], run=study.folder.parent / "o" / "c")
    study = replace(study, cells=(elsewhere, *cells[1:]))
    found = budgets.cost(study, kinds_of(study))
    assert found is not None and study.hours == len(cells) - 1
    assert f"{len(cells) - 1:.1f} hours in all" in found[1]
    assert "1 run of other studies took 1.0 hours more." in found[1]


def test_predictions_are_told_with_what_came_out() -> None:
    study = example()
    names = Names(kinds_of(study))
    told = words.told(study, names, "generation")
    assert [one.held for one in told] == ["yes", "no", "words"]
    assert told[0].expected == "drkl against rkl: better in overconfidence by the teacher"
    assert told[0].came_out.startswith("Better: difference −0.06") and told[0].came_out.endswith("5 seeds, primary.")
    unknown = Prediction(metric="rkl", cell={"objective.name": "gone"}, expect="better")
    (none,) = words.told(replace(study, predictions=(Foretold(unknown, None, None),)), names, "generation")
    assert none.held == "undecided" and "There is no such comparison yet." in none.came_out


def row(**more: Any) -> Verdict:
    given: dict[str, Any] = {
        "metric": "rkl", "axes": {"objective.name": "drkl"}, "baseline": {"objective.name": "rkl"}, "difference": -0.1,
        "interval": (-0.2, 0.0), "p_holm": 0.04, "seeds": 5, "exploratory": False, "verdict": "better",
    }  # fmt: skip
    return Verdict(**given | more)


def test_the_headline_names_what_is_decided_and_counts_the_rest() -> None:
    study = example()
    names = Names(kinds_of(study))
    rows = (row(), row(metric="distinct_2"), row(metric="agreement", verdict="worse"))
    rows = (*rows, row(metric="fkl", verdict="undecided"))
    _, text = words.headline(replace(study, verdicts=rows), names, "generation")
    assert text == (
        "drkl is better than rkl in reverse KL and Distinct-2. drkl is worse than rkl in top-token agreement. "
        "1 of the 4 primary comparisons is undecided."
    )
    equal = (row(verdict="no difference"),)
    assert words.headline(replace(study, verdicts=equal), names, "generation")[1] == (
        "drkl and rkl differ in reverse KL by less than 0.05 nats."
    )
    none = replace(study, verdicts=(row(exploratory=True),))
    assert "all that follows is exploratory" in words.headline(none, names, "generation")[1]


def test_the_headline_says_by_how_many_seeds_where_some_are_left_out() -> None:
    study = example()
    rows = (row(seeds=3), row(metric="fkl"), row(metric="agreement", verdict="no difference", seeds=4))
    _, text = words.headline(replace(study, verdicts=rows), Names(kinds_of(study)), "generation")
    assert "drkl is better than rkl in reverse KL, by 3 of 5 seeds. drkl is better than rkl in forward KL." in text
    assert text.endswith("by less than matters, by 4 of 5 seeds.")
    said = " ".join(words.limits(replace(study, verdicts=rows)))
    assert "2 comparisons have fewer pairs than the study has seeds." in said
    assert "fewer pairs" not in " ".join(words.limits(replace(study, verdicts=(row(),))))


def test_limits_say_that_seeds_were_added() -> None:
    study = example()
    assert "Seeds were added" not in " ".join(words.limits(study))
    assert any(one.startswith("Seeds were added") for one in words.limits(replace(study, has_more_seeds=True)))


def test_what_may_be_decided_by_chance_is_counted_of_what_can_be_decided() -> None:
    study = example()
    rows = (
        row(exploratory=True, p=0.3),
        row(exploratory=True, metric="stronger_tail_share", p=0.3),
        row(exploratory=True),
    )
    assert "3 comparisons are exploratory, without a correction: if nothing differed at all, about 0.1" in " ".join(
        words.limits(replace(study, verdicts=rows))
    )
    said = " ".join(words.limits(replace(study, verdicts=rows[1:])))
    assert "2 comparisons are exploratory, without a correction. " in said


def test_of_two_teachers_none_is_drawn() -> None:
    study = example()
    for entropies in ((2.0, 2.001), (2.0, 2.5)):
        cells = [
            replace(cell, teacher={**cell.teacher, "entropy": entropies[place % 2]})
            for place, cell in enumerate(study.cells)
        ]
        other = replace(study, cells=tuple(cells))
        kinds, is_one = kinds_of(other), entropies[1] == 2.001
        assert bool(curves.teacher_of(kinds, curves.sweep_means)) == is_one
        assert bool(curves.teacher_of(kinds, curves.reliability_means)) == is_one
        drawn = [picture.alt for picture in (figures.frontier(kinds, figures.lines_of(kinds)),) if picture]
        assert ("Teacher:" in drawn[0]) == is_one
        said = "The teacher is not the same in all cells" in " ".join(words.limits(other))
        assert said != is_one


def test_limits_say_what_holm_costs_here() -> None:
    study = example()
    rows = (row(t_needed=4.851), row(t_needed=3.5), row(exploratory=True, t_needed=2.776, seeds=5))
    text = " ".join(words.limits(replace(study, verdicts=rows)))
    assert "over 2 primary comparisons" in text
    assert "|t| has to reach 4.9 at worst, where one comparison by itself needs 2.8, at 5 seeds" in text
    assert "1 comparison is exploratory" in text and "There are 5 seeds." in text
    assert "Holm" not in " ".join(words.limits(replace(study, verdicts=rows[1:])))
    bare = study.definition.model_copy(update={"smallest_difference": {}})
    assert any("“no difference” is never said" in one for one in words.limits(replace(study, definition=bare)))


def cell(name: str, seed: int, **budget: Any) -> CellResult:
    study = example(seeds=(0,), curves=False)
    return replace(
        study.cells[0], name=f"{name}-{seed}", axes={"objective.name": name, "run.seed": seed}, budget=budget
    )


def test_budgets_are_equal_equal_within_a_seed_nearly_so_or_differ() -> None:
    cells = tuple(
        cell(name, seed, steps=360, tokens=1000 + seed, shown=10_000 + (name == "rkl"),
             rule="last" if seed else name, none=None)
        for seed in (0, 1) for name in ("drkl", "rkl")
    )  # fmt: skip
    table = budgets.table(kinds_of(replace(example(curves=False), cells=cells)))
    assert table is not None and table.rows == [
        ["Steps", "equal", "360"],
        ["Tokens", "equal within each seed", "1,000 to 1,001"],
        ["Shown", "equal to within 0.0\N{NO-BREAK SPACE}%", "10,000 to 10,001"],
        ["Rule", "differs", "drkl: drkl; last; rkl: rkl; last"],
    ]


def test_differing_budgets_head_their_section() -> None:
    rows = (row(budget_differs=("tokens by 3 %",)), row(metric="fkl", budget_differs=("tokens by 3 %", "steps")))
    found = budgets.unequal(rows, Names(kinds_of(example(curves=False))))
    assert found == ["drkl against rkl: tokens by 3 % and steps"]


@pytest.mark.usefixtures("sketchy")
def test_the_distance_stands_beside_the_difference_only_where_it_decides() -> None:
    study = example(seeds=(0, 1), metrics=FEW)
    text = Page(as_html(study)).words
    assert "distance from 0" in text and "distance from the teacher’s" in text
    rows = tuple(replace(one, distance=(0.1, None)) for one in study.verdicts if one.metric == "rkl")
    assert "distance from" not in Page(as_html(replace(study, verdicts=rows, predictions=()))).text


@pytest.mark.usefixtures("sketchy")
def test_the_command_names_the_studys_file_and_the_environment_is_that_of_its_beginning() -> None:
    begun = {"command": ["drkl", "study", "studies/a b.yaml", "--part", "1/2"], "torch": "2.13", "git_commit": None}
    text = Page(as_html(example(metrics=FEW, made=begun))).words
    assert "drkl study 'studies/a b.yaml' drkl study 'studies/a b.yaml' --report" in text
    assert "--part" not in text and "git commit" not in text and "2.13" in text
    text = Page(as_html(example(metrics=FEW, made={"torch": "2.13"}))).words
    assert f"drkl study {example().definition.name}.yaml drkl study" in text  # the copy in its folder would be refused


def test_versions_that_differ_between_cells_are_said() -> None:
    study = example(metrics=FEW)
    evaluation = study.cells[0].evaluation
    assert evaluation is not None
    evaluation.settings["versions"] = {"torch": "2.14"}
    assert ("torch, in evaluations", "differs: 2.14, 2.13.0+cpu") in budgets.environment(study, kinds_of(study))


@pytest.mark.usefixtures("sketchy")
def test_a_whole_study_is_read_from_its_folder_and_drawn(tmp_path: Path) -> None:
    asked = made.definition(primary=[{"metric": "rkl", "cell": {"objective.name": "drkl"}, "against": {}}])
    folder = made.write_study(tmp_path / "studies" / "s", asked, made.planted({"drkl": -0.5}))
    page = Page(as_html(Study.load(folder, prompts=False)))
    assert "drkl is better than rkl in reverse KL." in page.words and "All 9 runs are finished." in page.words
    assert str(tmp_path) not in page.text


@pytest.mark.usefixtures("sketchy")
def test_calibration_after_a_temperature_stands_beside_calibration_before() -> None:
    study = example(metrics=["ece", "agreement", "distinct_2"], seeds=(0, 1), primary=())
    assert "With a temperature after training" not in Page(as_html(study)).words
    scaling = Scaling("labels", [Fold(1.5, 10, 10), Fold(1.7, 10, 10)])
    cells = tuple(
        cell
        if cell.axes["objective.name"] == "fkl"
        else replace(
            cell,
            metrics=cell.metrics | {"ece": 0.2 + 0.01 * cell.axes["run.seed"]},
            scaled={"ece": 0.05 + 0.01 * cell.axes["run.seed"], "agreement": cell.metrics["agreement"]},
            evaluation=replace(cell.evaluation, scaling=scaling),  # type: ignore[type-var]
        )
        for cell in study.cells
    )
    scaled = figures.scaled_table(kinds_of(replace(study, cells=cells)), [METRICS["ece"], METRICS["agreement"]])
    assert scaled is not None
    assert scaled.head == ["Cells", "Temperature", "Calibration error (ECE)"]  # top tokens stay, so agreement does
    low, high = scipy.stats.t.interval(0.95, 1, loc=0.055, scale=0.005)
    ends = f"{low:.3f} to {high:.3f}".replace("-", "\N{MINUS SIGN}")
    expected = [("1.6", "1.5 to 1.7"), ("0.205 \N{RIGHTWARDS ARROW} 0.055", ends)]
    assert scaled.rows == [["rkl", *expected], ["drkl", *expected]]
    page = Page(as_html(replace(study, cells=cells)))
    assert "With a temperature after training" in page.words and "0.205 \N{RIGHTWARDS ARROW} 0.055" in page.words
    column = replace(study, cells=cells).cell_table()["scaled_ece"].dropna()
    assert list(column) == pytest.approx([0.05, 0.05, 0.06, 0.06])


@pytest.mark.usefixtures("sketchy")
def test_the_teacher_of_a_recipe_comes_first_in_what_repeats_the_study() -> None:
    study = example(metrics=FEW, seeds=(0,), primary=())

    def commands(teacher: str) -> list[str]:
        cells = tuple(
            replace(cell, evaluation=replace(cell.evaluation, settings={"models": {"teacher": teacher}}))  # type: ignore[type-var]
            for cell in study.cells
        )
        (text,) = re.findall(r'<pre class="commands">(.*?)</pre>', as_html(replace(study, cells=cells)), re.DOTALL)
        return text.strip().splitlines()

    own = ["drkl study instruction.yaml", "drkl study instruction.yaml --report"]
    assert commands("runs/gpt-scratch-teacher/student") == ["drkl distill gpt-scratch-teacher", *own]
    for teacher in ("smollm2-135m-instruct", "runs/mine/student", "models/gpt-scratch-teacher", "runs", "", HOSTILE):
        assert commands(teacher) == own
