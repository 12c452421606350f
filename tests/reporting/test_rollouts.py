"""What the page says of the answers that a run sampled: curves, texts and warnings."""

from __future__ import annotations

import re
from typing import Any

import pytest

from drkl.reporting.inputs import read_run
from drkl.reporting.page import report
from drkl.reporting.rollouts import FOLDED_FROM, PROMPTS, STEPS, STEPS_OPEN, TEXT_LIMIT, section
from drkl.runs import RunFolder, read_jsonl, write_jsonl
from tests.reporting.conftest import LAST_STEPS, WARMUP_STEPS, MakeRun

NUMBERS = {
    "answers": 16, "finished": 0.9, "length": 40.0, "ends_per_1000": 22.0, "distinct2": 0.9, "repeated4": 0.05,
    "student_entropy": 2.0, "teacher_entropy": 1.5, "fkl": 0.8, "rkl": 0.6, "loss": 0.7,
}  # fmt: skip
TITLES = [
    "Answers that end", "Length of an answer", "Ends", "Distinct-2", "Repetition inside an answer",
    "Entropy on the answers", "Reverse KL on the answers", "Forward KL on the answers", "Held-out loss",
    "Time of a step",
]  # fmt: skip


def sampled(run: RunFolder, finished: float = 0.9) -> RunFolder:
    """Give the last stage of a run the lines of sampled answers; from half of it on so many are finished."""
    first = {"eval_rollout_" + name: value for name, value in (NUMBERS | {"loss": 0.9}).items()}
    rows = [{"step": 0, "seconds": 0.5} | first]
    for row in read_jsonl(run.train_log_path):
        heldout = any(key.startswith("eval_") for key in row)
        late = {"finished": finished} if row["step"] > LAST_STEPS / 2 else {}
        prefix = "eval_rollout_" if heldout else "rollout_"
        row |= {prefix + name: value for name, value in (NUMBERS | late).items()}
        row |= {"eval_response_distinct2": 0.95} if heldout else {"seconds_generating": 2.0, "seconds_learning": 1.0}
        rows.append(row)
    write_jsonl(run.train_log_path, rows)
    return run


def text(step: int, **changes: Any) -> dict[str, Any]:
    line = {"step": step, "id": "a", "prompt": "Why?", "text": f"because {step}", "finished": True, "num_tokens": 3}
    return line | changes


def test_a_run_without_answers_has_no_such_section(make_run: MakeRun) -> None:
    run = make_run()
    assert section(read_run(run)) is None and read_run(run).concerns == []


def test_prompts_alone_have_no_loss_beside_that_of_the_answers(make_run: MakeRun) -> None:
    run = sampled(make_run())
    rows = [{key: row[key] for key in row if key != "eval_fkl"} for row in read_jsonl(run.train_log_path)]
    write_jsonl(run.train_log_path, rows)
    found = section(read_run(run))
    assert found is not None
    assert [picture.title for picture in found.pictures] == [title for title in TITLES if title != "Held-out loss"]


@pytest.mark.slow
def test_the_page_of_a_run_without_answers_does_not_speak_of_them(make_run: MakeRun) -> None:
    page = report(make_run().root).read_text()
    assert "What did it write as it learnt?" not in page and '<p class="notice">' not in page


def test_the_curves_of_the_answers(make_run: MakeRun) -> None:
    found = section(read_run(sampled(make_run())))
    assert found is not None and found.histories == []
    assert [picture.title for picture in found.pictures] == TITLES
    loss = found.pictures[-2]
    assert "own answers from 0.9 to 0.7" in loss.alt, "before the first step the answers alone are measured"
    assert "data's responses from" in loss.alt
    assert "writing from 2 to 2; learning from 1 to 1" in found.pictures[-1].alt


