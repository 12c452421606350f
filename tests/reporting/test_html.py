import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from drkl.errors import DrklError
from drkl.reporting import figures, write_report
from drkl.reporting.html import emphasise
from drkl.reporting.record import read_run
from drkl.reporting.samples import sample_table
from drkl.runs import RunFolder, write_json, write_jsonl, write_yaml
from tests.reporting.conftest import MakeRun, add_sample, write_run

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script></style></pre>--><img src=x onerror=alert(2)> & \x00 \ud800 \u202e {{ 7*7 }} `ls`"


class Page(HTMLParser):
    """The page's elements, ids, links and text; complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
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
    assert page.tags.count("svg") == 4 + 3 + 6 + 3


def test_the_page_needs_nothing_but_itself(whole: str) -> None:
    page = Page(whole)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(value.startswith("#") for value in (*page.values("href"), *page.values("xlink:href")))
    assert "http" not in whole.replace("http-equiv", "")
    assert "@import" not in whole
    assert not page.values("src")


def test_ids_are_unique_and_every_figure_has_words(whole: str) -> None:
    page = Page(whole)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("xlink:href")} <= set(ids)
    assert len([label for tag, name, label in page.attributes if (tag, name) == ("svg", "aria-label") and label]) == 16
    assert set(page.values("aria-labelledby")) <= set(ids)


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
    assert not {"script", "img"} & set(page.tags)
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
    table = sample_table(read_run(run), budget=20_000)
    assert 0 < len(table.shown) < 8
    assert table.left_out == 10 - len(table.shown)
    assert list(table.shown[0].answers) == ["teacher", "before", "warmup", "after"]
    row = {"model": "after", "sample": 0, "text": "word " * 250, "reference": "r", "num_tokens": 3}
    write_jsonl(run.samples_path, [{**row, "prompt_id": str(i), "prompt": "p"} for i in range(900)])
    text = write_report(run).read_text(encoding="utf-8")
    assert len(text) < 2_000_000
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
    subprocess.run([sys.executable, "-c", code, str(run.root)], check=True, timeout=100)
