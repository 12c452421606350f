"""A teacher behind a server: what it knows is what the model knows, and every way in which the server may fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from drkl import client
from drkl.data.collate import collate, teacher_inputs
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX
from drkl.teachers.served import ServedTeacher, stand_in
from drkl.teachers.served_checks import check_distributions, check_length, check_vocabulary
from tests.models import tiny, tiny_classifiers
from tests.rollouts.fake_vllm import Cut, Drop, FakeVllm, Fault, on, rescored, serving, slow

K = 6
ROWS = [
    Row("a", (5, 6), (7, 8, 2), None),
    Row("b", (9,), (10, 11, 12, 13, 2), None, (True, False, False, True, True)),
    Row("c", (20, 21, 22), (23,), None),
]
PROMPTS = [[1, 5, 9], [20, 30, 40, 50]]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0, 0.0))
    for name in ("DRKL_TEACHER_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.llama(9, layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's: it stands for the teacher, whose name is no folder."""
    return tiny.save(tiny.llama(1, layers=2), tmp_path_factory.mktemp("s"))


@pytest.fixture
def fake(model: PreTrainedModel) -> Iterator[FakeVllm]:
    with serving(FakeVllm(model, tiny.tokenizer(), name="big")) as server:
        yield server


def served(fake: FakeVllm, folder: Path, **changes: Any) -> ServedTeacher:
    settings: dict[str, Any] = {"top_k": K, "server_timeout": 20.0} | changes
    teacher = ServedTeacher(f"{fake.address}/v1", "big", **settings)
    teacher.settle(str(folder))
    return teacher


