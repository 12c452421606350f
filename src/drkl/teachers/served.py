"""A teacher behind a server: its k most probable tokens at each position are asked for as training needs them."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.client import GO_ON, MOMENTARY, Caller, Client, Refused, printable
from drkl.data.collate import each_row
from drkl.errors import DrklError, did_you_mean
from drkl.losses import LMHead
from drkl.losses.topk import TopK
from drkl.models.classes import is_classifier
from drkl.models.forward import is_encoder_decoder, lm_head
from drkl.models.load import load_config, load_tokenizer, resolve_model, without_weights, words_of
from drkl.models.readout import Batch
from drkl.models.settings import read_generation_config
from drkl.signals import may_be_cut_short
from drkl.teachers.config import TeacherConfig, address_fault
from drkl.teachers.scores import Odd, Scores, as_topk, read_scores

COMPLETIONS = "/v1/completions"
SAME = 0.1
"""The mean difference of log-probabilities of one model that computes in half precision, asked twice."""
_BYTES_OF_ID = 40
"""An id in a tuple of Python's."""
_TOGETHER = 8
"""Rows that are asked for together in a pass over many, for each request that may wait."""
CALLER = Caller(
    server="The teacher's server",
    setting="teacher.server",
    start="Start it, or start it again, with `vllm serve`, and see its log.",
    faster="Raise teacher.server_timeout, or lower teacher.server_requests",
    no_route="The server does not have this route.",
    keys=("DRKL_TEACHER_KEY", "VLLM_API_KEY"),
    # One request that fails in the server's own code is no reason to stop a run of hours.
    momentary=MOMENTARY | {500},
    slow_tries=3,
)


class Served(NamedTuple):
    """What a server says of the model."""

    root: str
    """The folder or id that it was loaded from; empty where it does not say."""
    longest: int | None
    """Tokens of prompt and answer together; None where it does not say."""


class Question(NamedTuple):
    """A row for the server."""

    ids: tuple[int, ...]
    """What the teacher reads, and one token more: a distribution is given where a token follows it."""
    positions: tuple[int, ...]


class NothingStands(DrklError):
    """No place has a config and a tokenizer for a served teacher."""


class _Asked(NamedTuple):
    """Rows that were asked for together, ahead of time."""

    questions: frozenset[Question]
    answers: Future[dict[Question, Scores]]


