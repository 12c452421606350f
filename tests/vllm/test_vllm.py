"""The real vLLM: `make test-vllm`, with the executable in the environment variable VLLM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.vllm_server import Server, free_address
from drkl.client import Client
from drkl.errors import DrklError
from drkl.models.adapter import add_adapter
from drkl.rollouts import served
from drkl.rollouts.answers import Request
from drkl.rollouts.config import RolloutsConfig
from drkl.rollouts.server import CALLER, TOLERANCE, ServerWriter
from drkl.runs import RunFolder
from tests.models import tiny
from tests.training import tiny_runs

pytestmark = pytest.mark.vllm

STOPS = [4, 9]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
"""vLLM's attention has no heads of fewer than 32 numbers on a CPU."""
STARTUP = 900
"""Seconds; one to five minutes where the machine does nothing else."""


def make_config(root: Path, address: str, **sections: Any) -> Path:
    if not (root / "teacher").exists():
        tiny.save(tiny.llama(7, layers=3, **SIZES), root / "teacher")
        tiny_runs.write_rows(root / "data.jsonl")
    rollouts = {"share": 1.0, "generator": "vllm", "server": address, "server_timeout": 120.0}
    values = tiny_runs.config(root, rollouts=rollouts, **sections)
    return tiny_runs.write_config(values, root / "config.yaml")


def start(config: Path, address: str, log: Path) -> Server:
    """`drkl rollout-server` of a config."""
    words = tiny_runs.command("rollout-server", config, "--vllm", os.environ["VLLM"], "--", "--enforce-eager")
    variables = tiny_runs.environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        running = Server(words, variables, address, stdout=file, stderr=subprocess.STDOUT)
    if not running.wait(STARTUP):
        running.stop(signal.SIGKILL)
        raise AssertionError(f"The server did not start:\n{log.read_text()[-3000:]}")
    return running


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    """One for all tests; the last of them kills it."""
    if not os.environ.get("VLLM"):
        pytest.skip("the environment variable VLLM names no executable")
    address = free_address()
    running = start(make_config(root, address), address, root / "server.log")
    yield running
    running.stop(signal.SIGINT)


@pytest.fixture
def student() -> PreTrainedModel:
    return tiny.llama(5, layers=2, **SIZES)


def writer(student: PreTrainedModel, server: Server, folder: Path, **more: Any) -> ServerWriter:
    settings = {"server_timeout": 120.0} | more.pop("settings", {})
    config = RolloutsConfig(share=1.0, generator="vllm", server=server.address, **settings)
    words = {"stops": STOPS, "folder": folder, "prompts": [[1, 5, 9], [20, 30, 40, 50]]} | more
    return ServerWriter(student, tiny.tokenizer(), config, **words)


def requests(count: int = 16) -> list[Request]:
    return [Request(f"r{i}", 0, tuple(range(10, 11 + i)), (), 3 + i) for i in range(count)]


@torch.no_grad()
def own_logprobs(student: PreTrainedModel, prompt: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    """Of the whole sequence, read once more for each token."""
    found = []
    for i, token in enumerate(ids):
        logits = student(torch.tensor([[*prompt, *ids[:i]]])).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[token]))
    return found


def change(student: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("tied", [True, False])
def test_log_probabilities_are_the_student_s_after_each_sync(server: Server, tmp_path: Path, tied: bool) -> None:
    student = tiny.llama(5, layers=2, tie_word_embeddings=tied, **SIZES)
    by_server = writer(student, server, tmp_path)
    previous: Any = None
    for step in range(3):
        by_server.sync(student, step)
        answers = by_server.write(requests(), seed=1)
        for request, answer in zip(requests(), answers, strict=True):
            own = own_logprobs(student, request.prompt_ids, answer.token_ids)
            assert answer.logprobs == pytest.approx(own, abs=TOLERANCE)
        assert answers != previous
        previous = answers
        change(student)


def test_answers_repeat_end_and_have_their_length(server: Server, student: PreTrainedModel, tmp_path: Path) -> None:
    by_server = writer(student, server, tmp_path)
    by_server.sync(student, 0)
    answers = by_server.write(requests(), seed=1)
    again = by_server.write(requests()[::-1], seed=1)[::-1]
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers]
    assert any(answer.finished for answer in answers) and not all(answer.finished for answer in answers)
    for request, answer in zip(requests(), answers, strict=True):
        assert answer.finished == (answer.token_ids[-1] in STOPS)
        assert answer.finished or len(answer.token_ids) == request.max_new_tokens


