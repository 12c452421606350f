"""Named sets of held-out rows, each read from a local file, a local data set or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drkl.data.examples import Example, parse_rows
from drkl.data.files import dataset_rows, file_rows
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

SUMMARISE = "Summarize the following abstract in one sentence."


def parse_suite(text: str) -> tuple[Suite, str | None]:
    """Split ``NAME`` or ``NAME=WHERE``.

    Raises:
        DrklError: an unknown name, or nothing after ``=``.
    """
    name, equals, where = text.partition("=")
    if name not in SUITES:
        raise DrklError(f"There is no suite {name!r}; there is {', '.join(SUITES)}.{did_you_mean(name, SUITES)}")
    if equals and not where.strip():
        raise DrklError(f"--suite {text}: expected a file, a folder or a hub id after '='.")
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
            some = ", ".join(one.name for one in SUITES.values() if one.bundled)
            raise DrklError(f"No slice of the suite {suite.name!r} ships with drkl; there is one of {some}.")
        where = suite.bundled
    rows, source = _rows(suite, where)
    examples = parse_rows(((place, _row(row)) for place, row in rows), source)
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
    if where.startswith("bundled:") or Path(where).expanduser().is_file():
        return file_rows(where), where
    looks_local = where.startswith((".", "/", "~")) or Path(where).suffix in (".jsonl", ".json", ".csv", ".parquet")
    if looks_local and not Path(where).expanduser().exists():
        raise DrklError(f"There is no file {where!r} for the suite {suite.name!r}.")
    return dataset_rows(where, split=suite.split), where


def _num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _row(row: Any) -> Any:
    """A row of one of the public formats as ours; any other is left as it is, for ``parse_rows`` to judge."""
    if not isinstance(row, dict):
        return row
    if "output" in row and {"instruction", "prompt"} & row.keys():
        return _instruction(row)
    if isinstance(row.get("source"), list) and "target" in row:  # SciTLDR: sentences, and several summaries
        abstract = " ".join(str(sentence) for sentence in row["source"])
        return {"prompt": f"{SUMMARISE}\n\n{abstract}"} | _answers(row["target"]) | _kept(row, "id", "paper_id")
    turns = row.get("turns")
    if isinstance(turns, dict) and {"speaker", "utterance"} <= turns.keys():  # Schema-Guided Dialogue on the hub
        return {"messages": _dialogue(turns)} | _kept(row, "id", "dialogue_id")
    if isinstance(row.get("response"), list):
        return {**row, **_answers(row["response"])}
    return row


def _instruction(row: dict[str, Any]) -> dict[str, Any]:
    """MiniLLM's rows: ``instruction`` and ``input``, ``prompt`` being the two in its template; ``output``."""
    if "instruction" not in row:
        return {"prompt": row["prompt"]} | _answers(row["output"]) | _kept(row, "id", "id")
    made: dict[str, Any] = {"prompt": row["instruction"]}
    if row.get("input"):
        made["input"] = row["input"]
    return made | _answers(row["output"]) | _kept(row, "id", "id")


def _answers(value: Any) -> dict[str, Any]:
    """The response, and all of them where there are several."""
    if not isinstance(value, list) or not value:
        return {"response": value}
    return {"response": value[0], "references": value}


def _kept(row: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    return {name: row[source]} if row.get(source) is not None else {}


def _dialogue(turns: dict[str, Any]) -> list[dict[str, str]]:
    """Up to the system's last turn; the user's are 0 on the hub."""
    roles = ["assistant" if str(one).upper() in ("1", "SYSTEM") else "user" for one in turns["speaker"]]
    messages = [{"role": r, "content": text} for r, text in zip(roles, turns["utterance"], strict=True)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages
