"""Runs whose rows come from a stream: the batches, weights and logs of one that reads all rows first, or is cut off."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import count as count_from
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from drkl.data.cursors import counted
from drkl.data.rows import Placed
from drkl.data.streams import RowStream, Source
from drkl.data.tokenize import DropReport, Row
from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training.run import Listener
from drkl.training.streaming import STATE, StreamedBatches, check_streaming
from tests.data.test_streams import NUMBERS, source, take
from tests.models import tiny, tiny_classifiers
from tests.models.tiny_classifiers import CLASSES
from tests.training import tiny_runs
from tests.training.test_caching import cache_of
from tests.training.test_python import ROWS, make
from tests.training.test_python import config as python_config
from tests.training.test_resume import Killed, assert_equal, comparable, cut_off, kill_at_step, killed_by_signal


def config(root: Path, **sections: Any) -> dict[str, Any]:
    """A run of 10 steps over windows of 7 rows, of which there are 40."""
    if not (root / "eval.jsonl").exists():
        root.mkdir(exist_ok=True)
        tiny_runs.write_rows(root / "eval.jsonl", 6)
    data = {"streaming": True, "shuffle_buffer": 7, "eval_path": str(root / "eval.jsonl")} | sections.pop("data", {})
    training = {"max_steps": 10} | sections.pop("training", {})
    return tiny_runs.config(root, data=data, training=training, **sections)


def named(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {**values, "run": {**values["run"], "name": name}}


def reference(root: Path, **sections: Any) -> tuple[dict[str, Any], RunFolder]:
    values = config(root, **sections)
    return values, tiny_runs.train(named(values, "whole"))


def without_account(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("rows_")} for line in comparable(run)]


SIZES = [{}, {"per_device_train_batch_size": 3, "tokens_per_step": None}]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=["tokens", "rows"])
def test_rows_that_fit_into_the_buffer_have_the_batches_of_a_run_that_reads_them_first(
    tmp_path: Path, size: dict[str, Any]
) -> None:
    values = config(tmp_path, data={"shuffle_buffer": 40}, training={"max_steps": 30} | size)  # two passes and a half
    streamed = tiny_runs.train(values)
    plain = {name: value for name, value in values["data"].items() if name not in ("streaming", "shuffle_buffer")}
    first = tiny_runs.train(named(values | {"data": plain}, "first"))
    assert tiny_runs.weights(streamed) == tiny_runs.weights(first)
    assert without_account(streamed) == without_account(first)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=["tokens", "rows"])
@pytest.mark.parametrize("step", [1, 3, 4, 5, 9])
def test_cut_off_anywhere_in_a_window(tmp_path: Path, step: int, size: dict[str, Any]) -> None:
    values, whole = reference(tmp_path, training=size)
    cut_off(values, kill_at_step("r", step))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "step"), [("log r/checkpoints", 5), ("checkpoint r/checkpoints", 6)])
def test_killed_by_signal(tmp_path: Path, moment: str, step: int) -> None:
    values, whole = reference(tmp_path)
    killed_by_signal(values, tmp_path / "c.yaml", moment, step)
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_cut_off_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole = reference(tmp_path)

    def killed(*args: Any, **words: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("drkl.training.trainer.RunRecord.trained", killed)
        cut_off(values, Listener())
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_a_bad_row_deep_in_the_stream_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    values, whole = reference(tmp_path)
    data = Path(values["data"]["path"])
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:30], '{"prompt": 7, "response": "w1"}\n', *lines[31:]]))
    with pytest.raises(DrklError, match=rf"^{re.escape(str(data))}:31: prompt must be text"):
        tiny_runs.train(values)
    run = RunFolder(Path(values["run"]["dir"]) / "r")
    assert [line["step"] for line in run.read_train_log() if "loss" in line][-1] == 7, "28 rows in windows of 7"
    assert (run.checkpoints_path / "checkpoint-6" / STATE).is_file()
    data.write_text("".join(lines))
    assert_equal(tiny_runs.train(values, "resume"), whole)


def streamed(rows: Sequence[Any]) -> datasets.IterableDataset:
    def generate() -> Iterator[Any]:
        yield from rows

    return datasets.IterableDataset.from_generator(generate)


TEXTS = [{"text": f"w{i} w{i * 2 % 9}", "label": CLASSES[i % 3]} for i in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "t5", "classifier", "tokenised"])
def test_an_iterable_dataset_trains_as_its_list_does(tmp_path: Path, kind: str) -> None:
    def pair() -> tuple[Any, Any]:
        if kind == "t5":
            return tiny.t5(1, layers=2), tiny.t5(9)
        if kind == "classifier":
            return tiny_classifiers.make("bert", 1), tiny_classifiers.make("bert", 9)
        return tiny.llama(1, layers=2), tiny.llama(9)

    data: list[Any] = TEXTS if kind == "classifier" else ROWS
    if kind == "tokenised":
        data = [{"input_ids": [5, 6, 7 + i % 9, 4], "labels": [-100, -100, 7 + i % 9, 4]} for i in range(12)]
    weights, logs = [], []
    for name, given in (("list", data), ("stream", streamed(data))):
        trainer = make(tmp_path / name, *pair(), fields={"max_steps": 6}, train_dataset=given, eval_dataset=data[:3])
        trainer.train()
        weights.append({name: weight.clone() for name, weight in trainer.student.state_dict().items()})
        logs.append(without_account(trainer.run))
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_an_iterable_dataset_is_resumed(tmp_path: Path) -> None:
    fields = {"max_steps": 8, "shuffle_buffer": 6}
    whole = make(tmp_path / "whole", fields=fields, train_dataset=streamed(ROWS))
    whole.train()
    again = make(tmp_path / "again", fields=fields, train_dataset=streamed(ROWS))
    shutil.copytree(whole.run.root, again.run.root, dirs_exist_ok=True)
    shutil.rmtree(again.run.checkpoints_path / "checkpoint-8")
    kept = [line for line in whole.run.read_train_log() if line["step"] <= 7]
    again.train(resume_from_checkpoint=True)
    assert comparable(again.run) == comparable(whole.run)
    assert [line for line in again.run.read_train_log() if line["step"] <= 7] == kept, "one step was taken"
    ours, theirs = again.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_cache_serves_a_stream_of_its_rows_and_names_another(tmp_path: Path) -> None:
    fields = {"max_steps": 4, "shuffle_buffer": 6}
    live = make(tmp_path / "live", tiny.llama(1, layers=2), tiny.llama(9), fields=fields, train_dataset=streamed(ROWS))
    live.train()
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    read = make(tmp_path / "read", tiny.llama(1, layers=2), cache, fields=fields, train_dataset=streamed(ROWS))
    read.train()
    ours, theirs = read.student.state_dict(), live.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = {"id": "new", "prompt": "w1 w1 w1", "response": "w2"}
    later = streamed([*ROWS[:10], other, *ROWS[10:]])
    trainer = make(tmp_path / "later", tiny.llama(1, layers=2), cache, fields=fields, train_dataset=later)
    with pytest.raises(DrklError, match="lacks 1 of 6 rows of the stream, first 'new'"):
        trainer.train()


ROWS_OF_FOUR: Any = ({}, {}), ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2})
"""A step in rows has those of both processes."""


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=["tokens", "rows"])
def test_two_processes_see_the_plan_of_one(tmp_path: Path, size: dict[str, Any]) -> None:
    """A gradient's sum has another order, which in fp32 is 1e-6 of it; where sums cancel, 1e-4 of a step of Adam."""
    values = config(tmp_path, training=size)
    one, two = [values | {"training": values["training"] | more} for more in ROWS_OF_FOUR[bool(size)]]
    alone, values = tiny_runs.train(named(one, "alone")), two
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "drkl", "distill", str(path)], env=tiny_runs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    both = RunFolder(Path(values["run"]["dir"]) / "r")
    exact = ("step", "num_tokens", "rows_read", "rows_dropped")
    for ours, theirs in zip(both.read_train_log(), alone.read_train_log(), strict=True):
        assert [ours.get(name) for name in exact] == [theirs.get(name) for name in exact]
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    ours, theirs = (load_file(run.student_path / "model.safetensors") for run in (both, alone))
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=10 * 1e-2 * 1e-4), name


