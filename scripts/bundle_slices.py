"""Make the bundled slices of Schema-Guided Dialogue, SciTLDR and banking77 from prepared rows.

    python scripts/bundle_slices.py SOURCE

SOURCE holds the folders sgd, scitldr and banking77 that scripts/prepare_data.py writes. Written are
src/drkl/data/bundled/NAME_train.jsonl and NAME_eval.jsonl, at most 200 kB for each set. The same source gives the same
bytes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drkl.data.examples import hash_of_id
from drkl.runs import read_jsonl, write_jsonl

BUNDLED = Path(__file__).resolve().parents[1] / "src" / "drkl" / "data" / "bundled"
LIMIT = 200_000
MAX_ABSTRACT_WORDS = 200
MAX_DIALOGUE_WORDS = 200
MAX_QUESTION_WORDS = 25

Row = dict[str, Any]


def main() -> None:
    """Read the source folders, write two files for each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder with sgd, scitldr and banking77")
    source = parser.parse_args().source
    dialogues = ("messages", "id")
    bundle(source / "sgd", "sgd", dialogues, {"train": ("train*", 100), "eval": ("dev", 20)}, is_short_dialogue)
    summaries = ("prompt", "response", "id", "context_start")
    bundle(source / "scitldr", "scitldr", summaries, {"train": ("train", 100), "eval": ("dev", 20)}, is_short_abstract)
    questions = ("text", "label", "id")
    bundle(source / "banking77", "banking77", questions, {"train": ("train", 924), "eval": ("test", 308)}, is_short)


def bundle(
    folder: Path, name: str, fields: tuple[str, ...], parts: dict[str, tuple[str, int]], usable: Callable[[Row], bool]
) -> None:
    """Write the slices of one set: the same number of usable rows of each label (if any), selected by a hash."""
    total = 0
    for part, (pattern, count) in parts.items():
        rows = [row for path in sorted(folder.glob(f"{pattern}.jsonl")) for row in read_jsonl(path)]
        if not rows:
            raise SystemExit(f"There are no rows in {folder}/{pattern}.jsonl.")
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in sorted(filter(usable, rows), key=lambda row: hash_of_id(row["id"])):
            groups[row.get("label", "")].append(row)
        kept = {row["id"] for group in groups.values() for row in group[: count // len(groups)]}
        path = BUNDLED / f"{name}_{part}.jsonl"
        write_jsonl(path, ({field: row[field] for field in fields} for row in rows if row["id"] in kept))
        total += path.stat().st_size
        print(path.name, len(kept), "rows", f"{path.stat().st_size:,} bytes")
    if total > LIMIT:
        raise SystemExit(f"{name} has {total:,} bytes, more than {LIMIT:,}.")


def is_short_dialogue(row: Row) -> bool:
    """Say whether the whole dialogue fits into some 300 tokens."""
    return sum(len(turn["content"].split()) for turn in row["messages"]) <= MAX_DIALOGUE_WORDS


def is_short_abstract(row: Row) -> bool:
    """Say whether the prompt fits into some 350 tokens."""
    return len(row["prompt"].split()) <= MAX_ABSTRACT_WORDS


def is_short(row: Row) -> bool:
    """Say whether the question is one sentence or two."""
    return len(row["text"].split()) <= MAX_QUESTION_WORDS


if __name__ == "__main__":
    main()
