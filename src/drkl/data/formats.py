"""Rows of public data sets, rewritten with the fields that drkl reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SUMMARISE = "Summarize the following abstract in one sentence."
"""The instruction before an abstract of SciTLDR."""


def standard_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of a known public format as ``prompt`` and ``response`` or as ``messages``; any other unchanged.

    Known are TRL's ``prompt`` and ``completion`` (texts, or lists of messages), ``instruction``, ``input`` and
    ``output`` as in Alpaca and MiniLLM, SciTLDR's ``source`` and ``target``, the dialogues of Schema-Guided Dialogue on
    the hub, and a ``response`` that is a list of equally good ones.

    >>> standard_row({"instruction": "Add.", "input": "1 1", "output": "2"})
    {'prompt': 'Add.', 'input': '1 1', 'response': '2'}
    """
    if "completion" in row and "prompt" in row:
        row = {**row, "response": row["completion"]}
    elif "output" in row and {"instruction", "prompt"} & row.keys():
        return _instruction(row)
    if {"prompt", "response"} <= row.keys() and any(_is_messages(row[name]) for name in ("prompt", "response")):
        turns = [*_messages(row["prompt"], "user"), *_messages(row["response"], "assistant")]
        return {"messages": turns} | _kept(row, "id", "id")
    if isinstance(row.get("source"), list) and "target" in row:  # SciTLDR: sentences, and several summaries
        abstract = " ".join(str(sentence) for sentence in row["source"])
        return {"prompt": f"{SUMMARISE}\n\n{abstract}"} | _answers(row["target"]) | _kept(row, "id", "paper_id")
    dialogue = row.get("turns")
    if isinstance(dialogue, Mapping) and {"speaker", "utterance"} <= dialogue.keys():  # Schema-Guided Dialogue
        return {"messages": _dialogue(dialogue)} | _kept(row, "id", "dialogue_id")
    if isinstance(row.get("response"), list):
        return {**row, **_answers(row["response"])}
    return row


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _messages(value: Any, role: str) -> Sequence[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    """``instruction`` and ``input``, or MiniLLM's ``prompt``, which is the two in its template; ``output``."""
    if "instruction" not in row:
        return {"prompt": row["prompt"]} | _answers(row["output"]) | _kept(row, "id", "id")
    fields: dict[str, Any] = {"prompt": row["instruction"]}
    if row.get("input"):
        fields["input"] = row["input"]
    return fields | _answers(row["output"]) | _kept(row, "id", "id")


def _answers(value: Any) -> dict[str, Any]:
    """The response, and all of them where there are several."""
    if not isinstance(value, list) or not value:
        return {"response": value}
    return {"response": value[0], "references": value}


def _kept(row: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    return {name: row[source]} if row.get(source) is not None else {}


def _dialogue(turns: Mapping[str, Any]) -> list[dict[str, str]]:
    """The dialogue up to the system's last turn; on the hub the user is speaker 0."""
    roles = ["assistant" if str(speaker).upper() in ("1", "SYSTEM") else "user" for speaker in turns["speaker"]]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns["utterance"], strict=True)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages
