"""Turn a public data set, as its repository has it, into rows that drkl reads.

    python scripts/prepare_data.py SET SOURCE TARGET

SET is one of dolly, self_instruct, sgd, scitldr, banking77, sentence_polarity, gutenberg; SOURCE the folder (or file)
that docs/data.md says to fetch; TARGET the folder to write. The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from drkl.data.examples import hash_of_id
from drkl.data.formats import SUMMARISE
from drkl.errors import DrklError
from drkl.runs import read_jsonl, read_text, write_jsonl, write_text

Row = dict[str, Any]

SUMMARIES_HELD_BACK = 400
TEST_SHARE = 0.1
TEXT_HELD_OUT = 0.05
ROLES = {"USER": "user", "SYSTEM": "assistant"}


def main() -> None:
    """Read the source, write the target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("source", type=Path, help="what docs/data.md says to fetch")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args()
    if not options.source.exists():
        parser.error(f"there is nothing at {options.source}")
    try:
        SETS[options.set](options.source, options.target)
    except DrklError as error:
        parser.error(str(error))
    for path in sorted(options.target.iterdir()):
        print(path, f"{path.stat().st_size:,} bytes")


def dolly(source: Path, target: Path) -> None:
    """databricks-dolly-15k.jsonl: the instruction, a blank line and the context."""
    rows = []
    for row in unique(read_jsonl(source), ("instruction", "context", "response")):
        context = row["context"].strip()
        prompt = row["instruction"] + (f"\n\n{context}" if context else "")
        start = len(row["instruction"]) + 2 if context else None
        rows.append(
            {"prompt": prompt, "response": row["response"], "id": f"dolly-{digest(prompt + row['response'])}"}
            | {"category": row["category"], "context_start": start}
        )
    train, test = split(rows)
    write_jsonl(target / "train.jsonl", train)
    write_jsonl(target / "eval.jsonl", test)


def self_instruct(source: Path, target: Path) -> None:
    """human_eval/user_oriented_instructions.jsonl: the 252 expert-written items."""
    rows = []
    for row in read_jsonl(source):
        (instance,) = row["instances"]
        context = instance["input"].strip()
        prompt = row["instruction"] + (f"\n\n{context}" if context else "")
        start = len(row["instruction"]) + 2 if context else None
        rows.append({"prompt": prompt, "response": instance["output"], "id": row["id"], "context_start": start})
    write_jsonl(target / "eval.jsonl", rows)


def sgd(source: Path, target: Path) -> None:
    """train, dev and test of dstc8-schema-guided-dialogue: the utterances; a last user turn is dropped."""
    for part in ("train", "dev", "test"):
        rows = []
        for path in sorted((source / part).glob("dialogues_*.json")):
            for dialogue in json.loads(read_text(path)):
                turns = [{"role": ROLES[t["speaker"]], "content": t["utterance"].strip()} for t in dialogue["turns"]]
                if turns and turns[-1]["role"] == "user":
                    turns.pop()
                roles = [turn["role"] for turn in turns]
                if turns and all(t["content"] for t in turns) and roles == ["user", "assistant"] * (len(turns) // 2):
                    rows.append({"messages": turns, "id": f"{part}-{dialogue['dialogue_id']}"})
        write_jsonl(target / f"{part}.jsonl", rows)


def scitldr(source: Path, target: Path) -> None:
    """SciTLDR-A: an abstract and its first summary; of dev and test, 400 rows by a hash of their ids."""
    for part in ("train", "dev", "test"):
        rows = []
        for row in read_jsonl(source / "SciTLDR-Data" / "SciTLDR-A" / f"{part}.jsonl"):
            rows.append(
                {"prompt": f"{SUMMARISE}\n\n{' '.join(row['source'])}", "response": row["target"][0]}
                | {"references": row["target"], "id": row["paper_id"], "context_start": len(SUMMARISE) + 2}
            )
        rows = list(unique(rows, ("prompt",)))
        if part != "train":
            kept = {row["id"] for row in by_hash(rows)[:SUMMARIES_HELD_BACK]}
            rows = [row for row in rows if row["id"] in kept]
        write_jsonl(target / f"{part}.jsonl", rows)


def banking77(source: Path, target: Path) -> None:
    """banking_data/train.csv and test.csv: a question and one of 77 intents."""
    seen: set[str] = set()
    for part in ("test", "train"):  # a training row equal to a test row is left out
        lines = read_text(source / "banking_data" / f"{part}.csv").splitlines(keepends=True)
        rows = [
            {"text": row["text"].strip(), "label": row["category"], "id": f"{part}-{number}"}
            for number, row in enumerate(csv.DictReader(lines))
        ]
        rows = list(unique(rows, ("text",), seen))
        write_jsonl(target / f"{part}.jsonl", rows)


def sentence_polarity(source: Path, target: Path) -> None:
    """rt-polarity.pos and rt-polarity.neg: a sentence a line."""
    rows = []
    for label, suffix in (("positive", "pos"), ("negative", "neg")):
        for number, line in enumerate(read_text(source / f"rt-polarity.{suffix}").splitlines()):
            if line.strip():
                rows.append({"text": line.strip(), "label": label, "id": f"{suffix}-{number}"})
    train, test = split(list(unique(rows, ("text",))))
    write_jsonl(target / "train.jsonl", train)
    write_jsonl(target / "test.jsonl", test)


def gutenberg(source: Path, target: Path) -> None:
    """Texts of Project Gutenberg: without header, footer and hard line breaks; the last 5 % of each are held out."""
    train, valid = [], []
    for path in sorted(source.rglob("*.txt")):
        paragraphs = book(read_text(path))
        cut = max(1, round(len(paragraphs) * (1 - TEXT_HELD_OUT)))
        train += paragraphs[:cut]
        valid += paragraphs[cut:]
    if not train:
        raise DrklError(f"There is no text in the .txt files under {str(source)!r}.")
    write_text(target / "train.txt", "\n\n".join(train) + "\n")
    write_text(target / "valid.txt", "\n\n".join(valid) + "\n")


def book(text: str) -> list[str]:
    """Return the paragraphs of a book, each on one line."""
    _, _, rest = (
        re.split(r"(\*\*\* ?START OF.*?\*\*\*)", text, maxsplit=1) if "*** START OF" in text else ("", "", text)
    )
    body = re.split(r"\*\*\* ?END OF", rest, maxsplit=1)[0]
    found = [" ".join(part.replace("_", "").split()) for part in re.split(r"\n\s*\n", body.replace("\r", ""))]
    return [part for part in found if part and "gutenberg" not in part.casefold()]


def unique(rows: Iterable[Row], fields: tuple[str, ...], seen: set[str] | None = None) -> Iterable[Row]:
    """Yield the rows whose fields, case and spacing aside, are not empty and were not there before."""
    seen = set() if seen is None else seen
    for row in rows:
        key = " ".join("\n".join(str(row[name]) for name in fields).casefold().split())
        if key and key not in seen:
            seen.add(key)
            yield row


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split off a tenth by a hash of the ids."""
    test = {row["id"] for row in by_hash(rows)[: round(TEST_SHARE * len(rows))]}
    return [row for row in rows if row["id"] not in test], [row for row in rows if row["id"] in test]


def by_hash(rows: list[Row]) -> list[Row]:
    """Order the rows by a hash of their ids."""
    return sorted(rows, key=lambda row: hash_of_id(row["id"]))


def digest(text: str) -> str:
    """Return twelve hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


SETS: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function
    for function in (dolly, self_instruct, sgd, scitldr, banking77, sentence_polarity, gutenberg)
}

if __name__ == "__main__":
    main()
