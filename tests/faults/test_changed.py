"""A run that was cut off, and what it is trained on is changed before it goes on: refused by name, or the same run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from drkl.config import describe_keys
from drkl.training.config import OWN_ARGUMENTS, OWNED
from tests.data.tiny_tokenizers import build
from tests.faults.conftest import Injected
from tests.faults.forked import Ended, Runner
from tests.models import tiny
from tests.training import tiny_runs

Change = Callable[[], Any]
ROLLOUTS = {"share": 1.0, "max_new_tokens": 4, "refresh_every": 2, "batch_size": 8, "eval_prompts": 2}


@dataclasses.dataclass
class Case:
    """A run that was cut off after a checkpoint, and the weights of the same run where it went through."""

    root: Path
    values: dict[str, Any]
    weights: bytes
    runner: Runner
    copies: int = 0

    def copy(self) -> Path:
        """A copy of the run, which is another folder: nothing goes by its path."""
        self.copies += 1
        target = self.root / "copies" / f"r{self.copies}"
        shutil.copytree(self.root / "runs" / "r", target)
        return target

    def resume(self, run: Path, **words: Any) -> Ended:
        return self.runner.call("distill", "--resume", run, **words)


def make(root: Path, runner: Runner, **sections: Any) -> Case:
    values = tiny_runs.config(root, **sections)
    path = tiny_runs.write_config(values, root / "c.yaml")
    done = runner.call("distill", path, "run.name=whole")
    assert done.code == 0, done.err
    moment = ["log", "r/checkpoints", 5]
    killed = runner.call("distill", path, inject="tests.training.killed:kill_in_training", given=moment)
    assert killed.code == -signal.SIGKILL, killed.err
    return Case(root, values, weights(root / "runs" / "whole"), runner)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Case:
    return make(tmp_path_factory.mktemp("plain"), runner)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Case:
    return make(tmp_path_factory.mktemp("sampled"), runner, rollouts=ROLLOUTS)


@pytest.fixture(scope="module")
def unchosen(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Case:
    """No checkpoint is the best: the run ends with its last weights."""
    arguments = {"logging_steps": 1, "load_best_model_at_end": False}
    return make(tmp_path_factory.mktemp("unchosen"), runner, training={"arguments": arguments})


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def edit(run: Path, key: str, value: Any) -> None:
    """Change a setting, by its dotted name, in the config.yaml of a run."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    *sections, name = key.split(".")
    place = values
    for section in sections:
        place = place[int(section)] if isinstance(place, list) else place[section]
    place[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


@contextmanager
def changed(path: Path, change: Change) -> Iterator[None]:
    """Inside, a file or a folder is changed; then it is as it was."""
    kept = path.with_name(f"{path.name}.kept")
    (shutil.copytree if path.is_dir() else shutil.copy2)(path, kept)
    try:
        change()
        yield
    finally:
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
        kept.rename(path)


def assert_refused(case: Case, run: Path, *words: str) -> None:
    """Refused in one message with the two ways out, and nothing of the run is touched."""
    before = files_of(run)
    done = case.resume(run)
    assert done.code == 2, f"status {done.code}: {done.err[-300:]}"
    assert "Traceback" not in done.err, done.err[-500:]
    for word in (*words, "Put them back as they were", "new run"):
        assert word in done.err, f"{word!r} is not in: {done.err}"
    assert files_of(run) == before, "the run was touched"


def files_of(run: Path) -> dict[str, bytes | None]:
    """Its files, without the lock that a killed process has left."""
    return {name: content for name, content in tiny_runs.tree(run).items() if name != ".lock"}


def assert_goes_on(case: Case, run: Path) -> None:
    done = case.resume(run)
    assert done.code == 0, done.err[-500:]
    assert "Going on from checkpoint-4." in done.out
    assert weights(run) == case.weights, "other weights than those of the run that went through"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[20:], *rows[:20]]


def with_other_response(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[:7], {**rows[7], "response": "w1 w2 w3"}, *rows[8:]]


def others(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "response": f"w{i % 20} w{i % 7}"} for i, row in enumerate(rows)]


FEW: dict[str, tuple[Callable[..., Any], str]] = {
    "ten rows fewer": (lambda rows: rows[:-10], "training rows: 38 then, 28 now"),
    "one response edited": (with_other_response, "training rows: as many as before"),
}
MORE: dict[str, tuple[Callable[..., Any], str]] = {
    "another order": (shuffled, "training rows: as many as before"),
    "other rows": (others, "training rows: as many as before"),
    "a row twice": (lambda rows: [*rows, {**rows[0], "id": "again"}], "training rows: 38 then"),
}