def test_tokens_are_drawn_from_the_student_s_distribution(
    server: Server, student: PreTrainedModel, tmp_path: Path
) -> None:
    """First tokens of many answers to one prompt, some tokens forbidden, against the probabilities."""
    by_server = writer(student, server, tmp_path, settings={"sampling_temperature": 0.5}, vocab_size=60)
    by_server.sync(student, 0)
    count = 2000
    asked = [Request("r", stream, (10, 11), (), 1) for stream in range(count)]
    drawn = torch.tensor([answer.token_ids[0] for answer in by_server.write(asked, seed=3)])
    with torch.no_grad():
        logits = student(torch.tensor([[10, 11]])).logits[0, -1].double()
    logits[60:] = -torch.inf
    expected = count * (logits / 0.5).softmax(-1)
    found = torch.bincount(drawn, minlength=64).double()
    assert found[60:].sum() == 0
    # Pearson's statistic over the tokens that are expected five times or more, the others together.
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    found = torch.cat([found[often], found[~often].sum()[None]])
    statistic = float(((found - expected) ** 2 / expected).sum())
    freedom = len(found) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of a chi-squared number


def test_an_adapter_is_merged(server: Server, student: PreTrainedModel, tmp_path: Path) -> None:
    adapter = add_adapter(student, {"r": 2, "target_modules": ["q_proj", "down_proj"]}, 0)
    change(student)
    by_server = writer(student, server, tmp_path, adapter=adapter)
    by_server.sync(student, 0)
    answer = by_server.write(requests(1), seed=0)[0]
    own = own_logprobs(student, requests(1)[0].prompt_ids, answer.token_ids)
    assert answer.logprobs == pytest.approx(own, abs=TOLERANCE)


def test_weights_that_do_not_arrive_are_seen(
    server: Server, student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that is left out of the file stays the old one, and nothing but the probe says so."""
    monkeypatch.setattr(served, "_untie", lambda model: None)
    writer(student, server, tmp_path / "a")
    by_server = writer(tiny.llama(11, layers=2, **SIZES), server, tmp_path / "b")
    with pytest.raises(DrklError, match=r"does not compute what the student does.*head is tied"):
        by_server.sync(by_server._student, 0)


def test_what_the_server_refuses_is_named(server: Server, student: PreTrainedModel, tmp_path: Path) -> None:
    too_long = [Request("r", 0, (10,) * 90, (), 50)]
    with pytest.raises(DrklError, match=r"takes 96 tokens of prompt and answer.*has 140"):
        writer(student, server, tmp_path).write(too_long, seed=0)
    larger = tiny.llama(5, layers=2, vocab=80, **SIZES)
    with pytest.raises(DrklError, match=r"does not read token 79|vocab_size 64 and not 80"):
        writer(larger, server, tmp_path).sync(larger, 0)
    with pytest.raises(DrklError, match=r"does not exist"):
        Client(server.address, 60.0, CALLER).ask("/v1/completions", {"model": "other", "prompt": [5]})
    writer(student, server, tmp_path).sync(student, 0)  # none of it harmed the server


def test_a_run_ends_by_name_and_goes_on_when_the_server_is_back(server: Server, root: Path) -> None:
    config = make_config(root, server.address)
    done = tiny_runs.call("distill", config)
    assert done.returncode == 0, done.stderr
    whole = RunFolder.open(root / "runs" / "r")
    assert tiny_runs.steps(whole) == [1, 2, 3, 4, 5, 6]
    cut = make_config(root, server.address, run={"name": "cut"})
    process = subprocess.Popen(
        tiny_runs.command("distill", cut, "training.max_steps=60", "rollouts.server_timeout=5"),
        env=tiny_runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = root / "runs" / "cut"
    end = time.monotonic() + STARTUP
    while not list((run / "checkpoints").glob("checkpoint-*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    server.stop(signal.SIGKILL)
    _, errors = process.communicate(timeout=STARTUP)
    assert process.returncode == 2 and "Traceback" not in errors
    said = re.sub(r"\s+", " ", errors)
    assert "cannot be reached" in said and "resume the run" in said
    again = start(cut, server.address, root / "again.log")
    try:
        done = tiny_runs.call("distill", "--resume", run)
        assert done.returncode == 0, done.stderr
    finally:
        again.stop(signal.SIGINT)
    assert tiny_runs.steps(RunFolder.open(run))[-1] == 60