def batch_of(rows: list[Row] | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    batch = collate(ROWS if rows is None else rows, pad_id=0)
    labels = batch["labels"]
    inputs, keep = teacher_inputs(batch)
    return inputs, keep, labels[labels != IGNORE_INDEX]


def known(model: PreTrainedModel, rows: list[Row] | None = None) -> list[tuple[np.ndarray, int]]:
    """Probabilities after each learnt prefix, each row read alone, and the token that follows."""
    found = []
    for row in ROWS if rows is None else rows:
        for place, token in enumerate(row.response_ids):
            if row.trained is None or row.trained[place]:
                ids = [*row.prompt_ids, *row.response_ids[:place]]
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
                p = np.exp(logits - logits.max())
                found.append((p / p.sum(), token))
    return found


def assert_is(topk: Any, model: PreTrainedModel, rows: list[Row] | None = None, k: int = K) -> None:
    expected = known(model, rows)
    assert topk.ids.shape == (len(expected), k)
    for place, (p, token) in enumerate(expected):
        best = np.argsort(-p, kind="stable")[:k]
        assert topk.ids[place].tolist() == best.tolist()
        np.testing.assert_allclose(topk.logits[place].numpy(), np.log(p[best]), atol=1e-4)
        np.testing.assert_allclose(float(topk.log_rest[place, 0]), np.log(1 - p[best].sum()), atol=1e-4)
        np.testing.assert_allclose(float(topk.label_logits[place]), np.log(p[token]), atol=1e-4)


def test_it_knows_what_the_model_knows(fake: FakeVllm, model: PreTrainedModel, folder: Path) -> None:
    teacher = served(fake, folder)
    inputs, keep, labels = batch_of()
    topk = teacher.hidden_at(inputs, keep, labels=labels)
    assert_is(topk, model)
    assert topk.temperatures == (1.0,) and topk.vocab_size == 64 and teacher.head is None
    without = teacher.hidden_at(inputs, keep)
    assert without.label_logits is None and torch.equal(without.ids, topk.ids)
    assert len(teacher.hidden_at(inputs, torch.zeros_like(keep))) == 0


def test_what_is_asked(fake: FakeVllm, folder: Path) -> None:
    teacher = served(fake, folder)
    fake.asked.clear()
    inputs, keep, labels = batch_of()
    teacher.hidden_at(inputs, keep, labels=labels)
    # Padding is off, and the last token that is learnt follows what the student reads.
    assert sorted(body["prompt"] for body in fake.bodies()) == [
        [5, 6, 7, 8, 2], [9, 10, 11, 12, 13, 2], [20, 21, 22, 23],
    ]  # fmt: skip
    assert min(fake.bodies(), key=lambda body: body["prompt"]) == {
        "model": "big", "prompt": [5, 6, 7, 8, 2], "prompt_logprobs": K, "max_tokens": 1, "temperature": 1.0, "n": 1,
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "add_special_tokens": False, "return_token_ids": True, "skip_special_tokens": False,
    }  # fmt: skip
    fake.asked.clear()
    keep[1, 4] = False  # what stands behind the last position is not asked
    teacher.hidden_at(inputs, keep)
    assert [9, 10, 11, 12, 13] in [body["prompt"] for body in fake.bodies()]


@pytest.mark.slow
def test_rows_are_asked_at_once_and_never_more(model: PreTrainedModel, folder: Path) -> None:
    fake = FakeVllm(model, tiny.tokenizer(), name="big")
    waiting, most = [0], [0]
    lock = threading.Lock()

    class Counting:
        """The lock of the server, which lets several in and counts them."""

        def __enter__(self) -> None:
            with lock:
                waiting[0] += 1
                most[0] = max(most[0], waiting[0])
            time.sleep(0.05)

        def __exit__(self, *_: Any) -> None:
            with lock:
                waiting[0] -= 1

    with serving(fake):
        teacher = served(fake, folder, server_requests=3)
        fake.lock = Counting()  # type: ignore[assignment]
        rows = [Row(str(i), (5 + i,), (7, 8), None) for i in range(9)]
        teacher.hidden_at(*batch_of(rows)[:2])
    assert most[0] == 3


def test_remembered_rows_are_not_asked_again(fake: FakeVllm, model: PreTrainedModel, folder: Path) -> None:
    teacher = served(fake, folder, remember_mb=1)
    inputs, keep, labels = batch_of()
    teacher.hidden_at(inputs, keep, labels=labels)
    before = len(fake.asked)
    again = teacher.hidden_at(inputs.copy(), keep, labels=labels)
    # In another batch, the same rows.
    other = batch_of([ROWS[2], ROWS[0]])
    assert_is(teacher.hidden_at(other[0], other[1], labels=other[2]), model, [ROWS[2], ROWS[0]])
    assert len(fake.asked) == before
    assert_is(again, model)
    forgets = served(fake, folder)
    before = len(fake.asked)
    for _ in range(2):
        forgets.hidden_at(inputs, keep, labels=labels)
    assert len(fake.asked) == before + 2 * len(ROWS)
    new = served(fake, folder, remember_mb=1)
    before = len(fake.asked)
    for _ in range(2):
        new.hidden_at(inputs, keep, labels=labels, remember=False)
    assert len(fake.asked) == before + 2 * len(ROWS)


def test_what_is_asked_ahead_is_not_asked_again(fake: FakeVllm, model: PreTrainedModel, folder: Path) -> None:
    from drkl.teachers.served import questions_of

    teacher = served(fake, folder)
    inputs, keep, labels = batch_of()
    before = len(fake.asked)
    asked = questions_of(inputs, keep, labels)
    teacher.prepare(asked)
    teacher.prepare(asked)
    assert_is(teacher.hidden_at(inputs, keep, labels=labels), model)
    assert len(fake.asked) == before + len(ROWS)
    fake.fault = rescored(lambda choices: [])
    other = batch_of([Row("d", (3, 4), (5, 6), None)])
    teacher.prepare(questions_of(*other))
    with pytest.raises(DrklError, match="not the one choice"):
        teacher.hidden_at(other[0], other[1], labels=other[2])
    fake.fault = None  # whoever goes on asks again
    assert len(teacher.hidden_at(other[0], other[1], labels=other[2])) == 2


def test_a_head_that_is_larger_or_smaller(fake: FakeVllm, model: PreTrainedModel, tmp_path: Path) -> None:
    larger = tiny.save(tiny.llama(1, layers=2, vocab=70), tmp_path / "larger")
    teacher = served(fake, larger)
    # The server does not read what stands beyond its own vocabulary, so the tokenizer says how many both have.
    assert teacher.vocab_size == len(tiny.tokenizer()) and teacher.served_ids is None
    smaller = tiny.save(tiny.llama(1, layers=2, vocab=60), tmp_path / "smaller", tiny.tokenizer(26))
    teacher = served(fake, smaller, top_k=20)
    inputs, keep, labels = batch_of()
    topk = teacher.hidden_at(inputs, keep, labels=labels)
    for place, (p, _) in enumerate(known(model)):
        best = [i for i in np.argsort(-p, kind="stable")[:20] if i < 60]
        assert [i for i in topk.ids[place].tolist() if i >= 0] == best
        np.testing.assert_allclose(float(topk.log_rest[place, 0]), np.log(1 - p[best].sum()), atol=1e-4)


@pytest.mark.parametrize("own", ["model", "root"])
def test_the_config_of_the_teacher_s_own_folder(model: PreTrainedModel, tmp_path: Path, own: str) -> None:
    theirs = tiny.save(model, tmp_path / "theirs")
    student = tiny.save(tiny.llama(1, layers=2, vocab=70), tmp_path / "student")
    name = str(theirs) if own == "model" else "big"
    with serving(FakeVllm(model, tiny.tokenizer(), name=name, root=str(theirs))) as fake:
        teacher = ServedTeacher(fake.address, name, top_k=K)
        teacher.settle(str(student))
        assert teacher.source == str(theirs) and teacher.served_ids == 64 and teacher.vocab_size == 64
        assert all(parameter.is_meta for parameter in teacher.model.parameters())
        other = ServedTeacher(fake.address, name, top_k=K, tokenizer=str(student))
        other.settle("")
        assert other.source == str(student) and other.served_ids is None
        assert other.config.tokenizer == str(student) and other.config.server == fake.address


def test_nothing_can_stand_for_it(tmp_path: Path) -> None:
    with pytest.raises(
        DrklError, match=r"Set teacher\.tokenizer to the folder.*Tried: '/nowhere/x': There is no folder"
    ):
        stand_in("/nowhere/x", None, "", "")
    with pytest.raises(DrklError, match=r"Tried: '/nowhere/y'"):
        stand_in(str(tiny.save(tiny.llama(1, layers=2), tmp_path)), "/nowhere/y", "", "")


def test_other_kinds_of_models(tmp_path: Path) -> None:
    t5 = tiny.save(tiny.t5(layers=2), tmp_path / "t5")
    with pytest.raises(DrklError, match=r"is an encoder-decoder, and the teacher is served.*leave teacher\.server out"):
        stand_in("/nowhere", None, "", str(t5))
    texts = tiny_classifiers.make(seed=1)
    texts.save_pretrained(tmp_path / "classes")
    tiny_classifiers.tokenizer().save_pretrained(tmp_path / "classes")
    with pytest.raises(DrklError, match=r"is a classifier, and the teacher is served"):
        stand_in("/nowhere", None, "", str(tmp_path / "classes"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server": "big:8000"}, r"server is 'big:8000'; expected an address such as http"),
        ({"server": "http://h/v1?key=a"}, r"server is 'http://h/v1\?key=a'; expected an address"),
        ({"server": "http://me:word@h/v1"}, r"server has a name or a password.*DRKL_TEACHER_KEY"),
        ({"server": "http://me:word@[h/v1"}, r"server has a name or a password.*DRKL_TEACHER_KEY"),
        ({"server": None}, r"server is None; expected"),
        ({"top_k": 0}, r"top_k is 0; expected a whole number of at least 1"),
        ({"top_k": 2.5}, r"top_k is 2\.5; expected a whole number"),
        ({"server_requests": 0}, r"server_requests is 0; expected a whole number"),
        ({"remember_mb": -1}, r"remember_mb is -1; expected a whole number of at least 0"),
        ({"server_timeout": 0}, r"server_timeout is 0; expected seconds above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message) as raised:
        ServedTeacher(**({"server": "http://h/v1", "model": "big"} | settings))
    assert "word" not in str(raised.value).replace("password", "")


# What the server does wrong.


def ask(fake: FakeVllm, folder: Path, **settings: Any) -> Any:
    teacher = served(fake, folder, **settings)
    inputs, keep, labels = batch_of()
    return teacher.hidden_at(inputs, keep, labels=labels)


def few(fault: Fault, times: int) -> Fault:
    """A fault of the first scored prompts alone."""
    left = [times]

    def first(fake: FakeVllm, path: str, body: Any) -> tuple[int, str] | None:
        if body is None or "prompt_logprobs" not in body or left[0] <= 0:
            return None
        left[0] -= 1
        return fault(fake, path, body)

    return first


def drop(fake: FakeVllm, path: str, body: Any) -> None:
    raise Drop


def cut(fake: FakeVllm, path: str, body: Any) -> None:
    raise Cut


@pytest.mark.parametrize("status", [500, *(pytest.param(n, marks=pytest.mark.slow) for n in (429, 502, 503))])
def test_a_server_that_fails_for_a_while_is_asked_again(
    fake: FakeVllm, model: PreTrainedModel, folder: Path, status: int
) -> None:
    fake.fault = few(lambda *_: (status, '{"error":{"message":"busy"}}'), 5)
    assert_is(ask(fake, folder), model)
    for broken in (drop, cut):
        fake.fault = few(broken, 4)
        assert_is(ask(fake, folder), model)


@pytest.mark.slow
def test_an_answer_that_comes_late_is_asked_again(fake: FakeVllm, model: PreTrainedModel, folder: Path) -> None:
    def late(*_: Any) -> None:
        time.sleep(0.5)

    fake.fault = few(late, 1)
    assert_is(ask(fake, folder, server_timeout=0.4, server_requests=1), model)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            on("/v1/completions", 500, '{"error":{"message":"EngineCore died"}}'),
            r"cannot be reached \(HTTP 500: Engine",
        ),
        (on("/v1/completions", 200, '{"choices": [{"prompt_lo'), r"does not answer with json but with"),
        (on("/v1/completions", 200, "null"), r"does not answer as asked: it has not the one choice"),
        (on("/v1/completions", 401, '{"error":"no"}'), r"refuses /v1/completions \(HTTP 401\).*DRKL_TEACHER_KEY"),
        (on("/v1/completions", 302, ""), r"sends to another address \(HTTP 302\).*Set teacher\.server to that of"),
        (on("/v1/completions", 404, "{}"), r"\(HTTP 404\).*Set teacher\.server to the address"),
        (rescored(lambda choices: choices * 2), r"not the one choice"),
        (rescored(lambda choices: [choices[0] | {"prompt_logprobs": None}]), r"has no prompt_logprobs"),
        (rescored(lambda choices: [choices[0] | {"prompt_token_ids": [1, 2]}]), r"it read another prompt"),
    ],
)
def test_a_server_that_fails_stops_with_one_message(fake: FakeVllm, folder: Path, fault: Fault, message: str) -> None:
    teacher = served(fake, folder)
    inputs, keep, labels = batch_of()
    fake.fault = fault
    with pytest.raises(DrklError, match=message) as raised:
        teacher.hidden_at(inputs, keep, labels=labels)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 700
    assert "rollout" not in str(raised.value)


def test_answers_of_other_rows_are_found(fake: FakeVllm, folder: Path) -> None:
    """Without the prompt's ids in the answer, the tokens that stand there tell."""
    teacher = served(fake, folder)
    rows = [Row("a", (5, 6), (7, 8, 2), None), Row("b", (9, 10), (11, 12, 2), None)]
    inputs, keep, labels = batch_of(rows)
    swapped = {5: [9, 10, 11, 12, 2], 9: [5, 6, 7, 8, 2]}

    def swap(server: FakeVllm, path: str, body: Any) -> tuple[int, str]:
        answer = server.scored(body | {"prompt": swapped[body["prompt"][0]], "return_token_ids": False})
        return 200, json.dumps(answer)

    fake.fault = swap
    with pytest.raises(DrklError, match=r"no log-probability of the token that stands there"):
        teacher.hidden_at(inputs, keep, labels=labels)


def test_a_slow_server_is_named(fake: FakeVllm, folder: Path) -> None:
    teacher = served(fake, folder, server_timeout=0.1)
    fake.fault = slow(0.3)
    inputs, keep, _ = batch_of(ROWS[:1])
    with pytest.raises(
        DrklError, match=r"within 0\.1 seconds\. Raise teacher\.server_timeout, or lower teacher\.server_r"
    ):
        teacher.hidden_at(inputs, keep)


def test_a_server_that_is_not_there(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        DrklError, match=r"The teacher's server at .* cannot be reached \(.*refused.*Start it.*vllm serve"
    ):
        ServedTeacher(address, "big").settle(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data":[{"id":"bog"},{"id":"a\\u001b"}]}', r"not serve 'big'; it serves 'bog', 'a *'\. Did you mean 'bog'"),
        ('{"data":[]}', r"does not serve 'big'; it serves none\. Set teacher\.model"),
        ('{"data":5}', r"/v1/models lists no models"),
        ("[]", r"/v1/models lists no models"),
        ('{"data":[{"id":"big","max_model_len":"long"}]}', r"gives 'long' for its max_model_len"),
    ],
)  # fmt: skip
def test_another_model_is_served(fake: FakeVllm, folder: Path, text: str, message: str) -> None:
    fake.fault = on("/v1/models", 200, text)
    with pytest.raises(DrklError, match=message):
        served(fake, folder)


