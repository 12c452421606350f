"""The server of a run: what `drkl rollout-server` writes and starts, and runs whose answers a server writes."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from drkl import client
from drkl.errors import DrklError
from drkl.models.student import make_student
from tests.command_line import Cli
from tests.models import tiny
from tests.rollouts.fake_vllm import Drop, FakeVllm, serving
from tests.training import tiny_runs


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny.llama(1, layers=2))) as server:
        yield server


def on_policy(fake: FakeVllm | None = None, **more: Any) -> dict[str, Any]:
    address = "http://127.0.0.1:8100" if fake is None else fake.address
    return {"share": 1.0, "generator": "vllm", "server": address, "server_timeout": 20} | more


def config(root: Path, **sections: Any) -> Path:
    return tiny_runs.write_config(tiny_runs.config(root, **sections), root / "c.yaml")


def test_the_command_serves_the_student_that_the_run_starts_from(cli: Cli, tmp_path: Path) -> None:
    recipe = config(tmp_path, rollouts=on_policy(max_new_tokens=10), stages=tiny_runs.STAGES)
    done = cli("rollout-server", recipe, "run.seed=4", "--print", "--", "--gpu-memory-utilization", "0.4")
    assert done.code == 0, done.err
    words = shlex.split(done.out)
    folder = tmp_path / "runs" / "r-rollout-server" / "start"
    assert words[:6] == ["env", "VLLM_SERVER_DEV_MODE=1", "VLLM_NO_USAGE_STATS=1", "vllm", "serve", str(folder)]
    flags = dict(zip(words[6::2], words[7::2], strict=True))
    assert flags == {
        "--served-model-name": "student", "--host": "127.0.0.1", "--port": "8100", "--dtype": "float32",
        "--generation-config": "vllm", "--max-model-len": "90",
        "--gpu-memory-utilization": "0.4",
    }  # fmt: skip
    spec = tiny_runs.specs(tiny_runs.config(tmp_path), ["run.seed=4"])[0]
    start = make_student(spec.student, str(spec.teacher and spec.teacher.model), 4)
    tiny.assert_alike(AutoModelForCausalLM.from_pretrained(folder), start)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert (folder / "tokenizer.json").is_file()
    # The run's own folder is not there yet, and may be made.
    assert not (tmp_path / "runs" / "r").exists()


def test_it_needs_no_address(cli: Cli, tmp_path: Path) -> None:
    recipe = config(tmp_path, rollouts={"share": 1.0, "generator": "vllm", "server": None})
    done = cli("rollout-server", recipe, "--print")
    assert done.code == 0 and "--host 127.0.0.1 --port 8000" in done.out


def test_it_becomes_the_server(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    started: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *words: started.extend(words))
    monkeypatch.setenv("KEPT", "1")
    recipe = config(tmp_path)
    done = cli("rollout-server", recipe, "--vllm", program, "--host", "0.0.0.0", "--port", "8200")
    assert done.code == 0, done.err
    assert started[0] == str(program) and started[1][:2] == [str(program), "serve"]
    assert started[2]["VLLM_SERVER_DEV_MODE"] == "1" and started[2]["KEPT"] == "1"
    assert f"drkl distill {recipe} rollouts.generator=vllm rollouts.server=http://0.0.0.0:8200" in done.out


@pytest.mark.parametrize(
    ("sections", "words", "message"),
    [
        ({}, [], r"There is no executable 'vllm' here\. Install vLLM: .*--vllm PATH/bin/vllm"),
        ({"task": "classification"}, ["--print"], r"classification|labels"),
        ({"rollouts": {"server": "http://x:y"}}, ["--print"], r"expected .*http://127"),
        ({"nonsense": 1}, ["--print"], r"unknown key"),
    ],
)
def test_what_cannot_be_served_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], words: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = config(tmp_path, **sections)
    done = cli("rollout-server", recipe, *words)
    assert done.code == 2 and "Traceback" not in done.err
    assert re.search(message, done.err), done.err
    assert not (tmp_path / "runs").exists()


def test_an_encoder_decoder_is_refused(cli: Cli, tmp_path: Path) -> None:
    recipe = config(tmp_path)
    tiny.save(tiny.t5(), tmp_path / "t5")
    done = cli("rollout-server", recipe, f"teacher.model={tmp_path / 't5'}", "--print")
    assert done.code == 2 and "encoder-decoders, which vLLM does not serve" in done.err


@pytest.mark.slow
def test_a_run_s_answers_come_from_the_server(fake: FakeVllm, tmp_path: Path) -> None:
    values = tiny_runs.config(
        tmp_path, rollouts=on_policy(fake, refresh_every=2, max_new_tokens=6), training={"max_steps": 4}
    )
    run = tiny_runs.train(values)
    assert tiny_runs.steps(run) == [1, 2, 3, 4]
    loaded = [Path(body["kwargs"]["weights_path"]).name for body in fake.bodies("/collective_rpc")]
    assert loaded == ["weights-000000", "weights-000002"]
    asked = [body for body in fake.bodies() if "stop_token_ids" in body]
    assert asked and all(body["max_tokens"] == 6 for body in asked)


@pytest.mark.slow
def test_the_probe_is_exact_where_training_computes_in_bf16(fake: FakeVllm, tmp_path: Path) -> None:
    """accelerate's autocast is left out of it: in bf16 the two would differ by more than rounding in fp32."""
    tiny_runs.train(
        tiny_runs.config(
            tmp_path, rollouts=on_policy(fake, max_new_tokens=6), training={"max_steps": 2, "precision": "bf16"}
        )
    )
    assert not [path for path, _ in fake.asked if path.startswith("/server_info")]


@pytest.mark.slow
def test_a_run_whose_server_goes_is_resumed(fake: FakeVllm, tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, rollouts=on_policy(fake, max_new_tokens=6), training={"max_steps": 4})
    whole = tiny_runs.weights(tiny_runs.train(values | {"run": values["run"] | {"name": "whole"}}))

    def gone(server: FakeVllm, path: str, body: Any) -> None:
        if path == "/collective_rpc" and body["kwargs"]["weights_path"].endswith("weights-000003"):
            server.fault = drop
            raise Drop

    def drop(server: FakeVllm, path: str, body: Any) -> None:
        raise Drop

    fake.fault = gone
    with pytest.raises(DrklError, match=r"cannot be reached .*resume the run"):
        tiny_runs.train(values)
    fake.fault, fake.model = None, fake.start
    assert tiny_runs.weights(tiny_runs.train(values, "resume")) == whole
