from __future__ import annotations

import hashlib
import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from drkl.data import DataConfig, load_examples

BUNDLED = resources.files("drkl.data").joinpath("bundled")
HASHES = Path(__file__).with_name("dolly_eval_prompt_hashes.txt")


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in BUNDLED.joinpath(name).read_text(encoding="utf-8").splitlines()]


TRAIN, HELD_OUT = read("dolly_train.jsonl"), read("dolly_eval.jsonl")


def key(text: str) -> str:
    return " ".join(text.casefold().split())


def digest(prompt: str) -> str:
    return hashlib.sha256(key(prompt).encode()).hexdigest()[:16]


def test_counts_and_fields() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (2000, 100)
    for row in TRAIN + HELD_OUT:
        assert list(row) == ["prompt", "response", "id", "category"]
        assert len(row["prompt"].split()) <= 60 and 15 <= len(row["response"].split()) <= 120
    for rows in (TRAIN, HELD_OUT):
        assert len(Counter(row["category"] for row in rows)) == 8


def test_no_id_and_no_prompt_twice() -> None:
    assert len({row["id"] for row in TRAIN + HELD_OUT}) == 2100
    assert len({key(row["prompt"]) for row in TRAIN + HELD_OUT}) == 2100


def test_no_prompt_of_the_evaluation_split() -> None:
    hashes = HASHES.read_text().split()
    assert len(hashes) == 500
    # One known prompt of that split: the hashes are of what they should be.
    assert digest("Which is a species of fish? Tope or Rope") in hashes
    assert not {digest(row["prompt"]) for row in TRAIN + HELD_OUT} & set(hashes)


@pytest.mark.parametrize(
    "words",
    [
        "Databricks, Inc.",
        "CC BY-SA 3.0",
        "creativecommons.org/licenses/by-sa/3.0/",
        "Wikipedia",
        "Schema-Guided",
        "CC BY-SA 4.0",
        "SciTLDR",
        "Apache License 2.0",
        "banking77",
        "CC BY 4.0",
        "PolyAI",
    ],
)
def test_attribution(words: str) -> None:
    text = BUNDLED.joinpath("ATTRIBUTION.md").read_text(encoding="utf-8")
    assert words in text and "## Changes made" in text


def test_they_load_by_name() -> None:
    train, held_out = load_examples(DataConfig(path="bundled:dolly", eval_path="bundled:dolly-eval"))
    assert [e.id for e in train] == [row["id"] for row in TRAIN]
    assert [e.response for e in held_out] == [row["response"] for row in HELD_OUT]


@pytest.mark.parametrize(
    ("name", "row_format", "counts"),
    [
        ("sgd", "messages", (100, 20)),
        ("scitldr", "prompt_response", (100, 20)),
        ("banking77", "text_label", (924, 308)),
    ],
)
def test_slices_of_other_tasks(name: str, row_format: str, counts: tuple[int, int]) -> None:
    config = DataConfig(path=f"bundled:{name}", eval_path=f"bundled:{name}-eval", format=row_format)
    train, held_out = load_examples(config)
    assert (len(train), len(held_out)) == counts
    files = [BUNDLED.joinpath(f"{name}_{part}.jsonl") for part in ("train", "eval")]
    assert sum(len(file.read_bytes()) for file in files) <= 200_000
    assert {key(json.dumps(e.messages)) for e in train}.isdisjoint(key(json.dumps(e.messages)) for e in held_out)
    if name == "banking77":
        assert {e.label for e in train} == {e.label for e in held_out} and len({e.label for e in train}) == 77
    if name == "scitldr":
        assert all(e.prompt_text[: e.context_start or 0].startswith("Summarize the following") for e in train)
