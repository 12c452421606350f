"""Servers and hubs that time out, talk nonsense, or come back as another."""

from __future__ import annotations

import gzip
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults import hostile
from tests.faults.conftest import Injected
from tests.faults.forked import Runner, environment
from tests.models import tiny
from tests.rollouts.fake_vllm import Drop, FakeVllm, rescored, serving

K = 8
Answer = Callable[[socket.socket], None]


def read(connection: socket.socket) -> bytes:
    return connection.recv(1 << 16)


def dripping(first: bytes, piece: bytes, every: float = 0.2) -> Answer:
    """An answer that goes on for ever, a little at a time."""

    def answer(connection: socket.socket) -> None:
        read(connection)
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(every)

    return answer


def once(data: bytes, *, wait: float = 0) -> Answer:
    def answer(connection: socket.socket) -> None:
        read(connection)
        time.sleep(wait)
        connection.sendall(data)

    return answer


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


MODELS = json.dumps({"data": [{"id": "big", "max_model_len": 96}]}).encode()
ANSWERS: dict[str, Answer] = {
    "a byte of the body at a time": dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "a byte of a body without a length": dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "a chunk at a time": dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a byte of the head at a time": dripping(b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "a head line at a time": dripping(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n", 0.5),
    "nothing": lambda connection: time.sleep(60),
    "HTTP/0.9": once(b"<html>hello</html>"),
    "nonsense": once(bytes(range(256)) * 100),
    "html": once(http("200 OK", b"<html>\x1b[31m</html>")),
    "gzip": once(http("200 OK", gzip.compress(b" " * (1 << 24)), "Content-Encoding: gzip")),
    "brackets": once(http("200 OK", b"[" * 200_000)),
    "digits": once(http("200 OK", b'{"data": ' + b"9" * 5_000 + b"}")),
    "another shape": once(http("200 OK", b'{"data": {"id": []}}')),
    "null": once(http("200 OK", b"null")),
    "a redirect to a file": once(http("302 Found", b"", "Location: file:///etc/passwd")),
    "status 500": once(http("500 Error", b'{"error": {"message": "\x1b]0;x\x07"}}')),
    "status 401": once(http("401 No", b"")),
    "an end in the middle": once(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"),
    "an end at once": lambda connection: None,
    "a length below zero": once(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + MODELS),
    "a head of a megabyte": once(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    "a thousand head lines": once(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 1_000 + b"\r\n"),
    "another model": once(http("200 OK", b'{"data": [{"id": "\x1b[31mother"}]}')),
}


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A teacher's server that hangs, sends a byte at a time for ever, breaks off, answers with HTML, HTTP/0.9, "
    "gzip, redirects to a file, or in another shape",
    does="Stops within `teacher.server_timeout` with one message that names the address.",
)
def test_a_server_that_talks_nonsense(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = hostile.write_config(tmp_path)
    values = yaml.safe_load(config.read_text())
    student = values["teacher"]["model"]
    for name, answer in ANSWERS.items():
        with hostile.listening(answer) as address, injected(name):
            values["teacher"] = {
                "model": "big",
                "server": address,
                "top_k": K,
                "server_timeout": 3,
                "tokenizer": student,
            }
            values["student"] = {"init": "pretrained", "model": student}
            config.write_text(yaml.safe_dump(values))
            done = runner.call("distill", config, until=240)
            hostile.assert_refused(done, address.removeprefix("http://"))
            hostile.assert_plain(done)
            assert len(done.err) < 3_000


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny.llama(9), tiny.tokenizer(), name="big")) as server:
        yield server