def test_the_key_is_sent_and_never_shown(fake: FakeVllm, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "theirs-123")
    assert ServedTeacher(fake.address, "big").client._headers["Authorization"] == "Bearer theirs-123"
    monkeypatch.setenv("DRKL_TEACHER_KEY", "secret-456")
    teacher = served(fake, folder)
    assert teacher.client._headers["Authorization"] == "Bearer secret-456"
    fake.fault = on("/v1/completions", 400, '{"error":{"message":"no Bearer secret-456 here"}}')
    inputs, keep, _ = batch_of()
    with pytest.raises(DrklError, match=r"HTTP 400") as raised:
        teacher.hidden_at(inputs, keep)
    assert "secret" not in str(raised.value) + repr(teacher) + str(teacher.config)
    monkeypatch.setenv("DRKL_TEACHER_KEY", "")
    assert "Authorization" not in ServedTeacher(fake.address, "big").client._headers
    monkeypatch.setenv("DRKL_TEACHER_KEY", "a\nb")
    with pytest.raises(DrklError, match=r"DRKL_TEACHER_KEY in the environment has characters"):
        ServedTeacher(fake.address, "big")


# What is found out before the first step.


def test_the_same_vocabulary(fake: FakeVllm, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_vocabulary(served(fake, folder), tiny.tokenizer())
    assert fake.bodies("/tokenize")[0]["add_special_tokens"] is False
    fake.fault = on("/tokenize", 404, '{"detail":"Not Found"}')  # it then tells what it reads of a text
    check_vocabulary(served(fake, folder), tiny.tokenizer())
    assert not caplog.records

    def mute(server: FakeVllm, path: str, body: Any) -> tuple[int, str] | None:
        is_text = path == "/v1/completions" and isinstance(body["prompt"], str)
        return (404, "{}") if path == "/tokenize" else (200, '{"choices":[{"text":"a"}]}') if is_text else None

    fake.fault = mute
    check_vocabulary(served(fake, folder), tiny.tokenizer())
    assert [record.getMessage()[:60] for record in caplog.records] == [
        "Warning: the teacher's server does not say which ids a text "
    ]


@pytest.mark.parametrize("route", [200, 404])
def test_another_vocabulary(fake: FakeVllm, folder: Path, route: int) -> None:
    fake.tokenizer = tiny.tokenizer()
    real = fake._ids
    fake._ids = lambda body: [token + (token == 40) for token in real(body)]  # type: ignore[method-assign]
    if route == 404:
        fake.fault = on("/tokenize", 404, "{}")
    with pytest.raises(DrklError, match=r"The vocabularies differ: of the text .* the ids \[.*40.*\], and the .*41"):
        check_vocabulary(served(fake, folder), tiny.tokenizer())


def test_a_smaller_vocabulary(fake: FakeVllm, folder: Path) -> None:
    fake.facts["vocabulary"] = 40
    with pytest.raises(DrklError, match=r"does not read the token 63, the last that its model 'big'"):
        check_vocabulary(served(fake, folder), tiny.tokenizer())


def test_what_it_writes_is_what_it_finds_likely(fake: FakeVllm, folder: Path) -> None:
    check_distributions(served(fake, folder), PROMPTS)
    prompts = [body["prompt"] for body in fake.bodies() if "prompt_logprobs" in body]
    assert [prompt[: len(start)] for prompt, start in zip(sorted(prompts), PROMPTS, strict=True)] == PROMPTS
    assert {len(prompt) for prompt in prompts} == {11, 12}
    fake.facts["max_model_len"] = 8  # a server that has little room
    check_distributions(served(fake, folder), PROMPTS)


def shifted(fake: FakeVllm, path: str, body: Any) -> tuple[int, str] | None:
    """A fault: every distribution stands one place too late."""
    if body is None or "prompt_logprobs" not in body:
        return None
    answer = fake.scored(body | {"prompt_logprobs": 64})
    entries, prompt = answer["choices"][0]["prompt_logprobs"], body["prompt"]
    late = [None, entries[1]]
    for place in range(2, len(prompt)):
        best = sorted(entries[place - 1].items(), key=lambda item: -item[1]["logprob"])[:K]
        token = str(prompt[place])
        late.append({token: entries[place - 1][token]} | dict(best))
    answer["choices"][0]["prompt_logprobs"] = late
    return 200, json.dumps(answer)


def test_another_count_of_places(fake: FakeVllm, folder: Path) -> None:
    fake.fault = shifted
    with pytest.raises(DrklError, match=r"does not find likely what it writes: at place .* counted in another way"):
        check_distributions(served(fake, folder), PROMPTS)


def test_another_model_writes(fake: FakeVllm, folder: Path) -> None:
    other = FakeVllm(tiny.llama(3, layers=2))
    fake.fault = lambda server, path, body: (
        (200, json.dumps(other.scored(body))) if body and "prompt_logprobs" in body else None
    )
    with pytest.raises(DrklError, match=r"more probability by a factor of .*counted in another way, or another model"):
        check_distributions(served(fake, folder), PROMPTS)


def test_fewer_log_probabilities_than_asked(fake: FakeVllm, folder: Path) -> None:
    fake.facts["max_logprobs"] = 5
    with pytest.raises(
        DrklError, match=r"top_k is 6, and .* gives fewer\. Start it with --max-logprobs 6 .*max allowed: 5"
    ):
        check_distributions(served(fake, folder), PROMPTS)


@pytest.mark.parametrize("ids", [None, [], ["a"], [-1], [True]])
def test_no_token_ids(fake: FakeVllm, folder: Path, ids: Any) -> None:
    fake.fault = on("/v1/completions", 200, json.dumps({"choices": [{"token_ids": ids}]}))
    teacher = served(fake, folder)
    with pytest.raises(DrklError, match=r"no token_ids \(vLLM has them from 0\.10\.2 on\)"):
        check_distributions(teacher, PROMPTS)


def test_a_row_that_is_too_long(fake: FakeVllm, folder: Path) -> None:
    check_length(served(fake, folder), 95, "r1")
    with pytest.raises(
        DrklError, match=r"'r1' has up to 96 tokens, and .* takes 95: .*--max-model-len 97 or more .* to 95"
    ):
        check_length(served(fake, folder), 96, "r1")