def test_what_a_stream_cannot_do_is_said_first(tmp_path: Path) -> None:
    for fields, message in (
        ({"num_train_epochs": 1}, "has no end that is known: give max_steps"),
        ({"same_batches": True}, "gives no batch again: leave same_batches out"),
        ({"teacher_remember_mb": 1}, "nothing to remember"),
        ({"rollout_share": 0.5}, "leave rollout_share at 0"),
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, "has no epochs: eval_strategy is 'epoch'"),
    ):
        with pytest.raises(DrklError, match=f"^train_dataset is a stream, which .*{message}"):
            check_streaming(python_config(tmp_path, **fields))


def anonymous_memory() -> float:
    """In MiB, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read there")
def test_the_memory_does_not_grow_with_the_rows_that_were_read(tmp_path: Path) -> None:
    """200,000 rows of 60 tokens, which would be 1.5 GB together."""

    def forever(count: int) -> Iterator[tuple[str, Any]]:
        return (
            (f"row {i}", {"id": f"r{i}", "tokens": [j % 9000 for j in range(i, i + 60)]}) for i in count_from(count)
        )

    def tokenise(part: Placed, name: str, row_format: str) -> tuple[list[Row], DropReport]:
        rows = [Row(row["id"], (1,), tuple(row["tokens"]), None) for _, row in part.items]  # type: ignore[arg-type]
        return rows, DropReport(kept=len(rows))

    stream = RowStream([Source("endless", counted(forever))], tokenise, 2000)
    made = batches(tmp_path, stream, tokens_per_step=None, per_device_train_batch_size=200, max_steps=1000)
    made.begin(None)
    after = {step: anonymous_memory() for step in range(1000) if made[2 * step] and step % 100 == 99}
    assert after[999] - after[199] < 30, after


# without models ---------------------------------------------------------------------------------------------------


def batches(folder: Path, stream: RowStream, **fields: Any) -> StreamedBatches:
    def check(rows: Sequence[Any]) -> None:
        if any(row.id == "r-refused" for row in rows):
            raise DrklError("A row is refused.")

    args = python_config(folder, **{"max_steps": 12, "tokens_per_step": 12} | fields)
    return StreamedBatches(stream, args, 2, check)


def numbers(rows: Sequence[dict[str, Any]] = NUMBERS, buffer: int = 7) -> RowStream:
    return RowStream([source(rows)], take, buffer)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    return path


def ids(made: StreamedBatches, first: int = 0) -> list[list[str]]:
    return [[row.id for row in made[index]] for index in range(first, len(made))]


def test_batches_go_on_from_the_window_of_a_checkpoint(tmp_path: Path) -> None:
    whole = batches(tmp_path, numbers())
    whole.begin(None)
    expected = ids(whole)
    whole.begin(None)
    assert ids(whole) == expected, "another training begins anew"
    for step in (1, 3, 5, 8, 11, 12):
        whole.begin(None)
        for index in range(2 * step + (step < 12)):  # one ahead
            whole[index]
        whole.save(checkpoint(tmp_path, step))
        resumed = batches(tmp_path, numbers())
        resumed.begin(tmp_path / f"checkpoint-{step}")
        assert ids(resumed, 2 * step) == expected[2 * step :]
        assert resumed.account(12) == whole_account(tmp_path)
    whole.end()


def whole_account(folder: Path) -> dict[str, Any]:
    made = batches(folder, numbers())
    made.begin(None)
    ids(made)
    return made.account(12)


def test_a_checkpoint_of_another_kind_or_with_other_settings_is_refused(tmp_path: Path) -> None:
    made = batches(tmp_path, numbers())
    made.begin(None)
    made[0]
    made.save(path := checkpoint(tmp_path, 1))
    for other, message in (
        (batches(tmp_path, numbers(buffer=8)), r"inputs .*: shuffle_buffer of the stream: 7 then, 8 now\. Put them"),
        (batches(tmp_path, numbers(), seed=1), "seed of the stream: 0 then, 1 now"),
        (batches(tmp_path, numbers(), tokens_per_step=13), "tokens_per_step of the stream: 12 then, 13 now"),
        (batches(tmp_path, numbers(), per_device_train_batch_size=3), "tokens_per_step of the stream: 12 then, None n"),
    ):
        with pytest.raises(DrklError, match=message):
            other.begin(path)
    (path / STATE).write_text("{}")
    with pytest.raises(DrklError, match=r"stream\.json' does not say where the stream was \('settings'\)"):
        made.begin(path)
    (path / STATE).unlink()
    with pytest.raises(DrklError, match=r"has no stream\.json: its run read all rows before its first step"):
        made.begin(path)


def test_other_rows_under_a_resumed_run_are_refused(tmp_path: Path) -> None:
    made = batches(tmp_path, numbers())
    made.begin(None)
    made[0]
    made.save(path := checkpoint(tmp_path, 1))
    made.begin(path)
    made[2]
    other = batches(tmp_path, numbers([{**row, "id": f"x{i}"} for i, row in enumerate(NUMBERS)]))
    with pytest.raises(DrklError, match=r"training rows: those of numbers are others, or in another order\. Put them"):
        other.begin(path)


def test_what_is_wrong_is_said_where_its_rows_are_needed(tmp_path: Path) -> None:
    made = batches(tmp_path, numbers([*NUMBERS[:9], {"id": "r-refused", "n": 1}, *NUMBERS[9:]]))
    made.begin(None)
    first = made._window(0)
    assert [row.id for row in first.rows] == [f"r{i}" for i in range(7)]
    with pytest.raises(DrklError, match=r"^A row is refused\.$"):
        made[2 * first.end]
    broken = batches(tmp_path, numbers([*NUMBERS[:9], {"id": "no number"}]))
    broken.begin(None)
    broken[0]
    with pytest.raises(KeyError, match="n"):  # a bug is no message
        broken[2 * first.end]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([(None, "The disk of another is gone.")], r"^The disk of another is gone\.$"),
        ([("another", None)], "^The processes read different rows from numbers; each has to read the whole stream"),
    ],
)
def test_every_process_ends_where_one_reads_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[Any], message: str
) -> None:
    made = batches(tmp_path, numbers())
    monkeypatch.setattr("drkl.training.streaming.gather", lambda own: own + told)
    monkeypatch.setattr(type(made._args), "world_size", property(lambda self: 2))
    made.begin(None)
    with pytest.raises(DrklError, match=message):
        made[0]
