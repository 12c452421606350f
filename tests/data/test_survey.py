"""`drkl data`, by the command a person types."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from drkl.cli import main
from drkl.data.survey import histogram
from tests.training import tiny_runs

TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "a b"), ("assistant", "c")]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["drkl", "data", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    if left.value.code:
        raise left.value
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture
def config(tmp_path: Path) -> Path:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": role, "content": text} for role, text in TURNS]
    rows = [{"id": f"c{i}", "messages": messages} for i in range(4)]
    long = [{"role": "user", "content": "a " * 60}, messages[1]]
    rows += [
        {"id": "long", "messages": long},
        {"id": "void", "messages": [messages[0], {**messages[1], "content": ""}]},
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_runs.config(tmp_path, data={"turns": "all", "eval_path": str(tmp_path / "data.jsonl")})
    del values["data"]["path"]
    values["data"]["sources"] = [{"path": str(chats)}, {"path": str(tmp_path / "data.jsonl"), "weight": 0.5}]
    return tiny_runs.write_config(values, tmp_path / "c.yaml")


def test_counts_drops_lengths_and_a_marked_row_of_each_source(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny_runs.tree(config.parent)
    out = run(monkeypatch, capsys, config)
    assert tiny_runs.tree(config.parent) == before
    first, second = out.split("data.jsonl (training)")[0], out.split("data.jsonl (training)")[1]
    lines = [" ".join(line.split()) for line in first.splitlines()]
    assert "rows kept 4 of 6" in lines
    assert "dropped: prompt too long 1" in lines and "dropped: empty response 1" in lines
    # Of each: hello, its end, c, its end.
    assert "tokens trained 16" in lines
    assert "4 4 " + "█" * 40 in lines
    assert "⟦hello<|im_end|>⟧" in first.replace(" ", "") and "⟦c<|im_end|>⟧" in first.replace(" ", "")
    assert first.count("⟦") == 3  # once where it is explained
    assert "rows an epoch" in second and "(weight 0.5)" in second and "(held out)" in second


def test_colour_where_there_is_some(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = run(monkeypatch, capsys, config)
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured and "in colour" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run(monkeypatch, capsys, config)
    assert "\x1b[1;32m" not in plain and "⟦" in plain


def test_what_a_run_would_refuse_is_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, config, "data.max_prompt_tokens=1")
    message = capsys.readouterr().err
    assert "chats.jsonl (training): None of the 6 rows can be used: " in message and "Traceback" not in message


def test_a_histogram_holds_every_length_once() -> None:
    for lengths in ([5], [1, 1, 9], list(range(100)), [3, 4]):
        bins = histogram(lengths)
        assert sum(count for *_, count in bins) == len(lengths) and len(bins) <= 8
        assert bins[0][0] == min(lengths) and bins[-1][1] >= max(lengths)
