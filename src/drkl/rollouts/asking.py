"""Answers to the prompts of rows: the requests, this process's part of the writing, and all parts together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from drkl.data.lengths import Room
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.processes import Share
from drkl.rollouts.answers import Answer, Request, Writer


class Asker:
    """Asks a writer to answer the prompts of rows, each process for its part.

    Args:
        writer: writes with the weights of now.
        seed: at least 0. With a row's id and the pass over the rows it decides the random numbers of an answer.
        max_new_tokens: longest answer.
        room: the models' context.
        share: which requests this process writes; None is all of them.
    """

    def __init__(
        self, writer: Writer, *, seed: int, max_new_tokens: int, room: Room, share: Share | None = None
    ) -> None:
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self._writer, self._room, self._share = writer, room, share or Share()
        self.on_writing: Callable[[int, int], None] = lambda done, of: None
        """Called with the answers that this process has written, and how many it will write."""

    def request(self, row: Row, number_of_pass: int) -> Request | None:
        """What is asked for a row; None where the context leaves no room, and the row has a response of its own.

        Raises:
            DrklError: there is no room, and no response.
        """
        prompt, context = row.sampling_ids, self._room.decoder
        teacher_prompt = prompt if row.teacher_prompt_ids is None else row.teacher_prompt_ids
        most = self.max_new_tokens
        if context is not None:
            most = min(most, context - (0 if self._room.separate else max(len(prompt), len(teacher_prompt))))
        if most < 1:
            if row.response_ids:
                return None
            raise DrklError(
                f"Row {row.id!r}: its prompt of {len(prompt)} tokens leaves no room for an answer in the models' "
                f"context of {context} tokens. Lower data.max_prompt_tokens, or leave the row out."
            )
        return Request(row.id, number_of_pass, prompt, teacher_prompt, most)

    def answers(self, requests: Sequence[Request], before: Callable[[], None] = lambda: None) -> list[Answer]:
        """Return the answer to each request, in order, in every process.

        Args:
            requests: the same in every process.
            before: called where this process is about to write.

        Raises:
            DrklError: the writer's; that of one process is raised in all.
        """
        if not requests:
            return []
        # Alike in cost: neighbours in length go to different processes.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        mine = self._share.of(order)
        done = 0

        def progress(more: int) -> None:
            nonlocal done
            done += more
            self.on_writing(done, len(mine))

        def write() -> list[tuple[int, Answer]]:
            if mine:
                before()
            answers = self._writer.write([requests[i] for i in mine], seed=self.seed, progress=progress)
            return list(zip(mine, answers, strict=True))

        by_number = dict(self._share.together(write))
        return [by_number[i] for i in range(len(requests))]


def answered_row(row: Row, token_ids: tuple[int, ...]) -> Row:
    """The row with an answer for its response, after the prompt as a model is sampled from it."""
    return replace(
        row, prompt_ids=row.sampling_ids, response_ids=token_ids, trained=None, sampling_context=None, sampled=True
    )


def answer_in(row: Row, stops: Collection[int]) -> Answer:
    """The answer that a row holds; ``stops`` are the tokens that end one."""
    return Answer(row.response_ids, row.response_ids[-1] in stops)
