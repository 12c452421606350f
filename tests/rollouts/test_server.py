"""Answers by a server: what is asked of it, the weights that it gets, and every way in which it may fail."""

from __future__ import annotations

import copy
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from drkl import client
from drkl.errors import DrklError
from drkl.models.adapter import add_adapter
from drkl.rollouts.answers import Request
from drkl.rollouts.config import RolloutsConfig
from drkl.rollouts.server import CALLER, ServerWriter
from tests.models import tiny
from tests.rollouts.fake_vllm import Drop, FakeVllm, changed, on, serving, slow

STOPS = [4, 9]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def student() -> PreTrainedModel:
    return tiny.llama(5, layers=2)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny.llama(1, layers=2))) as server:
        yield server


def writer(student: PreTrainedModel, fake: FakeVllm | str, folder: Path, **more: Any) -> ServerWriter:
    settings = {"server_timeout": 20.0} | more.pop("settings", {})
    address = fake if isinstance(fake, str) else fake.address
    config = RolloutsConfig(share=1.0, generator="vllm", server=address, **settings)
    words = {"stops": STOPS, "folder": folder, "prompts": [[1, 5, 9], [20, 30, 40, 50]]} | more
    return ServerWriter(student, tiny.tokenizer(), config, **words)


def requests(count: int = 6) -> list[Request]:
    return [Request(f"r{i}", i % 2, tuple(range(10, 11 + i)), (), 3 + i) for i in range(count)]


