"""Training with a teacher behind a server: the losses are those with the model; what cannot be is found before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import drkl
from drkl import client
from drkl.analysis.probe import probe_specs
from drkl.config import load_config
from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.teachers.cached import TeacherCache
from drkl.training.caching import cache_teacher
from drkl.training.estimate import estimate, estimate_cache
from drkl.training.run import cache_states, distill
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.rollouts.fake_vllm import Drop, FakeVllm, rescored, serving
from tests.training import tiny_runs
from tests.training.test_caching import log_of
from tests.training.test_python import ROWS, TOKENIZER, config, make

K = 8


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    for name in ("DRKL_TEACHER_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny.llama(9), tiny.tokenizer(), name="big")) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """The student's."""
    return str(tiny.save(tiny.llama(1, layers=2), tmp_path / "student"))


def served(fake: FakeVllm, **settings: Any) -> drkl.ServedTeacher:
    return drkl.ServedTeacher(f"{fake.address}/v1", "big", **({"top_k": K} | settings))


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.pair.student.state_dict().items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


def scored(fake: FakeVllm) -> list[list[int]]:
    return [body["prompt"] for body in fake.bodies() if "prompt_logprobs" in body]


def no_server(tmp_path: Path, **teacher: Any) -> dict[str, Any]:
    """A config whose server is not there."""
    section = {"server": "http://127.0.0.1:9/v1", "model": "big", "top_k": K} | teacher
    student = tiny.save(tiny.llama(1, layers=2), tmp_path / "student")
    return tiny_runs.config(tmp_path, student={"init": "pretrained", "model": str(student), "layers": None}) | {
        "teacher": section
    }


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"objective": "drkl"}, marks=pytest.mark.slow),
        pytest.param(
            {"objective": "drkl", "objective_params": {"target": "label"}, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"objective": "fkl", "kd_weight": 0.5}, marks=pytest.mark.slow),
        pytest.param({"objective": "rkl", "per_device_train_batch_size": 3}, marks=pytest.mark.slow),
        pytest.param({"objective": "akl"}, marks=pytest.mark.slow),
    ],
)
def test_the_losses_are_those_of_the_models_own_k_largest_logits(
    tmp_path: Path, fake: FakeVllm, folder: str, fields: dict[str, Any]
) -> None:
    cache = cache_teacher(
        tiny.llama(9), ROWS, ROWS[:4], kind="topk", k=K, model=folder, args=config(tmp_path, **fields),
        output_dir=tmp_path / "cache", processing_class=TOKENIZER,
    )  # fmt: skip
    (tmp_path / "a").mkdir()
    runs = []
    for place, teacher in ((tmp_path, cache), (tmp_path / "a", served(fake))):
        trainer = make(place, folder, teacher, fields={"max_steps": 4, "learning_rate": 1e-2} | fields)
        trainer.train()
        runs.append(trainer)
    expected, found = (log_of(trainer.run) for trainer in runs)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for theirs, ours in zip(expected, found, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_folder_names_the_server_and_no_key(
    tmp_path: Path, fake: FakeVllm, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRKL_TEACHER_KEY", "secret-456")
    trainer = make(tmp_path, folder, served(fake, remember_mb=1))
    trainer.train()
    trainer.save_model()
    written = trainer.run.read_config()
    assert written["teacher"] == {
        "model": "big", "server": f"{fake.address}/v1", "top_k": K, "tokenizer": None, "server_timeout": 600.0,
        "server_requests": 32, "remember_mb": 1, "cache": None, "fill_cache": False, "dtype": "auto",
        "model_init_kwargs": {}, "shard": False,
    }  # fmt: skip
    load_config(written)
    assert trainer.run.read_env()["parameters"]["teacher"] is None
    assert "learnt from its teacher's 8 most probable tokens" in (trainer.run.student_path / "README.md").read_text()
    found = [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert not found


@pytest.mark.slow
def test_a_step_is_asked_together_and_the_next_one_beside_it(tmp_path: Path, fake: FakeVllm, folder: str) -> None:
    fields = {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "no", "kd_weight": 1.0}
    trainer = make(tmp_path, folder, served(fake), fields=fields, eval_dataset=None)
    before = len(scored(fake))
    trainer.train()
    rows = [trainer.rows[i] for step in trainer._steps for i in step]
    assert sorted(scored(fake)[before:]) == sorted([*row.prompt_ids, *row.response_ids] for row in rows)


@pytest.mark.slow
def test_later_epochs_ask_nothing_again(tmp_path: Path, fake: FakeVllm, folder: str) -> None:
    fields = {"num_train_epochs": 3, "teacher_remember_mb": 4, "eval_strategy": "no"}
    trainer = make(tmp_path, folder, served(fake), fields=fields, eval_dataset=None)
    before = len(scored(fake))
    trainer.train()
    assert len(scored(fake)) - before == len(ROWS)


@pytest.mark.slow
def test_a_server_that_dies_stops_the_run_at_a_good_checkpoint(tmp_path: Path, fake: FakeVllm, folder: str) -> None:
    fields = {"max_steps": 3, "learning_rate": 1e-2, "save_steps": 1, "eval_strategy": "no"}
    whole = make(tmp_path, folder, served(fake), fields=fields)
    whole.train()
    (tmp_path / "a").mkdir()
    trainer = make(tmp_path / "a", folder, served(fake), fields=fields)
    step_of_rows = [trainer.rows[i].prompt_ids + trainer.rows[i].response_ids for i in trainer._steps[2]]

    def dies(server: FakeVllm, path: str, body: Any) -> None:
        if (
            body
            and "prompt_logprobs" in body
            and tuple(body["prompt"]) == step_of_rows[0]
            and trainer.state.global_step
        ):
            server.fault = gone
            raise Drop

    def gone(server: FakeVllm, path: str, body: Any) -> None:
        raise Drop

    fake.fault = dies
    with pytest.raises(
        DrklError, match=r"The teacher's server at .* cannot be reached .*Then start again, or resume the run"
    ) as raised:
        trainer.train()
    assert str(raised.value).count("\n") == 0
    fake.fault = None
    again = make(tmp_path / "a", folder, served(fake), fields=fields)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again), weights(whole))
    assert log_of(again.run) == log_of(whole.run)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [{"remember_mb": 2}, {}])
