"""The shapes that rows have, recognised by their columns and rewritten with the fields that drkl reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.data.fields import MESSAGE_WEIGHTS, ROLES, from_json, is_void, names_of
from drkl.errors import DrklError

SUMMARISE = "Summarize the following abstract in one sentence."
"""The instruction before an abstract of SciTLDR."""


@dataclass(frozen=True)
class Shape:
    """One shape of a row.

    Args:
        name: what ``data.format`` calls it.
        title: what `drkl data` calls it.
        columns: its columns; any one of the tuples is enough.
    """

    name: str
    title: str
    columns: tuple[tuple[str, ...], ...]

    def fits(self, names: Collection[str]) -> bool:
        """Whether columns of these names hold the shape."""
        for columns in self.columns:  # loops: every row is asked eight times and more
            for name in columns:
                if name not in names:
                    break
            else:
                return True
        return False


SHAPES = (
    Shape("messages", "messages (OpenAI)", (("messages",),)),
    Shape("conversations", "conversations (ShareGPT)", (("conversations",), ("conversation",))),
    Shape("prompt_response", "prompt and response", (("prompt", "response"),)),
    Shape("prompt_completion", "prompt and completion (TRL)", (("prompt", "completion"),)),
    Shape("instruction", "instruction and output (Alpaca)", (("instruction", "output"),)),
    Shape("instruction", "instruction and response (Dolly)", (("instruction", "response"),)),
    Shape("text_label", "text and label", (("text", "label"),)),
    Shape("text", "text", (("text",),)),
)
MINILLM = Shape("prompt_response", "prompt and output (MiniLLM)", (("prompt", "output"),))
SCITLDR = Shape("prompt_response", "source and target (SciTLDR)", (("source", "target"),))
DIALOGUE = Shape("messages", "turns (Schema-Guided Dialogue)", (("turns",),))
PROMPT = Shape("prompt", "prompt alone", (("prompt",),))
INSTRUCTION = Shape("prompt", "instruction alone", (("instruction",),))
_ANSWERS = ("response", "completion")
_PAIR_NAMES = ("prompt_response", "prompt_completion", "instruction")
_STANDS_IN = {
    "messages": ("conversations", "prompt_completion", "prompt_response"),
    "conversations": ("messages",),
    **dict.fromkeys(_PAIR_NAMES, _PAIR_NAMES),
}
"""The shapes that are read, too, where a format is demanded that a row does not have."""
_PAIRS = (
    ("question", "answer"), ("query", "response"), ("question", "response"), ("problem", "solution"),
    ("input", "output"), ("inputs", "targets"), ("document", "summary"), ("article", "highlights"),
    ("dialogue", "summary"), ("instruction", "completion"), ("query", "answer"),
)  # fmt: skip
ASKED = tuple(dict.fromkeys(pair[0] for pair in _PAIRS if pair[0] != "instruction"))
"""Columns that are read as a prompt where none of another name is there and no response is needed."""
_BESIDE = ("context", "contexts", "passage", "choices", "options", *ASKED)
"""Columns that may be a part of such a prompt."""
STUDENT_ANSWERS = "rollouts.share: 1 (in Python rollout_share=1)"
"""What makes responses needless."""
NEEDS_NONE = f"Where the student writes every response, none is needed: {STUDENT_ANSWERS}."
PROMPT_ALONE = (
    f" A prompt alone is enough only where the student writes every response: {STUDENT_ANSWERS}. Else add a column "
    "response (or completion), or messages that end with the assistant's."
)


def read_json_messages(place: str, row: Mapping[str, Any], row_format: str = "auto") -> Mapping[str, Any]:
    """Return a row with the messages of its prompt and its answer that are json text, as csv files hold them.

    Raises:
        DrklError: the prompt alone is such text, so that it may be meant as it is, and no format decides.
    """
    texts = {name: from_json(row[name]) for name in ("prompt", *_ANSWERS) if isinstance(row.get(name), str)}
    texts = {name: value for name, value in texts.items() if name == "prompt" or not is_void(value)}
    found = {name: value for name, value in texts.items() if _is_messages(value) and all(map(_has_role, value))}
    if not found or not is_void(row.get("messages")):
        return row
    if found.keys() == {"prompt"} and texts.keys() & set(_ANSWERS):
        if row_format == "auto":
            raise DrklError(
                f"{place}: the prompt is json text of messages. Set data.format to messages to read it so, or to "
                "prompt_response (or prompt_completion) to learn from the text as it is."
            )
        if row_format != "messages":
            return row
    return {**row, **found}


def shape_of(place: str, row: Mapping[str, Any], row_format: str = "auto", *, needs_responses: bool = True) -> Shape:
    """Return the shape of a row, by the columns that hold something; by all of its columns where none fits.

    Where no response is needed, a prompt alone is a shape too.

    Raises:
        DrklError: columns of two shapes, or of none (with the place).
    """
    alone = [] if needs_responses else _alone(place, row, row_format)
    if row_format != "auto":
        found = alone if alone and _has_no_answer(row) else _demanded(row, row_format) or alone
    else:
        filled = frozenset(name for name, value in row.items() if not is_void(value))
        found = _all_shapes(row, filled) or _public(row) or alone or _all_shapes(row, row.keys())
        if not found and not needs_responses:  # an empty prompt, which is dropped and counted
            found = [shape for shape in (PROMPT, INSTRUCTION, *map(_asked, ASKED)) if shape.fits(row.keys())][:1]
    if len(found) > 1:
        raise _two_shapes(place, found[0], found[1])
    if not found:
        raise _no_shape(place, row, row_format, needs_responses=needs_responses)
    return found[0]


def _alone(place: str, row: Mapping[str, Any], row_format: str) -> list[Shape]:
    """The shapes of a prompt without a response that a row has.

    Raises:
        DrklError: a column that is read as a prompt, beside another that may belong to it.
    """
    filled = frozenset(name for name, value in row.items() if not is_void(value))
    as_messages = row_format == "messages" and _has_messages(row) and "messages" not in filled
    if row_format not in ("auto", *_PAIR_NAMES) and not as_messages:
        return []
    found = [shape for shape in (PROMPT, INSTRUCTION) if shape.fits(filled)]
    if PROMPT in found and _is_messages(row["prompt"]) and _has_no_answer(row) and _speaks_last(row["prompt"]):
        raise DrklError(
            f"{place}: the prompt ends with a message of the assistant's; it must end with the user's (or a tool's), "
            "which the student answers: it continues no answer that has begun."
        )
    asked = [name for name in ASKED if name in filled and isinstance(row[name], str)]
    if found or row_format != "auto" or not asked:
        return found
    if beside := [name for name in _BESIDE if name in filled and name != asked[0]]:
        raise DrklError(
            f"{place}: {asked[0]} may be the prompt, or a part of it beside {beside[0]}. Write all that the student is "
            "to read into one column, prompt."
        )
    return [_asked(asked[0])]


def _asked(name: str) -> Shape:
    """The shape of a row with a prompt in a column of ``ASKED``."""
    return Shape("prompt", f"{name}, as the prompt", ((name,),))


def _demanded(row: Mapping[str, Any], row_format: str) -> list[Shape]:
    """The shapes of one format that a row has; of another that stands in for it where it has none."""
    there = frozenset(name for name, value in row.items() if value is not None)
    for names in (there, row.keys()):
        for name in dict.fromkeys((row_format, *_STANDS_IN.get(row_format, ()))):
            if row_format == "messages" and name.startswith("prompt") and not _has_messages(row):
                continue  # a pair of texts is no conversation
            found = [shape for shape in (*SHAPES, *_public(row)) if shape.name == name and shape.fits(names)]
            if found:
                # Beside a prompt, a response is that prompt's answer.
                return found[:1] if "prompt" in names else found
    return []


def standard_row(
    row: Mapping[str, Any], shape: Shape, *, needs_responses: bool = True
) -> tuple[str, Mapping[str, Any]]:
    """Return the kind of a row (``messages``, ``pair``, ``text`` or ``text_label``), and it with that kind's fields.

    A pair has ``prompt`` and ``response``; other columns stay. A response that is not there and not needed is "", and
    messages end with the prompt's then.

    >>> standard_row({"instruction": "Add.", "input": "1 1", "output": "2"}, SHAPES[4])[1]["response"]
    '2'
    """
    if shape.name in ("text", "text_label"):
        return shape.name, row
    if shape.name == "prompt":
        return _prompt_alone(row, shape)
    if shape is DIALOGUE:
        return "messages", {**row, "messages": _dialogue(row["turns"])} | _kept(row, "dialogue_id")
    if shape is SCITLDR:  # sentences, and several summaries
        abstract = " ".join(str(sentence) for sentence in row["source"])
        fields = {"prompt": f"{SUMMARISE}\n\n{abstract}"} | _answers(row["target"]) | _kept(row, "paper_id")
        return "pair", {**row, **fields}
    if shape.name == "messages":
        return "messages", row
    if shape.name == "conversations":
        return "messages", {**row, "messages": row[conversations_column(row)]}
    if shape is MINILLM:  # the prompt is instruction and input in their template
        return "pair", {**row, "input": None} | _answers(row["output"])
    if shape.name == "instruction":
        answer = row["output"] if "output" in row else row["response"]
        context = row.get("input") or row.get("context")  # Dolly's word for it
        return "pair", {**row, "prompt": row["instruction"], "input": context} | _answers(answer)
    answer = row["completion" if shape.name == "prompt_completion" else "response"]
    if _has_messages(row):
        prompt = [_unlearnt(message) for message in _messages(row["prompt"], "user")]
        answers = [] if is_void(answer) and not needs_responses else _messages(answer, "assistant")
        return "messages", {**row, "messages": [*prompt, *answers]}
    return "pair", {**row, **_answers(answer)}


def _has_no_answer(row: Mapping[str, Any]) -> bool:
    return all(is_void(row.get(name)) for name in (*_ANSWERS, "output"))


def _speaks_last(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is the assistant's."""
    role = str(messages[-1].get("role") or messages[-1].get("from")).lower()
    return ROLES.get(role, role) == "assistant"


