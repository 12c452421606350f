"""How long a prompt, a row and an answer may be where the user does not say: what fits the models, by one rule."""

from __future__ import annotations

from typing import NamedTuple

from drkl.errors import DrklError

MAX_TOKENS, MAX_PROMPT_TOKENS = 512, 256
"""The lengths where neither the user nor a model sets a limit."""


class Room(NamedTuple):
    """The positions of the models that read a row, the fewest of any of them; None where nothing limits them."""

    encoder: int | None = None
    """For the prompt. Where there is no encoder, as ``decoder``."""
    decoder: int | None = None
    """For prompt and response together, or for the response alone if ``separate``."""
    separate: bool = False
    """Whether an encoder reads the prompt and a decoder writes the response."""

    @property
    def longest_prompt(self) -> int | None:
        """The number of tokens of the longest prompt that leaves room for a response."""
        return self.encoder if self.separate or self.encoder is None else self.encoder - 1

    @property
    def longest_row(self) -> int | None:
        """The largest ``max_tokens``, which counts prompt and response together."""
        if self.separate:
            return None if self.encoder is None or self.decoder is None else self.encoder + self.decoder
        return self.decoder


NO_LIMIT = Room()


class Lengths(NamedTuple):
    """Limits in tokens, as ``data.max_prompt_tokens`` and ``data.max_tokens``."""

    max_prompt_tokens: int
    max_tokens: int


def fit_lengths(
    max_prompt_tokens: int | None, max_tokens: int | None, room: Room = NO_LIMIT, *, max_new_tokens: int | None = None
) -> Lengths:
    """Return the limits that were given, and for those that were not (None) what fits the models.

    ``max_tokens`` is 512, or 256 more than a given ``max_prompt_tokens`` where that is more, or the context;
    ``max_prompt_tokens`` is 256, or half of a given ``max_tokens`` of at most 256, or the longest prompt that leaves
    the models room for a response, or for ``max_new_tokens`` of an answer: the smallest of these.

    >>> fit_lengths(None, None)
    Lengths(max_prompt_tokens=256, max_tokens=512)
    >>> fit_lengths(None, None, Room(128, 128))
    Lengths(max_prompt_tokens=127, max_tokens=128)
    >>> fit_lengths(None, 128)
    Lengths(max_prompt_tokens=64, max_tokens=128)
    >>> fit_lengths(300, None)
    Lengths(max_prompt_tokens=300, max_tokens=556)

    Raises:
        DrklError: the given length of a prompt leaves no room for a response.
    """
    total = max_tokens
    if total is None:
        total = max(MAX_TOKENS, MAX_PROMPT_TOKENS + (max_prompt_tokens or 0))
        total = min(total, room.longest_row or total)
    if max_prompt_tokens is not None:
        if max_prompt_tokens >= total and max_tokens is None:
            raise DrklError(
                f"max_prompt_tokens ({max_prompt_tokens}) leaves no room for a response in the models' context of "
                f"{total} tokens. Set data.max_prompt_tokens to at most {total - 1}, or leave it out."
            )
        return Lengths(max_prompt_tokens, total)
    prompt = total // 2 if max_tokens is not None and total <= MAX_PROMPT_TOKENS else MAX_PROMPT_TOKENS
    prompt = min(prompt, total - 1, room.longest_prompt or prompt)
    if max_new_tokens is not None and room.decoder is not None and not room.separate:
        prompt = min(prompt, room.decoder - max_new_tokens)
    return Lengths(max(1, prompt), total)


def answer_room(lengths: Lengths, room: Room, max_new_tokens: int | None = None) -> int:
    """Return the longest answer, in tokens, that is sampled in training.

    Args:
        lengths: the limits of the rows.
        room: the models' context.
        max_new_tokens: the length that was given; None takes what ``max_tokens`` has above ``max_prompt_tokens``, as
            far as the context goes.

    >>> answer_room(Lengths(256, 512), Room(400, 400)), answer_room(Lengths(256, 512), Room(400, 400), 100)
    (144, 100)

    Raises:
        DrklError: the longest prompt and the given answer, or one token, do not fit the context together.
    """
    prompt, left = lengths.max_prompt_tokens, room.decoder
    if left is None:
        return max_new_tokens or lengths.max_tokens - prompt
    owner = "decoder's" if room.separate else "models'"
    whose = f"the {owner} context of {left} tokens"
    left -= 0 if room.separate else prompt
    if left < 1:
        raise DrklError(
            f"data.max_prompt_tokens ({prompt}) leaves no room for an answer in {whose}. Set it to less, or leave it "
            "out."
        )
    if max_new_tokens is None:
        return min(lengths.max_tokens - prompt, left)
    if max_new_tokens <= left:
        return max_new_tokens
    beside = "" if room.separate else f" after a prompt of data.max_prompt_tokens ({prompt})"
    shorter = left + prompt - max_new_tokens
    other = "" if room.separate or shorter < 1 else f", or data.max_prompt_tokens to at most {shorter}"
    raise DrklError(
        f"rollout_max_new_tokens ({max_new_tokens}){beside} passes {whose}. Set it to at most {left}{other}."
    )


def fit_answer(default: int, room: Room, shortest_prompt: int) -> int:
    """Return how long an answer is where the user does not say.

    ``default``, or half of the context, or what the shortest prompt leaves of it: the smallest of these.
    """
    if room.decoder is None:
        return default
    if room.separate:
        return min(default, room.decoder)
    return max(1, min(default, room.decoder // 2, room.decoder - shortest_prompt))


def check_answer(max_new_tokens: int, room: Room, longest_prompt: int) -> None:
    """Raise DrklError if an answer of ``max_new_tokens`` does not fit the models after the longest prompt."""
    if room.longest_prompt is not None and longest_prompt > room.longest_prompt:
        raise DrklError(
            f"A prompt of {longest_prompt} tokens is too long for the models' context of {room.encoder} tokens. "
            "Shorten it."
        )
    if room.decoder is None:
        return
    left = room.decoder if room.separate else room.decoder - longest_prompt
    if max_new_tokens > left:
        beside = "" if room.separate else f" after a prompt of {longest_prompt}"
        raise DrklError(
            f"max_new_tokens: {max_new_tokens} tokens{beside} pass the models' context of {room.decoder} tokens. Set "
            f"it to at most {left}, or leave it out."
        )


def no_prompt_fits(shortest: int, lengths: Lengths, room: Room) -> str:
    """Return why no prompt fits, and the way out; ``shortest`` is the shortest prompt in tokens."""
    context, longest = room.encoder, room.longest_prompt
    if longest is not None and shortest > longest:
        return (
            f" The shortest prompt has {shortest} tokens and the models' context is {context}: no row fits. Shorten "
            "the prompts, or choose models with a longer context."
        )
    known = "" if context is None else f" and the models' context is {context}"
    both = f" and data.max_tokens ({lengths.max_tokens}) above it" if lengths.max_tokens <= shortest else ""
    left = None if context is None or room.separate else context - shortest
    rest = "" if left is None else f", which leaves {left} for a response (rollout_max_new_tokens where it is sampled)"
    return (
        f" The shortest prompt has {shortest} tokens{known}; raise data.max_prompt_tokens ({lengths.max_prompt_tokens})"
        f"{f' to at least {shortest}{both}{rest}' if known or both else ''}."
    )
