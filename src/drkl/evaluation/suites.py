"""Named sets of held-out rows, each read from a local file, a local data set or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from drkl.data.examples import Example, parse_rows
from drkl.data.files import dataset_rows, rows_at
from drkl.errors import DrklError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Suite:
    """One test set; ``dataset`` and ``file`` are where the hub has it, ``bundled`` the slice that ships with drkl."""

    name: str
    title: str
    dataset: str
    file: str | None = None
    split: str = "train"
    min_response_tokens: int = 0
    max_rows: int | None = None
    bundled: str | None = None


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("dolly", "DollyEval, 500 rows", "MiniLLM/dolly", "valid.jsonl", bundled="bundled:dolly-eval"),
        Suite("self-instruct", "Self-Instruct, user-oriented, 252 rows", "MiniLLM/self-inst", "valid.jsonl"),
        Suite("vicuna", "VicunaEval, 80 rows", "MiniLLM/Vicuna", "valid.jsonl"),
        Suite("sni", "Super-NaturalInstructions, responses of at least 11 tokens", "MiniLLM/sinst",
              "11_/valid.jsonl", min_response_tokens=11),
        Suite("unni", "Unnatural Instructions, responses of at least 11 tokens, 10,000 rows", "MiniLLM/uinst",
              "11_/valid.jsonl", min_response_tokens=11, max_rows=10_000),
        Suite("scitldr", "SciTLDR, abstracts", "allenai/scitldr:Abstract", split="test",
              bundled="bundled:scitldr-eval"),
        Suite("dialogue", "Schema-Guided Dialogue", "google-research-datasets/schema_guided_dstc8:dialogues",
              split="test", bundled="bundled:sgd-eval"),
    )
}  # fmt: skip


def parse_suite(text: str) -> tuple[Suite, str | None]:
    """Split ``NAME`` or ``NAME=WHERE``.

    Raises:
        DrklError: an unknown name, or nothing after ``=``.
    """
    name, equals, where = text.partition("=")
    if name not in SUITES:
        raise DrklError(f"There is no suite {name!r}; there is {', '.join(SUITES)}.{did_you_mean(name, SUITES)}")
    if equals and not where.strip():
        raise DrklError(f"The suite {text!r}: expected a file, a folder or a hub id after '='.")
    return SUITES[name], where.strip() or None


def read_suite(
    suite: Suite, where: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Example]:
    """The rows of a suite.

    Args:
        suite: which one.
        where: a file (jsonl, json, csv, parquet), a local data set, a hub id (``id``, ``id:config``), or ``bundled``
            for the slice that ships with drkl; None is where the hub has it.
        tokenizer: counts the tokens of responses, for a suite that leaves out short ones.

    Raises:
        DrklError: nothing there, a row of no known format, or no row left.
    """
    if where == "bundled":
        if suite.bundled is None:
            some = ", ".join(other.name for other in SUITES.values() if other.bundled)
            raise DrklError(f"No slice of the suite {suite.name!r} ships with drkl; there is one of {some}.")
        where = suite.bundled
    rows, source = _rows(suite, where)
    examples = parse_rows(rows, source)
    if suite.min_response_tokens and tokenizer is not None:
        examples = [e for e in examples if _num_tokens(tokenizer, e.response) >= suite.min_response_tokens]
    if not examples:
        raise DrklError(
            f"{source}: no row has a response of at least {suite.min_response_tokens} tokens, which the suite "
            f"{suite.name!r} asks for."
        )
    return examples[: suite.max_rows]


def name_rows(examples: Sequence[Example], suite: str) -> list[Example]:
    """The rows with the suite's name before their ids: rows of two suites may have the same."""
    return [replace(example, id=f"{suite}/{example.id}") for example in examples]


def _rows(suite: Suite, where: str | None) -> tuple[Iterator[tuple[str, Any]], str]:
    if where is None:
        return dataset_rows(suite.dataset, split=suite.split, data_files=suite.file), suite.dataset
    try:
        return rows_at(where, split=suite.split), where
    except DrklError as error:
        raise DrklError(f"Suite {suite.name!r}: {error}") from error


def _num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
