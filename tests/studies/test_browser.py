"""The page of a study in a real browser: it fits the window, its labels do not lie on each other, it is alone."""

from pathlib import Path
from typing import Any

import pytest

from drkl.studies.page import as_html
from drkl.studies.result import Study
from tests.reporting.test_browser import Tab, browser  # noqa: F401 - a fixture
from tests.studies.example import OBJECTIVES, example
from tests.studies.test_page import hostile

pytestmark = [pytest.mark.slow, pytest.mark.browser]

ON_EACH_OTHER = """
[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3
  ).map(([b]) => svg.getAttribute('aria-label').slice(0, 40) + ': ' + a + ' / ' + b));
})
"""
"""Labels of a figure whose boxes overlap."""
OUTSIDE = """
[...document.querySelectorAll('svg[role=img] text')].filter(one => {
  const box = one.getBoundingClientRect(); return box.left < -1 || box.right > innerWidth + 1;
}).map(one => one.textContent)
"""
NAMES = ("fkl", "rkl", "drkl")
STUDIES = {
    "three": lambda: example(states={("fkl", 4): ("failed", "x" * 3_000)}),
    "thirteen": lambda: example(objectives=OBJECTIVES),
    "one seed": lambda: example(seeds=(0,)),
    "classes": lambda: example(task="classification", seeds=(0, 1, 2)),
    "long names": lambda: example(
        variants=["rkl", "drkl-0.1-" + "as-long-as-people-make-them-" * 4, "y" * 120, "drkl with many words " * 6],
        seeds=(0, 1, 2),
    ),
    "hostile": hostile,
    "nothing": lambda: example(states={(name, seed): ("missing", None) for name in NAMES for seed in range(5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_fits_is_alone_and_readable(name: str, tmp_path: Path, browser: Any) -> None:  # noqa: F811
    study: Study = STUDIES[name]()
    path = tmp_path / "study.html"
    path.write_text(as_html(study), encoding="utf-8")
    for width, scheme in ((1280, "light"), (400, "dark"), (400, "light"), (1280, "dark")):
        tab = Tab(browser, path, width=width, scheme=scheme)
        tab.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert tab.page.title() == "instruction – study"
        assert not tab.overflows()
        assert tab.page.evaluate(ON_EACH_OTHER) == [] and tab.page.evaluate(OUTSIDE) == []
        assert tab.page.locator("img").count() == 0 and tab.page.locator("script").count() == 1
        ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(ground[4:].split(",")[0]) < 80) == (scheme == "dark")
        tab.check()
        tab.context.close()


def test_without_a_script_all_is_readable_and_with_one_a_curve_can_be_hidden(tmp_path: Path, browser: Any) -> None:  # noqa: F811
    path = tmp_path / "study.html"
    path.write_text(as_html(example()), encoding="utf-8")
    still = Tab(browser, path, script=False)
    assert not still.page.locator(".toggle").first.is_visible()
    assert still.page.locator("[data-series=run-0]").last.is_visible()
    tab = Tab(browser, path)
    curve = tab.page.locator("[data-series=run-0]").last
    tab.page.get_by_role("checkbox", name="fkl", exact=True).uncheck()
    assert not curve.is_visible() and tab.page.locator("[data-series=run-1]").last.is_visible()
    tab.check()
