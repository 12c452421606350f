"""How a teacher reads prompts, where its chat template is another than the one that writes the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from drkl.data.drafts import Draft, Drafter, with_stand_in
from drkl.data.encoding import TextEncoder
from drkl.data.ends import special_tokens
from drkl.data.rendering import CHAT_NAMED
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.tokenize import Row

SHOWN = 24
"""Characters of two renderings that are shown from where they differ."""


@dataclass(frozen=True)
class TeacherView:
    """A teacher's own rendering of prompts; the tokens of the responses are the student's.

    Args:
        tokenizer: the teacher's, of the student's vocabulary.
        template: as ``data.template``.
        encoder_decoder: whether an encoder reads the prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = "auto"
    encoder_decoder: bool = False

    @cached_property
    def _drafter(self) -> Drafter:
        return Drafter(TextEncoder(self.tokenizer), self._named(), encoder_decoder=self.encoder_decoder)

    def add_to(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with the teacher's rendering of its prompt, if that is another.

        Raises:
            DrklError: the teacher's template refuses the conversation or leaves out a part of it, or the row has
                several learnt turns, of which the later prompts stand inside the response.
        """
        drafts = [self._draft(row) for row in rows]
        if len(drafts) > 1:
            self._drafter.read(drafts)
        return [self._with_prompt(row, draft) for row, draft in zip(rows, drafts, strict=True)]

    def _with_prompt(self, row: Row, draft: Draft) -> Row:
        with _naming(row):
            ids = tuple(draft.encode().ids)
        if ids == row.sampling_ids:
            return row
        if row.trained is not None:
            raise DrklError(
                f"Row {row.id!r} has several turns to learn, and the chat templates of student and teacher differ: the "
                "later turns of the user's would stand inside the response as the student's template writes them. Set "
                "data.turns: last, or data.template to alpaca, plain or jinja text, which both read."
            )
        return replace(row, teacher_prompt_ids=ids)

    def _draft(self, row: Row) -> Draft:
        example = row.example
        with _naming(row):
            if self.encoder_decoder:
                return self._drafter.source(example)
            return self._drafter.prompt(example if example.messages[-1]["content"] else with_stand_in(example))

    def _named(self) -> str:
        """A template of that name where the teacher has one too, else its own."""
        name = self.template.removeprefix(CHAT_NAMED)
        templates = self.tokenizer.chat_template
        if name != self.template and not (isinstance(templates, dict) and name in templates):
            return "chat"
        return self.template

    def difference(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """A sentence on where the two renderings of a row's prompt first differ; ``tokenizer`` wrote the row."""
        texts = [
            str(reader.decode(list(ids), clean_up_tokenization_spaces=False))
            for reader, ids in ((tokenizer, row.sampling_ids), (self.tokenizer, row.teacher_prompt_ids or ()))
        ]
        length = min(map(len, texts))
        place = next((i for i in range(length) if texts[0][i] != texts[1][i]), length)
        ours, theirs = (repr(text[place : place + SHOWN]) if text[place:] else "its end" for text in texts)
        after = f"after {texts[0][max(0, place - SHOWN) : place]!r} " if place else ""
        return (
            f"Student and teacher each read the prompts in their own rendering. In row {row.id!r} these first differ "
            f"{after}at character {place}: the student reads {ours}, the teacher {theirs}."
        )


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    try:
        yield
    except DrklError as error:
        raise DrklError(f"Row {row.id!r}, as the teacher reads it: {error}") from error


def view_of(
    teacher: PreTrainedTokenizerBase | None, rows: PreTrainedTokenizerBase, template: str, *, encoder_decoder: bool
) -> TeacherView | None:
    """How a teacher reads the prompts that are written for the tokenizer of the rows; None where it reads them so."""
    if teacher is None or not (encoder_decoder or has_own_view(teacher, rows, template)):
        return None
    return TeacherView(teacher, template, encoder_decoder)


def has_own_view(teacher: PreTrainedTokenizerBase, rows: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a teacher may read prompts otherwise than they are written by the tokenizer of the rows.

    Templates other than the chat template are one rendering, which both read; an encoder-decoder has none, and its
    tokenizers are compared all the same.
    """
    is_chat = template in ("auto", "chat") or template.startswith(CHAT_NAMED)
    same = teacher.chat_template == rows.chat_template and special_tokens(teacher) == special_tokens(rows)
    same = same and teacher.special_tokens_map == rows.special_tokens_map
    return is_chat and bool(teacher.chat_template) and not same
