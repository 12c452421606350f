from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.reporting import write_picture
from tests.reporting.conftest import MakeRun


def test_an_svg_that_looks_the_same_anywhere(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    path = write_picture(run, tmp_path / "docs" / "picture.svg")
    svg = path.read_text(encoding="utf-8")
    assert svg.rstrip().endswith("</svg>")
    assert "<text" not in svg
    assert path.stat().st_size < 400_000
    assert write_picture(run, tmp_path / "again.svg").read_bytes() == path.read_bytes()


def test_a_png(make_run: MakeRun, tmp_path: Path) -> None:
    path = write_picture(make_run(), tmp_path / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_warmup_has_a_picture(make_run: MakeRun, tmp_path: Path) -> None:
    assert write_picture(make_run(warmup=False), tmp_path / "picture.svg").is_file()


def test_what_cannot_be_drawn_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"should end in \.svg or \.png"):
        write_picture(make_run(), tmp_path / "picture.jpg")
    with pytest.raises(DrklError, match=r"has no eval\.json to draw; `drkl evaluate "):
        write_picture(make_run("bare", evaluated=False), tmp_path / "picture.svg")
    with pytest.raises(DrklError, match="no distance to a teacher"):
        write_picture(make_run("plain", teacher=False), tmp_path / "picture.svg")
    assert not list(tmp_path.glob("picture.*"))
