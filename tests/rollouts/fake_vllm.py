"""A server that answers as vLLM 0.32 does, in this process: its answers are those of a tiny model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

Fault = Callable[["FakeVllm", str, Any], "tuple[int, str] | None"]
"""From a path and a body to the status and text in the place of the right answer; None leaves it."""


class Drop(Exception):
    """Raised by a fault: the connection breaks."""


class Cut(Exception):
    """Raised by a fault: the connection breaks in the middle of an answer."""


class FakeVllm:
    """What one server holds, and what it was asked.

    Args:
        model: what it starts with.
        tokenizer: of ``/tokenize``; None where there is no such route.
        facts: in the place of the right ones: name, version, dtype, max_model_len, root, vocabulary, max_logprobs, key.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, **facts: Any) -> None:
        self.start = self.model = model
        self.tokenizer = tokenizer
        self.facts: dict[str, Any] = {
            "name": "student", "version": "0.32.0", "dtype": "torch.float32", "max_model_len": 96, "root": "nowhere",
            "vocabulary": model.config.vocab_size, "max_logprobs": 20,
        } | facts  # fmt: skip
        self.asked: list[tuple[str, Any]] = []
        self.fault: Fault | None = None
        self.tied = False
        """Whether it goes on with the head that it started with, as vLLM does on a CPU with a tied one."""
        self.lock = threading.Lock()
        self.address = ""

    def bodies(self, path: str = "/v1/completions") -> list[Any]:
        return [body for where, body in self.asked if where == path]

    def answer(self, path: str, body: Any) -> tuple[int, str]:
        with self.lock:
            self.asked.append((path, body))
            odd = self.fault(self, path, body) if self.fault is not None else None
            return self._right(path, body) if odd is None else odd

    def _right(self, path: str, body: Any) -> tuple[int, str]:
        if path == "/version":
            return 200, json.dumps({"version": self.facts["version"]})
        if path == "/v1/models":
            served = {
                "id": self.facts["name"],
                "root": self.facts["root"],
                "max_model_len": self.facts["max_model_len"],
            }
            return 200, json.dumps({"data": [served]})
        if path.startswith("/server_info"):
            return 200, json.dumps({"vllm_config": {"model_config": {"dtype": self.facts["dtype"]}}})
        if path == "/reset_prefix_cache":
            return 200, json.dumps({"success": True})
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            return self._reload(Path(body["kwargs"]["weights_path"]))
        if path == "/v1/completions":
            if body["model"] != self.facts["name"]:
                return 404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
            if isinstance(body["prompt"], str):
                return 200, json.dumps({"choices": [{"index": 0, "prompt_token_ids": self._ids(body)}]})
            if len(body["prompt"]) + body["max_tokens"] > self.facts["max_model_len"]:
                return 400, json.dumps({"error": {"message": "The prompt is longer than the maximum model length"}})
            if (asked := body.get("prompt_logprobs", 0)) > (most := self.facts["max_logprobs"]):
                words = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {most}"
                return 400, json.dumps({"error": {"message": words}})
            if max(body["prompt"]) >= self.facts["vocabulary"]:
                return 400, json.dumps({"error": {"message": f"Token id {max(body['prompt'])} is out of vocabulary"}})
            return 200, json.dumps(self._complete(body))
        if path == "/tokenize" and self.tokenizer is not None:
            return 200, json.dumps({"tokens": self._ids(body), "max_model_len": self.facts["max_model_len"]})
        return 404, json.dumps({"detail": "Not Found"})

    def _ids(self, body: Any) -> list[int]:
        ids: list[int] = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return ids

    def _reload(self, folder: Path) -> tuple[int, str]:
        if not (folder / "model.safetensors").is_file():
            return 500, json.dumps({"error": {"message": f"Worker failed with error: no {folder}"}})
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if self.tied:
            head: Any = self.start.get_output_embeddings()
            self.model.get_output_embeddings().weight.data.copy_(head.weight)
        return 200, json.dumps({"results": [None]})

    @torch.no_grad()
    def _complete(self, body: Any) -> Any:
        if "prompt_logprobs" in body:
            return self.scored(body)
        numbers = torch.Generator().manual_seed(body.get("seed", 0))
        ids, logprobs, reason = list(body["prompt"]), [], "length"
        for _ in range(min(body["max_tokens"], self.facts["max_model_len"] - len(body["prompt"]))):
            logp = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            scores = logp.clone()
            for token, bias in body.get("logit_bias", {}).items():
                scores[int(token)] += bias
            if body["temperature"] == 0:
                ids.append(int(scores.argmax()))
            else:
                probabilities = (scores / body["temperature"]).softmax(-1)
                ids.append(int(torch.multinomial(probabilities, 1, generator=numbers)))
            logprobs.append(float(logp[ids[-1]]))
            if ids[-1] in body.get("stop_token_ids", ()):
                reason = "stop"
                break
        new = ids[len(body["prompt"]) :]
        choice = {
            "token_ids": new, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason,
            "prompt_token_ids": body["prompt"],
        }  # fmt: skip
        return {"choices": [choice]}

    @torch.no_grad()
    def scored(self, body: Any) -> Any:
        """A completion with the log-probabilities of its prompt: the k best at each place, and the token there."""
        prompt, k = body["prompt"], body["prompt_logprobs"]
        logp = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        entries: list[Any] = [None]
        for place, token in enumerate(prompt[1:]):
            best = logp[place].topk(min(k, len(logp[place]))).indices.tolist()
            ranks = {number: rank for rank, number in enumerate(best, start=1)}
            entry = {
                str(number): {
                    "logprob": float(logp[place, number]),
                    "rank": ranks.get(number, 99),
                    "decoded_token": "?",
                }
                for number in dict.fromkeys([token, *best])
            }
            entries.append(entry)
        choice = {"index": 0, "text": "?", "finish_reason": "length", "prompt_logprobs": entries}
        return {"choices": [choice | ({"prompt_token_ids": prompt} if body.get("return_token_ids") else {})]}