def change_data(case: Case, injected: Injected, changes: dict[str, tuple[Callable[..., Any], str]]) -> None:
    path, run = case.root / "data.jsonl", case.copy()
    for name, (change, said) in changes.items():
        rows = change(rows_of(path))
        with injected(name), changed(path, lambda rows=rows: write(path, rows)):  # type: ignore[misc]
            assert_refused(case, run, said)
    with injected("put back"):
        assert_goes_on(case, run)


@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The training data: rows fewer, one response edited",
    does="Refuses before the run is touched, with the number of rows then and now and the two ways out: put them back, "
    "or start anew. Once they are back, the run goes on to the same bytes.",
)
def test_training_data_is_changed(plain: Case, injected: Injected) -> None:
    change_data(plain, injected, FEW)


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The training data: other rows, another order, a row twice; with sampled answers the prompts, or their ids",
    does="Refuses, likewise.",
)
def test_more_of_the_training_data_is_changed(plain: Case, sampled: Case, injected: Injected) -> None:
    change_data(plain, injected, MORE)
    change_data(
        sampled,
        injected,
        {
            "prompts": (lambda rows: [{**row, "prompt": "w3 " + row["prompt"]} for row in rows], "training rows: "),
            "ids": (lambda rows: [{**row, "id": f"x{row['id']}"} for row in rows], "training rows: "),
        },
    )


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="One number of the teacher's weights; its chat template; its tokenizer",
    does="Refuses, and names what is another.",
)
def test_the_teacher_is_changed(plain: Case, injected: Injected) -> None:
    folder = plain.root / "teacher"

    def one_number() -> None:
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).flatten()[0] += 0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def template() -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text() + "{# another #}")

    def words() -> None:
        build(extra=[f"w{33 - i}" for i in range(34)]).save_pretrained(folder)

    for name, change, said in (
        ("one weight", one_number, "the teacher: other weights"),
        ("its template", template, "the template: another"),
        ("its tokenizer", words, "the tokenizer: another"),
    ):
        with injected(name), changed(folder, change):
            assert_refused(plain, plain.copy(), said)


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The held-out rows: half of them, one of them edited",
    does="Refuses: the best would be chosen across two sets.",
)
def test_held_out_rows_are_changed(tmp_path: Path, runner: Runner, injected: Injected) -> None:
    path = tiny_runs.write_rows(tmp_path / "heldout.jsonl", 12)
    data = {"eval_path": str(path), "path": str(tmp_path / "data.jsonl"), "max_prompt_tokens": 40, "max_tokens": 80}
    case = make(tmp_path, runner, data=data)
    run = case.copy()
    for name, change, said in (
        ("half", lambda rows: rows[::2], "held-out rows: 12 then, 6 now"),
        ("one edited", with_other_response, "held-out rows: as many as before"),
    ):
        with injected(name), changed(path, lambda change=change: write(path, change(rows_of(path)))):  # type: ignore[misc]
            assert_refused(case, run, said)
    with injected("none"):
        other = case.copy()
        edit(other, "data.eval_path", "none")
        assert_refused(case, other, "held-out rows: 12 then, 0 now", "load_best_model_at_end: true then, false now")
    with injected("put back"):
        assert_goes_on(case, run)


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The model that the student starts from",
    does="Refuses: another start is another run, though the checkpoint has all weights.",
)
def test_the_start_of_the_student_is_changed(tmp_path: Path, runner: Runner, injected: Injected) -> None:
    tiny.save(tiny.llama(3, layers=2), tmp_path / "student")
    for name, peft in (("whole", None), ("LoRA", {"r": 2, "target_modules": ["q_proj"], "export": "merged"})):
        root = tmp_path / name
        root.mkdir()
        shutil.copytree(tmp_path / "student", root / "student")
        case = make(
            root, runner, student={"init": "pretrained", "layers": None, "model": str(root / "student")}, peft=peft
        )
        run = case.copy()

        def other(root: Path = root) -> None:
            tiny.save(tiny.llama(4, layers=2), root / "student")

        with injected(name), changed(root / "student", other):
            assert_refused(case, run, "the student: other weights before its first step")
        with injected(f"{name}, put back"):
            assert_goes_on(case, run)