def logprobs(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Choices with the entries of their prompt changed."""

    def edit(choices: Any) -> Any:
        choices[0]["prompt_logprobs"] = change(choices[0]["prompt_logprobs"])
        return choices

    return edit


def each(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    return logprobs(lambda entries: [None, *({k: change(v) for k, v in entry.items()} for entry in entries[1:])])


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A teacher's server that answers with NaN, infinite or positive log-probabilities, other ids, counts, "
    "orders or prompts, missing fields, or as another model once it was away",
    does="Refused by what is wrong with the answer; no number of it is used.",
)
def test_a_server_that_answers_wrong(runner: Runner, fake: FakeVllm, tmp_path: Path, injected: Injected) -> None:
    folder = str(tiny.save(tiny.llama(1, layers=2), tmp_path / "student"))
    teacher = {"model": "big", "server": fake.address, "top_k": K, "tokenizer": folder, "server_timeout": 20}
    config = hostile.write_config(
        tmp_path, teacher=teacher | {"dtype": "auto"}, student={"init": "pretrained", "model": folder, "layers": None}
    )
    changes: dict[str, Callable[[Any], Any]] = {
        "NaN": each(lambda entry: entry | {"logprob": math.nan}),
        "+inf": each(lambda entry: entry | {"logprob": math.inf}),
        "positive": each(lambda entry: entry | {"logprob": 0.5}),
        "true": each(lambda entry: entry | {"logprob": True}),
        "text": each(lambda entry: entry | {"logprob": "-1"}),
        "no logprob": each(lambda entry: {"rank": 1}),
        "all alike": each(lambda entry: entry | {"logprob": -0.1}),
        "ids beyond": logprobs(lambda e: [None, *({str(10**9 + int(k)): v for k, v in x.items()} for x in e[1:])]),
        "no ids": logprobs(lambda e: [None, *({f"{k}x": v for k, v in x.items()} for x in e[1:])]),
        "an id of 5,000 digits": logprobs(lambda e: [None, *({**x, "9" * 5_000: x[next(iter(x))]} for x in e[1:])]),
        "one too few": logprobs(lambda e: e[:-1]),
        "one too many": logprobs(lambda e: [*e, e[-1]]),
        "the other way round": logprobs(lambda e: [None, *e[:0:-1]]),
        "null": logprobs(lambda e: None),
        "few tokens": logprobs(lambda e: [None, *(dict([*x.items()][:2]) for x in e[1:])]),
        "no choice": lambda choices: [],
        "two choices": lambda choices: choices * 2,
        "another prompt": lambda choices: [choices[0] | {"prompt_token_ids": [1, 2, 3]}],
    }
    for name, change in changes.items():
        fake.fault = rescored(change)
        with injected(name):
            hostile.assert_refused(runner.call("distill", config, "--overwrite", until=240), fake.address)
    fake.fault = None
    right = fake.model
    other = tiny.llama(5)
    scored = [0]

    def away(server: FakeVllm, where: str, body: Any) -> None:
        """Be away for one question, and be another model then."""
        if where == "/v1/completions" and "prompt_logprobs" in body:
            scored[0] += 1
            if scored[0] == 60:
                server.model = other
                raise Drop

    fake.fault = away
    with injected("another model once it was away"):
        done = runner.call("distill", config, "--overwrite", until=240)
        assert scored[0] >= 60, "it was never away"
        hostile.assert_refused(done, "another model")
    fake.model = right


HUB: dict[str, Answer] = {
    "status 500": once(http("500 Error", b"<html>\x1b[31m</html>")),
    "html": once(http("200 OK", b"<html>hello</html>", "ETag: x", "X-Repo-Commit: x")),
    "a redirect to a file": once(http("302 Found", b"", "Location: file:///etc/passwd")),
    "an end at once": lambda connection: None,
}


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A hub (`HF_ENDPOINT`) that answers a model's or a data set's id with errors, HTML, redirects to a file, "
    "or not at all",
    does="One message that says where the id was looked for.",
)
def test_a_hub_that_talks_nonsense(tmp_path: Path, injected: Injected) -> None:
    config = hostile.write_config(tmp_path)
    for name, answer in HUB.items():
        with hostile.listening(answer) as address:
            variables = {
                "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "hf"), "HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3",
            }  # fmt: skip
            for changes in (("teacher.model=someone/model",), ("data.path=null", "data.dataset=someone/rows")):
                with injected(f"{name}: {changes[-1]}"):
                    done = subprocess.run(
                        [sys.executable, "-m", "drkl", "data", str(config), *changes], env=environment(variables),
                        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=400,
                    )  # fmt: skip
                    assert done.returncode == 2, done.stderr[-500:]
                    assert "Traceback" not in done.stderr, done.stderr[-800:]
                    assert "someone/" in done.stderr, done.stderr[-300:]
                    assert "root:" not in done.stdout + done.stderr
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