@contextmanager
def serving(fake: FakeVllm) -> Iterator[FakeVllm]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _do(self, body: Any) -> None:
            missing = 0
            try:
                status, text = fake.answer(self.path, body)
            except Drop:
                self.close_connection = True
                return
            except Cut:
                status, text, missing = 200, '{"choices": [', 99
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + missing))
            self.close_connection = missing > 0
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fake.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def on(path: str, status: int, text: str, *, times: int = 10**6) -> Fault:
    """A fault: the first answers of a path are this one."""
    left = [times]

    def fault(fake: FakeVllm, where: str, body: Any) -> tuple[int, str] | None:
        if where.split("?")[0] != path or left[0] <= 0:
            return None
        left[0] -= 1
        return status, text

    return fault


def changed(**fields: Any) -> Fault:
    """A fault: completions with other fields of their choice; a value may be a function of the right one."""

    def fault(fake: FakeVllm, where: str, body: Any) -> tuple[int, str] | None:
        if where != "/v1/completions" or "stop_token_ids" not in body:
            return None
        answer = fake._complete(body)
        choice = answer["choices"][0]
        for name, value in fields.items():
            choice[name] = value(choice[name]) if callable(value) else value
        return 200, json.dumps(answer)

    return fault


def slow(seconds: float) -> Fault:
    def fault(fake: FakeVllm, where: str, body: Any) -> None:
        if where == "/v1/completions":
            time.sleep(seconds)

    return fault


def rescored(change: Callable[[Any], Any], *, after: int = 0) -> Fault:
    """A fault: the answers to scored prompts with their choice changed, after so many right ones."""
    seen = [0]

    def fault(fake: FakeVllm, where: str, body: Any) -> tuple[int, str] | None:
        if where != "/v1/completions" or "prompt_logprobs" not in body:
            return None
        seen[0] += 1
        if seen[0] <= after:
            return None
        answer = fake.scored(body)
        answer["choices"] = change(answer["choices"])
        return 200, json.dumps(answer)

    return fault