@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The objective, the size of a step, the number of steps, the learning rate, the seed in config.yaml",
    does="Refuses, with each setting that is another, then and now.",
)
def test_settings_are_changed(plain: Case, injected: Injected) -> None:
    for key, value in {"objective.gamma": 0.3, "training.max_steps": 8}.items():
        with injected(key):
            run = plain.copy()
            edit(run, key, value)
            assert_refused(plain, run, f"{key}: ", f"then, {value} now")
    with injected("two at once"):
        run = plain.copy()
        edit(run, "training.learning_rate", 0.5)
        edit(run, "run.seed", 4)
        edit(run, "training.tokens_per_step", 60)
        said = "run.seed: 3 then, 4 now", "learning_rate: 0.01 then, 0.5 now", "tokens_per_step: 120 then, 60 now"
        assert_refused(plain, run, *said)


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="A finished first stage: its objective, its steps; a stage more, a stage less",
    does="Refuses before anything is trained, and names the stage.",
)
def test_a_finished_stage_is_changed(tmp_path: Path, runner: Runner, injected: Injected) -> None:
    case = make(tmp_path, runner, stages=tiny_runs.STAGES)
    for key, value in (("stages.0.objective.name", "rkl"), ("stages.0.training.max_steps", 5), ("stages", [])):
        with injected(key):
            run = case.copy()
            edit(run, key, value)
            assert_refused(case, run, key.split(".")[-1] if value else "the stages before")
    with injected("one more"):
        run = case.copy()
        edit(run, "stages", [*tiny_runs.STAGES, {"name": "more"}])
        assert_refused(case, run, 'the stages before: ["warmup"] then, ["warmup", "more"] now')
    with injected("unchanged"):
        assert_goes_on(case, case.copy())


@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The run's folder, its data and its teacher are moved, copied, linked",
    does="Goes on to the same bytes: everything is known by its content.",
)
def test_everything_is_moved(plain: Case, tmp_path: Path, injected: Injected) -> None:
    with injected("data and teacher elsewhere, and the run behind a link"):
        run = plain.copy().rename(tmp_path / "moved")
        shutil.copytree(plain.root / "teacher", tmp_path / "other-teacher")
        shutil.copy(plain.root / "data.jsonl", tmp_path / "other-data.jsonl")
        edit(run, "teacher.model", str(tmp_path / "other-teacher"))
        edit(run, "data.path", str(tmp_path / "other-data.jsonl"))
        (tmp_path / "link").symlink_to(run)
        assert_goes_on(plain, tmp_path / "link")


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The cache of the teacher: of another teacher; made again elsewhere; the teacher itself in its place",
    does="Refuses another teacher, and another kind of it; goes on with the same one, wherever its cache lies.",
)
def test_a_cached_teacher_is_changed(tmp_path: Path, runner: Runner, injected: Injected) -> None:
    def cache(name: str, seed: int) -> Path:
        tiny.save(tiny.llama(seed), tmp_path / "teacher")
        path = tiny_runs.write_config(tiny_runs.config(tmp_path), tmp_path / "cache.yaml")
        done = runner.call("cache", path, "--output", tmp_path / name)
        assert done.code == 0, done.err
        return tmp_path / name

    tiny_runs.config(tmp_path)
    cache("other", 5)
    cache("used", 0)
    case = make(tmp_path, runner, teacher={"cache": str(tmp_path / "used")})
    run = case.copy()
    with injected("another teacher's"):
        edit(run, "teacher.cache", str(tmp_path / "other"))
        assert_refused(case, run, "the teacher: other weights")
    with injected("the teacher itself"):
        edit(run, "teacher.cache", None)
        assert_refused(case, run, "the teacher: a cache then, a model now")
    with injected("moved"):
        (tmp_path / "used").rename(tmp_path / "moved")
        edit(run, "teacher.cache", str(tmp_path / "moved"))
        assert_goes_on(case, run)


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The inputs of a run that was ended before its first checkpoint",
    does="Begins anew with whatever there is, and says what changed: nothing was trained that could be mixed.",
)
def test_a_run_without_a_checkpoint_is_changed(plain: Case, injected: Injected) -> None:
    run = plain.root / "runs" / "early"
    path, early = plain.root / "c.yaml", "run.name=early"
    killed = plain.runner.call(
        "distill", path, early, inject="tests.training.killed:kill_in_training", given=["log", "early/checkpoints", 1]
    )
    assert killed.code == -signal.SIGKILL, killed.err
    expected = plain.runner.call("distill", path, "run.name=expected", "objective.gamma=0.25")
    assert expected.code == 0, expected.err
    with injected("another objective"):
        edit(run, "objective.gamma", 0.25)
        done = plain.resume(run)
        assert done.code == 0, done.err
        assert "so it begins anew, with what was changed: objective.gamma: 0.5 then, 0.25 now" in done.err
        assert weights(run) == weights(plain.root / "runs" / "expected")


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="The config of a job that is started again with --auto-resume: a setting, the data of a finished run",
    does="Refuses by name; a finished run whose data and teacher only lie elsewhere is left as it is.",
)
def test_a_job_is_started_again_with_another_config(plain: Case, tmp_path: Path, injected: Injected) -> None:
    path = plain.root / "c.yaml"
    shutil.copytree(plain.root / "teacher", tmp_path / "teacher")
    words = ("distill", path, "--auto-resume", "run.name=whole")
    for override, said in (
        ("objective.gamma=0.25", "objective.gamma: 0.5 then, 0.25 now"),
        ("data.max_rows=30", "training rows: 38 then, 30 now"),
    ):
        with injected(override):
            done = plain.runner.call(*words, override)
            assert done.code == 2 and said in done.err, done.err
    for override in ("evaluation.prompts=3", f"teacher.model={tmp_path / 'teacher'}"):
        with injected(override):
            done = plain.runner.call(*words, override)
            assert done.code == 0 and "nothing is left to do" in done.out, done.err
    assert weights(plain.root / "runs" / "whole") == plain.weights


