"""Hostile text where it is shown: terminal, page, Markdown, csv, model card."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.data.tiny_tokenizers import build
from tests.faults import hostile
from tests.faults.conftest import Injected
from tests.faults.forked import Runner
from tests.faults.hostile import SEQUENCES

ELSEWHERE = "![x](http:a.example)<img src=x onerror=alert(1)><script>alert(1)<script>](javascript:alert(1))"
NAME = f"t{SEQUENCES.replace('/', '')}`|{ELSEWHERE}\n---\nlicense: mit\n# H"
"""Of a folder: of a model, of rows, of results."""
QUICK = ("--prompts", 2, "--samples", 1, "--max-new-tokens", 4)


class Shown(NamedTuple):
    config: Path
    run: Path
    rows: Path
    teacher: Path
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Iterator[Shown]:
    """A run whose teacher, rows and answers have names and words that are hostile."""
    root = tmp_path_factory.mktemp("shown")
    config = hostile.write_config(root)
    teacher, rows = root / NAME, root / f"{NAME}.jsonl"
    words = [f"w{i}" for i in range(20)] + [SEQUENCES, "<script>alert(1)</script>", "=HYPERLINK(1)", "\x1b[2J"]
    (root / "teacher").rename(teacher)
    build(extra=words).save_pretrained(teacher)
    (root / "data.jsonl").rename(rows)
    values = yaml.safe_load(config.read_text())
    values["teacher"]["model"], values["data"]["path"] = str(teacher), str(rows)
    config.write_text(yaml.safe_dump(values))
    printed = {}
    printed["distill"] = runner.call("distill", config, until=300)
    run = root / "runs" / "r"
    printed["evaluate"] = runner.call("evaluate", run, *QUICK, until=300)
    yield Shown(config, run, rows, teacher, printed)


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="Control sequences, overrides of the direction of writing and markup in the names of models, files and "
    "folders, in rows, ids, roles, columns, keys of a config, and in what the models answer",
    does="Every command prints them so that a terminal obeys nothing; so do its errors.",
)
def test_terminal(shown: Shown, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    for name, done in shown.printed.items():
        with injected(name):
            hostile.assert_plain(done)
            assert done.code == 0, done.err
    out = tmp_path / f"out{SEQUENCES.replace('/', '')}"
    commands: dict[str, tuple[object, ...]] = {
        "data": ("data", shown.config),
        "dry run": ("distill", shown.config, "--dry-run"),
        "generate": ("generate", shown.run, "--prompt", f"w1 {SEQUENCES}", "--samples", 2),
        "pair": ("evaluate", "--student", shown.run / "student", "--teacher", shown.teacher, "--data", shown.rows,
                 "--output", out, *QUICK),
        "report": ("report", shown.run, "--output", f"{out}.html"),
        "compare": ("compare", shown.run, out),
        "no run": ("report", f"x{SEQUENCES}\udcff"),
        "no recipe": ("distill", f"x{SEQUENCES}"),
        "no format": ("report", shown.run, "--format", SEQUENCES),
        "no suite": ("evaluate", shown.run, "--suite", f"s{SEQUENCES}=x"),
        "a key": ("distill", shown.config, f"data.x{SEQUENCES}=1"),
    }  # fmt: skip
    for name, command in commands.items():
        with injected(name):
            done = runner.call(*command, until=300)
            hostile.assert_plain(done)
            assert done.code in (0, 2), done.err
            assert "[bold red]x" in done.out + done.err or "bold" not in done.out + done.err
    config = hostile.write_config(tmp_path)
    rows = tmp_path / "data.jsonl"
    good = rows.read_text()
    message = {"role": f"x{SEQUENCES}", "content": "w1"}
    odd: dict[str, Any] = {
        "an id twice": [{"id": SEQUENCES, "prompt": "w1", "response": "w2"}] * 2,
        "a column": [{f"pro{SEQUENCES}": "w1", "response": "w2"}],
        "a role": [{"messages": [message, {"role": "assistant", "content": "w2"}]}],
        "a kind": [{"prompt": {SEQUENCES: 1}, "response": "w2"}],
    }
    for name, lines in odd.items():
        rows.write_text(good + "".join(json.dumps(line) + "\n" for line in lines))
        with injected(f"rows: {name}"):
            done = runner.call("data", config)
            hostile.assert_refused(done)
            hostile.assert_plain(done)


class Page(HTMLParser):
    """Scripts, links and pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            active = name.startswith("on") or (name in ("src", "href", "action", "xlink:href", "style"))
            if active and re.search(r"javascript:|https?:|//|alert|expression|url\(", value or "", re.I):
                self.found.append(f"<{tag} {name}={value!r}>")
            if tag in ("img", "iframe", "object", "embed", "link", "base", "form", "meta") and name in ("src", "href"):
                self.found.append(f"<{tag} {name}={value!r}>")


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="Script, markup, links and pictures from elsewhere in the names of models, runs, files, in rows and answers: "
    "in the page, its picture, the Markdown report and the model card; formulas in csv",
    does="They are shown as they are written: nothing runs, loads or computes.",
)
def test_page(shown: Shown, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    run = tmp_path / "=1+1<script>alert(1)<script>"
    shutil.copytree(shown.run, run)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    hostile_text = f"</script><script>alert(1)</script>{ELSEWHERE}{SEQUENCES}=1+1"

    def spoilt(value: Any) -> Any:
        if isinstance(value, str):
            return value + hostile_text
        if isinstance(value, list):
            return [spoilt(item) for item in value]
        return value

    texts = [{k: spoilt(v) if k in ("prompt", "reference", "texts", "references") else v for k, v in line.items()}
             for line in samples]  # fmt: skip
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    hostile.settings("eval.json", checksum=None, files=None)(run)  # without checksums, as a stranger can write it
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    with injected("page"):
        done = runner.call("report", run, "--output", page, "--picture", picture, until=300)
        assert done.code == 0, done.err
        read = Page()
        read.feed(page.read_text())
        allowed = Page()
        clean = tmp_path / "clean.html"
        assert runner.call("report", shown.run, "--output", clean, until=300).code == 0
        allowed.feed(clean.read_text())
        assert read.found == allowed.found == [], read.found[:3]
        assert read.scripts == allowed.scripts
        assert "<script>alert" not in page.read_text()
        assert "Content-Security-Policy" in page.read_text()
    with injected("picture"):
        text = picture.read_text()
        assert "<script" not in text and "onerror" not in text.replace("&lt;img src=x onerror", ""), "active"
    with injected("Markdown"):
        target = tmp_path / "report.md"
        assert runner.call("report", run, "--format", target.suffix[1:], "--output", target, until=300).code == 0
        assert_no_markdown(target.read_text())
    with injected("csv"):
        target = tmp_path / "report.csv"
        assert runner.call("report", run, "--format", target.suffix[1:], "--output", target, until=300).code == 0
        cells = [cell for row in csv.reader(target.read_text().splitlines()) for cell in row]
        assert [c for c in cells if re.match(r"[=+@\t\r]|-(?![\d.]+(e[+-]?\d+)?$)", c)] == []
    with injected("model card"):
        card = (shown.run / "student" / "README.md").read_text()
        head, rest = re.fullmatch(r"---\n(.*?\n)---\n(.*)", card, re.S).groups()  # type: ignore[union-attr]
        assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "tags"}
        assert_no_markdown(rest)
        assert not hostile.CONTROL.search(rest)


def assert_no_markdown(text: str) -> None:
    """Outside of code there is no picture, link, element, or heading of somebody else's."""
    plain = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.S)
    for pattern in (r"(?<!\\)!\[", r"(?<!\\)\]\((http|javascript)", r"(?<!\\)<(img|script)", r"^# H$", r"^license:"):
        found = re.search(pattern, plain, re.M)
        assert found is None, plain[max(0, found.start() - 80) : found.end() + 80] if found else ""
