"""The page in a real browser: it fits the window, asks the network for nothing, and has no script to miss."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drkl.reporting import write_report
from drkl.runs import write_jsonl
from tests.reporting import test_classification
from tests.reporting.conftest import MakeRun, add_sample

pytestmark = [pytest.mark.slow, pytest.mark.browser]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_alone(make_run: MakeRun, tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    run = make_run()
    add_sample(run, prompt="<script>document.title='taken'</script>" + "x" * 3_000, text="y" * 3_000)
    path = write_report([run, make_run("rkl", objective="rkl")])
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.resolve().as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.title() == "quickstart – distillation report"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert asked == [path.resolve().as_uri()]
    assert said == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 80) == (scheme == "dark")
    for figure in page.query_selector_all("svg"):
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] > 150 and box["height"] > 50
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_classifier_fits(tmp_path: Path, browser: Any, width: int) -> None:
    long = "y" * 300
    runs = [test_classification.write_run(tmp_path / name, classes=[long, "x", "z"]) for name in ("drkl", "rkl")]
    lines = [{"id": "a", "text": "x" * 3_000, "label": long, "student": "z" * 300, "teacher": long, "nll": 9.0}]
    write_jsonl(runs[0].predictions_path, lines)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(write_report(runs).resolve().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".predictions").count() == 2 and page.locator("script").count() == 0
