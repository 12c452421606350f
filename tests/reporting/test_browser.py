"""The page in a real browser: it fits the window, asks the network for nothing, and its script does what it should."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drkl.reporting import report
from drkl.runs import RunFolder, read_json, write_json, write_jsonl, write_yaml
from tests.reporting import test_classification
from tests.reporting.conftest import MakeRun, add_sample, write_analysis, write_pair
from tests.reporting.test_rollouts import sampled

pytestmark = [pytest.mark.slow, pytest.mark.browser]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = (
    "</script><script>document.title='taken'</script></style></title>--><!--"
    "<img src=x onerror=\"document.title='taken'\">"
    "\u200f\u202e\u2028 & {{ 7*7 }} "
)


class Tab:
    """A page without a network; ``said`` is what the console and the policy had to say."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, script: bool = True, scheme: str = "light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script, offline=True
        )
        self.context.set_default_timeout(0)  # a slow machine is no failure; pytest's own limit ends what hangs
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.uri = path.resolve().as_uri()
        self.page.goto(self.uri)

    def check(self) -> None:
        assert self.said == [] and self.asked == [self.uri]

    def overflows(self) -> bool:
        width = self.page.viewport_size["width"]
        return bool(self.page.evaluate("document.documentElement.scrollWidth") > width)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=0)
        yield chromium
        chromium.close()


def hostile_analysis(run: RunFolder) -> None:
    """An analysis whose names and sentences are long, and hostile."""
    write_analysis(run, command=["drkl", "analyze", "x" * 300], models={"student": HOSTILE, "teacher": "y" * 300})
    content = read_json(run.analysis_path)
    content["objectives"][0]["objective"] = HOSTILE
    content["findings"][-1] |= {"text": HOSTILE, "question": HOSTILE}
    write_json(run.analysis_path, content)


@pytest.mark.parametrize("swept", [True, False])
def test_the_page_fits_and_is_alone(make_run: MakeRun, tmp_path: Path, browser: Any, swept: bool) -> None:
    run = make_run(swept=swept)
    add_sample(run, prompt="<script>document.title='taken'</script>" + "x" * 3_000, text="y" * 3_000)
    if swept:
        hostile_analysis(run)
    several = [run, make_run("rkl", objective="rkl", swept=swept)]
    if not swept:  # many columns are wider than a window
        several += [sampled(make_run(f"more-{place}", swept=False)) for place in range(7)]
    for runs in (several, [run], [write_pair(tmp_path / "pair")]):
        path = report(runs, tmp_path / "page.html")
        for width, scheme in ((1280, "light"), (390, "dark"), (1280, "dark"), (390, "light")):
            tab = Tab(browser, path, width=width, scheme=scheme)
            tab.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert tab.page.title().endswith(" – distillation report")
            assert not tab.overflows()
            tab.check()
            ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(ground[4:].split(",")[0]) < 80) == (scheme == "dark")
            sizes = tab.page.evaluate(
                "[...document.querySelectorAll('svg[role=img]')].map(one => one.getBoundingClientRect())"
                ".map(box => [box.width, box.height])"
            )
            assert all(wide > 150 and high > 25 for wide, high in sizes)
            tab.page.screenshot(path=tmp_path / "page.png", full_page=True)
            assert (tmp_path / "page.png").stat().st_size > 50_000
            tab.context.close()


def test_sorting_by_click_and_keyboard_and_back(make_run: MakeRun, browser: Any) -> None:
    tab = Tab(browser, report(make_run(swept=True)))
    page = tab.page
    names = "[...document.querySelectorAll('.metrics tbody tr:not(.group) .metric')].map(one => one.textContent)"
    groups = page.locator(".metrics tr.group")
    first, num_groups = page.evaluate(names), groups.count()
    assert num_groups > 5
    page.get_by_role("button", name="Metric").click()
    assert page.evaluate(names) == sorted(first, key=str.casefold)
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert groups.count() == 0
    page.locator(".metrics thead th", has_text="Student").locator("button").focus()
    page.keyboard.press("Enter")
    values = "[...document.querySelectorAll('.metrics tbody tr')].map(row => row.cells[4].dataset.value)"
    down = page.evaluate(values)
    numbers = [float(value) for value in down if value]
    assert numbers == sorted(numbers, reverse=True) and down[: len(numbers)] == [value for value in down if value]
    page.keyboard.press("Space")
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert "Sorted by Student" in page.locator(".sorting [role=status]").inner_text()
    page.get_by_role("button", name="Back to the groups").click()
    assert page.evaluate(names) == first and groups.count() == num_groups
    assert page.locator("[aria-sort]").count() == 0
    tab.check()


