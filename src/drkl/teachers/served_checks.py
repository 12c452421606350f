"""What is found out about a served teacher before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from drkl.client import Refused, printable
from drkl.errors import DrklError
from drkl.teachers.scores import Odd, choice_of
from drkl.teachers.served import COMPLETIONS, Question, ServedTeacher

PROMPTS, TOKENS = 4, 8
"""Prompts that the server goes on with, and tokens that it adds to each."""
NEAR = 0.5
"""A written token may be this much less probable than the most probable one, in log-probability: a server computes a
token that it writes and one that it reads in other batches, and in half precision a logit of 16 is rounded to 1/8."""
_LONGEST_PROMPT = 64
_TEXTS = (
    "Hello, world! It's 2 o'clock; 3.14 < 22/7.",
    "def f(x):\n    return x**2  # a comment\n\n",
    "Größe, niño, 東京, Привет, مرحبا, हिन्दी 🙂",
)
_SPREAD, _TOGETHER = 256, 16
"""Tokens over the whole vocabulary whose texts are compared, and how many of them are one text."""

_log = logging.getLogger("drkl")


def check_vocabulary(teacher: ServedTeacher, tokenizer: Any) -> None:
    """Raise DrklError unless the server and a tokenizer give texts the same ids.

    Args:
        teacher: settled, its ``vocab_size`` that of the pair.
        tokenizer: the run's.
    """
    if not teacher.reads(teacher.vocab_size - 1):
        raise DrklError(
            f"The teacher's server at {teacher.server} does not read the token {teacher.vocab_size - 1}, the last that "
            f"its model {teacher.name!r} and the student were to share: its vocabulary is smaller, and another one. "
            "Choose a student of the teacher's family."
        )
    texts = _probes(tokenizer, teacher)
    theirs = _ids_of(teacher, list(texts))
    for (text, ours), found in zip(texts.items(), theirs, strict=True):
        if found is None:
            _log.warning(
                "Warning: the teacher's server does not say which ids a text has, so its vocabulary could not be "
                "compared with the tokenizer of the rows. They have to be the same."
            )
            return
        if found != ours:
            place = next((i for i, (a, b) in enumerate(zip(ours, found, strict=False)) if a != b), len(ours))
            raise DrklError(
                f"The vocabularies differ: of the text {printable(text)[:60]!r} the tokenizer of the rows makes the "
                f"ids {_some(ours, place)}, and the teacher's server {_some(found, place)} (from place {place} on). "
                "One row feeds both models, so an id has to be one token to both: serve the teacher that the student "
                "belongs to, or set teacher.tokenizer to its folder."
            )


def check_distributions(teacher: ServedTeacher, prompts: Sequence[Sequence[int]]) -> None:
    """Raise DrklError unless the server gives as many tokens as asked for, and its own text is what it finds likely.

    It goes on with a few prompts, always by the most probable token, and is asked for the distributions in what it
    wrote: there those tokens have to be the most probable ones. A server that counts places in another way, or adds
    a token before a prompt, is found by that.

    Args:
        teacher: settled.
        prompts: token ids of some of the run's.
    """
    room = TOKENS + _LONGEST_PROMPT if teacher.served.longest is None else teacher.served.longest - 1
    starts = [list(prompt)[: min(_LONGEST_PROMPT, max(1, room - TOKENS))] for prompt in prompts if prompt][:PROMPTS]
    written = [_written(teacher, start, min(TOKENS, room - len(start))) for start in starts]
    questions = [
        Question((*start, *answer), tuple(range(len(start) - 1, len(start) + len(answer) - 1)))
        for start, answer in zip(starts, written, strict=True)
    ]
    try:
        found = teacher.ask(questions)
    except Refused as error:
        if "logprobs" not in str(error):
            raise
        raise DrklError(
            f"teacher.top_k is {teacher.top_k}, and the teacher's server gives fewer. Start it with --max-logprobs "
            f"{teacher.top_k} or more (vLLM's default is 20), or lower teacher.top_k. {error}"
        ) from error
    for question in questions:
        scores = found[question]
        for place, position in enumerate(question.positions):
            top, own = float(scores.logp[place, 0]), float(scores.observed[place])
            if not own >= top - NEAR:
                raise DrklError(
                    f"The teacher's server at {teacher.server} does not find likely what it writes: at place "
                    f"{position + 1} of {len(question.ids)} tokens it wrote {question.ids[position + 1]}, and, asked "
                    f"for the distribution there, gives {int(scores.ids[place, 0])} more probability by a factor of "
                    f"{_factor(top - own)}. Its places are counted in another way, or another model answers."
                )


def check_length(teacher: ServedTeacher, longest: int, row_id: str) -> None:
    """Raise DrklError where the server cannot read the longest row.

    Args:
        teacher: settled.
        longest: its tokens, prompt and response.
        row_id: its id.
    """
    limit = teacher.served.longest
    if limit is not None and longest + 1 > limit:
        raise DrklError(
            f"Row {row_id!r} has up to {longest} tokens, and the teacher's server takes {limit - 1}: its "
            f"--max-model-len is {limit}, and it has to write one. Start it with --max-model-len {longest + 1} or more "
            f"where its model has the positions, or set data.max_tokens (in Python max_tokens) to {limit - 1}."
        )


def _probes(tokenizer: Any, teacher: ServedTeacher) -> dict[str, list[int]]:
    """Texts that the server can read, with the ids that a tokenizer gives them."""
    size = min(teacher.vocab_size, 1 + max(tokenizer.get_vocab().values()))
    spread = list(range(0, size, max(1, size // _SPREAD)))
    pieces = [spread[start : start + _TOGETHER] for start in range(0, len(spread), _TOGETHER)]
    texts = [*_TEXTS, *(" ".join(tokenizer.decode([token]) for token in piece) for piece in pieces)]
    probes = {text: list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts if text.strip()}
    room = teacher.served.longest
    return {
        text: ids
        for text, ids in probes.items()
        if ids and max(ids) < teacher.vocab_size and (room is None or len(ids) < room - 1)
    }


def _ids_of(teacher: ServedTeacher, texts: Sequence[str]) -> list[list[int] | None]:
    """The ids that the server gives texts; None where it does not say."""
    client = teacher.client
    path, key, bodies = "/tokenize", "tokens", [_tokenize_body(teacher, text) for text in texts]
    try:
        client.patiently(lambda: client.ask(path, bodies[0]))
    except Refused:
        # Another server than vLLM: it may tell what it reads of a text that it is to go on with.
        path, key = COMPLETIONS, "prompt_token_ids"
        bodies = [teacher.body([], answer=1) | {"prompt": text} for text in texts]
    found: dict[int, list[int] | None] = {}

    def take(number: int, answer: Any) -> None:
        place = answer if key == "tokens" else _first_choice(answer)
        ids = place.get(key) if isinstance(place, dict) else None
        is_ids = isinstance(ids, list) and all(type(token) is int for token in ids)
        found[number] = ids if is_ids else None

    client.ask_each(path, bodies, at_once=teacher.server_requests, on_answer=take)
    return [found[number] for number in range(len(texts))]


def _tokenize_body(teacher: ServedTeacher, text: str) -> dict[str, Any]:
    return {"model": teacher.name, "prompt": text, "add_special_tokens": False}


def _first_choice(answer: Any) -> Any:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices else None


def _written(teacher: ServedTeacher, prompt: Sequence[int], count: int) -> list[int]:
    """The most probable tokens after a prompt, as the server writes them."""
    client = teacher.client
    body = client.patiently(lambda: client.ask(COMPLETIONS, teacher.body(prompt, answer=count)))
    try:
        ids = choice_of(body, prompt).get("token_ids")
        if not isinstance(ids, list) or not ids or any(type(token) is not int or token < 0 for token in ids):
            raise Odd("an answer has no token_ids (vLLM has them from 0.10.2 on)")
    except Odd as error:
        raise teacher.odd(error) from error
    return ids


def _some(ids: Sequence[int], place: int) -> str:
    more = ", …" if len(ids) > place + 4 else ""
    return f"[{', '.join(map(str, ids[place : place + 4]))}{more}]"


def _factor(difference: float) -> str:
    return f"{min(2.718281828 ** min(difference, 700.0), 1e12):.3g}"
