"""Rows that a finished cache lacks: they are added by the teacher that it is of, or refused by name."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from drkl.errors import DrklError
from drkl.losses.topk import TopK
from drkl.models.readout import to_batch
from drkl.runs import read_json, write_jsonl
from drkl.teachers.cached import TeacherCache
from drkl.teachers.live import LiveTeacher
from drkl.teachers.shards import ShardReader
from drkl.training.caching import cache_teacher
from drkl.training.estimate import estimate
from drkl.training.run import Listener, cache_states, distill
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.rollouts.fake_vllm import FakeVllm, serving
from tests.training import tiny_runs
from tests.training.test_caching import cache_of, log_of
from tests.training.test_python import ROWS, TOKENIZER, config, make

MORE: list[dict[str, Any]] = [{"prompt": f"w{i} w9", "response": f"w{i + 2} w1"} for i in range(5)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small(root: Path, **sections: Any) -> dict[str, Any]:
    """A config whose cache lies in ``root / "cache"``, made from 25 of its 38 training rows."""
    values = tiny_runs.config(root, **sections)
    part = copy.deepcopy(values)
    part["data"]["max_rows"] = 25
    cache_states(tiny_runs.specs(part), root / "cache")
    values["teacher"]["cache"] = str(root / "cache")
    return values


def filling(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"teacher": values["teacher"] | {"fill_cache": True}}


@pytest.mark.slow
def test_rows_are_added_and_training_is_near_the_live_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = small(tmp_path)
    values["training"] |= {"max_steps": 2}
    before = contents(tmp_path / "cache")
    with pytest.raises(DrklError, match=r"lacks 13 of 38 training rows, first 'r26'.* Let teacher.fill_cache: true"):
        tiny_runs.train(values)
    said: list[str] = []
    teachers: list[weakref.ref[Any]] = []
    load = LiveTeacher.load

    def loaded(*arguments: Any, **words: Any) -> LiveTeacher:
        teacher = load(*arguments, **words)
        teachers.append(weakref.ref(teacher.model))
        return teacher

    monkeypatch.setattr(LiveTeacher, "load", loaded)
    dropped: list[bool] = []
    run = distill(
        tiny_runs.specs(filling(values)),
        listener=Listener(said.append),
        on_trainer=lambda trainer: dropped.append(all(teacher() is None for teacher in teachers)),
    )
    assert any("lacks 13 rows, first 'r26'; they are added." in text for text in said)
    assert len(teachers) == 1 and dropped == [True]
    after = contents(tmp_path / "cache")
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert [*ShardReader(tmp_path / "cache").verify()]
    assert TeacherCache.open(tmp_path / "cache").manifest["rows"] == 40

    monkeypatch.setattr(LiveTeacher, "load", lambda *a, **w: pytest.fail("loaded the teacher again"))
    values["run"]["name"] = "again"
    again = distill(tiny_runs.specs(filling(values)))
    assert contents(tmp_path / "cache") == after and tiny_runs.weights(again) == tiny_runs.weights(run)


@pytest.mark.slow
def test_a_cache_that_is_filled_with_every_row_is_the_live_teacher(tmp_path: Path) -> None:
    """Its rows are those of other data, so that every batch is read as in training."""
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES)
    live = tiny_runs.train(values)
    other = {"path": str(tiny_runs.write_rows(tmp_path / "other.jsonl", 8, response="w1 w20")), "max_tokens": 70}
    cache_states(tiny_runs.specs(values | {"data": other, "stages": []}), tmp_path / "cache")
    values["teacher"]["cache"] = str(tmp_path / "cache")
    values["run"]["name"] = "cached"
    cached = tiny_runs.train(filling(values))
    assert tiny_runs.weights(cached) == tiny_runs.weights(live) and log_of(cached) == log_of(live)
    settings = read_json(tmp_path / "cache" / "manifest.json")["data"]
    assert len(settings) > 1 and settings[0] != settings[1]


@pytest.mark.slow
def test_how_many_rows_would_be_added(tmp_path: Path, cli: Cli) -> None:
    values = small(tmp_path)
    with pytest.raises(DrklError, match="lacks 13 of 38 training rows"):
        estimate(tiny_runs.specs(values))
    path = tiny_runs.write_config(filling(values), tmp_path / "c.yaml")
    done = cli("distill", path, "--dry-run")
    assert done.code == 0 and "rows_added_to_the_cache: 13" in done.out
    assert TeacherCache.open(tmp_path / "cache").manifest["rows"] == 27  # nothing was written


def test_a_cache_to_fill_is_named(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, teacher={"fill_cache": True})
    with pytest.raises(DrklError, match="fill_cache is true, and no cache is named that could be filled"):
        tiny_runs.specs(values)


@pytest.mark.slow
def test_another_teacher_of_the_same_name(tmp_path: Path) -> None:
    values = small(tmp_path)
    before = contents(tmp_path / "cache")
    tiny.save(tiny.llama(8), tmp_path / "teacher")
    with pytest.raises(
        DrklError, match=r"The teacher '.*' is not the one of the cache '.*cache', .* its weights or its"
    ):
        tiny_runs.train(filling(values))
    assert contents(tmp_path / "cache") == before and not (tmp_path / "runs" / "r").exists()


@pytest.mark.slow
def test_a_killed_pass_leaves_the_cache_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drkl.teachers.cached.SHARD_BYTES", 1000)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    values = {name: small(tmp_path / name) for name in ("whole", "cut")}
    for own in values.values():  # the same teacher and rows
        own["teacher"]["model"] = values["whole"]["teacher"]["model"]
    cache_states(tiny_runs.specs(part_of(values["cut"])), tmp_path / "cut" / "other")
    values["cut"]["teacher"]["cache"] = str(tmp_path / "cut" / "other")
    tiny_runs.train(filling(values["whole"]))

    def stop(done: int, of: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    folder = tmp_path / "cut" / "other"
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_runs.specs(filling(values["cut"])), listener=Listener(on_fill=stop))
    assert (folder / "manifest.json").read_bytes() == manifest and TeacherCache.open(folder).manifest["rows"] == 27
    assert len([*folder.glob("values-*")]) > read_json(folder / "manifest.json")["shards"]
    (folder / "values-00099.safetensors").write_bytes(b"of another pass that was killed")
    seen: list[int] = []
    distill(tiny_runs.specs(filling(values["cut"])), listener=Listener(on_fill=lambda done, of: seen.append(of)))
    assert seen[0] < 7
    assert contents(folder) == contents(tmp_path / "whole" / "cache")


def part_of(values: dict[str, Any]) -> dict[str, Any]:
    part = copy.deepcopy(values)
    part["data"]["max_rows"] = 25
    del part["teacher"]["cache"]
    return part


@pytest.mark.slow
def test_the_command_that_made_it_mends_a_filled_cache(tmp_path: Path) -> None:
    values = small(tmp_path)
    first = contents(tmp_path / "cache")
    tiny_runs.train(filling(values))
    filled = contents(tmp_path / "cache")
    cache_states(tiny_runs.specs(part_of(values)), tmp_path / "cache")
    assert contents(tmp_path / "cache") == filled  # nothing is broken
    (tmp_path / "cache" / "values-00001.safetensors").unlink()
    cache_states(tiny_runs.specs(part_of(values)), tmp_path / "cache")
    assert contents(tmp_path / "cache") == first
    values["run"]["name"] = "again"
    tiny_runs.train(filling(values))
    assert contents(tmp_path / "cache") == filled


def test_in_python(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    cache_of(tmp_path, student, teacher)
    made = cache_of(tmp_path, student, teacher, fill=True)
    assert made.manifest["rows"] == len(ROWS) and "made_with" not in made.manifest
    more: dict[str, Any] = {
        "args": config(tmp_path), "model": student, "output_dir": tmp_path / "cache", "processing_class": TOKENIZER
    }  # fmt: skip
    filled = cache_teacher(teacher, [*MORE, *ROWS[:3]], MORE[:1], fill=True, **more)
    assert filled is not None and filled.manifest["rows"] == len(ROWS) + len(MORE)
    trainer = make(tmp_path, student, filled, train_dataset=[*ROWS, *MORE])
    assert filled.lacking(trainer.pair.rows, None) == []


def test_a_cache_of_largest_logits(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1, layers=2), tiny.llama(9)
    cache_of(tmp_path, student, teacher, kind="topk", k=5)
    rows = [ROWS[0] | {"response": f"{ROWS[0]['response']} w7"}, *MORE]
    given: dict[str, Any] = {"args": config(tmp_path), "model": student, "processing_class": TOKENIZER}
    filled = cache_teacher(teacher, rows, fill=True, output_dir=tmp_path / "cache", **given)
    whole = cache_teacher(teacher, rows, kind="topk", k=5, output_dir=tmp_path / "whole", **given)
    assert filled is not None and whole is not None and filled.manifest["rows"] == len(ROWS) + len(rows)
    batch = to_batch(make(tmp_path, student, teacher, train_dataset=rows).pair.rows, [*range(len(rows))], pad_id=0)
    ours, theirs = filled.states(batch), whole.states(batch)
    assert isinstance(ours, TopK) and isinstance(theirs, TopK)
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        (tiny.llama(8), {}, "is not the one of the cache"),
        (tiny.llama(9).to(torch.bfloat16), {}, "The teacher is in bfloat16, and the cache '.*' is of one in float32"),
        (tiny.llama(9), {"part": 1, "parts": 2}, "fill is true: one process adds rows to a cache, of the kind"),
        (tiny.llama(9), {"kind": "topk"}, "of the kind that it is. Leave part, parts, kind, k and temperatures out"),
        (tiny.llama(9), {"output_dir": "nothing"}, "There is no folder '.*nothing'"),
        (tiny.llama(9), {"processing_class": tiny.tokenizer(words=tiny.VOCAB - 31)}, "made with another tokenizer"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, teacher: Any, changes: dict[str, Any], message: str) -> None:
    student = tiny.llama(1, layers=2)
    cache_of(tmp_path, student, tiny.llama(9))
    before = contents(tmp_path / "cache")
    if "output_dir" in changes:
        changes = {"output_dir": tmp_path / changes["output_dir"]}
    with pytest.raises(DrklError, match=message):
        cache_of(tmp_path, student, teacher, fill=True, **changes)
    assert contents(tmp_path / "cache") == before


@pytest.mark.slow
def test_two_processes_of_torchrun_fill_once(tmp_path: Path) -> None:
    values = small(tmp_path)
    one = copy.deepcopy(values)
    cache_states(tiny_runs.specs(part_of(values)), tmp_path / "other")
    one["teacher"]["cache"] = str(tmp_path / "other")
    one["run"]["name"] = "one"
    tiny_runs.train(filling(one))
    path = tiny_runs.write_config(filling(values), tmp_path / "c.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "drkl"]
    done = subprocess.run(
        [*launch, "distill", str(path)], env=tiny_runs.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loading the teacher") == 1
    assert contents(tmp_path / "cache") == contents(tmp_path / "other")


@pytest.mark.slow
def test_held_out_rows_alone(tmp_path: Path) -> None:
    values = small(tmp_path)
    tiny_runs.train(filling(values))
    rows = tmp_path / "heldout.jsonl"
    write_jsonl(rows, [{"id": str(i), **row} for i, row in enumerate(MORE)])
    values["data"] |= {"eval_path": str(rows)}
    values["run"]["name"] = "heldout"
    with pytest.raises(DrklError, match="lacks 5 of 5 held-out rows, first '0'"):
        tiny_runs.train(values)
    said: list[str] = []
    distill(tiny_runs.specs(filling(values)), listener=Listener(said.append))
    assert any("lacks 5 rows" in text for text in said)
    assert TeacherCache.open(tmp_path / "cache").manifest["rows"] == 45


@pytest.mark.slow
def test_a_server_adds_rows(tmp_path: Path, cli: Cli) -> None:
    with serving(FakeVllm(tiny.llama(9), tiny.tokenizer(), name="big")) as fake:
        student = tiny.save(tiny.llama(1, layers=2), tmp_path / "student")
        values = tiny_runs.config(tmp_path, student={"init": "pretrained", "model": str(student), "layers": None})
        values["teacher"] = {"server": f"{fake.address}/v1", "model": "big", "top_k": 8}
        part = copy.deepcopy(values)
        part["data"]["max_rows"] = 25
        cache_states(tiny_runs.specs(part), tmp_path / "cache", kind="topk")
        values["teacher"]["cache"] = str(tmp_path / "cache")
        with pytest.raises(DrklError, match="lacks 13 of 38 training rows"):
            tiny_runs.train(values)
        other = filling(values)
        other["teacher"]["top_k"] = 9
        with pytest.raises(DrklError, match=r"server does not give what the cache .* has: k is 8, not 9"):
            tiny_runs.train(other)
        run = tiny_runs.train(filling(values))
        assert TeacherCache.open(tmp_path / "cache").manifest["rows"] == 40
        values["run"]["name"] = "served"
        del values["teacher"]["cache"]
        served = tiny_runs.train(values)
    for folder in (run, served):  # the server is gone
        done = cli("evaluate", folder.root, "--sweep", "none")
        assert done.code == 0, done.err
        assert "which give no exact numbers" in done.out or "of which there are no exact numbers" in done.out
        done = cli("analyze", folder.root)
        assert done.code == 2 and "compares the student with the whole distribution of its teacher" in done.err
    teacher = tiny.save(tiny.llama(9), tmp_path / "big")
    done = cli("evaluate", served.root, "--sweep", "none", f"teacher.model={teacher}")
    assert done.code == 0 and "no exact numbers" not in done.out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "classifier"])
def test_other_models(tmp_path: Path, kind: str) -> None:
    if kind == "t5":
        rows: list[Any] = ROWS
        make_pair, words = (lambda: (tiny.t5(1), tiny.t5(2))), TOKENIZER
    else:
        rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(12)]
        make_pair = lambda: (tiny_classifiers.make(seed=1), tiny_classifiers.make(seed=2))  # noqa: E731
        words = tiny_classifiers.tokenizer()
    data = {"train_dataset": rows[4:], "eval_dataset": rows[2:4], "processing_class": words}
    student, teacher = make_pair()
    given: dict[str, Any] = {
        "args": config(tmp_path), "model": student, "output_dir": tmp_path / "cache", "processing_class": words
    }  # fmt: skip
    cache_teacher(teacher, rows[:2], **given)
    cache = cache_teacher(teacher, rows[4:], rows[2:4], fill=True, **given)
    trainers = []
    for name, own in (("live", teacher), ("cached", cache)):
        (tmp_path / name).mkdir()
        trainers.append(make(tmp_path / name, make_pair()[0], own, fields={"max_steps": 2}, **data))
        trainers[-1].train()
    live, cached = (trainer.pair.student.state_dict() for trainer in trainers)
    assert all(torch.equal(cached[name], value) for name, value in live.items())
