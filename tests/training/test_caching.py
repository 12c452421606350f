"""A teacher that runs once: training from its cache is training with it, bit for bit; what does not fit is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel

import drkl
from drkl.analysis.config import AnalysisConfig
from drkl.analysis.watch import GradientWatch
from drkl.data.collate import collate, teacher_inputs
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.readout import to_batch
from drkl.runs import RunFolder, read_json, read_yaml, write_json, write_jsonl
from drkl.teachers.cached import TeacherCache, row_of, rows_of, write_states
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from drkl.teachers.shards import ShardWriter
from drkl.training.caching import cache_teacher
from drkl.training.estimate import estimate
from drkl.training.run import Listener, cache_states, distill, prepare
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_python import ROWS, TOKENIZER, config, make

QUIET_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
TIMES = ("seconds", "tokens_per_second")


def log_of(run: RunFolder) -> list[dict[str, Any]]:
    return [{name: line[name] for name in line if name not in TIMES} for line in run.read_train_log()]


def cache_of(folder: Path, student: PreTrainedModel, teacher: PreTrainedModel, **changes: Any) -> TeacherCache:
    given = {
        "args": config(folder, **changes.pop("fields", {})), "processing_class": TOKENIZER, "model": student,
        "output_dir": folder / "cache",
    } | changes  # fmt: skip
    made = cache_teacher(teacher, ROWS, ROWS[:4], **given)
    assert made is not None
    return made


def check_same(folder: Path, pair: Callable[[], tuple[Any, Any]], data: dict[str, Any], **fields: Any) -> None:
    """Train with the teacher and from its cache, and compare every weight and every number of the log."""
    (folder / "live").mkdir()
    live = make(folder / "live", *pair(), fields=fields, **data)
    live.train()
    student, teacher = pair()
    rows = {
        name: data.get(name, ROWS if name == "train_dataset" else ROWS[:4])
        for name in ("train_dataset", "eval_dataset")
    }
    cache_teacher(
        teacher, *rows.values(), model=student, args=config(folder, **fields), output_dir=folder / "cache",
        processing_class=data.get("processing_class", TOKENIZER),
    )  # fmt: skip
    cached = make(folder, pair()[0], TeacherCache.open(folder / "cache"), fields=fields, **data)
    cached.train()
    expected, found = live.pair.student.state_dict(), cached.pair.student.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert log_of(cached.run) == log_of(live.run)
    assert all(parameter.is_meta for parameter in cached.pair.teacher.model.parameters())


@pytest.mark.slow
def test_a_decoder(tmp_path: Path) -> None:
    check_same(tmp_path, lambda: (tiny.llama(1, layers=2), tiny.llama(9)), {}, max_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "fkl", "gradient_accumulation_steps": 3},
        {"objective": "gjs", "temperature": 2.0, "kd_weight": 0.5},
        {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 2},
        {"num_train_epochs": 2, "same_batches": True},
        {"objective": "drkl", "objective_params": {"target": "label"}, "eval_rows": 2},
    ],
)
def test_settings_that_change_the_batches_or_the_loss(tmp_path: Path, fields: dict[str, Any]) -> None:
    check_same(tmp_path, lambda: (tiny.llama(1, layers=2), tiny.llama(9)), {}, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        lambda: (tiny.t5(1), tiny.t5(2)),
        lambda: (tiny.bart(1), tiny.bart(2)),
        lambda: (tiny.gpt2(1), tiny.gpt2(2)),
        lambda: (tiny.llama(1, vocab=70, layers=2), tiny.llama(9)),
        lambda: (tiny.llama(1, layers=2), tiny.llama(9).to(torch.bfloat16)),
    ],
    ids=["t5", "bart", "gpt2", "unequal vocabularies", "bf16 teacher"],
)
def test_other_models(tmp_path: Path, pair: Callable[[], tuple[Any, Any]]) -> None:
    check_same(tmp_path, pair, {})


@pytest.mark.slow
@QUIET_PEFT
def test_lora(tmp_path: Path) -> None:
    peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    check_same(tmp_path, lambda: (tiny.llama(1, layers=2), tiny.llama(9)), peft)


@pytest.mark.slow
def test_a_classifier(tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(12)]
    data = {"train_dataset": rows[3:], "eval_dataset": rows[:3], "processing_class": tiny_classifiers.tokenizer()}
    check_same(tmp_path, lambda: (tiny_classifiers.make(seed=1), tiny_classifiers.make(seed=2)), data)


@pytest.mark.slow
def test_the_config_of_a_run_in_python_repeats_it(tmp_path: Path) -> None:
    folders = [
        tiny.save(model, tmp_path / name) for name, model in (("s", tiny.llama(1, layers=2)), ("t", tiny.llama(9)))
    ]
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [{"id": str(i), **row} for i, row in enumerate(ROWS)])
    data: dict[str, Any] = {"train_dataset": str(rows), "eval_dataset": None}
    cache_teacher(
        str(folders[1]), str(rows), model=str(folders[0]), args=config(tmp_path), output_dir=tmp_path / "cache"
    )
    cache = TeacherCache.open(tmp_path / "cache")
    trainer = make(tmp_path, str(folders[0]), cache, processing_class=None, **data)
    trainer.train()
    trainer.save_model()
    written = read_yaml(trainer.run.config_path)
    assert written["teacher"]["model"] == str(folders[1]) and written["teacher"]["cache"] == str(tmp_path / "cache")
    written["run"] |= {"dir": str(tmp_path), "name": "again"}
    again = tiny_runs.train(written)
    assert (again.student_path / "model.safetensors").read_bytes() == (
        trainer.run.student_path / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_more_epochs_than_one_are_near(tmp_path: Path) -> None:
    """Other batches than those of the first epoch move the last digits of a sum, and no more."""
    live = make(tmp_path, tiny.llama(1, layers=2), tiny.llama(9), fields={"num_train_epochs": 3})
    live.train()
    cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    (tmp_path / "b").mkdir()
    teacher = TeacherCache.open(tmp_path / "cache")
    cached = make(tmp_path / "b", tiny.llama(1, layers=2), teacher, fields={"num_train_epochs": 3})
    cached.train()
    for name, value in live.pair.student.state_dict().items():
        torch.testing.assert_close(cached.pair.student.state_dict()[name], value, rtol=0, atol=1e-5)


def test_rows_are_found_however_they_are_padded_and_for_some_of_their_positions(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    rows: list[Any] = [Row(str(i), (5 + i, 6), (7, 8 + i, 2), None) for i in range(3)]
    batch = collate(rows, pad_id=0)
    del batch["row_ids"]
    inputs, keep = teacher_inputs(batch)
    assert rows_of(inputs, keep) == [row_of(row, None) for row in rows]
    assert rows_of(*teacher_inputs(collate(rows, pad_id=0, packed=True))) == rows_of(inputs, keep)
    longer = collate([*rows, Row("long", (1,) * 9, (2, 2), None)], pad_id=3)
    del longer["row_ids"]
    assert rows_of(*teacher_inputs(longer))[:3] == rows_of(inputs, keep)
    with pytest.raises(DrklError, match="lacks 3 of the 3 rows of a batch"):
        cache.hidden_at(inputs, keep)


@torch.no_grad()
def test_some_positions_of_a_row(tmp_path: Path) -> None:
    teacher = tiny.llama(9)
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), teacher)
    trainer = make(tmp_path, tiny.llama(1, layers=2), teacher)
    rows = trainer.pair.rows[:3]
    batch = collate(rows, pad_id=trainer.pair.pad_id)
    del batch["row_ids"]
    inputs, keep = teacher_inputs(batch)
    for number in range(3):
        keep[number, keep[number].nonzero()[:1]] = False  # all but the first of each
    expected = teacher.model(**inputs).last_hidden_state[keep]
    torch.testing.assert_close(cache.hidden_at(inputs, keep), expected, rtol=0, atol=1e-5)
    keep[0] = False
    assert len(cache.hidden_at(inputs, keep)) == int(keep.sum())
    keep[:] = False
    assert cache.hidden_at(inputs, keep).shape == (0, teacher.config.hidden_size)


@torch.no_grad()
def test_one_text_that_is_learnt_from_at_other_positions_too(tmp_path: Path) -> None:
    """As ``turns: all`` in one stage and the last turn alone in another give it."""
    teacher = tiny.llama(9)
    rows = [Row("a", (5, 6), (7, 8, 9, 2), None, trained) for trained in ((True, True, False, True), None)]
    batches = [to_batch([row], [0], pad_id=0) for row in rows]
    about = {"teacher": {"name": "a"}, "data": [{}], "tokenizer": {}}

    def files(folder: Path) -> list[str]:
        teacher.config.save_pretrained(folder)
        return ["config.json"]

    assert write_states(tmp_path, LiveTeacher(teacher), batches, about, files=files)
    cache = TeacherCache.open(tmp_path)
    for batch in batches:
        expected = teacher.model(**batch.inputs).last_hidden_state[batch.keep]
        torch.testing.assert_close(cache.states(batch), expected, rtol=0, atol=1e-6)
    cache.check_rows(rows, None, "rows")


@pytest.mark.slow
def test_two_stages_and_the_teachers_folder_gone(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES)
    student = tiny.save(tiny.llama(4, layers=2), tmp_path / "student")
    values["student"] = {"init": "pretrained", "model": str(student)}
    live = tiny_runs.train(values)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    done = cli("cache", path, "--output", tmp_path / "cache")
    assert done.code == 0, done.err
    assert f"Next: drkl distill {path} teacher.cache={tmp_path / 'cache'}" in " ".join(done.out.split())
    shutil.move(tmp_path / "teacher", tmp_path / "gone")
    done = cli("distill", path, "run.name=cached", f"teacher.cache={tmp_path / 'cache'}")
    assert done.code == 0, done.err
    cached = RunFolder(tmp_path / "runs" / "cached")
    for ours, theirs in zip([*cached.stages(), cached], [*live.stages(), live], strict=True):
        assert (ours.student_path / "model.safetensors").read_bytes() == (
            theirs.student_path / "model.safetensors"
        ).read_bytes()
        assert log_of(ours) == log_of(theirs)
    assert read_yaml(cached.config_path)["teacher"]["cache"] == str(tmp_path / "cache")


@pytest.mark.slow
def test_parts_and_verification(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drkl.teachers.cached.SHARD_BYTES", 1000)
    values = tiny_runs.config(tmp_path)
    whole = cache_states(tiny_runs.specs(values), tmp_path / "one")
    assert whole is not None and whole.manifest["shards"] > 4
    for part in (2, 0, 1):
        made = cache_states(tiny_runs.specs(values), tmp_path / "three", part=part, parts=3)
        assert (made is None) == (part != 1)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "three").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "three" / n).read_bytes() for n in names)
    done = cli("cache", "--verify", tmp_path / "three")
    assert done.code == 0 and "files as they were written, 40 rows." in done.out
    broken = tmp_path / "three" / "values-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    done = cli("cache", "--verify", tmp_path / "three")
    assert done.code == 2 and "values-00002.safetensors" in done.err


def test_an_estimate_has_the_rows_and_the_bytes_of_the_cache(tmp_path: Path, cli: Cli) -> None:
    values = tiny_runs.config(tmp_path, stages=[{"name": "warmup", "data": {"max_rows": 30}}])
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    done = cli("cache", path, "--dry-run")
    assert done.code == 0, done.err
    said = yaml.safe_load(done.out)
    cache = cache_states(tiny_runs.specs(values), tmp_path / "cache")
    assert cache is not None
    assert (said["rows"], said["positions"]) == (cache.manifest["rows"], cache.manifest["positions"])
    [states] = [load_file(one) for one in (tmp_path / "cache").glob("values-*")]
    assert states["states"].nbytes == said["positions"] * said["bytes_per_position"]
    assert len(said["saved_seconds_per_epoch"]) == 2 and said["estimated_seconds"] >= 0


@pytest.mark.slow
def test_two_processes_of_torchrun_write_the_folder_of_one(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    cache_states(tiny_runs.specs(values), tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "drkl"]
    done = subprocess.run(
        [*launch, "cache", str(path), "--output", str(tmp_path / "two")],
        env=tiny_runs.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.slow
def test_a_killed_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drkl.teachers.cached.SHARD_BYTES", 1000)
    values = tiny_runs.config(tmp_path)
    cache_states(tiny_runs.specs(values), tmp_path / "whole")

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_states(tiny_runs.specs(values), tmp_path / "cut", progress=stop)
    with pytest.raises(DrklError, match=r"is not finished: it has [1-9]"):
        TeacherCache.open(tmp_path / "cut")
    seen: list[int] = []
    assert (
        cache_states(tiny_runs.specs(values), tmp_path / "cut", progress=lambda done, of: seen.append(of)) is not None
    )
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert seen[0] < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": [*ROWS, {"prompt": "w9", "response": "w9"}]}, "lacks 1 of 21 training rows, first 'row-21'"),
        ({"eval_dataset": [{"prompt": "w9", "response": "w9"}]}, "lacks 1 of 1 held-out rows"),
        ({"fields": {"template": "plain"}}, "lacks 20 of 20 training rows, .* other settings than template auto"),
        ({"fields": {"rollout_share": 0.5}}, "a teacher cache has the data's alone"),
    ],
)
def test_what_a_cache_has_not(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    with pytest.raises(DrklError, match=message):
        make(tmp_path, tiny.llama(1, layers=2), cache, **changes)


def test_another_tokenizer(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    with pytest.raises(DrklError, match="was made with another tokenizer: its ids mean other tokens"):
        make(tmp_path, tiny.llama(1, layers=2), cache, processing_class=tiny.tokenizer(words=tiny.VOCAB - 31))


def test_what_cannot_be_cached(tmp_path: Path) -> None:
    student = tiny.llama(1, layers=2)
    with pytest.raises(DrklError, match="rollout_share is above 0: the student writes new text"):
        cache_of(tmp_path, student, tiny.llama(9), fields={"rollout_share": 0.5})
    with pytest.raises(DrklError, match="There is no teacher to cache"):
        cache_of(tmp_path, student, None)  # type: ignore[arg-type]
    with pytest.raises(DrklError, match="part is 2 of 2; expected a number from 0 to 1"):
        cache_of(tmp_path, student, tiny.llama(9), part=2, parts=2)
    broken = tiny.llama(9)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(DrklError, match=r"The teacher.* has weights that are not finite numbers.*model\.norm\.weight"):
        cache_of(tmp_path, student, broken, output_dir=tmp_path / "nan")


def test_another_teacher_is_not_written_into_a_cache_nor_read_from_it(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    cache_states(tiny_runs.specs(values), tmp_path / "cache")
    other = tiny.save(tiny.llama(7), tmp_path / "other")
    values["teacher"]["model"] = str(other)
    with pytest.raises(DrklError, match="is a cache of something else: teacher is"):
        cache_states(tiny_runs.specs(values), tmp_path / "cache")
    values["teacher"]["cache"] = str(tmp_path / "cache")
    with pytest.raises(
        DrklError, match=r"teacher.model is '.*other', and the cache '.*' is of '.*teacher'. Set teacher"
    ):
        tiny_runs.train(values)
    values["teacher"]["model"] = TeacherCache.open(tmp_path / "cache").manifest["teacher"]["name"]
    with pytest.raises(DrklError, match=r"The teacher is the cache '.*', of kind hidden. Of a cache of hidden states"):
        cache_states(tiny_runs.specs(values), tmp_path / "new")


def test_a_manifest_of_another_version(tmp_path: Path) -> None:
    cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    path = tmp_path / "cache" / "manifest.json"
    write_json(path, read_json(path) | {"format": 99})
    with pytest.raises(DrklError, match="has the format 99; this version of drkl reads 1"):
        TeacherCache.open(tmp_path / "cache")


def test_the_files_are_safetensors_and_json(tmp_path: Path) -> None:
    teacher = tiny.llama(9)
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), teacher)
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".json", ".safetensors"}
    assert names - {"manifest.json"} == set(cache.manifest["files"])
    head = load_file(tmp_path / "cache" / "head.safetensors")
    assert torch.equal(head["weight"], teacher.lm_head.weight)
    assert cache.manifest["rows"] == len(ROWS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give either a CONFIG or `--verify FOLDER`"),
        (("quickstart",), "`--output FOLDER` is missing"),
        (("quickstart", "--output", "x", "--part", "4/3"), "--part is '4/3'; expected I/N with I from 1 to N"),
        (("quickstart", "--output", "x", "rollouts.share=1"), "rollouts.share is above 0"),
        (("--verify", "nothing"), "There is no folder 'nothing'"),
        (("--verify", "nothing", "--output", "x"), "`--verify` reads a cache, and takes no `--output`"),
        (("--verify", "nothing", "--kind", "topk"), "takes no `--kind`"),
        (("--verify", "nothing", "--dry-run"), "takes no `--dry-run`"),
        (("quickstart", "--output", "x", "--kind", "top"), "Error: --kind is 'top'; expected one of hidden, topk"),
        (("quickstart", "--probe", "--kind", "top"), "Error: --kind is 'top'; expected one of hidden, topk"),
        (("quickstart", "--dry-run", "--k", "4"), "--k goes with --kind 'topk', and --kind is 'hidden', which"),
        (("quickstart", "--dry-run", "--k", "4"), "Leave --k out, or set --kind to 'topk'"),
        (("quickstart", "--output", "x", "--temperature", "2"), "Leave --temperature out, or set --kind to 'topk'"),
        (("quickstart", "--dry-run", "--kind", "topk", "--temperature", "0"), "Error: --temperature has 0.0; expected"),
    ],
)
def test_words_that_make_no_command(words: tuple[str, ...], message: str, cli: Cli) -> None:
    done = cli("cache", *words)
    assert done.code == 2 and message in " ".join(done.err.split())


def test_it_is_public() -> None:
    assert drkl.TeacherCache is TeacherCache and drkl.cache_teacher is cache_teacher


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_a_description_that_was_edited_is_named_before_it_is_read(tmp_path: Path, name: str) -> None:
    values = tiny_runs.config(tmp_path)
    cache_states(tiny_runs.specs(values), tmp_path / "cache")
    path = tmp_path / "cache" / name
    path.write_bytes(path.read_bytes() + b" ")
    values["teacher"]["cache"] = str(tmp_path / "cache")
    for use in (estimate, distill):
        with pytest.raises(DrklError, match=f"{name}' is not the file that manifest.json lists"):
            use(tiny_runs.specs(values))
    del values["teacher"]["cache"]
    assert cache_states(tiny_runs.specs(values), tmp_path / "cache") is not None  # written again
    TeacherCache.open(tmp_path / "cache")


def test_a_manifest_that_describes_no_hidden_states(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, {"kind": "other"}, []) as writer:
        writer.finish()
    with pytest.raises(DrklError, match=r"manifest.json' does not describe the hidden states of a teacher"):
        TeacherCache.open(tmp_path)


def test_settings_that_a_cache_cannot_follow(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    for fields in ({"teacher_model_init_kwargs": {"dtype": "float32"}}, {"teacher_model_revision": "main"}):
        with pytest.raises(
            DrklError, match=r"say how a teacher is loaded, and teacher_model is a cache of one, '.*cache'"
        ):
            make(tmp_path, tiny.llama(1, layers=2), cache, fields=fields)
    config = TeacherConfig(model=cache.manifest["teacher"]["name"], cache=str(cache.folder), dtype="bf16")
    with pytest.raises(DrklError, match=r"teacher.dtype is bf16, and the cache '.*' has states in float32. Leave"):
        TeacherCache.of(config)


def test_the_dtype_of_a_cache_is_its_own_on_every_machine(tmp_path: Path) -> None:
    """A run that is resumed, or evaluated elsewhere, reads its config again."""
    values = tiny_runs.config(tmp_path)
    cache_states(tiny_runs.specs(values), tmp_path / "cache")
    values["teacher"] |= {"cache": str(tmp_path / "cache"), "dtype": "auto"}
    [spec] = tiny_runs.specs(values)
    assert TeacherCache.of(TeacherConfig.model_validate(spec.resolved["teacher"])).manifest["dtype"] == "float32"


def test_memory_for_what_is_remembered_anyway(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    trainer = make(tmp_path, tiny.llama(1, layers=2), cache, fields={"teacher_remember_mb": 5})
    assert any(note.startswith("teacher_remember_mb has no effect") for note in trainer.pair.notes)
    values = tiny_runs.config(tmp_path)
    cache_states(tiny_runs.specs(values), tmp_path / "of")
    values["teacher"] |= {"remember_mb": 5, "model_init_kwargs": {"use_cache": True}, "cache": str(tmp_path / "of")}
    said: list[str] = []
    prepare(tiny_runs.specs(values), Listener(said.append))
    assert said[0].endswith("Without effect on a cache: teacher.remember_mb, teacher.model_init_kwargs.")


def test_the_pushes_on_the_target_are_watched(tmp_path: Path) -> None:
    logs = []
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    for folder, teacher in ((tmp_path / "a", cache), (tmp_path / "b", tiny.llama(9))):
        folder.mkdir()
        trainer = make(folder, tiny.llama(1, layers=2), teacher)
        watch = GradientWatch.for_trainer(trainer, AnalysisConfig(watch_every=1, watch_positions=7))
        assert watch is not None
        logs.append(watch.measure(trainer.pair.student))
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)


def test_a_cache_where_weights_are_needed(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    student, message = tiny.llama(1, layers=2), "cache' is a teacher cache, which has no weights"
    for weightless in (cache, str(cache.folder)):
        with pytest.raises(DrklError, match=message):
            drkl.evaluate(weightless, None, ROWS[:2], TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(DrklError, match=message):
        make(tmp_path, student, str(cache.folder))
    with pytest.raises(DrklError, match=message):
        LiveTeacher.load(TeacherConfig(model=str(cache.folder)), torch.device("cpu"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DrklError, match=r"There is no folder '.*nothing', .* a path that is relative starts at the working"
    ):
        TeacherCache.open(tmp_path / "nothing")
    for nothing in (None, "", 3):
        with pytest.raises(DrklError, match=f"folder is {nothing!r}; expected the path of a folder"):
            TeacherCache.open(nothing)  # type: ignore[arg-type]
        with pytest.raises(DrklError, match=f"output_dir is {nothing!r}; expected the path of a folder"):
            cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9), output_dir=nothing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": -1}, "part is -1; expected a whole number of at least 0"),
        ({"part": 0.5, "parts": 2}, "part is 0.5; expected"),
        ({"part": "1", "parts": 2}, "part is '1'; expected"),
        ({"parts": 0}, "parts is 0; expected a whole number of at least 1"),
        ({"parts": True}, "parts is True; expected"),
    ],
)
def test_parts_that_are_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9), **changes)


def test_its_head_goes_to_the_device_of_the_run(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny.llama(1, layers=2), tiny.llama(9))
    assert cache.to("meta").head is not None and cache.head.weight.is_meta
    trainer = make(tmp_path, tiny.llama(1, layers=2), TeacherCache.open(tmp_path / "cache"))
    assert trainer.teacher is not None and trainer.teacher.head.weight.device == trainer.args.device
