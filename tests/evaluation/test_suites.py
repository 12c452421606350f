from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drkl.errors import DrklError
from drkl.evaluation.suites import SUITES, name_rows, parse_suite, read_suite
from tests.evaluation import tiny


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_names_of_the_contract() -> None:
    assert list(SUITES) == "dolly self-instruct vicuna sni unni scitldr dialogue".split()


def test_names_and_places() -> None:
    assert parse_suite("dolly") == (SUITES["dolly"], None)
    assert parse_suite("vicuna=a=b.jsonl") == (SUITES["vicuna"], "a=b.jsonl")
    with pytest.raises(DrklError, match=r"There is no suite 'vicunna'; there is dolly, .*Did you mean 'vicuna'"):
        parse_suite("vicunna=x")
    with pytest.raises(DrklError, match="expected a file, a folder or a hub id"):
        parse_suite("dolly=")


def test_rows_as_minillm_has_them(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "Below is an instruction", "instruction": "Add.", "input": "1 and 2", "output": ["3", "three"]},
        {"prompt": "ignored", "instruction": "Say hi.", "input": "", "output": "hi"},
        {"prompt": "No template.", "output": "yes"},
    )
    first, second, third = read_suite(SUITES["self-instruct"], path)
    assert (first.prompt_text, first.context_start) == ("Add.\n\n1 and 2", 6)
    assert first.response == "3" and first.all_references == ("3", "three")
    assert second.prompt_text == "Say hi." and second.context_start is None and second.all_references == ("hi",)
    assert third.prompt_text == "No template." and third.response == "yes"


def test_our_own_rows_and_several_references(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "p", "response": ["a", "b"], "id": "x"},
        {"prompt": "p", "response": "a", "references": ["c"], "id": "y"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "id": "z"},
    )
    found = read_suite(SUITES["dolly"], path)
    assert [example.all_references for example in found] == [("a", "b"), ("a", "c"), ("r",)]
    assert [example.id for example in name_rows(found, "dolly")] == ["dolly/x", "dolly/y", "dolly/z"]


def test_summaries_and_dialogues_as_the_hub_has_them(tmp_path: Path) -> None:
    path = written(tmp_path, {"source": ["One.", "Two."], "target": ["S1", "S2"], "paper_id": "P"})
    (paper,) = read_suite(SUITES["scitldr"], path)
    assert paper.prompt_text == "Summarize the following abstract in one sentence.\n\nOne. Two."
    assert paper.all_references == ("S1", "S2") and paper.id == "P"
    turns = {"speaker": [0, 1, 0, 1, 0], "utterance": ["a", "b", "c", "d", "bye"]}
    (talk,) = read_suite(SUITES["dialogue"], written(tmp_path, {"dialogue_id": "D", "turns": turns}))
    assert [m["content"] for m in talk.messages] == ["a", "b", "c", "d"] and talk.response == "d"


def test_short_responses_are_left_out_where_the_suite_says_so(tmp_path: Path) -> None:
    tokenizer, long, short = tiny.tokenizer(), "hi hello there", "hi hello"
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (short, long)]
    assert counts[0] < counts[1] < 11 and SUITES["sni"].min_response_tokens == SUITES["unni"].min_response_tokens == 11
    suite = replace(SUITES["sni"], min_response_tokens=counts[1])
    path = written(tmp_path, {"prompt": "p", "output": short}, {"prompt": "p", "output": long})
    assert [e.response for e in read_suite(suite, path, tokenizer)] == [long]
    assert len(read_suite(SUITES["dolly"], path, tokenizer)) == 2
    with pytest.raises(DrklError, match="no row has a response of at least 11 tokens"):
        read_suite(SUITES["unni"], path, tokenizer)


@pytest.mark.parametrize("name", ["dolly", "scitldr", "dialogue"])
def test_bundled_slices(name: str) -> None:
    assert len(read_suite(SUITES[name], "bundled")) >= 20


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="No slice of the suite 'vicuna' ships with drkl; there is one of dolly"):
        read_suite(SUITES["vicuna"], "bundled")
    with pytest.raises(DrklError, match=r"Suite 'dolly': There is no file '.*nowhere.jsonl'"):
        read_suite(SUITES["dolly"], str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DrklError, match=r"rows.jsonl:1: expected the fields prompt and response"):
        read_suite(SUITES["dolly"], written(tmp_path, {"question": "?"}))
    with pytest.raises(DrklError, match="references must be a list of texts"):
        read_suite(SUITES["dolly"], written(tmp_path, {"prompt": "p", "response": "r", "references": "r"}))
    with pytest.raises(DrklError, match="Cannot load the data set 'MiniLLM/Vicuna'"):
        read_suite(SUITES["vicuna"])