def test_on_policy(tmp_path: Path, fake: FakeVllm, folder: str, teacher: dict[str, Any]) -> None:
    """The sampled rows are scored as they are; the student's own answers are written here."""
    fields = {"rollout_share": 0.5, "rollout_max_new_tokens": 6, "max_steps": 3, "max_tokens": 40}
    trainer = make(tmp_path, folder, served(fake, **teacher), fields=fields)
    trainer.train()
    lines = [line for line in trainer.run.read_train_log() if "rollout_share" in line]
    assert len(lines) == 3 and all("rollout_fkl" in line or line["rollout_share"] == 0 for line in lines)
    state = json.loads((trainer.run.checkpoints_path / "checkpoint-3" / "rollouts.json").read_text())
    assert state
    sampled = {tuple(prompt) for prompt in scored(fake)} - {row.prompt_ids + row.response_ids for row in trainer.rows}
    assert sampled


def short(tmp_path: Path, fake: FakeVllm, **changes: Any) -> Path:
    """A config with server, model and top_k alone, of two steps."""
    values = no_server(tmp_path, server=f"{fake.address}/v1") | changes
    values["training"] |= {"max_steps": 2}
    return tiny_runs.write_config(values, tmp_path / "c.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_a_config(tmp_path: Path, fake: FakeVllm, own: bool, cli: Cli) -> None:
    """The student's folder stands for the teacher, or the teacher's own does."""
    changes: dict[str, Any] = {"stages": [{"name": "warmup", "training": {"max_steps": 1}}]}
    if own:
        fake.facts["name"] = name = str(tiny.save(tiny.llama(9), tmp_path / "own"))
        changes["teacher"] = {"server": fake.address, "model": name, "top_k": K}
        changes["student"] = {"init": "prune", "layers": 2}
    path = short(tmp_path, fake, **changes)
    done = cli("distill", path)
    assert done.code == 0, done.err
    assert f"is asked at {fake.address}" in done.out + done.err
    run = RunFolder(tmp_path / "runs" / "r")
    assert yaml.safe_load(run.config_path.read_text())["teacher"]["tokenizer"] is None
    assert len(tiny_runs.steps(run)) == 2
    done = cli("distill", path, "--overwrite", "teacher.top_k=21")
    assert done.code == 2 and "Start it with --max-logprobs 21" in done.err and run.is_finished()


@pytest.mark.slow
def test_an_evaluation_leaves_the_teacher_out(tmp_path: Path, fake: FakeVllm, cli: Cli) -> None:
    assert cli("distill", short(tmp_path, fake)).code == 0
    run = tmp_path / "runs" / "r"
    done = cli("evaluate", run)
    assert done.code == 0, done.err
    assert "of which there are no exact numbers: the teacher is left out" in " ".join((done.out + done.err).split())
    done = cli("analyze", run)
    assert done.code == 2 and "compares the student with the whole distribution of its teacher" in done.err
    other = tiny.save(tiny.llama(9), tmp_path / "weights")
    assert cli("analyze", run, f"teacher.model={other}").code == 0
    assert cli("report", run).code == 0


@pytest.mark.slow
def test_a_cache_that_the_server_fills(tmp_path: Path, fake: FakeVllm, cli: Cli) -> None:
    path = short(tmp_path, fake)
    done = cli("cache", path, "--kind", "topk", "--output", tmp_path / "cache")
    assert done.code == 0, done.err
    assert TeacherCache.open(tmp_path / "cache").manifest["k"] == K
    before, cached = len(fake.asked), f"teacher.cache={tmp_path / 'cache'}"
    done = cli("distill", path, cached)  # the server stands beside it, and is asked no more
    assert done.code == 0, done.err
    assert len(fake.asked) == before
    # Rows that it lacks are asked for.
    more = [cached, f"data.path={tiny_runs.write_rows(tmp_path / 'more.jsonl', count=44)}", "--overwrite"]
    assert "lacks" in cli("distill", path, *more).err
    done = cli("distill", path, *more, "teacher.fill_cache=true", "teacher.top_k=9")
    assert "k is 8, not 9" in done.err and "or set teacher.top_k to the cache's k" in done.err
    done = cli("distill", path, *more, "teacher.fill_cache=true")
    assert done.code == 0, done.err
    assert len(TeacherCache.open(tmp_path / "cache")._rows) == 44


@pytest.mark.slow
def test_a_cache_is_the_server_s_answers(tmp_path: Path, fake: FakeVllm, folder: str) -> None:
    args = config(tmp_path, learning_rate=1e-2)
    cache = cache_teacher(
        served(fake), ROWS, ROWS[:4], kind="topk", model=folder, args=args, output_dir=tmp_path / "cache",
        processing_class=TOKENIZER,
    )  # fmt: skip
    assert cache is not None and cache.manifest["k"] == K and cache.manifest["temperatures"] == [1.0]
    (tmp_path / "a").mkdir()
    live = make(tmp_path, folder, served(fake), args=args)
    live.train()
    cached = make(tmp_path / "a", folder, cache, fields={"learning_rate": 1e-2})
    cached.train()
    assert same(weights(cached), weights(live))
    assert log_of(cached.run) == log_of(live.run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hidden"}, r"a server gives no hidden states\. Set kind to 'topk'"),
        ({"kind": "topk", "k": 5}, r"k is 5 and teacher\.top_k 8"),
        ({"kind": "topk", "temperatures": [2.0]}, r"A temperature of 2 .*at temperature 1 alone"),
    ],
)
def test_what_a_cache_of_it_cannot_have(
    tmp_path: Path, fake: FakeVllm, folder: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DrklError, match=message):
        cache_teacher(
            served(fake), ROWS, model=folder, args=config(tmp_path), output_dir=tmp_path / "cache",
            processing_class=TOKENIZER, **settings,
        )  # fmt: skip
    specs = load_config(no_server(tmp_path))[0].specs()
    with pytest.raises(DrklError, match=message):
        cache_states(specs, tmp_path / "cache", **settings)