OTHER: dict[str, Any] = {
    "run.seed": 4, "task": "classification", "teacher.remember_mb": 8, "teacher.shard": True,
    "teacher.fill_cache": True,
    "teacher.top_k": 8, "teacher.server_timeout": 5.0, "teacher.server_requests": 3, "teacher.dtype": "bf16",
    "teacher.model_init_kwargs": {"attn_implementation": "eager"}, "student.init": "random", "student.layers": 3,
    "student.config": {"attention_dropout": 0.5}, "student.freeze_embeddings": True, "student.dtype": "bf16",
    "student.disable_dropout": True, "student.model_init_kwargs": {"attn_implementation": "eager"},
    "peft": {"r": 2, "target_modules": ["q_proj"], "export": "merged"}, "data.max_rows": 30, "data.format": "text",
    "data.turns": "all", "data.template": "plain", "data.max_prompt_tokens": 3, "data.max_tokens": 41,
    "data.eval_path": "none", "data.eval_max_rows": 1, "data.shuffle_buffer": 5, "data.src_lang": "en",
    "data.tgt_lang": "de", "data.streaming": True,
    "objective.name": "rkl", "objective.gamma": 0.25, "objective.skew": 0.1, "loss.temperature": 2.0,
    "loss.kd_weight": 0.5, "loss.t2_scaling": True, "training.max_steps": 5, "training.num_train_epochs": 2.0,
    "training.tokens_per_step": 100, "training.per_device_train_batch_size": 4, "training.same_batches": True,
    "training.learning_rate": 1e-3, "training.lr_scheduler_type": "linear", "training.warmup_steps": 3,
    "training.weight_decay": 0.1, "training.max_grad_norm": 0.5, "training.logging_steps": 2,
    "training.precision": "bf16", "training.eval_every": 1, "training.eval_rows": 1, "training.save_every": 4,
    "training.gradient_checkpointing": True, "training.padding_free": True, "training.early_stop_patience": 1,
    "rollouts.share": 0.5, "rollouts.source": "teacher", "rollouts.teacher_share": 0.3,
    "rollouts.sampling_temperature": 0.5, "rollouts.top_p": 0.5, "rollouts.max_new_tokens": 3,
    "rollouts.refresh_every": 1, "rollouts.replay": 0.5, "rollouts.replay_memory": 3, "rollouts.server_timeout": 3.0,
    "rollouts.stop_map": {"4": "4"}, "rollouts.batch_size": 3, "rollouts.eval_prompts": 1, "rollouts.keep_texts": 1,
    "evaluation.prompts": 1, "evaluation.samples_per_prompt": 1, "evaluation.sampling_temperature": 0.5,
    "evaluation.sweep": [], "evaluation.max_new_tokens": 3, "evaluation.seed": 1, "evaluation.seeds": [1, 2],
    "evaluation.batch_size": 2, "analysis.watch_every": 1, "analysis.watch_positions": 3,
}  # fmt: skip
"""Another value of each setting."""
PLACES = {
    "run.name", "run.dir", "run.device", "teacher.model", "student.model", "data.path", "data.dataset", "data.sources",
    "teacher.cache", "teacher.server", "teacher.tokenizer", "rollouts.server", "rollouts.server_folder",
    "rollouts.generator", "tokenizer.train", "tokenizer.vocab_size", "stages", "training.arguments", "peft.export",
    "student.encoder_layers",
}  # fmt: skip
"""Where things are, what needs a server, another family or another machine, and sections that have a test of their
own."""
LAST_DIGITS = {"rollouts.batch_size", "training.gradient_checkpointing", "teacher.shard"}
"""What divides a step otherwise."""