def _prompt_alone(row: Mapping[str, Any], shape: Shape) -> tuple[str, Mapping[str, Any]]:
    """A row of one of the shapes of a prompt without a response; of the columns in ``_PAIRS``, the answer is kept."""
    ((column,),) = shape.columns
    if column == "prompt" and _has_messages(row):
        return "messages", {**row, "messages": [_unlearnt(message) for message in row["prompt"]]}
    answers = [row[answer] for asked, answer in _PAIRS if asked == column and isinstance(row.get(answer), str)]
    response = {"response": next((answer for answer in answers if answer), "")}
    if column == "prompt":
        return "pair", {**row, "response": ""}
    context = (row.get("input") or row.get("context")) if column == "instruction" else None
    return "pair", {**row, "prompt": row[column], "input": context, **response}


def conversations_column(row: Mapping[str, Any]) -> str:
    """Return the name of the column that holds a row's ShareGPT conversation."""
    return "conversations" if "conversations" in row else "conversation"


def _all_shapes(row: Mapping[str, Any], names: Collection[str]) -> list[Shape]:
    found = [shape for shape in SHAPES if shape.fits(names)]
    if any(shape.name == "text_label" for shape in found):  # a text with a label is a text, too
        found = [shape for shape in found if shape.name != "text"]
    if "conversations" not in names and not isinstance(row.get("conversation"), list | tuple):
        found = [shape for shape in found if shape.name != "conversations"]
    # Half of a pair is a mistake, whatever stands beside it.
    half = {"prompt", "response", "completion"} & row.keys()
    return [] if half and [shape.name for shape in found] == ["text"] else found