def test_a_probe_needs_the_whole_distribution(tmp_path: Path, fake: FakeVllm, folder: str) -> None:
    with pytest.raises(DrklError, match=r"A few logits are known of the teacher at http"):
        drkl.probe_top_k(served(fake), ROWS, model=folder, args=config(tmp_path), processing_class=TOKENIZER)
    with pytest.raises(DrklError, match=r"A few logits are known of the teacher at http"):
        probe_specs(load_config(no_server(tmp_path))[0].specs())


def test_estimates_ask_no_server(tmp_path: Path) -> None:
    specs = load_config(no_server(tmp_path))[0].specs()
    plan = estimate(specs)
    assert plan["not_estimated"].startswith("the time that the teacher's server takes")
    assert plan["parameters"]["teacher"] is None and plan["stages"][0]["steps"] == 6
    plan = estimate_cache(specs, kind="topk")
    assert plan["k"] == K and "estimated_seconds" not in plan and plan["not_estimated"]
    with pytest.raises(DrklError, match=r"cannot be reached"):
        distill(specs)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task": "classification"}, r"task is 'classification', and teacher\.server is of language models"),
    ({"loss": {"temperature": 2.0}}, r"temperature of the loss is 2, and the teacher is served"),
    ({"rollouts": {"share": 0.5, "source": "teacher"}}, r"rollouts\.source is 'teacher', and the teacher is served"),
    ({"rollouts": {"share": 0.5, "source": "mixed"}}, r"rollouts\.source is 'mixed', and the teacher is served"),
    ({"objective": {"name": "ab", "alpha": 0.5, "beta": -0.5}}, r"'ab' cannot be had from a teacher's k most probable"),
    ({"teacher": {"dtype": "bf16"}}, r"dtype says how weights are loaded"),
    ({"teacher": {"model_init_kwargs": {"revision": "x"}}}, r"model_init_kwargs says how weights are loaded"),
    ({"teacher": {"server": None}}, r"top_k is about a served teacher, and server names no address"),
    ({"teacher": {"server": "host:8000"}}, r"server is 'host:8000'; expected an address"),
    ({"teacher": {"server": "http://a:bcd@host/v1"}}, r"server has a name or a password.*DRKL_TEACHER_KEY"),
    ({"teacher": {"top_k": 0}}, r"teacher\.top_k: .*got 0"),
    ({"stages": [{"name": "s", "loss": {"temperature": 3.0}}]}, r"temperature of the loss is 3"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_a_config_that_asks_what_a_server_does_not_give(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    values = no_server(tmp_path)
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(values.get(name), dict) and name != "objective"
        values[name] = values[name] | section if both else section
    with pytest.raises(DrklError, match=message) as raised:
        load_config(values)
    assert "bcd" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.0}, r"temperature of the loss is 2"),
        (
            {"rollout_share": 1.0, "rollout_source": "teacher"},
            r"rollout_source is 'teacher', and the teacher is served",
        ),
        (
            {"objective": lambda student, teacher, labels: student.sum(-1)},
            r"cannot be had from a teacher's k most prob",
        ),
        ({"teacher_model_revision": "x"}, r"say how a teacher is loaded, and teacher_model is one behind a server"),
    ],
)
def test_arguments_that_a_server_cannot_follow(
    tmp_path: Path, fake: FakeVllm, folder: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DrklError, match=message):
        make(tmp_path, folder, served(fake), fields=fields)


