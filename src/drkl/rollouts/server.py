"""Answers by a vLLM server, which is given the student's weights each time before it writes."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.client import GO_ON, Caller, Client, Refused, printable
from drkl.data.examples import hash_of_id
from drkl.errors import DrklError
from drkl.models.check import own_logits, plain_ids
from drkl.models.forward import in_eval_mode
from drkl.rollouts.answers import Answer, Request
from drkl.rollouts.config import RolloutsConfig
from drkl.rollouts.served import check_servable, served_copy, write_served
from drkl.signals import may_be_cut_short

TESTED = (0, 32)
"""The version that `make test-vllm` runs against."""
OLDEST = (0, 10, 2)
"""The first version whose completions return token ids."""
TOLERANCE = 2e-2
"""Largest difference of a log-probability between server and student, both in fp32. Rounding gives 1e-4."""
HALF_TOLERANCE = 0.1
"""The mean difference where one of them computes in bf16 or fp16: a logit of 16 to 32 is rounded to a multiple of 1/8
there, so a single token says little, and many tokens much."""
PROBES, PROBE_TOKENS = 4, 16
"""Prompts of a probe, and tokens that the server adds to each."""
_LONGEST_PROBE = 64

_SIZES = (
    "model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads",
    "n_head", "num_key_value_heads", "head_dim", "intermediate_size", "n_inner",
)  # fmt: skip
"""Fields of a config by which another model is known."""

CALLER = Caller(
    server="The vLLM server",
    setting="rollout_server",
    start="Start it, or start it again, with `drkl rollout-server CONFIG`.",
    faster="Raise rollout_server_timeout, or lower rollout_batch_size or rollout_max_new_tokens",
    no_route=(
        "The routes for new weights exist only where the server was started with VLLM_SERVER_DEV_MODE=1, as `drkl "
        "rollout-server CONFIG` does it."
    ),
    keys=("VLLM_API_KEY",),
)

_log = logging.getLogger("drkl")


class ServerWriter:
    """Writes answers with a vLLM server; a `Writer` that has to be given the weights by `sync` first.

    Args:
        student: as it is trained; decoder-only.
        tokenizer: goes with the weights.
        config: the section `rollouts`; ``server`` is an address.
        stops: ids that end an answer.
        folder: where the weights lie for the server; both see it under this path.
        prompts: some of the run's prompts, as the student reads them: the first few are the probe.
        adapter: peft's handle on the student, where it has an adapter.
        vocab_size: the ids that may be drawn are those below, which both models know; None for all of the student's.

    Raises:
        DrklError: a student that cannot be served.
    """

    def __init__(
        self, student: PreTrainedModel, tokenizer: Any, config: RolloutsConfig, *, stops: Sequence[int], folder: Path,
        prompts: Sequence[Sequence[int]] = (), adapter: Any = None,
        vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        check_servable(student)
        assert config.server is not None, "the config checks it"
        self._student, self._tokenizer, self._config, self._adapter = student, tokenizer, config, adapter
        self._stops, self._folder = list(stops), folder.absolute()
        embeddings: Any = student.get_input_embeddings()
        self._vocabulary = int(embeddings.weight.shape[0])
        unknown = range(self._vocabulary if vocab_size is None else vocab_size, self._vocabulary)
        self._bias = {str(token): -100.0 for token in unknown}
        self._prompts = [list(prompt)[:_LONGEST_PROBE] for prompt in prompts[:PROBES] if prompt]
        if not self._prompts:
            self._prompts = [plain_ids(student, 8)]
        self._client = Client(config.server, config.server_timeout, CALLER)
        self._model = ""
        """The served model's name; empty until the server was looked at."""
        self._longest: int | None = None
        self._half: bool | None = None
        """Whether server or student computes in half precision; None until it matters."""
        self._current: Path | None = None
        """Where the weights lie that the server was given last."""

    def look(self) -> None:
        """Find out what the server serves, where that was not done yet.

        Raises:
            DrklError: the server cannot be reached, is of a version that cannot do it, or serves another model.
        """
        if not self._model:
            self._client.patiently(self._look)

    # Called by the training loop after every `refresh_every` steps, before `write`.
    def sync(self, student: PreTrainedModel, step: int) -> None:
        """Give the server the student's weights of now, and compare the two on a probe.

        Args:
            student: the one that the writer was made with.
            step: number of optimiser steps that made the weights.

        Raises:
            DrklError: the server cannot be reached, is another model's or of a version that cannot do it, or computes
                something else than the student afterwards.
        """
        assert student is self._student, "a writer is made for one student"
        self.look()
        folder = self._folder / f"weights-{step:06d}"
        write_served(served_copy(student, self._adapter), self._tokenizer, folder)
        self._current = folder
        self._client.patiently(self._load)
        for old in self._folder.glob("weights-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def write(
        self, requests: Sequence[Request], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """As `Writer.write`.

        An answer's random numbers are the server's own, from a seed that follows from ``seed``, the row and the pass.
        Rounding, which depends on what else the server computes at that moment, may still decide between two tokens.

        Raises:
            DrklError: the server cannot be reached or does not answer in time, a prompt and its answer are longer than
                it takes, or an answer is not one.
        """
        if not requests:
            return []
        self.look()
        self._check_lengths(requests)
        answers: dict[int, Answer] = {}
        lost = False

        def ask() -> None:
            nonlocal lost
            if lost and self._current is not None:
                # A server that was started again has the weights that it started with.
                self._load()
            left = [i for i in range(len(requests)) if i not in answers]

            def keep(number: int, body: Any) -> None:
                answers[left[number]] = self._answer(requests[left[number]], body)
                if progress is not None:
                    progress(1)

            bodies = [self._body(requests[i], seed) for i in left]
            lost = True
            self._client.ask_all("/v1/completions", bodies, at_once=self._config.batch_size, on_answer=keep)

        with may_be_cut_short():
            self._client.patiently(ask)
        return [answers[i] for i in range(len(requests))]

    def _body(self, request: Request, seed: int) -> dict[str, Any]:
        stream = hash_of_id(f"{seed} {request.stream} {request.key}")
        return {
            **self._plain(request.prompt_ids, request.max_new_tokens, int.from_bytes(stream[:8], "big") >> 1),
            "temperature": self._config.sampling_temperature,
            "top_p": self._config.top_p,
            "stop_token_ids": self._stops,
            # The head may have rows for more tokens than the two models share.
            **({"logit_bias": self._bias} if self._bias else {}),
        }

    def _plain(self, prompt: Sequence[int], max_tokens: int, seed: int) -> dict[str, Any]:
        """A question whose every setting is given, so that none is the server's own default."""
        return {
            "model": self._model, "prompt": list(prompt), "max_tokens": max_tokens, "seed": seed, "n": 1,
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True,
            "skip_special_tokens": False, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip

    def _answer(self, request: Request, body: Any) -> Answer:
        ids, logprobs, reason = self._generated(body, request.prompt_ids)
        finished = reason == "stop"
        if finished and (not ids or ids[-1] not in self._stops):
            raise self._odd(f"it ended an answer at {ids[-1:]}, which is none of the stop tokens {self._stops}")
        if not finished and len(ids) != request.max_new_tokens:
            raise self._odd(
                f"it ended an answer after {len(ids)} of {request.max_new_tokens} tokens and says {reason!r}"
            )
        if len(ids) > request.max_new_tokens or set(ids[:-1]) & set(self._stops):
            raise self._odd(f"an answer goes on after its end: {len(ids)} tokens of {request.max_new_tokens}")
        return Answer(tuple(ids), finished, tuple(logprobs))

    def _generated(self, body: Any, prompt: Sequence[int]) -> tuple[list[int], list[float], Any]:
        """The ids, their log-probabilities and the reason of the end in what a completion returns."""
        try:
            (choice,) = body["choices"]
            reason = choice["finish_reason"]
            ids = list(choice["token_ids"])
            logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            read = choice.get("prompt_token_ids")
            if any(type(token) is not int for token in ids):
                raise TypeError("an id is no whole number")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._odd(
                f"an answer has no token ids with log-probabilities in it ({printable(repr(error))})"
            ) from error
        if read is not None and read != list(prompt):
            raise self._odd("it read another prompt than it was asked; it puts tokens before prompts or cuts them")
        if outside := [token for token in ids if not 0 <= token < self._vocabulary]:
            raise self._odd(f"it wrote token {outside[0]}, and the student's vocabulary has {self._vocabulary}")
        if len(logprobs) != len(ids) or not all(math.isfinite(value) for value in logprobs):
            raise self._odd(f"{len(ids)} tokens have {len(logprobs)} log-probabilities, or some that are no numbers")
        return ids, logprobs, reason

    def _odd(self, what: str) -> DrklError:
        return DrklError(
            f"The vLLM server at {self._client.address} does not answer as asked: {what}. Start a server for this run "
            f"with `drkl rollout-server CONFIG`. {GO_ON}"
        )

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        """Raise DrklError where the server would cut an answer short."""
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        if self._longest is not None and longest > self._longest:
            raise DrklError(
                f"The vLLM server at {self._client.address} takes {self._longest} tokens of prompt and answer, and a "
                f"prompt with its longest answer has {longest}. Start it with --max-model-len {longest} or more "
                "(`drkl rollout-server CONFIG` does), or lower rollout_max_new_tokens."
            )
        highest = max(max(request.prompt_ids) for request in requests)
        assert highest < self._vocabulary, "rows are checked against the models"

    def _look(self) -> None:
        """Find out what is served, and refuse another model than the student."""
        client = self._client
        self._check_version(client.ask("/version"))
        models = client.ask("/v1/models")
        try:
            served = models["data"][0]
            name, longest = str(served["id"]), served.get("max_model_len")
            self._longest = None if longest is None else int(longest)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self._odd("/v1/models names no model with its max_model_len") from error
        self._check_config(str(served.get("root") or ""))
        self._model = name
        self._check_vocabulary()

    def _check_version(self, answer: Any) -> None:
        version = printable(str(answer.get("version"))) if isinstance(answer, dict) else ""
        numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
        if numbers is None:
            raise self._odd(f"its /version is {version or printable(repr(answer))}")
        found = tuple(int(part or 0) for part in numbers.groups())
        if found < OLDEST:
            raise DrklError(
                f"The vLLM server at {self._client.address} is version {version}, whose answers have no token ids. Use "
                f"vLLM {'.'.join(map(str, TESTED))}, with which drkl is tested."
            )
        if found[:2] != TESTED:
            _log.warning(
                "The vLLM server is version %s; drkl is tested with %s. Each time it has new weights, its "
                "log-probabilities are compared with the student's.", version, ".".join(map(str, TESTED)),
            )  # fmt: skip

    def _check_config(self, root: str) -> None:
        """Raise DrklError where the served folder, if it is seen here, holds a model of another kind or size."""
        path = Path(root, "config.json")
        if not root or not path.is_file():
            return
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            theirs = dict(theirs.get("text_config") or theirs)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return
        ours = self._student.config.get_text_config().to_dict()
        other = [key for key in _SIZES if None not in (ours.get(key), theirs.get(key)) and ours[key] != theirs[key]]
        if other:
            differences = ", ".join(f"{key} {theirs[key]} and not {ours[key]}" for key in other)
            raise DrklError(
                f"The vLLM server at {self._client.address} serves another model than the student: {root!r} has "
                f"{differences}. Start one for this run with `drkl rollout-server CONFIG`."
            )

    def _check_vocabulary(self) -> None:
        """Raise DrklError where the server's vocabulary is smaller than the student's."""
        last = self._vocabulary - 1
        try:
            self._client.ask("/v1/completions", self._plain([last], 1, 0))
        except Refused as error:
            name, self._model = self._model, ""
            raise DrklError(
                f"The vLLM server at {self._client.address} does not read token {last}, the last of the student's "
                f"vocabulary, so its model {name!r} is another one. Start a server for this run with `drkl "
                f"rollout-server CONFIG`. It says: {error}"
            ) from error

    def _load(self) -> None:
        """Let the server load the newest weights, and compare it with the student."""
        assert self._current is not None, "the weights are written before"
        try:
            self._client.ask(
                "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._current)}}
            )
        except Refused as error:
            raise DrklError(
                f"The vLLM server did not load the student's weights from {str(self._current)!r}: {error} Both have to "
                "see this folder under the same path (rollout_server_folder), and the server's model has to be the "
                "student's. After a failed loading the server has to be started again."
            ) from error
        # Attention states of the prompts were computed with the old weights.
        done = self._client.ask("/reset_prefix_cache", {})
        if isinstance(done, dict) and done.get("success") is False:
            raise self._odd("it keeps what it computed with the old weights; does another program use it?")
        self._probe()

    def _probe(self) -> None:
        """Raise DrklError where server and student give the same tokens other log-probabilities."""
        room = PROBE_TOKENS
        if self._longest is not None:
            room = max(1, min(room, self._longest - max(map(len, self._prompts))))
        theirs, ours = [], []
        for number, prompt in enumerate(self._prompts):
            body = self._client.ask("/v1/completions", self._plain(prompt, room, number))
            ids, logprobs, _ = self._generated(body, prompt)
            theirs += logprobs
            ours.append(logprobs_of(self._student, prompt, ids))
        differences = (torch.tensor(theirs) - torch.cat(ours)).abs()
        worst, mean = float(differences.max()), float(differences.mean())
        # Written so that a difference that is no number fails.
        if not (worst <= TOLERANCE or (self._computes_in_half() and mean <= HALF_TOLERANCE)):
            limit = f"a mean of {HALF_TOLERANCE:g}" if self._half else f"{TOLERANCE:g}"
            raise DrklError(
                f"After its weights were renewed, the vLLM server at {self._client.address} does not compute what the "
                f"student does: the log-probabilities of {len(theirs)} tokens differ by up to {worst:.2g} (mean "
                f"{mean:.2g}; at most {limit} is rounding). The known cause is a served model whose head is tied to "
                "its embeddings: some versions go on with the old head. `drkl rollout-server CONFIG` serves the "
                f"student with a head of its own; start the server with it. {GO_ON}"
            )

    def _computes_in_half(self) -> bool:
        if self._half is None:
            # Takes vLLM several seconds: it looks for everything that is installed.
            info = self._client.ask("/server_info?config_format=json")
            try:
                theirs = str(info["vllm_config"]["model_config"]["dtype"])
            except (KeyError, TypeError) as error:
                raise self._odd("/server_info names no dtype") from error
            self._half = "float32" not in theirs or self._student.dtype != torch.float32
        return self._half


@torch.no_grad()
def logprobs_of(student: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return the student's own log-probabilities `[tokens]` of an answer's tokens, in the precision of its weights."""
    # accelerate puts a forward in the model's place that computes in half precision.
    wrapped = vars(student).pop("forward", None)
    try:
        with in_eval_mode(student):
            logits = own_logits(student, [*prompt, *ids])
    finally:
        if wrapped is not None:
            vars(student)["forward"] = wrapped
    logp = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return logp.gather(-1, torch.tensor(list(ids), device=logp.device)[:, None])[:, 0].cpu()