def _public(row: Mapping[str, Any]) -> list[Shape]:
    """The public shape that a row has, if it has none of ``SHAPES``."""
    if isinstance(row.get("source"), list) and "target" in row:
        return [SCITLDR]
    dialogue = row.get("turns")
    if isinstance(dialogue, Mapping) and {"speaker", "utterance"} <= dialogue.keys():
        return [DIALOGUE]
    return [MINILLM] if MINILLM.fits(row) else []


def _two_shapes(place: str, one: Shape, other: Shape) -> DrklError:
    way_out = "Remove the columns of one of them."
    if one.name != other.name:
        formats = f"{one.name} or {other.name}"
        way_out = (
            f"Set data.format to {formats} in the run's yaml (one of several sources has its own), or r{way_out[1:]}"
        )
    return DrklError(f"{place}: the columns fit two shapes: {one.title}, and {other.title}. {way_out}")


def _no_shape(place: str, row: Mapping[str, Any], row_format: str, *, needs_responses: bool) -> DrklError:
    expected = _EXPECTED[row_format]
    if not needs_responses and row_format not in ("text", "text_label"):
        expected += " (the prompt alone is enough)"
    message = f"{place}: expected {expected}; found {names_of(row)}."
    if "chosen" in row or "rejected" in row:
        return DrklError(
            f"{message} Pairs of a chosen and a rejected answer are for preference training, which is not here. To "
            "learn the chosen one, name it response (or messages, where it is a whole conversation)."
        )
    if "input_ids" in row:
        return DrklError(f"{message} Rows that are tokenised already are read in Python: pass them to the trainer.")
    plainer = [str(name).strip().lower() for name in row]
    known = SHAPES if needs_responses else (*SHAPES, PROMPT, INSTRUCTION)
    if row_format == "auto" and any(shape.fits(plainer) for shape in known):
        return DrklError(f"{message} Column names are read as they are written: in small letters, without blanks.")
    if {"role", "content"} <= row.keys():
        return DrklError(
            f'{message} That is one message; a row is a conversation: {{"messages": [{{"role": …, "content": …}}, …]}}.'
        )
    if "prompt" in row and "response" not in row and needs_responses and row_format in ("auto", "prompt_response"):
        return DrklError(message + PROMPT_ALONE)
    pair = next((pair for pair in _PAIRS if all(isinstance(row.get(name), str) for name in pair)), None)
    if pair is not None:
        message += f" If {pair[0]} is what is asked and {pair[1]} the answer, name the columns prompt and response."
    elif row_format == "auto":
        message += " Rename the columns, or write the rows anew as one of these."
    else:
        message += " Set data.format: auto, or rename the columns."
    return DrklError(message)


