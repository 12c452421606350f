"""Make the bundled sample of databricks-dolly-15k from a folder with its splits as jsonl.

    python scripts/bundle_dolly.py SOURCE

SOURCE holds train_*.jsonl, dev.jsonl and eval.jsonl, rows with prompt, response, id and category; eval.jsonl is the
500-row evaluation split of this literature, of which no prompt may be bundled. Written are
src/drkl/data/bundled/dolly_train.jsonl and dolly_eval.jsonl, and the hashes of the evaluation prompts with which
tests/data shows that none is bundled. The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

from drkl.runs import read_jsonl, write_jsonl, write_text

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "src" / "drkl" / "data" / "bundled"
HASHES = ROOT / "tests" / "data" / "dolly_eval_prompt_hashes.txt"

SEED = 0
TRAIN_ROWS = 2000
HELD_OUT_ROWS = 100
MAX_PROMPT_WORDS = 60
MIN_RESPONSE_WORDS = 15
MAX_RESPONSE_WORDS = 120
FIELDS = ("prompt", "response", "id", "category")

Row = dict[str, Any]


def main() -> None:
    """Read the source folder, write the two files and the hashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder with train_*.jsonl, dev.jsonl and eval.jsonl")
    source = parser.parse_args().source
    train = [row for path in sorted(source.glob("train_[0-9].jsonl")) for row in read_jsonl(path)]
    dev = read_jsonl(source / "dev.jsonl")
    evaluation = [prompt_key(row) for row in read_jsonl(source / "eval.jsonl")]

    held_out = sample(dev, HELD_OUT_ROWS, taken=set(evaluation))
    chosen = sample(train, TRAIN_ROWS, taken={*evaluation, *(prompt_key(row) for row in held_out)})
    write_jsonl(BUNDLED / "dolly_train.jsonl", chosen)
    write_jsonl(BUNDLED / "dolly_eval.jsonl", held_out)
    hashes = sorted(hashlib.sha256(key.encode()).hexdigest()[:16] for key in evaluation)
    write_text(HASHES, "".join(f"{line}\n" for line in hashes))
    for name, rows in (("train", chosen), ("held-out", held_out)):
        print(name, len(rows), dict(sorted(Counter(row["category"] for row in rows).items())))


def sample(rows: list[Row], count: int, taken: set[str]) -> list[Row]:
    """Draw ``count`` usable rows with new prompts, in the category mix of ``rows`` as far as the usable ones allow."""
    shuffled = random.Random(SEED).sample(rows, len(rows))
    usable: dict[str, list[Row]] = {row["category"]: [] for row in rows}
    seen = set(taken)
    for row in shuffled:
        if is_usable(row) and prompt_key(row) not in seen:
            seen.add(prompt_key(row))
            usable[row["category"]].append(row)
    mix = Counter(row["category"] for row in rows)
    shares = quotas(mix, {name: len(found) for name, found in usable.items()}, count)
    kept = {row["id"] for name, found in usable.items() for row in found[: shares[name]]}
    return [{field: row[field] for field in FIELDS} for row in shuffled if row["id"] in kept]


def quotas(mix: Counter[str], available: dict[str, int], count: int) -> dict[str, int]:
    """Share ``count`` out in proportion to ``mix``, one at a time to the category furthest behind."""
    if sum(available.values()) < count:
        raise SystemExit(f"Only {sum(available.values())} usable rows, {count} wanted.")
    shares = dict.fromkeys(sorted(mix), 0)
    for _ in range(count):
        left = [name for name in shares if shares[name] < available[name]]
        behind = max(left, key=lambda name: mix[name] / (shares[name] + 1))
        shares[behind] += 1
    return shares


def is_usable(row: Row) -> bool:
    """Say whether two cores can afford the row, and whether its response says something."""
    words = len(row["response"].split())
    return len(row["prompt"].split()) <= MAX_PROMPT_WORDS and MIN_RESPONSE_WORDS <= words <= MAX_RESPONSE_WORDS


def prompt_key(row: Row) -> str:
    """Return the prompt with case and spacing taken away: what makes two prompts the same."""
    return " ".join(row["prompt"].casefold().split())


if __name__ == "__main__":
    main()