def look(case: Case, key: str, value: Any) -> str:
    """Change one setting: it is refused by name, or the weights are those of the run that went through."""
    run = case.copy()
    edit(run, key, value)
    done = case.resume(run)
    assert "Traceback" not in done.err, done.err[-800:]
    if done.code == 0:
        assert key.split(".")[-1] in LAST_DIGITS or weights(run) == case.weights, "silently other weights"
        shutil.rmtree(run)
        return "goes on"
    assert done.code == 2, f"status {done.code}: {done.err[-300:]}"
    shutil.rmtree(run)
    return done.err


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="Every setting of a config, one after the other",
    does="Refuses by name what moves a number; whatever else is changed, the run ends with the same bytes.",
)
def test_every_setting_is_changed(plain: Case, sampled: Case, unchosen: Case, injected: Injected) -> None:
    keys = {name for name, _, _ in describe_keys() if "[]" not in name}
    assert keys - PLACES <= OTHER.keys() | {"training.nan", "training.nan_skips"}, "a setting that is not looked at"
    went_on = set()
    for key, value in OTHER.items():
        case = sampled if key.startswith("rollouts.") else plain
        with injected(f"{key}: {value}"):
            said = look(case, key, value)
            if said == "goes on":
                went_on.add(key)
            elif "Put them back as they were" in said:
                named = "held-out rows: 2 then, 0 now" if key == "data.eval_path" else key.split(".")[0]
                assert named in said, said
    for key in ("training.eval_every", "training.eval_rows", "training.save_every"):
        with injected(f"{key}, where nothing is chosen by it"):
            assert look(unchosen, key, 3) == "goes on"
    with injected("what goes on"):
        sections = {key for key in went_on if key.split(".")[0] in ("evaluation", "analysis")}
        assert {"training.logging_steps", "teacher.remember_mb", "rollouts.batch_size"} | sections <= went_on
        assert not went_on & {"training.eval_every", "run.seed", "data.template", "rollouts.top_p"}


def other_argument(value: Any) -> Any:
    """Another value of a plain argument; None where none is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 0.9 if isinstance(value, float) else None


@pytest.mark.slow
@pytest.mark.fault(
    group="Changed between start and resume",
    fault="Every argument of transformers that is a number or a flag",
    does="Refuses by name what moves a number; whatever else is changed, the run ends with the same bytes.",
)
def test_every_argument_is_changed(plain: Case, injected: Injected) -> None:
    fields = dataclasses.fields(TrainingArguments)
    own = {"logging_nan_inf_filter": True, "load_best_model_at_end": False, "save_total_limit": 3, "data_seed": 9}
    own |= {"dataloader_drop_last": True, "neftune_noise_alpha": 1.0, "torch_empty_cache_steps": 1}
    own |= {"eval_strategy": "no", "save_strategy": "best", "optim": "sgd", "logging_strategy": "epoch"}
    own |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "gradient_accumulation_steps": 2}
    for field in fields:
        value = own.get(field.name, other_argument(field.default))
        skipped = field.name in OWNED or field.name in OWN_ARGUMENTS or field.name == "dataloader_num_workers"
        if value is None or skipped:
            continue
        with injected(f"{field.name}: {value}"):
            run = plain.copy()
            edit(run, f"training.arguments.{field.name}", value)
            done = plain.resume(run)
            assert done.code in (0, 2) and "Traceback" not in done.err, done.err[-800:]
            if done.code == 0 and field.name != "gradient_accumulation_steps":
                assert weights(run) == plain.weights, "silently other weights"
            if done.code == 0 and field.name == "gradient_accumulation_steps":
                assert "gradient_accumulation_steps: 1 then, 2 now" in done.err, done.err
            shutil.rmtree(run)