class ServedTeacher:
    """A teacher behind a vLLM server, or another that gives the log-probabilities of a prompt in the same form.

    It stands wherever a live teacher stands in training, and knows the `top_k` most probable tokens at each position.
    The key of the server is taken from the environment variable ``DRKL_TEACHER_KEY``, or ``VLLM_API_KEY`` where that
    is not set. Its weights are never here: ``model`` is a model without weights, for its config.

    Args:
        server: its address, such as ``http://127.0.0.1:8000/v1``.
        model: the name under which it serves the teacher.
        top_k: tokens at each position; the server has to be started with as many ``--max-logprobs``.
        tokenizer: a folder or id with a config and a tokenizer of the teacher's vocabulary. Default: the first of
            ``model``, the folder that the server names, and the student's own.
        server_timeout: longest wait for an answer, in seconds.
        server_requests: requests that wait for their answer at a time.
        remember_mb: memory in MiB for the answers to rows that come again.

    Raises:
        DrklError: a value out of its range.
    """

    head: LMHead | None = None

    def __init__(
        self, server: str, model: str, top_k: int = 64, *, tokenizer: str | None = None, server_timeout: float = 600.0,
        server_requests: int = 32, remember_mb: int = 0,
    ) -> None:  # fmt: skip
        if (fault := address_fault(server)) is not None:
            raise DrklError(f"{fault}.")
        least = {"top_k": (top_k, 1), "server_requests": (server_requests, 1), "remember_mb": (remember_mb, 0)}
        for name, (value, lowest) in least.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise DrklError(f"{name} is {value!r}; expected a whole number of at least {lowest}.")
        if isinstance(server_timeout, bool) or not 0 < server_timeout <= 1e6:
            raise DrklError(f"server_timeout is {server_timeout!r}; expected seconds above 0.")
        self.server, self.name, self.top_k, self.tokenizer = server, str(model), top_k, tokenizer
        self.server_timeout, self.server_requests, self.remember_mb = server_timeout, server_requests, remember_mb
        self.pad_id: int | None = None
        self.client = Client(server, server_timeout, CALLER)
        self.client.on_return = self._check_the_same
        self._witness: tuple[Question, Scores] | None = None
        """An answer, by which another model is known."""
        self.source = ""
        """The folder or id whose config and tokenizer stand for the teacher's, once it is settled; empty for none."""
        self.vocab_size = 0
        """The ids, from 0, that both models have."""
        self._model: PreTrainedModel | None = None
        self._served: Served | None = None
        self._memory: dict[Question, Scores] = {}
        self._bytes_left = remember_mb * 2**20
        self._expected: Iterator[Batch] = iter(())
        self._due = 0
        """Batches that were asked together and not read yet."""
        self._ahead: deque[_Asked] = deque(maxlen=2)

    @classmethod
    def of(cls, config: TeacherConfig) -> ServedTeacher:
        """The teacher of a config."""
        assert config.server is not None
        return cls(
            config.server,
            config.model,
            config.top_k,
            tokenizer=config.tokenizer,
            server_timeout=config.server_timeout,
            server_requests=config.server_requests,
            remember_mb=config.remember_mb,
        )

    @property
    def k(self) -> int:
        """The number of tokens that are known at each position."""
        return self.top_k

    @property
    def config(self) -> TeacherConfig:
        """The ``teacher`` section that says the same."""
        names = ("server", "top_k", "tokenizer", "server_timeout", "server_requests", "remember_mb")
        return TeacherConfig(model=self.name, **{name: getattr(self, name) for name in names})

    @property
    def model(self) -> PreTrainedModel:
        """A model without weights that has the teacher's config."""
        assert self._model is not None, "`settle` makes it"
        return self._model

    @property
    def served(self) -> Served:
        """What the server says of the model; it is asked once.

        Raises:
            DrklError: it cannot be reached, or serves no such model.
        """
        if self._served is None:
            self._served = self._look(self.client.patiently(lambda: self.client.ask("/v1/models")))
        return self._served

    def settle(self, student: str, config: Any = None, tokenizer: Any = None) -> None:
        """Find a config and a tokenizer that stand for the teacher's, in the first of the places that have both.

        Args:
            student: folder or id of the student; empty where it has none.
            config: the student's config, where no place has one; None for none.
            tokenizer: goes with it.

        Raises:
            DrklError: the server cannot be reached or serves no such model, or no place has them.
        """
        if self._model is not None:
            return
        try:
            self.source = stand_in(self.name, self.tokenizer, self.served.root, student)
        except NothingStands:
            if config is None or tokenizer is None or self.tokenizer is not None:
                raise
            config = copy.deepcopy(config)
            _check_decoder(config, "The student")
        else:
            config, tokenizer = load_config(self.source), load_tokenizer(self.source)
        self._model = _without_weights(config, self.source)
        if self.served_ids is None and not self.reads(config.get_text_config().vocab_size - 1):
            # The student's head may have rows beyond the vocabulary of both.
            config.get_text_config().vocab_size = 1 + max(words_of(tokenizer).get_vocab().values())
            self._model = _without_weights(config, self.source)
        self.vocab_size = lm_head(self._model).vocab_size

    @property
    def served_ids(self) -> int | None:
        """The number of ids that the teacher has; None where another model's config stands for its own."""
        own = bool(self.source) and self.source in (self.name, self.served.root)
        return int(self.model.config.get_text_config().vocab_size) if own else None

    def hidden_at(
        self, batch: Mapping[str, Tensor], keep: Tensor, *, labels: Tensor | None = None, remember: bool = True
    ) -> TopK:
        """Return what is known of the teacher at the `n` positions where ``keep`` `[batch, tokens]` is true.

        Args:
            batch: what the teacher reads.
            keep: the positions.
            labels: `[n]`, the tokens observed there.
            remember: whether the answers are kept while they fit into ``remember_mb``.

        Raises:
            DrklError: the server is gone, or answers with something else than it was asked for.
        """
        questions = questions_of(batch, keep, labels)
        found = self._answers(questions)
        for question, scores in found.items():
            size = scores.num_bytes + _BYTES_OF_ID * len(question.ids)
            if remember and question not in self._memory and size <= self._bytes_left:
                self._bytes_left -= size
                self._memory[question] = scores
        parts = [found[question] for question in questions]
        return as_topk(parts, self.top_k, self.vocab_size, labelled=labels is not None).to(keep.device)

    def states(self, batch: Batch) -> TopK:
        """Return what is known at the positions that are read of some rows, as the teacher reads them."""
        if not self._due:
            questions: list[Question] = []
            for ahead in self._expected:
                questions += _questions_in(ahead)
                self._due += 1
                if len(questions) >= _TOGETHER * self.server_requests:
                    break
            self.prepare(questions)
        self._due = max(0, self._due - 1)
        read = batch.for_teacher
        return self.hidden_at(read.inputs, read.keep, labels=batch.labels, remember=False)

    def expect(self, batches: Iterable[Batch]) -> None:
        """Tell which batches `states` is called with next, in order, so that the rows of many are asked at once."""
        self._expected, self._due = iter(batches), 0

    def remember_up_to(self, megabytes: int) -> None:
        """Use at least so much memory, in MiB, for the answers to rows that come again."""
        more = max(0, megabytes - self.remember_mb)
        self.remember_mb += more
        self._bytes_left += more * 2**20

    def prepare(self, questions: Iterable[Question]) -> None:
        """Ask for rows that `hidden_at` will be called with, while something else goes on.

        What goes wrong is raised where the answers are needed. Those of the last two calls are kept.
        """
        known = set(self._memory).union(*(asked.questions for asked in self._ahead))
        if not (new := [question for question in dict.fromkeys(questions) if question not in known]):
            return
        asked = _Asked(frozenset(new), Future())

        def ask() -> None:
            try:
                asked.answers.set_result(self.ask(new))
            except BaseException as error:
                asked.answers.set_exception(error)

        self._ahead.append(asked)
        # Nothing waits for it where the run stops before.
        threading.Thread(target=ask, daemon=True).start()

    def ask(self, questions: Sequence[Question]) -> dict[Question, Scores]:
        """Ask the server, many rows at a time.

        Raises:
            DrklError: as `hidden_at`.
        """
        found: dict[Question, Scores] = {}

        def take(number: int, body: Any) -> None:
            question = questions[number]
            found[question] = self.read(body, question)

        bodies = [self.body(question.ids) for question in questions]
        self.client.ask_each(COMPLETIONS, bodies, at_once=self.server_requests, on_answer=take)
        if self._witness is None and found:
            self._witness = max(found.items(), key=lambda item: len(item[0].positions))
        return found

    def _check_the_same(self) -> None:
        """Raise DrklError where a server that was away has another model now."""
        if self._served is not None and self._look(self.client.ask("/v1/models")) != self._served:
            raise self._another("/v1/models describes another model than before")
        if self._witness is None:
            return
        question, before = self._witness
        now = self.read(self.client.ask(COMPLETIONS, self.body(question.ids)), question)
        lowest = -30.0  # of what rounds to nothing
        difference = float(np.abs(np.clip(now.observed, lowest, 0) - np.clip(before.observed, lowest, 0)).mean())
        if not difference <= SAME:
            raise self._another(
                f"the log-probabilities of the {len(before.observed)} tokens of a row that it had read before differ "
                f"by {difference:.2g} in the mean; at most {SAME:g} is rounding"
            )

    def _another(self, what: str) -> DrklError:
        return DrklError(
            f"The teacher's server at {self.server} could not be reached for a while, and has another model since: "
            f"{what}. Start it with the model that it had. {GO_ON}"
        )

    def read(self, body: Any, question: Question) -> Scores:
        """What an answer says of the positions of a row.

        Raises:
            DrklError: it is not one.
        """
        try:
            return read_scores(
                body, question.ids, question.positions, k=self.top_k, vocab_size=self.vocab_size,
                served_ids=self.served_ids,
            )  # fmt: skip
        except Odd as error:
            raise self.odd(error) from error

    def body(self, prompt: Sequence[int], *, answer: int | None = None) -> dict[str, Any]:
        """A question whose every setting is given, so that none is the server's own default.

        Args:
            prompt: token ids.
            answer: None asks for the distributions in the prompt; a number for so many most probable tokens after it.
        """
        settings: dict[str, Any] = {
            "model": self.name, "prompt": list(prompt), "n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "add_special_tokens": False,
            "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        if answer is None:
            return settings | {"prompt_logprobs": self.top_k, "max_tokens": 1, "temperature": 1.0}
        return settings | {"max_tokens": answer, "temperature": 0.0, "ignore_eos": True}

    def reads(self, token: int) -> bool:
        """Whether the server takes a token id in a prompt."""
        try:
            self.client.patiently(lambda: self.client.ask(COMPLETIONS, self.body([token], answer=1)))
        except Refused:
            return False
        return True

    def odd(self, what: object) -> DrklError:
        """The error for an answer that is none."""
        return DrklError(
            f"The teacher's server at {self.server} does not answer as asked: {what}. drkl is tested with vLLM 0.32. "
            f"{GO_ON}"
        )

    def _answers(self, questions: Sequence[Question]) -> dict[Question, Scores]:
        """What is known of rows: remembered, asked ahead, or asked now."""
        found = {question: self._memory[question] for question in questions if question in self._memory}
        for asked in list(self._ahead):
            if wanted := [question for question in questions if question in asked.questions and question not in found]:
                try:
                    with may_be_cut_short(alone=True):
                        answers = asked.answers.result()
                except BaseException:
                    self._ahead.remove(asked)  # whoever goes on asks again
                    raise
                found |= {question: answers[question] for question in wanted}
        left = [question for question in dict.fromkeys(questions) if question not in found]
        if not left:
            return found
        with may_be_cut_short(alone=True):
            return found | self.ask(left)

    def _look(self, models: Any) -> Served:
        try:
            served = {str(model["id"]): model for model in models["data"]}
        except (KeyError, TypeError) as error:
            raise self.odd("/v1/models lists no models") from error
        if self.name not in served:
            names = ", ".join(repr(printable(name)) for name in served) or "none"
            raise DrklError(
                f"The teacher's server at {self.server} does not serve {self.name!r}; it serves {names}."
                f"{did_you_mean(self.name, served)} Set teacher.model to one of those."
            )
        longest = served[self.name].get("max_model_len")
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
            raise self.odd(f"/v1/models gives {printable(repr(longest))} for its max_model_len")
        return Served(str(served[self.name].get("root") or ""), longest)


def questions_of(batch: Mapping[str, Tensor], keep: Tensor, labels: Tensor | None) -> list[Question]:
    """What is asked for a batch: each row as the teacher reads it, padding off, to the token after the last position.

    Args:
        batch: the inputs of a batch of `drkl.data.collate.collate`, padded or packed.
        keep: as large, true at `n` positions.
        labels: `[n]`, the tokens that follow them; the last one of a row is not among its inputs. None puts any there.
    """
    observed = None if labels is None else labels.tolist()
    questions, before = [], 0
    for (ids,), kept in each_row(batch, keep):
        positions = tuple(kept.nonzero()[:, 0].tolist())
        if not positions:
            continue
        before += len(positions)
        read = ids.tolist()
        follows = read[-1] if observed is None else observed[before - 1]
        questions.append(Question((*read, follows)[: positions[-1] + 2], positions))
    return questions


def _questions_in(batch: Batch) -> list[Question]:
    read = batch.for_teacher
    return questions_of(read.inputs, read.keep, batch.labels)


def stand_in(name: str, tokenizer: str | None, root: str, student: str) -> str:
    """The first folder or id that has a config and a tokenizer for a served teacher.

    Args:
        name: of the served model.
        tokenizer: the one that the user names; None for none.
        root: what the server loaded.
        student: the student's folder or id.

    Raises:
        DrklError: none has, or it is of a model that is not served in this way.
    """
    reasons = []
    for place in dict.fromkeys([tokenizer] if tokenizer is not None else [name, root, student]):
        if not place:
            continue
        try:
            config = load_config(place)
            load_tokenizer(place)
        except DrklError as error:
            reasons.append(f"{place!r}: {printable(str(error))}")
            continue
        _check_decoder(config, repr(place))
        return place
    raise NothingStands(
        "Nothing here has a config and a tokenizer that could stand for the served teacher's. Set teacher.tokenizer to "
        f"the folder or id of a model with its vocabulary. Tried: {' '.join(reasons) or 'nothing'}"
    )


def _check_decoder(config: Any, name: str) -> None:
    if is_encoder_decoder(config) or is_classifier(config):
        kind = "an encoder-decoder" if is_encoder_decoder(config) else "a classifier"
        raise DrklError(
            f"{name} is {kind}, and the teacher is served: a server gives the log-probabilities of a decoder's prompt "
            "alone. Load the teacher here: leave teacher.server out."
        )


def _without_weights(config: Any, source: str) -> PreTrainedModel:
    model = without_weights(config, torch.float32, source)
    if source:
        with contextlib.suppress(OSError):  # it has none of its own
            model.generation_config = read_generation_config(resolve_model(source))
    return model