@pytest.mark.slow
def test_the_page_of_a_run_that_went_wrong(make_run: MakeRun) -> None:
    run = sampled(make_run(), finished=0.1)
    evil = '<script>alert(1)</script></div>{{ 7 * 7 }}\u202e"onmouseover=x \x00'
    lines = [text(0, text=evil, prompt=evil), text(9, text=evil * 30, prompt=evil), text(9, text="word " * 1000)]
    write_jsonl(run.rollouts_path, lines)
    [concern] = read_run(run).concerns
    step = int(re.match(r"Step (\d+): 90\s% of the newest", concern)[1])  # type: ignore[index]
    assert WARMUP_STEPS + LAST_STEPS / 2 < step <= WARMUP_STEPS + LAST_STEPS, "on the axis that joins the stages"
    page = report(run.root).read_text()
    findings = page[page.index('id="findings"') : page.index("Yes and no are decided")]
    assert findings.count('<p class="notice">') == 1 and "unlearning where to end" in findings
    # Marks are drawn by reference: two figures with one name would show each other's.
    names = re.findall(r'\bid="([\w-]+)"', page)
    assert len(names) == len(set(names))
    assert "written by the student. Dots:" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page and "\u202e" not in page and "\x00" not in page
    assert "3,500 more characters are not shown; they are in <code>rollouts.jsonl</code>" in page
    assert "unlearning where to end" in report(run.root, output_format="md").read_text()


@pytest.mark.slow
def test_among_several_runs_it_says_whose_it_is(make_run: MakeRun) -> None:
    runs = [make_run("good"), sampled(make_run("bad"), finished=0.1)]
    page = report([run.root for run in runs], runs[0].root / "both.html").read_text()
    assert re.search(r'<p class="notice">bad · drkl: Step <b>\d+</b>', page)


def test_the_answers_to_a_prompt_by_step(make_run: MakeRun) -> None:
    run = make_run()
    lines = [text(step) for step in range(0, 60, 10)] + [text(20, text="again", finished=False, num_tokens=1)]
    write_jsonl(run.rollouts_path, [*lines, text(0, id="b", prompt="How?")])
    found = section(read_run(run))
    assert found is not None and found.pictures == [] and found.left_out == 0
    first, second = found.histories
    assert [one.step for one in first.unfolded] == [WARMUP_STEPS + step for step in (0, 20, 30, 50)]
    assert [one.step for one in first.every] == [WARMUP_STEPS + step for step in range(0, 60, 10)]
    assert (first.every[2].text.text, first.every[2].note) == ("again", "1 token, cut"), "the later line counts"
    assert first.every[1].note == "3 tokens" and first.every[1].opening == ""
    assert len(second.unfolded) == 1 and second.every == []


def test_many_prompts_and_steps_do_not_make_the_page_long(make_run: MakeRun) -> None:
    run = make_run()
    long = "word " * 1000
    write_jsonl(
        run.rollouts_path, [text(step, id=f"p{n}", text=long) for step in range(200) for n in range(PROMPTS + 2)]
    )
    found = section(read_run(run))
    assert found is not None and len(found.histories) == PROMPTS and found.left_out == 2
    one = found.histories[0]
    assert len(one.unfolded) == STEPS_OPEN and len(one.every) == STEPS
    assert (one.every[0].step, one.every[-1].step) == (WARMUP_STEPS, WARMUP_STEPS + 199)
    assert len(one.every[0].opening) <= FOLDED_FROM + 2 and len(one.every[0].text.text) == TEXT_LIMIT


@pytest.mark.slow
def test_prompts_that_are_not_on_the_page_are_counted_there(make_run: MakeRun) -> None:
    run = make_run()
    write_jsonl(run.rollouts_path, [text(1, id=f"p{n}") for n in range(PROMPTS + 2)])
    assert "2 more prompts are in <code>rollouts.jsonl</code>." in report(run.root).read_text()


@pytest.mark.parametrize(
    "line", [{}, {"step": "x", "text": "t"}, {"step": 1}, {"step": None, "text": 3, "id": [1], "prompt": {}}]
)
def test_lines_that_are_no_answers_are_left_out(make_run: MakeRun, line: dict[str, Any]) -> None:
    run = make_run()
    write_jsonl(run.rollouts_path, [line])
    assert section(read_run(run)) is None
    write_jsonl(run.rollouts_path, [line, text(1, id=[1], num_tokens="x", finished="?", text=7)])
    found = section(read_run(run))
    assert found is not None and found.histories[0].unfolded[0].text.text == "7"
