"""A teacher that the real vLLM serves: `make test-vllm`, with the executable in the environment variable VLLM."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import drkl
from benchmarks.vllm_server import Server, free_address
from drkl.data.collate import collate, teacher_inputs
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX
from drkl.runs import RunFolder, read_yaml
from drkl.teachers.cached import TeacherCache
from drkl.teachers.served_checks import check_distributions, check_length, check_vocabulary
from tests.models import tiny
from tests.training import tiny_runs
from tests.vllm.test_vllm import SIZES, STARTUP

pytestmark = pytest.mark.vllm

K, MAX_LOGPROBS, LONGEST = 8, 30, 90
NAME = "served-teacher"
KEY = "a-key-of-the-tests"
TOLERANCE = 1e-3
"""Largest difference of a log-probability between vLLM and transformers, both in fp32; 5e-5 was measured."""
ROWS = [
    Row("a", (5, 6), (7, 8, 2), None),
    Row("b", (9,), (10, 11, 12, 13, 2), None, (True, False, False, True, True)),
    Row("c", (20, 21, 22), (23,), None),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny.save(tiny.llama(7, layers=3, **SIZES), folder / "teacher")
    tiny.save(tiny.llama(1, layers=2, vocab=70, **SIZES), folder / "student")
    tiny_runs.write_rows(folder / "data.jsonl")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    if not os.environ.get("VLLM"):
        pytest.skip("the environment variable VLLM names no executable")
    address = free_address()
    host, port = address.removeprefix("http://").split(":")
    settings = {
        "served-model-name": NAME, "host": host, "port": port, "dtype": "float32", "max-model-len": str(LONGEST),
        "max-logprobs": str(MAX_LOGPROBS), "api-key": KEY,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = [os.environ["VLLM"], "serve", str(root / "teacher"), "--enforce-eager", *flags]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (root / "server.log").open("w") as file:
        running = Server(command, os.environ | variables, address, stdout=file, stderr=subprocess.STDOUT)
    if not running.wait(STARTUP):
        running.stop(signal.SIGKILL)
        raise AssertionError(f"The server did not start:\n{(root / 'server.log').read_text()[-3000:]}")
    yield running
    running.stop(signal.SIGINT)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRKL_TEACHER_KEY", KEY)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def served(server: Server, root: Path, **settings: Any) -> drkl.ServedTeacher:
    teacher = drkl.ServedTeacher(f"{server.address}/v1", NAME, **({"top_k": K, "server_timeout": 120.0} | settings))
    teacher.settle(str(root / "student"))
    return teacher


def test_it_knows_what_transformers_says(server: Server, root: Path) -> None:
    teacher = served(server, root)
    assert teacher.source == str(root / "teacher") and teacher.served.longest == LONGEST
    batch = collate(ROWS, pad_id=0)
    labels = batch["labels"]
    inputs, keep = teacher_inputs(batch)
    topk = teacher.hidden_at(inputs, keep, labels=labels[labels != IGNORE_INDEX])
    model = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32).eval()
    place = 0
    for row in ROWS:
        for count, token in enumerate(row.response_ids):
            if row.trained is not None and not row.trained[count]:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([[*row.prompt_ids, *row.response_ids[:count]]])).logits[0, -1]
            logp = logits.double().log_softmax(-1).numpy()
            best = np.argsort(-logp, kind="stable")[:K]
            assert topk.ids[place].tolist() == best.tolist()
            np.testing.assert_allclose(topk.logits[place].numpy(), logp[best], atol=TOLERANCE)
            rest = np.log(1 - np.exp(logp[best]).sum())
            np.testing.assert_allclose(float(topk.log_rest[place, 0]), rest, atol=TOLERANCE)
            np.testing.assert_allclose(float(topk.label_logits[place]), logp[token], atol=TOLERANCE)
            place += 1
    assert place == len(topk)


def test_the_checks_pass_and_say_what_does_not_fit(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = served(server, root)
    check_vocabulary(teacher, tiny.tokenizer())
    check_distributions(teacher, [[1, 5, 9], [20, 30, 40, 50], list(range(5, 60))])
    check_length(teacher, LONGEST - 1, "r")
    teacher.ask([question(LONGEST - 1)])
    with pytest.raises(DrklError, match=r"takes 89: its --max-model-len is 90"):
        check_length(teacher, LONGEST, "r")
    with pytest.raises(DrklError, match=r"refuses /v1/completions"):
        teacher.ask([question(LONGEST)])
    with pytest.raises(DrklError, match=r"top_k is 31, .* Start it with --max-logprobs 31 or more"):
        check_distributions(served(server, root, top_k=31), [[1, 5, 9]])
    # A tokenizer with two words the other way round.
    other = tiny.tokenizer()
    monkeypatch.setattr(type(other), "__call__", lambda self, text, **_: {"input_ids": [5, 5, 5]})
    with pytest.raises(DrklError, match=r"The vocabularies differ: of the text"):
        check_vocabulary(teacher, other)
    with pytest.raises(DrklError, match=rf"does not serve 'big'; it serves '{NAME}'"):
        drkl.ServedTeacher(server.address, "big").settle("")
    assert not teacher.reads(64) and teacher.reads(63)
    monkeypatch.setenv("DRKL_TEACHER_KEY", "another")
    with pytest.raises(DrklError, match=r"HTTP 401.*Set DRKL_TEACHER_KEY"):
        drkl.ServedTeacher(server.address, NAME).settle("")


def question(length: int) -> Any:
    from drkl.teachers.served import Question

    return Question((*range(5, 45), *range(5, length - 35)), (length - 2,))


@pytest.mark.parametrize("rollouts", [{}, {"share": 0.5, "max_new_tokens": 6}])
def test_a_student_is_trained_end_to_end(server: Server, root: Path, rollouts: dict[str, Any]) -> None:
    """A server, a name and a k; the student's head has rows that the teacher's has not."""
    name = "on" if rollouts else "off"
    values = tiny_runs.config(
        root, run={"name": name}, student={"init": "pretrained", "model": str(root / "student"), "layers": None},
        rollouts=rollouts,
    )  # fmt: skip
    values["teacher"] = {"server": f"{server.address}/v1", "model": NAME, "top_k": K}
    config = tiny_runs.write_config(values, root / f"{name}.yaml")
    done = tiny_runs.call("distill", config)
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(root / "runs" / name)
    assert tiny_runs.steps(run) == [1, 2, 3, 4, 5, 6]
    losses = [line["eval_loss"] for line in run.read_train_log() if "eval_loss" in line]
    assert losses[-1] < losses[0]
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in run.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert read_yaml(run.config_path)["teacher"]["server"] == f"{server.address}/v1"
    if not rollouts:
        made = tiny_runs.call("cache", config, "--kind", "topk", "--output", root / "cache")
        assert made.returncode == 0, made.stderr
        assert TeacherCache.open(root / "cache").manifest["k"] == K
        again = tiny_runs.call("distill", config, "run.name=cached", f"teacher.cache={root / 'cache'}")
        assert again.returncode == 0, again.stderr
        cached = [line["loss"] for line in RunFolder.open(root / "runs" / "cached").read_train_log() if "loss" in line]
        live = [line["loss"] for line in run.read_train_log() if "loss" in line]
        assert cached == pytest.approx(live, abs=TOLERANCE)
