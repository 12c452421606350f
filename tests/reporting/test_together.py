"""The training of several runs on one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drkl.reporting import report
from drkl.reporting.inputs import read_run
from drkl.reporting.together import PROMPTS, trained_together
from drkl.runs import read_jsonl, write_jsonl
from tests.reporting.conftest import LAST_STEPS, WARMUP_STEPS, MakeRun, write_pair
from tests.reporting.test_rollouts import sampled, text


def test_each_number_of_all_runs_is_in_one_figure(make_run: MakeRun) -> None:
    runs = [read_run(make_run("one")), read_run(make_run("two", warmup=False))]
    together = trained_together(runs)
    assert together is not None and together.sampled == [] and together.written == []
    assert [picture.title for picture in together.curves] == [
        "Reverse KL to the teacher", "Forward KL to the teacher", "Top-token agreement", "Entropy",
        "Negative log-likelihood",
    ]  # fmt: skip
    assert [line.title for line in together.lines] == ["one · drkl", "two · drkl"]
    for picture, key in zip(together.curves, ("rkl", "fkl", "agreement", "student_entropy", "nll"), strict=True):
        ends = []
        for run in runs:
            checks = [row[f"eval_{key}"] for stage in run.stages for row in stage.heldout]
            ends.append((f"{checks[0]:.3g}", f"{checks[-1]:.3g}"))
        (first, last), (start, end) = ends
        assert f"one · drkl from {first} to {last}; two · drkl from {start} to {end}." in picture.alt
        assert all(f'data-series="run-{place}"' in picture.svg for place in (0, 1))


def test_a_run_without_held_out_rows_shows_its_batches(make_run: MakeRun) -> None:
    plain = make_run("plain", warmup=False)
    rows = [row for row in read_jsonl(plain.train_log_path) if not any(key.startswith("eval_") for key in row)]
    write_jsonl(plain.train_log_path, rows)
    together = trained_together([read_run(make_run("checked")), read_run(plain)])
    assert together is not None
    assert f"plain · drkl from {rows[0]['rkl']:.3g} to {rows[-1]['rkl']:.3g}." in together.curves[0].alt


def test_a_caption_speaks_of_a_log_scale_only_where_there_is_one(make_run: MakeRun) -> None:
    runs = []
    for name in ("one", "two"):
        run = make_run(name, warmup=False)
        rows = [{"step": step, "eval_rkl": value, "eval_fkl": value + 10} for step, value in ((1, 4.0), (2, 1.0))]
        write_jsonl(run.train_log_path, rows)
        runs.append(read_run(run))
    together = trained_together(runs)
    assert together is not None
    assert [picture.caption for picture in together.curves] == ["KL(q‖p), nats, log scale", "KL(p‖q), nats"]


@pytest.mark.slow
def test_the_answers_of_each_run_that_wrote_some(make_run: MakeRun) -> None:
    writer = sampled(make_run("writer"))
    write_jsonl(writer.rollouts_path, [text(step, id=f"p{n}") for step in (1, 9) for n in range(PROMPTS + 1)])
    together = trained_together([read_run(make_run("silent")), read_run(writer)])
    assert together is not None
    assert [picture.title for picture in together.sampled] == [
        "Answers that end", "Length of an answer", "Ends", "Distinct-2", "Repetition inside an answer",
        "Entropy on the answers", "Reverse KL on the answers", "Forward KL on the answers",
    ]  # fmt: skip
    entropy = together.sampled[5]
    assert entropy.caption == "nats" and "silent" not in entropy.alt
    [(label, histories)] = together.written
    assert label == "writer · drkl" and len(histories) == PROMPTS
    assert [one.step for one in histories[0].unfolded] == [WARMUP_STEPS + 1, WARMUP_STEPS + 9]


def test_one_run_and_runs_that_were_not_trained_have_no_such_figures(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_run(make_run())
    assert trained_together([run]) is None
    pairs = [read_run(write_pair(tmp_path / name)) for name in ("a", "b")]
    assert trained_together(pairs) is None
    mixed = trained_together([pairs[0], run])
    assert mixed is not None and [line.key for line in mixed.lines] == ["run-1"]


@pytest.mark.slow
def test_the_page_of_several_runs_that_sampled(make_run: MakeRun) -> None:
    runs = [sampled(make_run(name, objective=name)) for name in ("fkl", "rkl", "<b>&")]
    for run in runs:
        write_jsonl(run.rollouts_path, [text(step) for step in (0, LAST_STEPS)])
    page = report([run.root for run in runs], runs[0].root / "several.html").read_text()
    names = re.findall(r'\bid="([\w-]+)"', page)
    assert len(names) == len(set(names))
    assert page.count("How the answers of <bdi>") == 3 and "<b>&" not in page
    assert "The training of <bdi>fkl</bdi> alone" in page
    assert "What did it write as it learnt?" not in page and "What did they write as they learnt?" in page