_EXPECTED = {
    "auto": "the fields prompt and response, or messages, or text (with label or without), or prompt and completion, "
    "or instruction and output, or conversations",
    "messages": "the field messages",
    "conversations": "the field conversations",
    "prompt_response": "the fields prompt and response",
    "prompt_completion": "the fields prompt and completion",
    "instruction": "the fields instruction and output",
    "text_label": "the fields text and label",
    "text": "the field text",
}


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _has_role(message: Mapping[str, Any]) -> bool:
    return "role" in message or "from" in message


def _has_messages(row: Mapping[str, Any]) -> bool:
    return any(_is_messages(row.get(name)) for name in ("prompt", "response", "completion"))


def _messages(value: Any, role: str) -> Sequence[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _unlearnt(message: Any) -> Any:
    """A message of a prompt, of which nothing is learnt unless the message itself says so."""
    role = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
    if ROLES.get(str(role), role) != "assistant" or any(message.get(name) is not None for name in MESSAGE_WEIGHTS):
        return message
    return {**message, "weight": 0}


def _answers(value: Any) -> dict[str, Any]:
    """The response, and all of them where there are several."""
    if not isinstance(value, list) or not value:
        return {"response": value}
    return {"response": value[0], "references": value}


def _kept(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {"id": row[source]} if row.get(source) is not None else {}


def _dialogue(turns: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """The dialogue up to the system's last turn; on the hub the user is speaker 0."""
    roles = ["assistant" if str(speaker).upper() in ("1", "SYSTEM") else "user" for speaker in turns["speaker"]]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns["utterance"], strict=True)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages
