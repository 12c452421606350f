import json
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from drkl.errors import DrklError
from drkl.reporting import figures, write_report
from drkl.reporting.html import emphasise
from drkl.reporting.record import read_run
from drkl.reporting.samples import sample_table
from drkl.runs import RunFolder, read_json, write_json, write_jsonl, write_yaml
from tests.reporting.conftest import TEMPERATURES, MakeRun, add_sample, write_pair, write_run

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

    def values(self, name: str) -> list[str]:
        return [value or "" for _, attribute, value in self.attributes if attribute == name]


def _page(*runs: RunFolder, output: Path | None = None) -> Page:
    return Page(write_report(list(runs), output).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a whole run, with its real figures."""
    run = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    assert write_report(run) == run.report_path
    return run.report_path.read_text(encoding="utf-8")


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without their drawing, which is what takes the time."""
    monkeypatch.setattr(figures, "to_svg", lambda figure, name, alt: Markup("<svg></svg>"))


def test_a_whole_page(whole: str) -> None:
    page = Page(whole)
    for wanted in (
        "After 350 steps the student is closer to its teacher", "Reverse KL", "lower is better", "Distinct-2",
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


def test_a_page_with_a_sweep_shows_what_is_new(make_run: MakeRun) -> None:
    page = _page(make_run(swept=True))
    assert page.values("role").count("img") == 4 + 2 + 4 + 4 + 6 + 3
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for wanted in (
        "Faithful and varied at once?", "At matched diversity (the teacher's Distinct-2 at temperature 1, 0.930)",
        "the data do not decide", "The best of k answers", "What becomes of the teacher's tail", "2.39 to 2.69",
        "Is it right as often as it is sure?", "Probability of the teacher's top token", "in the prompt picker",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert (
        {"teacher", "before", "warmup", "after"} == set(page.values("data-series")) == set(page.values("data-toggle"))
    )
    assert json.loads(page.scripts[0])["temperatures"] == ["0.5", "0.7", "1", "1.2", "1.5"]


@pytest.mark.usefixtures("sketchy")
def test_an_outside_pair_has_a_page_without_training(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "pair")
    page = _page(pair)
    for wanted in (
        "org/teacher", "models/small", "Student and teacher", "Suite by suite", "vicuna", "teacher 23.0",
        "drkl evaluate --student models/small --teacher org/teacher --data rows.jsonl --output out/pair",
        f"drkl report {pair.root}",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    for unwanted in ("How did it get there?", "Warm-up", "config.yaml", "/somewhere", "Is it the objective?"):
        assert unwanted not in page.text, unwanted
    assert [column[0] for column in json.loads(page.scripts[0])["columns"]] == ["Teacher", "Student"]


@pytest.mark.usefixtures("sketchy")
def test_a_pair_beside_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    page = _page(make_run(swept=True), write_pair(tmp_path / "pair"))
    assert "models.teacher" in page.text and "These runs differ in data" in page.text
    columns = [column[0] for column in json.loads(page.scripts[0])["columns"]]
    assert columns == ["Teacher", "quickstart · drkl", "pair"]


BROKEN = [None, 3, [], {}, {"after": None}, {"after": []}, {"after": [None, 3, {}]}, {"after": {"rkl": "x"}},
          {"edges": 1, "ranks": {}, "after": {"tokens": [1], "samples": [1, "x"], "rouge_l_best": None}},
          {"after": [{"sampling_temperature": 1e400, "rouge_l": 1}, {"sampling_temperature": 0.5, "rouge_l": None}]},
          {"dolly": None, "vicuna": {"after": 3, "intervals": []}}]  # fmt: skip


@pytest.mark.usefixtures("sketchy")
@pytest.mark.parametrize("broken", BROKEN)
def test_odd_sections_never_stop_a_report(make_run: MakeRun, broken: object) -> None:
    run = make_run(swept=True)
    found = json.loads(run.eval_path.read_text())
    sections = ("intervals", "sweep", "coverage", "reliability", "distributions", "tail", "suites", "settings")
    run.eval_path.write_text(json.dumps(found | dict.fromkeys(sections, broken)))
    for output_format in ("html", "md", "csv"):
        assert write_report([run, run], output_format=output_format).stat().st_size > 1_000


@pytest.mark.slow
@pytest.mark.usefixtures("sketchy")
def test_a_large_evaluation_makes_a_small_page(make_run: MakeRun) -> None:
    run = make_run(swept=True)
    words = "<b>& a word of an answer " * 12
    rows = [
        {"model": model, "prompt_id": str(i), "prompt": f"prompt {i} {words}", "sampling_temperature": t, "sample": k,
         "text": f"{words} {k}", "reference": words, "num_tokens": 60}
        for i in range(500)
        for model in ("teacher", "before", "warmup", "after") for t in TEMPERATURES for k in range(4)
    ]  # fmt: skip
    write_jsonl(run.samples_path, rows)
    path = write_report(run)
    assert path.stat().st_size < 5_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert "of the 40,000 answers" in page.text
    prompts = json.loads(page.scripts[0])["prompts"]
    assert all(len(column[2]) == 1 for column in prompts[-1]["answers"])


@pytest.mark.usefixtures("sketchy")
def test_first_answers_come_before_further_ones(make_run: MakeRun) -> None:
    record = read_run(make_run(swept=True))
    whole = json.loads(sample_table([record]).picker)
    assert [len(column[2]) for column in whole["prompts"][0]["answers"]] == [4] * 4
    table = sample_table([record], picker_budget=12_000)
    found = json.loads(table.picker)["prompts"]
    assert len(found) == 10
    assert all(len(column[2]) == 1 for prompt in found for column in prompt["answers"])
    assert "of the 800 answers and 10 of the 10 prompts" in table.picker_note
    assert sample_table([record], picker_budget=10).picker == ""


def test_the_same_run_gives_the_same_page(whole: str, tmp_path: Path) -> None:
    again = write_report(write_run(tmp_path / "quickstart")).read_text(encoding="utf-8")
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
    table = sample_table([read_run(run)], budget=20_000)
    assert 0 < len(table.shown) < 8
    assert table.left_out == 10 - len(table.shown)
    assert list(table.shown[0].answers) == ["teacher", "before", "warmup", "after"]
    row = {"model": "after", "sample": 0, "text": "word " * 250, "reference": "r", "num_tokens": 3}
    write_jsonl(run.samples_path, [{**row, "prompt_id": str(i), "prompt": "p"} for i in range(900)])
    text = write_report(run).read_text(encoding="utf-8")
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
    assert "There was no teacher in this run." in page.text
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
    assert "The evaluation holds no number" in _page(run).text


@pytest.mark.usefixtures("sketchy")
def test_several_runs_side_by_side(make_run: MakeRun, tmp_path: Path) -> None:
    first, other = make_run(), make_run("rkl", objective="rkl", changes={"after": {"rkl": 2.47}})
    page = _page(first, other, output=tmp_path / "out" / "compare.html")
    assert "The runs side by side" in page.text
    assert "objective.name" in page.text
    assert "objective.gamma" in page.text
    assert "run.name" not in page.text.split("On what their configurations differ")[1].split("How sure")[0]
    assert f"drkl report {first.root} {other.root}" in page.text
    assert "not measured on the same thing" not in page.text


@pytest.mark.usefixtures("sketchy")
def test_runs_that_are_not_comparable_are_called_so(make_run: MakeRun) -> None:
    first, other = make_run(), make_run("other")
    config = other.read_config()
    config["evaluation"]["sampling_temperature"] = 0.5
    write_yaml(other.config_path, config)
    assert "These runs differ in evaluation" in _page(first, other).text
    # What an evaluation says it used decides, where all say it, and not what a configuration planned.
    for run in (first, other):
        evaluation = read_json(run.eval_path)
        evaluation["settings"]["seeds"] = [0]
        write_json(run.eval_path, evaluation)
    assert "These runs differ" not in _page(first, other).text
    evaluation["settings"]["max_new_tokens"] = 32
    write_json(other.eval_path, evaluation)
    assert "These runs differ in max new tokens: their numbers" in _page(first, other).text
    assert "Not every run has been evaluated" in _page(first, make_run("new", evaluated=False)).text


@pytest.mark.usefixtures("sketchy")
def test_no_run_and_no_room_are_errors(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="no run to report on"):
        write_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(DrklError, match="Cannot write "):
        write_report(make_run(), tmp_path / "file" / "report.html")


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


def test_reporting_needs_no_torch_and_is_light_to_import(make_run: MakeRun) -> None:
    run = make_run(evaluated=False)
    code = (
        "import sys; from pathlib import Path\n"
        "from drkl.reporting import write_report; from drkl.runs import RunFolder\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules), {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "write_report(RunFolder(Path(sys.argv[1])))\n"
        "assert not any(heavy), heavy\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.root)], check=True)