def test_a_curve_can_be_hidden(make_run: MakeRun, browser: Any) -> None:
    tab = Tab(browser, report([make_run(swept=True), make_run("rkl", objective="rkl", swept=True)]))
    curve = tab.page.locator("[data-series=run-1]").first
    assert curve.is_visible()
    box = tab.page.get_by_role("checkbox", name="rkl", exact=True).first
    box.uncheck()
    assert not curve.is_visible() and tab.page.locator("[data-series=run-0]").first.is_visible()
    box.focus()
    tab.page.keyboard.press("Space")
    assert curve.is_visible()
    tab.check()


def test_the_picker_changes_prompt_and_temperature(make_run: MakeRun, browser: Any) -> None:
    tab = Tab(browser, report(make_run(swept=True)))
    shown = tab.page.locator(".picker article")
    assert "Why do cats purr?" in shown.inner_text()
    assert tab.page.get_by_role("button", name="Previous").is_disabled()
    tab.page.get_by_role("button", name="Next").click()
    assert "Name three rivers" in shown.inner_text() and "(empty answer)" in shown.inner_text()
    tab.page.get_by_label("Sampling temperature").select_option("0.5")
    assert "At 0.5: The Danube" in shown.inner_text()
    tab.page.locator("select[data-pick=prompt]").select_option(index=9)
    assert "tallest mountain" in shown.inner_text() and "At 0.5" in shown.inner_text()
    assert tab.page.locator(".picker [role=status]").text_content() == "Prompt 10 of 10, sampling temperature 0.5"
    assert not tab.page.locator(".static article").first.is_visible()
    tab.page.emulate_media(media="print")
    assert not tab.page.locator(".picker").is_visible() and not tab.page.locator(".sorting").first.is_visible()
    assert tab.page.locator(".static article").first.is_visible()
    tab.check()


def test_without_a_script_all_is_readable(make_run: MakeRun, browser: Any) -> None:
    tab = Tab(browser, report(make_run(swept=True)), script=False)
    assert tab.page.locator(".static article").first.is_visible()
    for hidden in (".picker", ".sorting", ".toggle"):
        assert not tab.page.locator(hidden).first.is_visible()
    assert tab.page.locator("[data-series=student]").first.is_visible()
    assert tab.page.locator(".metrics tr.group").first.is_visible()


def test_hostile_output_stays_text_and_runs_nothing(make_run: MakeRun, tmp_path: Path, browser: Any) -> None:
    run, pair = make_run(swept=True), write_pair(tmp_path / "pair")
    odd = HOSTILE + "\x00\ud800"
    for text in (odd, odd + "x" * 100_000):
        add_sample(run, prompt=text, text=text, reference=[text, text], prompt_id=text, suite=text)
    config = run.read_config()
    config["run"]["name"] = config["objective"]["name"] = config["teacher"]["model"] = HOSTILE
    write_yaml(run.config_path, config)
    found = read_json(pair.eval_path)
    found["settings"] |= {"models": {"teacher": HOSTILE, "student": HOSTILE}, "data": {HOSTILE: HOSTILE}}
    found["settings"] |= {"command": ["drkl", HOSTILE], "protocol": HOSTILE, "suites": [HOSTILE]}
    found["suites"] = {HOSTILE: {"student": {"rkl": 1.0}}}
    write_json(pair.eval_path, found)
    for runs in ([run], [run, pair], [pair]):
        tab = Tab(browser, report(runs, tmp_path / "page.html"), width=390)
        assert tab.page.title().endswith(" – distillation report")
        assert tab.page.locator("img").count() == 0
        assert not tab.overflows()
        if run in runs:
            written = tab.page.locator(".picker article .text").first.text_content()
            assert "</script><script>document.title='taken'</script>" in written and "␀[U+D800]" in written
        tab.check()
        tab.context.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_classifier_fits(tmp_path: Path, browser: Any, width: int) -> None:
    long = "y" * 300
    runs = [test_classification.write_run(tmp_path / name, classes=[long, "x", "z"]) for name in ("drkl", "rkl")]
    line = {"id": "a", "text": "x" * 3_000, "label": long, "student": "z" * 300, "student_confidence": 0.9}
    write_jsonl(runs[0].predictions_path, [line | {"teacher": long, "nll": 9.0}])
    tab = Tab(browser, report(runs), width=width)
    assert not tab.overflows()
    assert tab.page.locator(".predictions").count() == 2 and tab.page.locator("script").count() == 1
    tab.check()