def own_logprobs(student: PreTrainedModel, prompt: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    """One token after the other."""
    found = []
    with torch.no_grad():
        for i, token in enumerate(ids):
            logits = student(torch.tensor([[*prompt, *ids[:i]]])).logits[0, -1]
            found.append(float(logits.log_softmax(-1)[token]))
    return found


def test_answers_are_the_student_s_own(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    asked, done = requests(), []
    by_server = writer(student, fake, tmp_path / "w", settings={"batch_size": 2})
    by_server.sync(student, 0)
    answers = by_server.write(asked, seed=1, progress=done.append)
    assert sum(done) == len(asked)
    assert any(answer.finished for answer in answers) and not all(answer.finished for answer in answers)
    for request, answer in zip(asked, answers, strict=True):
        assert answer.finished == (answer.token_ids[-1] in STOPS)
        assert answer.finished or len(answer.token_ids) == request.max_new_tokens
        own = own_logprobs(student, request.prompt_ids, answer.token_ids)
        assert answer.logprobs == pytest.approx(own, abs=1e-4)


def test_an_answer_depends_on_seed_row_and_pass_alone(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    by_server = writer(student, fake, tmp_path / "w")
    by_server.sync(student, 0)
    asked = [Request(key, stream, (10, 11), (), 8) for key in ("a", "b") for stream in (0, 1)]
    first = by_server.write(asked, seed=1)
    assert by_server.write(asked[::-1], seed=1) == first[::-1]
    assert by_server.write(asked[2:], seed=1) == first[2:]
    seeds = [body["seed"] for body in fake.bodies() if body["max_tokens"] == 8]
    assert len(set(seeds)) == len(asked) and all(0 <= seed < 2**63 for seed in seeds)
    assert by_server.write(asked, seed=2) != first


def test_every_setting_of_sampling_is_given(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    by_server = writer(student, fake, tmp_path, settings={"sampling_temperature": 0.7, "top_p": 0.9}, vocab_size=62)
    by_server.write(requests(1), seed=1)
    body = fake.bodies()[-1]
    expected = {
        "model": "student", "prompt": [10], "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
        "n": 1, "stop_token_ids": STOPS, "ignore_eos": True, "return_token_ids": True, "logprobs": 0,
        "skip_special_tokens": False, "logit_bias": {"62": -100.0, "63": -100.0},
    }  # fmt: skip
    assert {name: value for name, value in body.items() if name != "seed"} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_each_set_reach_the_server(fake: FakeVllm, tmp_path: Path, tied: bool) -> None:
    student = tiny.llama(5, layers=2, tie_word_embeddings=tied).train()
    by_server = writer(student, fake, tmp_path / "w")
    for step in (0, 3):
        before = copy.deepcopy(student.state_dict())
        by_server.sync(student, step)
        assert [path.name for path in (tmp_path / "w").iterdir()] == [f"weights-{step:06d}"]
        stored = load_file(tmp_path / "w" / f"weights-{step:06d}" / "model.safetensors")
        assert torch.equal(stored["lm_head.weight"], student.lm_head.weight)
        assert torch.equal(stored["model.embed_tokens.weight"], student.model.embed_tokens.weight)
        config = json.loads((tmp_path / "w" / f"weights-{step:06d}" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        # The student is as it was.
        assert student.config.tie_word_embeddings is tied and student.training
        assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied
        assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_an_adapter_is_merged_for_the_server_alone(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    adapter = add_adapter(student, {"r": 2, "target_modules": ["q_proj", "down_proj"]}, 0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    names = list(student.state_dict())
    by_server = writer(student, fake, tmp_path / "w", adapter=adapter)
    by_server.sync(student, 0)  # the probe compares the merged weights with the student and its adapter
    assert list(student.state_dict()) == names
    answer = by_server.write(requests(1), seed=0)[0]
    assert answer.logprobs == pytest.approx(own_logprobs(student, (10,), answer.token_ids), abs=1e-4)


def test_a_server_that_keeps_the_old_head_is_refused(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    fake.tied = True
    with pytest.raises(DrklError, match=r"differ by up to .* head is tied .*rollout-server CONFIG"):
        writer(student, fake, tmp_path).sync(student, 0)


def test_half_precision_is_measured_by_the_mean(student: PreTrainedModel, tmp_path: Path) -> None:
    with serving(FakeVllm(student, dtype="torch.bfloat16")) as fake:
        rounded = on("/collective_rpc", 200, "{}")
        fake.model = copy.deepcopy(student).bfloat16().float()
        fake.fault = rounded
        writer(student, fake, tmp_path / "a").sync(student, 0)
        fake.model = tiny.llama(6, layers=2)
        with pytest.raises(DrklError, match=r"at most a mean of 0\.1"):
            writer(student, fake, tmp_path / "b").sync(student, 0)


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [(404, '{"detail":"Not Found"}', r"VLLM_SERVER_DEV_MODE=1"), (200, '{"vllm_config":"text"}', r"names no dtype")],
)
def test_a_precision_that_is_not_told_is_named(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path, status: int, text: str, message: str
) -> None:
    fake.tied, fake.fault = True, on("/server_info", status, text)
    with pytest.raises(DrklError, match=message):
        writer(student, fake, tmp_path).sync(student, 0)


def test_a_server_that_was_started_again_gets_the_weights_again(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path
) -> None:
    by_server = writer(student, fake, tmp_path / "w", settings={"batch_size": 1})
    by_server.sync(student, 0)
    expected = by_server.write(requests(), seed=1)
    before = len(fake.bodies())

    def restart(server: FakeVllm, path: str, body: Any) -> None:
        if len(server.bodies()) == before + 3:
            server.model, server.fault = server.start, None
            raise Drop

    fake.fault = restart
    done: list[int] = []
    assert by_server.write(requests(), seed=1, progress=done.append) == expected
    assert sum(done) == len(expected)
    assert len(fake.bodies("/collective_rpc")) == 2


def test_a_busy_server_is_asked_again(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    by_server = writer(student, fake, tmp_path / "w")
    fake.fault = on("/version", 503, "starting", times=2)
    by_server.sync(student, 0)
    expected = by_server.write(requests(2), seed=1)
    fake.fault = on("/v1/completions", 429, "too many", times=1)
    assert by_server.write(requests(2), seed=1) == expected


def test_a_server_that_is_gone_is_named(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    by_server = writer(student, address, tmp_path)
    with pytest.raises(
        DrklError,
        match=r"cannot be reached \(.*refused.*\); tried 4 times\. Start it.*Then start again, or resume the run",
    ):
        by_server.sync(student, 0)
    assert not list(tmp_path.iterdir())


def test_it_may_go_while_it_writes(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    by_server = writer(student, fake, tmp_path)
    by_server.sync(student, 0)

    def drop(server: FakeVllm, path: str, body: Any) -> None:
        if body is not None:
            raise Drop

    fake.fault = drop
    with pytest.raises(DrklError, match=r"cannot be reached \(.*\); tried 4 times.*resume the run"):
        by_server.write(requests(), seed=1)


def test_a_slow_server_is_named(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    by_server = writer(student, fake, tmp_path, settings={"server_timeout": 0.2})
    by_server._client.ask("/version")
    by_server._model = "student"
    fake.fault = slow(0.6)
    with pytest.raises(DrklError, match=r"not answered /v1/completions within 0\.2 seconds.*server_timeout"):
        by_server.write(requests(1), seed=1)


def test_an_answer_that_drips_is_timed_as_a_whole(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    by_server = writer(student, fake, tmp_path, settings={"server_timeout": 1.0})
    with closing(socket.create_server(("127.0.0.1", 0))) as server, closing(by_server._client._connection()) as asked:
        asked.port = server.getsockname()[1]
        asked.connect()
        connection, _ = server.accept()
        over = threading.Event()

        def drip() -> None:
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not over.wait(0.05):
                    connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        asked.putrequest("GET", "/version")
        asked.endheaders()
        with pytest.raises(DrklError, match=r"not answered /version within 1 seconds"):
            by_server._client._receive(asked, "/version", time.monotonic())
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("path", "status", "text", "message"),
    [
        ("/version", 200, "<html>hello</html>", r"does not answer with json but with '<html>hello</html>'"),
        ("/version", 200, '"0.32"', r"its /version is"),
        ("/version", 404, '{"detail":"Not Found"}', r"refuses /version \(HTTP 404\): Not Found.*Is it a vLLM server"),
        ("/version", 200, '{"version":"0.9.1"}', r"version 0\.9\.1, whose answers have no token ids. Use vLLM 0\.32"),
        ("/v1/models", 401, '{"error":"Unauthorized"}', r"HTTP 401.*VLLM_API_KEY"),
        ("/v1/models", 200, '{"data":[]}', r"/v1/models names no model"),
        ("/collective_rpc", 404, '{"detail":"Not Found"}', r"did not load.*VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", 500, '{"error":{"message":"no layers.2"}}', r"no layers\.2.*server_folder.*started again"),
        ("/reset_prefix_cache", 200, '{"success":false}', r"keeps what it computed with the old weights"),
        ("/v1/models", 200, '{"data":[{"id":"a","max_model_len":"long"}]}', r"names no model with its max_model_len"),
        ("/v1/models", 200, '{"data":[{"id":"a","max_model_len":Infinity}]}', r"names no model with its max_model_len"),
        ("/v1/models", 200, "[" * 100_000, r"does not answer with json but with"),
        ("/v1/models", 500, "[" * 100_000, r"refuses /v1/models \(HTTP 500\)"),
        ("/version", 200, '{"version":"0.9.1\\u001b[2J"}', r"version 0\.9\.1 +\[2J, whose answers"),
        ("/version", 200, '["\\u001b[2J"]', r"its /version is \['\\x1b\[2J'\]"),
        ("/version", 307, "", r"sends to another address \(HTTP 307\): it names none\. Set rollout_server to that of"),
        ("/v1/completions", 500, '{"error":{"message":"EngineCore\\u001b[2J died"}}', r"EngineCore +\[2J died\. .*log"),
        ("/v1/completions", 400, '{"error":{"message":"no"}}', r"does not read token 63, the last of the student's"),
    ],
)  # fmt: skip
def test_a_sync_that_fails_says_why(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path, path: str, status: int, text: str, message: str
) -> None:
    fake.fault = on(path, status, text)
    with pytest.raises(DrklError, match=message) as raised:
        writer(student, fake, tmp_path).sync(student, 0)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"token_ids": None}, r"no token ids with log-probabilities"),
        ({"token_ids": lambda ids: [*ids[:-1], 64], "finish_reason": "length"}, r"wrote token 64, and .* has 64"),
        ({"finish_reason": "stop", "token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}}, r"none of the stop"),
        ({"finish_reason": "length", "token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}}, r"after 1 of 3 tokens"),
        ({"finish_reason": "abort", "token_ids": [], "logprobs": {"token_logprobs": []}}, r"after 0 of 3.*'abort'"),
        ({"finish_reason": "stop", "token_ids": [4, 7, 4], "logprobs": {"token_logprobs": [-1.0] * 3}}, r"goes on"),
        ({"logprobs": {"token_logprobs": []}}, r"have 0 log-probabilities"),
        ({"logprobs": lambda found: {"token_logprobs": [float("nan")] * len(found["token_logprobs"])}}, r"no numbers"),
        ({"prompt_token_ids": [1, 10]}, r"another prompt"),
        ({"token_ids": [float("inf")] * 3}, r"no token ids with log-probabilities.*an id is no whole number"),
        ({"token_ids": [7.5, 7, 7]}, r"no token ids with log-probabilities"),
        ({"token_ids": [True, 7, 7]}, r"no token ids with log-probabilities"),
        ({"logprobs": {"token_logprobs": [10**400] * 3}}, r"no token ids with log-probabilities"),
    ],
)
def test_an_answer_that_is_none_is_refused(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path, fault: dict[str, Any], message: str
) -> None:
    by_server = writer(student, fake, tmp_path)
    fake.fault = changed(**fault)
    with pytest.raises(DrklError, match=message):
        by_server.write(requests(1), seed=1)


@pytest.mark.parametrize("choices", [[], None, {}, [{}, {}], 10**5 * "a"])
def test_other_numbers_of_answers_are_refused(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path, choices: Any
) -> None:
    by_server = writer(student, fake, tmp_path)
    fake.fault = on("/v1/completions", 200, json.dumps({"choices": choices}))
    by_server._model = "student"
    with pytest.raises(DrklError, match=r"no token ids with log-probabilities") as raised:
        by_server.write(requests(1), seed=1)
    assert len(str(raised.value)) < 1000


def test_a_config_that_is_none_says_nothing_of_the_model(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path
) -> None:
    for text in ("[1]", '{"text_config": "a"}', "[" * 10**5, "{}"):
        (tmp_path / "config.json").write_text(text)
        fake.facts["root"] = str(tmp_path)
        writer(student, fake, tmp_path / "w").sync(student, 0)


def answering(raw: bytes) -> Iterator[str]:
    """A server that answers the first question with these bytes, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(raw)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x1b[2J\r\n\r\n", r"cannot be reached \( \[2J\)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n[1]", r"cannot be reached \(it broke off in the middle"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://other/\x1b\r\n\r\n", r"\(HTTP 302\): https://other/ \. Set rollout"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b"1" * 900, r"answers with more than 0 MiB"),
    ],
)
def test_what_no_server_should_send(raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", ())
    monkeypatch.setattr(client, "_LARGEST", 800)
    for address in answering(raw):
        asker = client.Client(address, 20.0, CALLER)
        with pytest.raises(DrklError, match=message) as raised:
            asker.patiently(partial(asker.ask, "/version"))
    assert str(raised.value).isprintable()


def test_https_where_there_is_none_is_named(fake: FakeVllm) -> None:
    asker = client.Client(fake.address.replace("http:", "https:"), 20.0, CALLER)
    with pytest.raises(DrklError, match=r"over https: .* Give its address with http://.* SSL_CERT_FILE"):
        asker.patiently(lambda: asker.ask("/version"))


def test_no_proxy_is_used(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert client.Client(fake.address, 20.0, CALLER).ask("/version") == {"version": "0.32.0"}


def test_another_model_is_refused_before_it_gets_weights(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path
) -> None:
    fake.facts["root"] = str(tiny.save(tiny.llama(1, layers=3), tmp_path / "other"))
    with pytest.raises(DrklError, match=r"another model than the student: .*num_hidden_layers 3 and not 2"):
        writer(student, fake, tmp_path / "w").sync(student, 0)
    fake.facts |= {"root": "nowhere", "vocabulary": 63}
    with pytest.raises(DrklError, match=r"does not read token 63.*out of vocabulary"):
        writer(student, fake, tmp_path / "w").sync(student, 0)
    assert not fake.bodies("/collective_rpc")


def test_answers_that_the_server_would_cut_are_refused(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path
) -> None:
    fake.facts["max_model_len"] = 8
    with pytest.raises(DrklError, match=r"takes 8 tokens .* has 14\. Start it with --max-model-len 14"):
        writer(student, fake, tmp_path).write(requests(), seed=1)


def test_another_version_is_warned_of(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.facts["version"] = "0.33.1.dev2+gabc"
    writer(student, fake, tmp_path).sync(student, 0)
    assert "version 0.33.1.dev2+gabc; drkl is tested with 0.32" in caplog.text


def test_a_key_is_sent(
    student: PreTrainedModel, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert writer(student, fake, tmp_path)._client._headers["Authorization"] == "Bearer secret"
    monkeypatch.setenv("VLLM_API_KEY", " secret\n")
    assert writer(student, fake, tmp_path)._client._headers["Authorization"] == "Bearer secret"
    monkeypatch.setenv("VLLM_API_KEY", "sécret")
    with pytest.raises(DrklError, match="VLLM_API_KEY in the environment has characters that a key cannot have"):
        writer(student, fake, tmp_path)


def test_an_address_may_end_in_v1(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    assert writer(student, fake.address + "/v1/", tmp_path).write(requests(1), seed=1)


def test_a_path_stands_before_every_route(fake: FakeVllm) -> None:
    with pytest.raises(DrklError, match=r"/gpu/0/v1/ refuses /version \(HTTP 404\)"):
        client.Client(fake.address + "/gpu/0/v1/", 20.0, CALLER).ask("/version")
    assert fake.asked == [("/gpu/0/version", None)]


def test_a_model_of_another_name_is_asked_by_it(student: PreTrainedModel, tmp_path: Path) -> None:
    with serving(FakeVllm(student, name="my/model")) as fake:
        by_server = writer(student, fake, tmp_path)
        by_server.sync(student, 0)
        assert len(by_server.write(requests(2), seed=1)) == 2
        fake.facts["name"] = "another"
        with pytest.raises(DrklError, match=r"The model `my/model` does not exist"):
            by_server.write(requests(1), seed=1)


def test_no_requests_ask_nothing(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    assert writer(student, fake, tmp_path).write([], seed=1) == []
    assert not fake.asked


def test_an_encoder_decoder_is_refused(fake: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"encoder-decoder.*rollout_generator='builtin'"):
        writer(tiny.t5(layers=2), fake, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(student: PreTrainedModel, fake: FakeVllm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DrklError, match=r"Cannot write the student's weights for the server .*rollout_server_folder"):
        writer(student, fake, tmp_path / "file").sync(student, 0)
