"""Hostile model folders and checkpoints: nothing of them runs, loops or fills the memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import hostile
from tests.faults.conftest import Injected
from tests.faults.forked import Runner, environment
from tests.faults.hostile import model_like, settings

LITTLE_MEMORY = {"inject": "tests.faults.hostile:limit_memory", "given": [3 * hostile.GIBI], "until": 300}
CHATML = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


class Models:
    """Copies of one small model, each with something changed."""

    def __init__(self, root: Path) -> None:
        self.root, self.mark = root, root / "ran"
        self.config = hostile.write_config(root)
        self.count = 0

    def like(self, edit: Callable[[Path], Any]) -> Path:
        self.count += 1
        return model_like(self.root / "teacher", self.root / f"model-{self.count}", edit)

    def code(self, folder: Path) -> None:
        for name in ("evil.py", "modeling_llama.py", "configuration_llama.py", "tokenization_evil.py"):
            (folder / name).write_text(f"import os\nos.system({f'touch {self.mark}'!r})\n")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def pickles(models: Models) -> dict[str, Callable[[Path], Any]]:
    def only(name: str) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            (folder / "model.safetensors").unlink()
            hostile.saved(models.mark, folder / name)

        return edit

    def in_place(name: str) -> Callable[[Path], Any]:
        return lambda folder: (folder / name).write_bytes(hostile.pickled(models.mark))

    def auto_map(**changes: Any) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            models.code(folder)
            for name, fields in changes.items():
                settings(f"{name}.json", **fields)(folder)

        return edit

    def adapter(folder: Path) -> None:
        base = folder / "base"
        shutil.copytree(models.root / "teacher", base)
        (folder / "model.safetensors").unlink()
        values = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        hostile.saved(models.mark, folder / "adapter_model.bin")

    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    unknown = {"auto_map": classes, "model_type": "evil"}
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    return {
        **{name: only(name) for name in ("pytorch_model.bin", "model.pt", "model.pkl", "consolidated.00.pth")},
        **{f"{name} instead": in_place(name) for name in ("model.safetensors", "tokenizer.json", "config.json")},
        "adapter_model.bin": adapter,
        "code for an unknown kind": auto_map(config=unknown),
        "code in another repository": auto_map(config=unknown | {"auto_map": {"AutoConfig": "a/b--evil.C"}}),
        "a tokenizer's code": auto_map(tokenizer_config=tokenizer),
        "a kernel of the hub": settings("config.json", attn_implementation="someone/kernel"),
        "pickled sentencepiece": lambda folder: (
            (folder / "tokenizer.json").unlink(),
            (folder / "tokenizer.model").write_bytes(hostile.pickled(models.mark)),
        ),
    }


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A model folder with pickles in the place of weights, tokenizer, config or adapter, or with code of its own",
    does="Nothing runs; one message says what drkl reads. Pickles and code beside whole files are not looked at.",
)
def test_pickles_and_code(models: Models, runner: Runner, injected: Injected) -> None:
    for name, edit in pickles(models).items():
        folder = models.like(edit)
        with injected(name):
            done = runner.call("distill", models.config, f"teacher.model={folder}", **LITTLE_MEMORY)
            assert not models.mark.exists(), "it ran"
            hostile.assert_refused(done, str(folder))
        shutil.rmtree(models.root / "runs", ignore_errors=True)

    def beside(folder: Path) -> None:
        models.code(folder)
        settings("config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(folder)
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.model"):
            hostile.saved(models.mark, folder / name)

    with injected("beside whole files"):
        done = runner.call("distill", models.config, f"teacher.model={models.like(beside)}", **LITTLE_MEMORY)
        assert not models.mark.exists(), "it ran"
        assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A model's json files: 100,000 brackets in one another, numbers of 5,000 digits, 100 million layers, sizes "
    "of 10^13, values of another kind; an index of weights that names files elsewhere",
    does="One message that names the model; nothing is made, and the memory is not filled.",
)
def test_settings_of_a_model(models: Models, runner: Runner, injected: Injected) -> None:
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"

    def index(name: str) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            target = models.root / "elsewhere.safetensors"
            (folder / "model.safetensors").rename(target)
            map_ = {"model.embed_tokens.weight": name.format(target)}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": map_}))

        return edit

    edits: dict[str, Callable[[Path], Any]] = {
        **{
            f"brackets in {name}": lambda folder, name=name: (folder / name).write_text(deep)
            for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
        },
        "digits": lambda folder: (folder / "config.json").write_text(f'{{"vocab_size": {"9" * 5_000}}}'),
        "an absolute shard": index("{}"),
        "a shard above": index("../elsewhere.safetensors"),
    }
    values: dict[str, Any] = {
        "num_hidden_layers": 10**8, "vocab_size": 10**13, "hidden_size": 10**10, "num_attention_heads": 0,
        "head_dim": 0, "num_key_value_heads": 0, "hidden_act": "os.system", "dtype": "os.system",
        "model_type": ["llama"], "text_config": {"model_type": "llama"}, "quantization_config": "x",
        "rope_parameters": {"rope_type": "yarn", "factor": -1, "rope_theta": 0}, "rope_scaling": {"type": "evil"},
    }  # fmt: skip
    edits |= {f"{key} of {value}": settings("config.json", **{key: value}) for key, value in values.items()}
    for name, edit in edits.items():
        folder = models.like(edit)
        with injected(name):
            done = runner.call("distill", models.config, f"teacher.model={folder}", **LITTLE_MEMORY)
            hostile.assert_refused(done, folder.name)
        shutil.rmtree(models.root / "runs", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A chat template, or a template of the config, that loops for ever, fills the memory, calls itself, reads "
    "files, reaches for Python's own, or has 3,000 brackets in one another",
    does="Stopped after 5 seconds of a processor or 1 GiB, with one message and the way out; nothing runs.",
)
def test_templates(models: Models, runner: Runner, injected: Injected) -> None:
    touch = f"os.system('touch {models.mark}')"
    templates = {
        "two loops": LOOPS,
        "a loop for some rows": "{% if 'w7' in messages[0]['content'] %}" + LOOPS + "{% endif %}",
        "a text": "{% set x = 'a' * 10**10 %}",
        "a list": "{% set x = ['a'] * 10**10 %}",
        "a width": "{% set x = 'a'|center(10**10) %}",
        "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "a macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "a file": "{% include '/etc/passwd' %}",
        "an import": "{% import 'os' as x %}",
        "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ cycler.__init__.__globals__." + touch + " }}",
        "brackets": "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}",
        "a message of ten megabytes": "{{ raise_exception('x' * 10**7) }}",
        "an answer of ten megabytes": "{{ 'abcdefghij' * 10**6 }}",
    }

    def with_template(text: str) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            (folder / "chat_template.jinja").write_text(text)
            settings("tokenizer_config.json", chat_template=None)(folder)

        return edit

    for name, text in templates.items():
        folder = models.like(with_template(text + CHATML))
        with injected(f"chat: {name}"):
            hostile.assert_refused(runner.call("data", models.config, f"teacher.model={folder}", **LITTLE_MEMORY))
            assert not models.mark.exists(), "it ran"
        if "message" not in name and "answer" not in name and "some" not in name:
            own = models.root / "own.yaml"
            hostile.write_config(models.root, own.name, data={"template": text + "{{ prompt }}"})
            with injected(f"data.template: {name}"):
                hostile.assert_refused(runner.call("data", own, **LITTLE_MEMORY), "data.template")
                assert not models.mark.exists(), "it ran"


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A tokenizer.json whose regular expression needs exponential time, or whose normaliser makes a million "
    "letters of one",
    does="One message that names the tokenizer.",
)
def test_tokenizers(models: Models, runner: Runner, injected: Injected) -> None:
    tenfold = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    parts: dict[str, Any] = {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": r"(\w+)+$|(a|a)*$"}, "behavior": "Isolated", "invert": False,
        },
        "normalizer": {"type": "Sequence", "normalizers": [tenfold] * 12},
    }  # fmt: skip
    for name, part in parts.items():
        folder = models.like(settings("tokenizer.json", **{name: part}))
        with injected(name):
            hostile.assert_refused(
                runner.call("data", models.config, f"teacher.model={folder}", **LITTLE_MEMORY), "okenizer"
            )


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A stranger's run to be resumed: a pickle in the place of each file of its checkpoints, with the right "
    "checksums, and of the files beside",
    does="Nothing runs. One message names what cannot be read; a log or `env.json` is made anew, with a warning.",
)
def test_checkpoints(models: Models, runner: Runner, injected: Injected) -> None:
    config = hostile.write_config(models.root, "cut.yaml", training={"save_every": 2, "max_steps": 6})
    killed = runner.call(
        "distill", config, "run.name=cut", inject="tests.training.killed:kill_in_training", given=["log", "cut", 5]
    )
    assert killed.code < 0, killed.err
    cut = models.root / "runs" / "cut"
    names = sorted(path.name for path in (cut / "checkpoints" / "checkpoint-2").iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "complete.json"} <= {*names}
    for name in [*names, "scaler.pt", "pytorch_model.bin", "training_args.bin", "optimizer.bin"]:
        run = models.root / f"run-{name}"
        shutil.copytree(cut, run)
        for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
            if (checkpoint / name).suffix in (".json", ".safetensors"):
                (checkpoint / name).write_bytes(hostile.pickled(models.mark))
            else:
                hostile.saved(models.mark, checkpoint / name)
            if name != "complete.json":
                hostile.with_checksums(checkpoint)
        with injected(f"checkpoint: {name}"):
            done = runner.call("distill", "--resume", run, until=300)
            assert not models.mark.exists(), "it ran"
            if done.code != 0:
                hostile.assert_refused(done)
            read = name in names and not name.endswith("config.json")  # of the others nothing is needed
            assert done.code == 2 or not read, done.out
    for name in ("config.yaml", "env.json", "train.jsonl"):
        run = models.root / f"run-{name}"
        shutil.copytree(cut, run)
        (run / name).write_bytes(hostile.pickled(models.mark))
        with injected(name):
            done = runner.call("distill", "--resume", run, until=300)
            assert not models.mark.exists(), "it ran"
            if done.code != 0:
                hostile.assert_refused(done, name)
                continue
            assert name != "config.yaml", "it went on without its settings"
            assert f"/{name}" in done.err, f"nothing was said of it: {done.err[-300:]}"
            lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
            steps = [line["step"] for line in lines if "loss" in line]
            assert steps == [*range(1, 7)], steps
            assert json.loads((run / "env.json").read_text())["finished"], "it has not ended"


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="The current folder has a `torch.py`, `yaml.py`, `typer.py`, `sitecustomize.py` and others",
    does="`drkl` and `python -m drkl` import none of them.",
)
def test_modules_in_the_current_folder(models: Models, injected: Injected) -> None:
    import subprocess

    folder = models.root / "current"
    folder.mkdir()
    for name in ("torch", "yaml", "typer", "click", "rich", "jinja2", "sitecustomize", "usercustomize", "conftest",
                 "transformers", "numpy", "pydantic", "datasets", "readline", "random"):  # fmt: skip
        (folder / f"{name}.py").write_text(f"import os\nos.system({f'touch {models.mark}'!r})\n")
    (folder / "matplotlibrc").write_text("text.usetex: True\nbackend: module://evil\n")
    for words in (["-m", "drkl"], ["-c", "from drkl.cli import main; import sys; sys.argv[0] = 'drkl'; main()"]):
        command = [sys.executable, *(["-P"] if words[0] == "-c" else []), *words, "distill", str(models.config)]
        with injected(words[0]):
            done = subprocess.run(
                [*command, "--dry-run"], cwd=folder, env=environment(), capture_output=True, text=True, check=False
            )
            assert not models.mark.exists(), "one was imported"
            assert done.returncode == 0, done.stderr[-500:]
    assert os.listdir(folder)
