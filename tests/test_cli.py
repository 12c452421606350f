"""The commands, as a person types them; in this process where nothing speaks against it."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from drkl import OBJECTIVES, __version__
from drkl.config import describe_keys
from drkl.evaluation.declared import KEYS
from drkl.runs import RunFolder
from drkl.terminal import printable, say, screen
from drkl.training import checks
from tests.command_line import Cli
from tests.models import tiny
from tests.training import tiny_runs

# The contract's own list, not the code's.
EVAL_KEYS = (
    "fkl rkl tvd agreement nll accuracy entropy confidence overconfidence confidence_gap entropy_gap target_gap "
    "rouge_l distinct_1 distinct_2 self_bleu num_tokens"
).split()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_runs.write_config(tiny_runs.config(tmp_path, training={"max_steps": 2}), tmp_path / "c.yaml")


def refuse(cli: Cli, root: Path, *arguments: object) -> str:
    """A short message, status 2, no traceback, nothing written."""
    before = tiny_runs.tree(root)
    done = cli(*arguments)
    assert done.code == 2, done
    assert done.err.startswith("Error: ") and "Traceback" not in done.err
    assert len(done.err) < 1000 and len(done.err.splitlines()) <= 3
    assert tiny_runs.tree(root) == before
    return done.err


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"drkl {__version__}\n", "")


def test_python_runs_the_package_as_the_command() -> None:
    words = [sys.executable, "-m", "drkl", "--version"]
    done = subprocess.run(words, env=tiny_runs.environment(), check=True, capture_output=True, text=True)
    assert done.stdout == f"drkl {__version__}\n"


def test_help_lists_the_commands(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for command in ("distill", "evaluate", "report", "generate", "toy", "objectives", "config"):
        assert re.search(rf"^.*\b{command}\b", done.out, re.MULTILINE)


@pytest.mark.parametrize("command", ["distill", "evaluate", "report", "generate", "toy", "objectives", "config"])
def test_every_command_has_help(cli: Cli, command: str) -> None:
    assert cli(command, "--help").code == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['drkl', '--help']\n"
        "from drkl.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'datasets', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=tiny_runs.environment(), check=True, capture_output=True)


def test_objectives_are_listed_whole(cli: Cli) -> None:
    done = cli("objectives")
    assert done.code == 0
    for name, cls in OBJECTIVES.items():
        assert f"{name}\n  {cls.formula}\n  source: {cls.source}\n" in done.out
    assert "gamma=" in done.out


def test_every_key_is_listed(cli: Cli) -> None:
    done = cli("config")
    assert done.code == 0
    for key, default, meaning in describe_keys():
        assert f"{key}  [{default}]\n    {meaning}\n" in done.out


def test_unknown_command_or_option(cli: Cli) -> None:
    assert cli("distil").code == 2
    assert cli("distill", "--fast").code == 2


@pytest.mark.slow
def test_a_run_on_prompts_alone_leads_to_its_report(cli: Cli, tmp_path: Path) -> None:
    """There is nothing to evaluate on, and each command says what else may be measured."""
    rollouts = {"share": 1, "max_new_tokens": 2, "eval_prompts": 1}
    values = tiny_runs.config(tmp_path, training={"max_steps": 1}, rollouts=rollouts)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w1"}) + "\n" for i in range(20)))
    root = tmp_path / "runs" / "r"
    done = cli("distill", tiny_runs.write_config(values, tmp_path / "c.yaml"))
    assert done.code == 0, done.err
    assert f"Next: drkl report {root}" in done.out.replace("\n", "")
    for command in ("evaluate", "analyze"):
        refused = cli(command, root)
        assert refused.code == 2 and "are prompts alone" in refused.err
        assert "for the evaluation (dolly, or dolly=FILE)" in refused.err and "drkl.analyze(" in refused.err


@pytest.mark.slow
def test_distill_evaluate_report_generate(cli: Cli, tmp_path: Path) -> None:
    config = tiny_runs.write_config(tiny_runs.config(tmp_path, stages=tiny_runs.STAGES), tmp_path / "c.yaml")
    root = tmp_path / "runs" / "r"
    done = cli("distill", config, "training.max_steps=4")
    assert done.code == 0, done.err
    assert f"Next: drkl evaluate {root}" in done.out.replace("\n", "")
    assert "40 of 40" in done.out or "38 of 38 rows kept" in done.out
    assert "held-out loss" in done.out
    env = json.loads((root / "env.json").read_text())
    assert env["command"] == ["drkl", "distill", str(config), "training.max_steps=4"]

    done = cli("evaluate", root)
    assert done.code == 0, done.err
    evaluation = json.loads((root / "eval.json").read_text())
    assert list(evaluation)[:5] == ["settings", "teacher", "before", "warmup", "student"]
    for model in ("teacher", "before", "warmup", "student"):
        assert list(evaluation[model]) == list(KEYS) and set(EVAL_KEYS) <= set(KEYS)
        assert evaluation[model]["num_tokens"] > 0
    assert evaluation["teacher"]["fkl"] == pytest.approx(0, abs=1e-6) and evaluation["teacher"]["agreement"] == 1
    assert evaluation["settings"]["prompts"] == 2
    samples = [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]
    assert len([row for row in samples if row["sampling_temperature"] == 1]) == 4 * 2 * 2
    assert {row["model"] for row in samples if row["sampling_temperature"] == 0.5} == {"teacher", "student"}
    assert "self_bleu" in done.out

    done = cli("report", root, "--picture", tmp_path / "p" / "r.svg")
    assert done.code == 0, done.err
    assert "<html" in (root / "report.html").read_text()
    assert "<svg" in (tmp_path / "p" / "r.svg").read_text()
    (root / "report.html").unlink()
    done = cli("report", root, "--picture", tmp_path / "r.pdf")
    assert done.code == 2 and ".svg or .png" in done.err
    assert not (root / "report.html").exists()

    done = cli("generate", root, "--prompt", "w1 w2", "--max-new-tokens", 5, "--samples", 2)
    assert done.code == 0, done.err
    assert "teacher" in done.out and "student" in done.out
    assert cli("generate", root, "--prompt", "w1 w2", "--max-new-tokens", 5, "--samples", 2) == done
    assert cli("generate", root, "--prompt", "w1", "--greedy", "--max-new-tokens", 5).code == 0

    # A stage is an ordinary run; so is a folder that was moved.
    moved = root.rename(tmp_path / "moved")
    assert cli("evaluate", moved / "stages" / "01-warmup").code == 0
    stage = json.loads((moved / "stages" / "01-warmup" / "eval.json").read_text())
    assert stage["student"]["fkl"] == pytest.approx(evaluation["warmup"]["fkl"], rel=1e-6)
    assert cli("evaluate", moved).code == 0
    again = json.loads((moved / "eval.json").read_text())
    assert again["student"] == evaluation["student"]


@pytest.mark.slow
def test_without_a_teacher(cli: Cli, tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, training={"max_steps": 2}, evaluation={"prompts": 1, "samples_per_prompt": 1})
    values |= {
        "teacher": None,
        "objective": {"name": "ce"},
        "student": {"init": "prune", "layers": [0, 3], "model": values["teacher"]["model"]},
    }
    assert cli("distill", tiny_runs.write_config(values, tmp_path / "c.yaml")).code == 0
    root = tmp_path / "runs" / "r"
    assert cli("evaluate", root).code == 0
    evaluation = json.loads((root / "eval.json").read_text())
    assert "teacher" not in evaluation and set(EVAL_KEYS) <= set(evaluation["student"])
    assert evaluation["student"]["fkl"] is None and evaluation["student"]["nll"] > 0
    assert cli("report", root).code == 0
    done = cli("generate", root, "--prompt", "w1", "--max-new-tokens", 5)
    assert done.code == 0 and "teacher" not in done.out


ISOLATED = """
import sys, warnings

