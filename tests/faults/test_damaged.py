"""Each file that drkl writes and reads again, damaged in every way, before every command that reads it."""

from __future__ import annotations

import pytest

from tests.faults import damaged
from tests.faults.conftest import Injected
from tests.faults.damaged import Bench, analyze, compare, distill, evaluate, generate, report, verify
from tests.faults.forked import Runner
from tests.training import tiny_runs


@pytest.fixture(scope="module")
def finished(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two finished runs of two stages, evaluated and analysed; ``b`` differs from ``a`` in its seed."""
    root = tmp_path_factory.mktemp("finished")
    for name, seed in (("a", 3), ("b", 4)):
        yaml = damaged.config(root, name, stages=tiny_runs.STAGES, run={"seed": seed})
        run = f"runs/{name}"
        damaged.make(runner, root, ("distill", yaml), ("evaluate", run), analyze(run).words)
    damaged.config(root, "next", student={"init": "pretrained", "model": "runs/a/student"}, training={"max_steps": 2})
    return Bench(runner, root, ["runs", "drkl-cache"])


@pytest.fixture(scope="module")
def begun(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two runs of two stages that were killed in their second one, with two checkpoints each."""
    root = tmp_path_factory.mktemp("begun")
    for name, seed in (("a", 3), ("b", 4)):
        yaml = damaged.config(
            root, name, stages=tiny_runs.STAGES, run={"seed": seed}, rollouts={"share": 0.5, "max_new_tokens": 5}
        )
        damaged.interrupted(runner, root, f"runs/{name}", yaml, 5)
    return Bench(runner, root, ["runs", "drkl-cache"])


@pytest.fixture(scope="module")
def cached(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Caches of both kinds, and a run of each."""
    root = tmp_path_factory.mktemp("cached")
    for kind in ("hidden", "topk"):
        more = () if kind == "hidden" else ("--kind", "topk", "--k", "8")
        yaml = damaged.config(root, kind, training={"max_steps": 2}, teacher={"cache": f"cache-{kind}"})
        plain = damaged.config(root, "plain", training={"max_steps": 2})
        damaged.make(runner, root, ("cache", plain, "--output", f"cache-{kind}", *more), ("distill", yaml))
        damaged.config(root, f"{kind}-again", training={"max_steps": 2}, teacher={"cache": f"cache-{kind}"})
    return Bench(runner, root, ["runs", "drkl-cache", "cache-hidden", "cache-topk"])


@pytest.mark.fault(
    group="Damaged files",
    fault="One bit of a finished run's weights, config, log, evaluation or record is another, or the file is gone",
    does="Refuses what is damaged, or warns; leaves out what is gone, and says so.",
)
def test_one_bit_of_a_finished_run(
    runner: Runner, tmp_path_factory: pytest.TempPathFactory, injected: Injected
) -> None:
    root = tmp_path_factory.mktemp("small")
    yaml = damaged.config(root, "a", training={"max_steps": 2}, evaluation={"prompts": 1, "samples_per_prompt": 1})
    damaged.make(runner, root, ("distill", yaml), ("evaluate", "runs/a"))
    bench = Bench(runner, root, ["runs", "drkl-cache"])
    bench.inject(
        injected, ["runs/a/student/model.safetensors", "runs/a/config.yaml"], [generate("runs/a")], only=("bit 0",)
    )
    read = [f"runs/a/{name}" for name in ("train.jsonl", "eval.json", "env.json")]
    bench.inject(injected, read, [report("runs/a")], only=("bit 0", "missing"))


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of a finished run's student, before evaluate, analyze, generate and a run that starts from it",
    does="Refuses the student, and names the file; the weights' checksums stand in env.json.",
)
def test_a_student(finished: Bench, injected: Injected) -> None:
    names = finished.files("runs/a/student")
    next_run = distill("next.yaml", run="runs/next")
    commands = [evaluate("runs/a"), generate("runs/a"), analyze("runs/a"), next_run]
    finished.inject(injected, names, commands, instead="/a/", other="/b/", every=0)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of the student of an earlier stage, before evaluate",
    does="Refuses it, and names the file.",
)
def test_the_student_of_a_stage(finished: Bench, injected: Injected) -> None:
    names = finished.files("runs/a/stages/01-warmup/student")
    finished.inject(injected, names, [evaluate("runs/a")], instead="/a/", other="/b/")


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of the student of a finished stage, before the next stage starts from it",
    does="Refuses it, and names the file.",
)
def test_the_student_that_the_next_stage_starts_from(
    runner: Runner, tmp_path_factory: pytest.TempPathFactory, injected: Injected
) -> None:
    root = tmp_path_factory.mktemp("stage")
    for name, seed in (("a", 3), ("b", 4)):
        yaml = damaged.config(root, name, stages=tiny_runs.STAGES, run={"seed": seed})
        damaged.interrupted(runner, root, f"runs/{name}", yaml, 1)
    bench = Bench(runner, root, ["runs", "drkl-cache"])
    names = bench.files("runs/a/stages/01-warmup/student")
    resume = distill("--resume", "runs/a", run="runs/a")
    bench.inject(injected, names, [resume], instead="/a/", other="/b/")


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="config.yaml or env.json of a finished run, before every command",
    does="Refuses, or says so.",
)
def test_the_record_of_a_finished_run(finished: Bench, injected: Injected) -> None:
    names = ["config.yaml", "env.json"]
    commands = [
        evaluate("runs/a"), analyze("runs/a"), report("runs/a"), compare("runs/a", "runs/b"), generate("runs/a"),
        distill("--resume", "runs/a", run="runs/a"), distill("a.yaml", "--auto-resume", run="runs/a"),
    ]  # fmt: skip
    finished.inject(injected, [f"runs/a/{name}" for name in names], commands, instead="/a/", other="/b/", every=4)
    stage = [f"runs/a/stages/01-warmup/{name}" for name in names]
    finished.inject(injected, stage, [*commands[:3], commands[5]], instead="/a/", other="/b/", every=0)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="config.yaml or env.json of an interrupted run, before it is resumed",
    does="Goes on; or names the file, where it says how the run was made.",
)
def test_the_record_of_an_interrupted_run(begun: Bench, injected: Injected) -> None:
    names = [f"runs/a/{folder}{name}" for folder in ("", "stages/01-warmup/") for name in ("config.yaml", "env.json")]
    commands = [distill("--resume", "runs/a", run="runs/a"), distill("a.yaml", "--auto-resume", run="runs/a")]
    begun.inject(injected, names, commands, instead="/a/", other="/b/", every=0)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="train.jsonl or rollouts.jsonl of an interrupted run, before it is resumed",
    does="Lines of the log are written again from the checkpoint; lost answers are said.",
)
def test_the_log_of_an_interrupted_run(begun: Bench, injected: Injected) -> None:
    names = ["runs/a/train.jsonl", "runs/a/rollouts.jsonl", "runs/a/stages/01-warmup/train.jsonl"]
    resume = distill("--resume", "runs/a", run="runs/a")
    begun.inject(injected, names, [resume, report("runs/a")], instead="/a/", other="/b/")


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of the newest checkpoint, before the run is resumed",
    does="The checkpoint before it is used, and that is said.",
)
def test_a_checkpoint(begun: Bench, injected: Injected) -> None:
    names = begun.files("runs/a/checkpoints/checkpoint-4")
    commands = [distill("--resume", "runs/a", run="runs/a"), distill("a.yaml", "--auto-resume", run="runs/a")]
    begun.inject(injected, names, commands, instead="/a/", other="/b/", every=0)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="The log, the evaluation or the analysis of a finished run, before report and compare",
    does="Refuses the file by its checksum; what is gone is left out, and said.",
)
def test_results(finished: Bench, injected: Injected) -> None:
    names = ["train.jsonl", "eval.json", "samples.jsonl", "heldout.jsonl", "analysis.json", "analysis/positions.csv"]
    names = [f"runs/a/{name}" for name in (*names, "stages/01-warmup/train.jsonl")]
    commands = [report("runs/a"), compare("runs/a", "runs/b"), report("runs/b", "runs/a")]
    finished.inject(injected, names, commands, instead="/a/", other="/b/", every=4)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files", fault="A file of tokenised rows, before a run reads it again", does="The rows are made anew."
)
def test_tokenised_rows(begun: Bench, injected: Injected) -> None:
    names = begun.files("drkl-cache/rows")
    begun.inject(injected, names, [distill("--resume", "runs/a", run="runs/a")])


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of a teacher's cache of states, before every command that reads it",
    does="Refused by its checksum before it is used.",
)
def test_a_cache_of_states(cached: Bench, injected: Injected) -> None:
    commands = [verify("cache-hidden"), distill("hidden-again.yaml", run="runs/hidden-again"), evaluate("runs/hidden")]
    names = cached.files("cache-hidden")
    cached.inject(injected, names, commands, instead="-hidden/", other="-topk/", every=0)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of a teacher's cache of logits, before every command that reads it",
    does="Refused by its checksum before it is used.",
)
def test_a_cache_of_logits(cached: Bench, injected: Injected) -> None:
    commands = [verify("cache-topk"), distill("topk-again.yaml", run="runs/topk-again"), evaluate("runs/topk")]
    names = cached.files("cache-topk")
    cached.inject(injected, names, commands, instead="-topk/", other="-hidden/", every=0)


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A finished part of an evaluation that was killed, or of the shared cache",
    does="The part is computed anew.",
)
def test_parts_of_an_evaluation(runner: Runner, tmp_path_factory: pytest.TempPathFactory, injected: Injected) -> None:
    root = tmp_path_factory.mktemp("parts")
    damaged.make(runner, root, ("distill", damaged.config(root, "a")))
    cache = {"DRKL_CACHE": str(root / "drkl-cache")}
    done = runner.call(
        "evaluate", "runs/a", cwd=root, variables=cache, inject="tests.training.killed:kill_after_files", given=[9]
    )
    assert done.code == -9, done
    bench = Bench(runner, root, ["runs", "drkl-cache"])
    names = bench.files("runs/a/.evaluation") + bench.files("drkl-cache/evaluation")
    assert any("runs" in name for name in names), names
    bench.inject(injected, names, [evaluate("runs/a")])


@pytest.mark.slow
@pytest.mark.fault(
    group="Damaged files",
    fault="A file of an adapter, before evaluate and generate",
    does="Refuses the student, and names the file.",
)
def test_an_adapter(runner: Runner, tmp_path_factory: pytest.TempPathFactory, injected: Injected) -> None:
    root = tmp_path_factory.mktemp("adapter")
    damaged.lora_start(root)
    for name, seed in (("a", 3), ("b", 4)):
        yaml = damaged.config(
            root, name, run={"seed": seed}, peft={"r": 2, "target_modules": ["q_proj"]}, training={"max_steps": 2},
            student={"init": "pretrained", "model": "other", "layers": None},
        )  # fmt: skip
        damaged.make(runner, root, ("distill", yaml))
    bench = Bench(runner, root, ["runs", "drkl-cache"])
    names = bench.files("runs/a/student", besides=("tokenizer.json", "README.md"))
    bench.inject(injected, names, [evaluate("runs/a"), generate("runs/a")], instead="/a/", other="/b/", every=0)
