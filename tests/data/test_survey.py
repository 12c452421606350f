"""`drkl data`, by the command a person types."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from drkl.cli import main
from drkl.data.config import DataConfig
from drkl.data.survey import histogram, survey
from tests.data.tiny_tokenizers import CHATML, build
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


def shapes() -> dict[str, dict[str, Any]]:
    """A row of each shape, by what `drkl data` calls it."""
    ask, say = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    return {
        "prompt and response": {"prompt": "hi", "response": "hello"},
        "prompt and completion (TRL)": {"prompt": "hi", "completion": "hello"},
        "prompt and completion (TRL), as messages": {"prompt": [ask], "completion": [say]},
        "messages (OpenAI)": {"messages": [ask, {**say, "content": [{"type": "text", "text": "hello"}]}]},
        "conversations (ShareGPT)": {"conversations": turns},
        "instruction and output (Alpaca)": {"instruction": "hi", "input": "", "output": "hello"},
        "instruction and response (Dolly)": {"instruction": "hi", "context": "", "response": "hello"},
        "prompt and output (MiniLLM)": {"prompt": "hi", "output": "hello"},
        "source and target (SciTLDR)": {"source": ["a", "b"], "target": ["hello"]},
        "turns (Schema-Guided Dialogue)": {"turns": {"speaker": [0, 1], "utterance": ["hi", "hello"]}},
        "text and label": {"text": "hi", "label": "hello"},
        "text": {"text": "a hello"},
    }


def test_ten_rows_of_each_shape_and_what_the_shape_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_runs.config(tmp_path, data={"eval_path": "none"})
    del values["data"]["path"]
    values["data"]["sources"] = []
    for number, row in enumerate(shapes().values()):
        path = tmp_path / f"shape{number}.jsonl"
        path.write_text(10 * (json.dumps(row) + "\n"))
        values["data"]["sources"].append({"path": str(path)})
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in list(shapes().values())[:2]))
    values["data"]["sources"].append({"path": str(mixed)})
    out = run(monkeypatch, capsys, tiny_runs.write_config(values, tmp_path / "shapes.yaml"))
    parts = [" ".join(part.split()) for part in out.split("(training)")[1:]]
    assert len(parts) == len(shapes()) + 1
    for title, part in zip(shapes(), parts, strict=False):
        assert part.startswith(f"format {title} rows kept {1 if title == 'text' else 10} of "), part
        assert ("⟦ahello<|im_end|>ahello" if title == "text" else "⟦hello<|im_end|>⟧") in part.replace(" ", ""), part
    assert parts[-1].startswith("format prompt and response: 1 format prompt and completion (TRL): 1 rows kept 2 of 2")


def test_fields_that_the_template_is_given_are_counted(tmp_path: Path) -> None:
    template = CHATML.replace("message['content']", "message.get('reasoning_content', '') + message['content']")
    messages = [{"role": role, "content": text, "reasoning_content": "a b" if role == "assistant" else None}
                for role, text in TURNS]  # fmt: skip
    rows = [{"messages": messages[:2]}, {"messages": [messages[0], {**messages[1], "weight": 0}, *messages[2:]]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = survey(DataConfig(path=str(path), eval_path="none"), build(template))
    assert ("rows with reasoning_content", "2") in found.facts and ("rows with weight 0", "1") in found.facts


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