class NoDrkl:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "drkl":
            raise ImportError(name)

sys.meta_path.insert(0, NoDrkl())
try:
    import drkl
except ImportError:
    pass
else:
    raise AssertionError("drkl is there")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "w1 w2"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
pipe = pipeline("text-generation", model=folder)
answer = pipe([{"role": "user", "content": "w1 w2"}], max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
assert answer["role"] == "assistant" and isinstance(answer["content"], str)
assert "drkl" not in sys.modules
"""


@pytest.mark.slow
def test_the_student_needs_nothing_of_ours(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert cli("distill", recipe).code == 0
    student = shutil.copytree(tmp_path / "runs" / "r" / "student", tmp_path / "given-away")
    shutil.rmtree(tmp_path / "runs")
    assert {path.suffix for path in student.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, student], env=tiny_runs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_overrides_and_what_they_drop(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("distill", recipe, "objective.name=rkl", "run.name=other", "training.learning_rate=1e-3")
    assert done.code == 0
    assert "gamma=0.5 belonged to another objective and is dropped" in done.out
    config = yaml.safe_load((tmp_path / "runs" / "other" / "config.yaml").read_text())
    assert config["objective"] == {"name": "rkl"} and config["training"]["learning_rate"] == 1e-3


def test_a_dry_run_shows_everything_and_writes_nothing(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    before = tiny_runs.tree(tmp_path)
    done = cli("distill", "--dry-run", recipe, "training.max_steps=7")
    assert done.code == 0, done.err
    assert tiny_runs.tree(tmp_path) == before
    plan = yaml.safe_load(done.out)
    assert plan["config"]["training"]["max_steps"] == 7
    assert plan["parameters"]["teacher"] == sum(p.numel() for p in tiny.llama().parameters())
    (stage,) = plan["stages"]
    assert {"budget", "input", "trained"} <= stage["tokens_per_step"].keys()
    assert stage["estimated_memory_gb"] > 0 and "estimated_minutes" in plan
    # The table for people is a comment to those who read yaml.
    assert "\n# Memory of r, predicted (1 process, cpu)\n# kB of each process  " in done.out
    assert f"\n# {stage['memory']['advice']}\n" in done.out


@pytest.mark.slow
def test_a_dry_run_for_another_machine(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("distill", "--dry-run", recipe, "--processes", "8", "training.arguments.fsdp=true", "run.device=cuda")
    assert done.code == 0, done.err
    (stage,) = yaml.safe_load(done.out)["stages"]
    assert (stage["memory"]["processes"], stage["memory"]["device"]) == (8, "cuda")
    assert "predicted (8 processes, cuda)" in done.out
    assert "processes is 0; expected" in refuse(cli, tmp_path, "distill", recipe, "--dry-run", "--processes", "0")
    assert "`--processes` goes with `--dry-run`" in refuse(cli, tmp_path, "distill", recipe, "--processes", "2")


@pytest.mark.slow
def test_resume_is_said_where_there_is_nothing_to_do(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert cli("distill", recipe).code == 0
    root = tmp_path / "runs" / "r"
    assert "is finished; there is nothing to resume" in refuse(cli, tmp_path, "distill", "--resume", root)
    assert "`--overwrite` replaces it" in refuse(cli, tmp_path, "distill", recipe)
    assert cli("distill", recipe, "--overwrite").code == 0
    # Where training was cut off, what reads its results says how to go on.
    shutil.rmtree(root / "student")
    then = RunFolder(root).read_env()
    RunFolder(root).write_env({key: then[key] for key in then.keys() - {"finished", "student", "files", "checksum"}})
    for command in (["evaluate", root], ["generate", root, "--prompt", "w1"]):
        assert f"`drkl distill --resume {root}` goes on with it" in refuse(cli, tmp_path, *command)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainig.max_steps=5"], "trainig: unknown key. Did you mean 'training'?"),
        (["training.max_step=5"], "training.max_step: unknown key. Did you mean 'max_steps'?"),
        (["objective.name=drlk"], "There is no objective 'drlk'. Did you mean 'drkl'?"),
        (["objective.gama=1"], "has no parameter 'gama'"),
        (["training.max_steps=0"], "training.max_steps: input should be greater than or equal to 1, got 0"),
        (["training.learning_rate=fast"], "training.learning_rate: input should be a valid number"),
        (["training.arguments.seed=1"], "seed is set by run.seed"),
        (["training.arguments.optim=adammm"], "adammm"),
        (["training.max_steps=[1"], "is not valid yaml"),
        (["stages.nope.name=x"], "There is no stage 'nope'; the config's stages: none."),
        (["data.path=nowhere.jsonl"], "There is no file 'nowhere.jsonl'"),
        (["data.path=/"], "Cannot read '/'"),
        (["data.path=bundled:doly"], "Did you mean 'bundled:dolly'?"),
        (["data.path=null", "data.dataset=nobody/nothing"], "Cannot load the data set 'nobody/nothing'"),
        (["data.max_prompt_tokens=1"], "None of the 38 rows can be used: 38 prompt longer than max_prompt_tokens"),
        (["teacher.model=nobody/nothing"], "looked for a folder of that name here"),
        (["teacher.model=/nowhere"], "There is no folder '/nowhere'"),
        (["student.init=pretrained", "student.model=/nowhere", "student.layers=null"], "There is no folder '/nowhere'"),
        (["student.layers=9"], "student.layers is 9; the model has 4 layers"),
        (["teacher=null"], "objective 'drkl' compares with a teacher, but teacher is null"),
    ],
)  # fmt: skip
def test_bad_input(cli: Cli, recipe: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refuse(cli, tmp_path, "distill", recipe, *overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "w1", "response": "w2"}\n{"prompt": \n', "rows.jsonl:2: not valid JSON"),
        (b'{"prompt": "w1", "answer": "w2"}\n', "rows.jsonl:1: expected the fields prompt and response"),
        (b"[1]\n", "rows.jsonl:1: expected an object"),
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (b'{"prompt": " ", "response": "w2"}\n{"prompt": "w1", "response": ""}\n', "None of the 1 rows can be used"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
    ],
)
def test_bad_rows(cli: Cli, recipe: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert message in refuse(cli, tmp_path, "distill", recipe, f"data.path={path}")
    assert message.replace("None of the 1", "None of the") in refuse(
        cli, tmp_path, "distill", recipe, f"data.eval_path={path}"
    ).replace("None of the 2", "None of the")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "is not valid yaml"), (b"- 1", "holds a list"), (b"\xff", "is not UTF-8"), (b"", "data: is missing")],
)
def test_bad_configs(cli: Cli, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert message in refuse(cli, tmp_path, "distill", path)


def test_configs_and_runs_that_are_not_there(cli: Cli, tmp_path: Path) -> None:
    assert "There is no file" in refuse(cli, tmp_path, "distill", tmp_path / "no.yaml")
    assert "Cannot read" in refuse(cli, tmp_path, "distill", tmp_path)
    assert "Give either a CONFIG or `--resume RUN`" in refuse(cli, tmp_path, "distill")
    for command in (["distill", "--resume"], ["evaluate"], ["report"], ["generate", "--prompt", "x"]):
        assert "There is no run folder" in refuse(cli, tmp_path, *command, tmp_path / "no-run")
        assert "is not a run folder" in refuse(cli, tmp_path, *command, tmp_path)


def test_resume_takes_nothing_beside_the_folder(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    message = "takes nothing beside the folder"
    assert message in refuse(cli, tmp_path, "distill", "--resume", tmp_path, "--overwrite")
    assert message in refuse(cli, tmp_path, "distill", "--resume", tmp_path, "--dry-run")
    assert "Give either" in refuse(cli, tmp_path, "distill", recipe, "--resume", tmp_path)


def test_a_failed_write_names_the_command_that_goes_on(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **words: object) -> None:
        raise OSError(errno.ENOSPC, "full", str(tmp_path / "log"))

    monkeypatch.setattr("drkl.config.load_config", full)
    said = f"Error: Cannot write '{tmp_path / 'log'}': No space left on device. Make room on its disk. "
    done = cli("distill", recipe)
    assert done.code == 2
    assert done.err == f"{said}Nothing of the run was written. To go on: drkl distill {recipe}\n"


def test_no_disk(cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(10, 10, 0))
    assert "0.0 GB are free. Make room" in refuse(cli, tmp_path, "distill", recipe)


def test_an_empty_prompt(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert "--prompt is empty" in refuse(cli, tmp_path, "generate", tmp_path, "--prompt", "  ")


def test_no_text_can_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2Jb\x07\nü\u202e\ud800\t%\xa0\u200d") == "a\ufffd[2Jb\ufffd\nü\ufffd\ufffd\t%\xa0\u200d"
    say("a\x1b", 1, end="!")
    screen().print("[bold]a[/bold] :smile: \x1b[31m", markup=True)
    assert capsys.readouterr().out == "a\ufffd 1![bold]a[/bold] :smile: \ufffd[31m\n"


@pytest.mark.slow
def test_the_real_program_ends_with_two_and_no_traceback(tmp_path: Path) -> None:
    path = tiny_runs.write_config(tiny_runs.config(tmp_path), tmp_path / "c.yaml")
    before = tiny_runs.tree(tmp_path)
    done = tiny_runs.call("distill", path, "objective.gamma=lots")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "Error: objective: drkl.gamma is 'lots'; expected a number greater than 0.\n"
    assert tiny_runs.tree(tmp_path) == before


@pytest.mark.slow
def test_a_training_that_blows_up_ends_with_two(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("distill", recipe, "training.learning_rate=1e30", "training.max_steps=8")
    assert done.code == 2 and "Traceback" not in done.err
    assert re.search(r"Error: .* step \d+,? .*rows r\d+", done.err)
    assert not (tmp_path / "runs" / "r" / "student").exists()