def test_a_loss_without_a_teacher_has_any_temperature(tmp_path: Path) -> None:
    values = no_server(tmp_path) | {"objective": {"name": "ce"}, "loss": {"temperature": 2.0}}
    load_config(values)


@pytest.mark.parametrize(
    ("facts", "settings", "message"),
    [
        ({}, {"top_k": 64}, r"top_k is 64, and student and teacher are compared on 64 ids; expected at most 63"),
        ({}, {"top_k": 21}, r"top_k is 21, .* Start it with --max-logprobs 21 or more \(vLLM's default is 20\)"),
        ({"max_model_len": 6}, {}, r"Row 'row-9' has up to 17 tokens, and the teacher's server takes 5"),
        ({"vocabulary": 40}, {}, r"does not read the token 63"),
        ({"name": "bog"}, {}, r"does not serve 'big'; it serves 'bog'"),
    ],
)
def test_a_server_that_does_not_fit_is_found_before_the_first_step(
    tmp_path: Path, fake: FakeVllm, folder: str, facts: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    fake.facts |= facts
    with pytest.raises(DrklError, match=message):
        make(tmp_path, folder, served(fake, **settings))
    assert not (tmp_path / "x").exists()


def test_a_student_that_would_be_made_of_the_served_teacher(tmp_path: Path, fake: FakeVllm) -> None:
    values = no_server(tmp_path, server=fake.address, tokenizer=str(tmp_path / "student"))
    values["student"] = {"init": "prune", "layers": 1}
    with pytest.raises(DrklError, match=r"student\.init is 'prune' .* its weights are the server's\. Name a model in"):
        distill(load_config(values)[0].specs())


@pytest.mark.slow
def test_models_in_memory_alone(tmp_path: Path, fake: FakeVllm) -> None:
    """Where no folder has a config, the student's own stands for the teacher's, with the tokenizer that is passed."""
    trainer = make(tmp_path, tiny.llama(1, layers=2, vocab=70), served(fake), fields={"max_steps": 3})
    assert trainer.pair.vocabulary == {"shared": 64, "student": 70, "teacher": 64}
    trainer.train()
    assert len(tiny_runs.steps(trainer.run)) == 3
    with pytest.raises(DrklError, match=r"Set teacher\.tokenizer to the folder"):
        make(tmp_path, tiny.llama(1, layers=2), served(fake), processing_class=None)
    with pytest.raises(DrklError, match=r"The student is an encoder-decoder, and the teacher is served"):
        make(tmp_path, tiny.t5(1), served(fake))


@pytest.mark.slow
def test_a_student_with_random_weights(tmp_path: Path, fake: FakeVllm) -> None:
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}
    values = no_server(tmp_path, server=fake.address) | {"student": {"init": "random", "config": shape}}
    with pytest.raises(DrklError, match=r"Set teacher\.tokenizer to the folder"):
        distill(load_config(values)[0].specs())
    values["teacher"]["tokenizer"] = str(tmp_path / "student")
    run = distill(load_config(values)[0].specs())
    assert len(tiny_runs.steps(run)) == 6


def test_a_classifier_as_the_student(tmp_path: Path, fake: FakeVllm) -> None:
    texts = tiny_classifiers.make(seed=1)
    texts.save_pretrained(tmp_path / "c")
    tiny_classifiers.tokenizer().save_pretrained(tmp_path / "c")
    rows = [{"text": f"w{i}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(6)]
    with pytest.raises(DrklError, match=r"is a classifier, and the teacher is served"):
        make(tmp_path, str(tmp_path / "c"), served(fake), train_dataset=rows, eval_dataset=None, processing_class=None)


@pytest.mark.slow
def test_bad_numbers_in_the_middle_stop_the_run(tmp_path: Path, fake: FakeVllm, folder: str) -> None:
    trainer = make(tmp_path, folder, served(fake), fields={"max_steps": 4})
    nan = {"5": {"logprob": float("nan")}}
    fake.fault = rescored(
        lambda choices: [choices[0] | {"prompt_logprobs": [None, *[nan] * (len(choices[0]["prompt_logprobs"]) - 1)]}],
        after=8,
    )
    with pytest.raises(DrklError, match=r"does not answer as asked: entry \d+ has a log-probability that is no number"):
        trainer.train()
