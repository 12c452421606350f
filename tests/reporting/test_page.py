import json
import re
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from drkl.errors import DrklError
from drkl.evaluation.result import Evaluation
from drkl.reporting import report
from drkl.reporting.inputs import read_run
from drkl.reporting.samples import sample_table
from drkl.reporting.templating import emphasise
from drkl.runs import RunFolder, read_json, write_json, write_jsonl, write_yaml
from tests.reporting.conftest import TEMPERATURES, MakeRun, add_sample, write_heldout, write_pair, write_run

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script></style></pre>--><img src=x onerror=alert(2)> & \x00 \ud800 \u202e {{ 7*7 }} `ls`"


class Page(HTMLParser):
    """The page's elements, ids, links and text; complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, (tag, self._open[-3:])
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def words(self) -> str:
        """The text with single blanks."""
        return " ".join(self.text.split())

    def values(self, name: str) -> list[str]:
        return [value or "" for _, attribute, value in self.attributes if attribute == name]


def _page(*runs: RunFolder, output: Path | None = None) -> Page:
    return Page(report(list(runs), output).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a whole run, with its real figures."""
    run = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    assert report(run) == run.report_path
    return run.report_path.read_text(encoding="utf-8")


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without their drawing, which is what takes the time."""
    for module in ("figures", "curves", "tradeoff", "analysis"):
        monkeypatch.setattr(f"drkl.reporting.{module}.to_svg", lambda figure, name, alt: Markup("<svg></svg>"))


def test_a_whole_page(whole: str) -> None:
    page = Page(whole)
    for wanted in (
        "Is the student closer to its teacher than before training?", "Reverse KL", "lower is better", "Distinct-2",
        "bundled:dolly", "prompt too long: 24", "max_prompt_tokens: 256", "git commit", "0123abc",
        "drkl distill recipes/quickstart.yaml", "Mary Shelley", "2 more prompts", "stopped by the limit",
        "(empty answer)", "sacrebleu", "14 min 40 s",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert "/somewhere" not in page.text
    assert len(whole) < 2_000_000
    assert page.tags.count("h1") == 1
    assert page.values("role").count("img") == 4 + 2 + 3 + 6 + 3


def test_the_page_needs_nothing_but_itself(whole: str) -> None:
    page = Page(whole)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    data, script = page.scripts
    assert json.loads(data)["columns"][0][0] == "Teacher"
    policy = next(value for value in page.values("content") if value.startswith("default-src 'none'"))
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}';" in policy
    assert "innerHTML" not in script and "eval(" not in script
    assert all(value.startswith("#") for value in (*page.values("href"), *page.values("xlink:href")))
    assert "http" not in whole.replace("http-equiv", "")
    assert "@import" not in whole
    assert not page.values("src")


def test_ids_are_unique_and_every_figure_has_words(whole: str) -> None:
    page = Page(whole)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("xlink:href")} <= set(ids)
    assert len([label for tag, name, label in page.attributes if (tag, name) == ("svg", "aria-label") and label]) == 18
    assert set(page.values("aria-labelledby")) <= set(ids)


@pytest.mark.slow
def test_a_page_with_a_sweep_shows_what_is_new(make_run: MakeRun) -> None:
    page = _page(make_run(swept=True))
    assert page.values("role").count("img") == 4 + 2 + 4 + 4 + 6 + 3
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for wanted in (
        "Faithful and varied at once?", "Does the student answer as well as its teacher when both are equally varied?",
        "Undecided", "The best of k answers", "Probability along the teacher's ranks", "2.39 to 2.69",
        "Is its confidence equal to its accuracy?", "Probability of the teacher's top token", "in the prompt picker",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert (
        {"teacher", "before", "warmup", "student"} == set(page.values("data-series")) == set(page.values("data-toggle"))
    )
    assert json.loads(page.scripts[0])["temperatures"] == ["0.5", "0.7", "1", "1.2", "1.5"]


@pytest.mark.usefixtures("sketchy")
def test_an_outside_pair_has_a_page_without_training(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "pair")
    page = _page(pair)
    for wanted in (
        "org/teacher", "models/small", "Does the student answer as well as its teacher?", "Suite by suite",
        "vicuna", "teacher 23.0",
        "drkl evaluate --student models/small --teacher org/teacher --data rows.jsonl --output out/pair",
        f"drkl report {pair.root}",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    for unwanted in ("How did training go?", "Warm-up", "config.yaml", "/somewhere", "what the objective contributes"):
        assert unwanted not in page.text, unwanted
    assert [column[0] for column in json.loads(page.scripts[0])["columns"]] == ["Teacher", "Student"]


@pytest.mark.usefixtures("sketchy")
def test_a_pair_beside_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    page = _page(make_run(swept=True), write_pair(tmp_path / "pair"))
    assert "models.teacher" in page.text and "are not comparable" in page.text
    columns = [column[0] for column in json.loads(page.scripts[0])["columns"]]
    assert columns == ["Teacher", "quickstart · drkl", "pair"]


@pytest.mark.slow
@pytest.mark.usefixtures("sketchy")
def test_a_large_evaluation_makes_a_small_page(make_run: MakeRun) -> None:
    run = make_run(swept=True)
    words = "<b>& a word of an answer " * 12
    rows = [
        {"model": model, "prompt_id": str(i), "prompt": f"prompt {i} {words}", "sampling_temperature": t, "sample": k,
         "text": f"{words} {k}", "reference": words, "num_tokens": 60}
        for i in range(500)
        for model in ("teacher", "before", "warmup", "student") for t in TEMPERATURES for k in range(4)
    ]  # fmt: skip
    write_jsonl(run.samples_path, rows)
    path = report(run)
    assert path.stat().st_size < 5_000_000
    page = Page(path.read_text(encoding="utf-8"))
    prompts = json.loads(page.scripts[0])["prompts"]
    assert f"Only the first {len(prompts)} of 500 prompts fit into this page" in page.text
    assert all(len(column[2]) == 4 for column in prompts[-1]["answers"])


@pytest.mark.usefixtures("sketchy")
def test_the_picker_holds_whole_prompts(make_run: MakeRun) -> None:
    record = read_run(make_run(swept=True))
    table = sample_table([record], {})
    assert table is not None and table.picker_note == ""
    assert [len(column[2]) for column in json.loads(table.picker)["prompts"][0]["answers"]] == [4] * 4
    table = sample_table([record], {}, picker_budget=30_000)
    assert table is not None
    prompts = json.loads(table.picker)["prompts"]
    assert 0 < len(prompts) < 10 and f"Only the first {len(prompts)} of 10 prompts" in table.picker_note
    assert all([len(column[2]) for column in prompt["answers"]] == [4] * 4 for prompt in prompts)
    table = sample_table([record], {}, picker_budget=10)
    assert table is not None and table.picker == ""


def test_the_same_run_gives_the_same_page(whole: str, tmp_path: Path) -> None:
    again = report(write_run(tmp_path / "quickstart")).read_text(encoding="utf-8")
    assert re.sub(r"\S+/quickstart", "", again) == re.sub(r"\S+/quickstart", "", whole)


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    run = make_run()
    add_sample(run, prompt=HOSTILE, text=HOSTILE, reference=HOSTILE, prompt_id=HOSTILE)
    config = run.read_config()
    config["run"]["name"] = config["objective"]["name"] = config["teacher"]["model"] = HOSTILE.replace("\ud800", "")
    write_yaml(run.config_path, config)
    write_json(
        run.env_path, run.read_env() | {"device_name": HOSTILE.replace("\ud800", ""), "command": ["drkl", "$(x)"]}
    )
    page = _page(run)
    assert len(page.scripts) == page.tags.count("script") == 2 and "img" not in page.tags
    assert not {"<", ">", "&", "\u2028", "\x00", "\u202e"} & set(page.scripts[0])
    assert json.loads(page.scripts[0])["prompts"][0]["prompt"][0].startswith("<script>alert(1)</script></style>")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert (
        "<script>alert(1)</script></style></pre>--><img src=x onerror=alert(2)> & ␀ [U+D800] [U+202E] {{ 7*7 }}"
        in page.text
    )
    assert "drkl '$(x)'" in page.text
    assert "49" not in page.text.split("alert(2)> & ")[1][:40]


@pytest.mark.usefixtures("sketchy")
def test_a_very_long_line_is_cut_with_a_note(make_run: MakeRun) -> None:
    run = make_run()
    add_sample(run, text="x" * 100_000)
    page = _page(run)
    assert "98,500 more characters are not shown; they are in samples.jsonl." in page.text
    assert "x" * 1_501 not in page.text


@pytest.mark.usefixtures("sketchy")
def test_too_many_prompts_are_named_not_shown(make_run: MakeRun) -> None:
    run = make_run()
    table = sample_table([read_run(run)], {}, page_budget=20_000)
    assert table is not None
    assert 0 < len(table.unfolded) < 8
    assert table.left_out == 10 - len(table.unfolded)
    assert list(table.unfolded[0].answers) == ["teacher", "before", "warmup", "student"]
    row = {"model": "student", "sampling_temperature": 1.0, "sample": 0, "text": "word " * 250, "reference": "r"}
    row["num_tokens"] = 3
    write_jsonl(run.samples_path, [{**row, "prompt_id": str(i), "prompt": "p"} for i in range(900)])
    text = report(run).read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert "would make this page too large; they are in <code>samples.jsonl</code>" in text


@pytest.mark.usefixtures("sketchy")
def test_without_an_evaluation_the_page_says_how_to_get_one(make_run: MakeRun) -> None:
    run = make_run(evaluated=False)
    page = _page(run)
    assert f"drkl evaluate {run.root}" in page.text
    assert "Every number" not in page.text
    assert page.tags.count("svg") == 9


@pytest.mark.usefixtures("sketchy")
def test_without_teacher_and_warmup_neither_is_spoken_of(make_run: MakeRun) -> None:
    page = _page(make_run(teacher=False, warmup=False))
    assert "There is no teacher to compare the student with." in page.text
    assert "Does the student predict the held-out data better than before training? Undecided" in page.words
    assert "Reverse KL" not in page.text
    assert "Warm-up" not in page.text
    assert "the teacher's is best" not in page.text


@pytest.mark.usefixtures("sketchy")
def test_a_bare_folder_is_enough(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "bare")
    write_yaml(run.config_path, {"run": {"name": "bare"}})
    page = _page(run)
    assert "has not been evaluated" in page.text
    write_json(run.eval_path, {})
    with pytest.raises(DrklError, match="the numbers of the student are missing"):
        report(run)


@pytest.mark.usefixtures("sketchy")
def test_several_runs_side_by_side(make_run: MakeRun, tmp_path: Path) -> None:
    first, other = make_run(), make_run("rkl", objective="rkl", changes={"student": {"rkl": 2.47}})
    page = _page(first, other, output=tmp_path / "out" / "compare.html")
    assert "The runs side by side" in page.text
    assert "objective.name" in page.text
    assert "objective.gamma" in page.text
    assert "run.name" not in page.text.split("Configuration keys that differ")[1].split("How confident")[0]
    assert f"drkl report {first.root} {other.root}" in page.text


@pytest.mark.slow
@pytest.mark.usefixtures("sketchy")
def test_runs_that_are_not_comparable_are_called_so(make_run: MakeRun) -> None:
    first, other = write_heldout(make_run()), write_heldout(make_run("other"))
    assert "are not comparable" not in _page(first, other).text
    found = read_json(other.eval_path)
    found["settings"]["max_new_tokens"] = 32
    write_json(other.eval_path, found)
    text = _page(first, other).text
    assert "A is quickstart · drkl, B is other · drkl: max_new_tokens is 64 in A and 32 in B." in text
    lines = (other.root / "heldout.jsonl").read_text()
    (other.root / "heldout.jsonl").write_text(lines.replace("row-3", "line-3"))
    text = _page(first, other).text
    assert "quickstart · drkl and other · drkl are not comparable: The held-out rows differ" in text
    assert "(best)" not in text and "2.54" in text
    assert "new · drkl has not been evaluated" in _page(first, make_run("new", evaluated=False)).text


@pytest.mark.slow
@pytest.mark.usefixtures("sketchy")
def test_evaluations_in_memory_and_run_folders_mix(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(swept=True)
    evaluation = Evaluation.load(run.root)
    memory = replace(evaluation, folder=None, name="in memory", lines={"samples": evaluation.samples})
    target = tmp_path / "deep" / "page.html"
    assert report(memory, target) == target
    page = Page(target.read_text(encoding="utf-8"))
    assert "in memory" in page.text and "Why do cats purr?" in page.text
    for absent in ("How did training go?", "config.yaml", "drkl report", "drkl distill"):
        assert absent not in page.text, absent
    page = Page(report([memory, run, str(run.root), evaluation], target).read_text(encoding="utf-8"))
    labels = ["in memory", "quickstart · drkl", "quickstart (2) · drkl", "quickstart (3) · drkl"]
    assert [column[0] for column in json.loads(page.scripts[0])["columns"]] == ["Teacher", *labels]
    with pytest.raises(DrklError, match="only in memory: name the file"):
        report(memory)


@pytest.mark.usefixtures("sketchy")
def test_no_run_and_no_room_are_errors(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="no run to report on"):
        report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(DrklError, match="Cannot write "):
        report(make_run(), tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("from 3.24 to 2.54 nats (−0.70)", "from <b>3.24</b> to <b>2.54</b> nats (<b>−0.70</b>)"),
        ("350 steps, step 350, Distinct-2 of 6,821.", "350 steps, step <b>350</b>, Distinct-2 of <b>6,821</b>."),
        ("run `a <b> 3` & 35\N{NO-BREAK SPACE}%", "run <code>a &lt;b&gt; 3</code> &amp; <b>35\N{NO-BREAK SPACE}%</b>"),
        ("x1 1.5B smollm2-135m", "x1 1.5B smollm2-135m"),
    ],
)
def test_numbers_stand_out_and_nothing_else(text: str, html: str) -> None:
    assert emphasise(text) == html


@pytest.mark.slow
def test_reporting_needs_no_torch_and_is_light_to_import(make_run: MakeRun) -> None:
    run = make_run(evaluated=False)
    code = (
        "import sys; from pathlib import Path\n"
        "from drkl.reporting import report; from drkl.runs import RunFolder\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules), {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "report(RunFolder(Path(sys.argv[1])))\n"
        "assert not any(heavy), heavy\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.root)], check=True)
