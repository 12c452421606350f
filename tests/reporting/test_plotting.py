import re

import matplotlib
import pytest

from drkl.reporting.plotting import new_figure, plot_style, svg_text


def drawn(salt: str, **style: bool) -> str:
    with plot_style(**style):
        figure, axes = new_figure(400, 200, ncols=2)
        for ax in axes:
            ax.plot([0, 1, 3], [2, 1, 2], "o-", label="line")
            ax.fill_between([0, 1], [0, 1], [1, 2], hatch="/")
            ax.scatter([1, 2], [1, 2], s=[10, 20])
        with matplotlib.rc_context({"svg.hashsalt": salt}):
            return svg_text(figure)


@pytest.mark.parametrize("text_as_paths", [True, False])
def test_the_ids_of_an_svg_do_not_hang_on_a_hash(text_as_paths: bool) -> None:
    first = drawn("one", text_as_paths=text_as_paths)
    assert first == drawn("another", text_as_paths=text_as_paths)
    ids = re.findall(r'\bid="([^"]+)"', first)
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', first))
    assert len(used) >= 4  # clips, markers, a hatch, a collection
    assert used <= set(ids)
    assert not re.search(r"[ \t]$", first, flags=re.M)
