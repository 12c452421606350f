"""The docs: their Python runs, their links lead somewhere, their numbers are those of committed results."""

from __future__ import annotations

import ast
import doctest
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import drkl
from benchmarks.rows import read_rows
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import CLASS_KEYS, KEYS
from drkl.objectives import OBJECTIVES
from drkl.training import trl
from scripts import oracles, pushes_page, write_docs
from tests.models import tiny, tiny_classifiers

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])

TRL_ARGUMENTS = (
    "model", "teacher_model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers",
    "quantization_config", "peft_config", "tools",
)  # fmt: skip
TRL_FIELDS = (
    "beta", "cache_implementation", "chat_template_kwargs", "disable_dropout", "ds3_gather_for_generation",
    "generation_kwargs", "log_completions", "log_unique_prompts", "max_completion_length",
    "max_tool_calling_iterations", "min_p", "model_init_kwargs", "num_completions_to_print",
    "pad_to_multiple_of", "remove_unused_columns", "repetition_penalty", "shuffle_dataset",
    "teacher_model_init_kwargs", "teacher_model_name_or_path", "teacher_model_revision", "temperature", "top_k",
    "top_p", "trust_remote_code", "use_vllm", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
    "vllm_group_port", "vllm_max_model_length", "vllm_mode", "vllm_model_impl", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_structured_outputs_regex",
    "vllm_tensor_parallel_size",
)  # fmt: skip
"""The arguments of TRL 1.16's DistillationTrainer, and the fields that its config adds to TrainingArguments."""

PYTHON = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A fenced block of Python; the line `<!-- not run: REASON -->` above one takes it out."""


def test_the_objective_of_ones_own() -> None:
    failed, tried = doctest.testfile(str(DOCS / "new-objective.md"), module_relative=False)
    assert tried > 5 and failed == 0


def test_the_loop_of_ones_own() -> None:
    failed, tried = doctest.testfile(str(DOCS / "own-loop.md"), module_relative=False)
    assert tried > 10 and failed == 0


def test_the_articles_statements() -> None:
    failed, tried = doctest.testfile(str(DOCS / "article.md"), module_relative=False)
    assert tried > 30 and failed == 0


def test_pages_are_of_objectives_and_the_table_lists_all() -> None:
    pages = {path.name: path.read_text() for path in (DOCS / "objectives").glob("*.md")}
    table = pages.pop("README.md")
    for name, text in pages.items():
        assert set(re.findall(r"`(\w+)`", text.splitlines()[0])) <= drkl.OBJECTIVES.keys(), name
        assert f"({name})" in table
    assert all(f"| `{name}` |" in table for name in drkl.OBJECTIVES)


def test_what_is_written_from_the_program_and_the_rows_is_current() -> None:
    for path, text in write_docs.pages().items():
        assert path.read_text() == text, f"{path.name} is not what `make docs` writes."


@pytest.mark.parametrize(("keys", "table"), [(KEYS, oracles.ORACLES), (CLASS_KEYS, oracles.CLASS_ORACLES)])
def test_every_metric_has_an_oracle_and_an_existing_test(
    keys: tuple[str, ...], table: Mapping[str, oracles.Oracle]
) -> None:
    assert sorted(table) == sorted(keys)
    for key, oracle in table.items():
        name, function = oracle.test.split("::")
        tree = ast.parse((DOCS.parent / oracles.TESTS / name).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, key


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def stand_in(folder: Path) -> dict[str, str]:
    """Write tiny models and rows into a folder, and return which hub id each of them stands in for."""
    rows = [{"prompt": f"hello w{i}", "completion": f"w{i} w{i % 3} there ."} for i in range(12)]
    data = folder / "tldr"
    data.mkdir()
    for split, count in (("train", 12), ("test", 3)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    labels = [f"w{i} hello,{('yes', 'no', 'maybe')[i % 3]}" for i in range(12)]
    (folder / "intents.csv").write_text("\n".join(["text,label", *labels]))
    tokens = tiny.tokenizer()
    for name, layers in (("small", 2), ("large", 4)):
        classifier = tiny_classifiers.make(num_hidden_layers=layers, classes=("maybe", "no", "yes"))
        tiny_classifiers.save(classifier, folder / "models" / f"{name}-classifier")
    models = {
        "facebook/opt-1.3b": tiny.llama(),
        "Qwen/Qwen2.5-0.5B-Instruct": tiny.llama(seed=1, layers=2),
        "Qwen/Qwen2.5-1.5B-Instruct": tiny.llama(layers=12),
        "google/t5-v1_1-small": tiny.t5(seed=1, layers=2),
        "google/t5-v1_1-base": tiny.t5(),
    }
    paths = {name: tiny.save(model, folder / name.replace("/", "--"), tokens) for name, model in models.items()}
    return {name: str(path) for name, path in (*paths.items(), ("trl-lib/tldr", data))}


class ShortEvaluation(EvaluationConfig):
    """Defaults that sample few tokens."""

    samples_per_prompt: int = 2
    sweep: tuple[float, ...] = ()
    max_new_tokens: int = 8


def assumed_names(ids: Mapping[str, str]) -> dict[str, Any]:
    """Return what reference pages take as given: two models, rows, a trainer; and make two runs in the folder runs/."""
    rows = str(Path(ids["trl-lib/tldr"]) / "test.jsonl")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(ids[f"Qwen/Qwen2.5-{size}B-Instruct"]) for size in ("0.5", "1.5")
    )
    tokenizer = tiny.tokenizer()
    for name in ("quickstart", "other"):
        args = drkl.DistillationConfig(output_dir=f"runs/{name}", max_steps=1, report_to="none")
        trainer = drkl.DistillationTrainer(
            ids["Qwen/Qwen2.5-0.5B-Instruct"], ids["Qwen/Qwen2.5-1.5B-Instruct"], args, rows, rows
        )
        trainer.train()
        trainer.save_model()
    drkl.evaluate_run("runs/other", samples_per_prompt=2, sweep=(), max_new_tokens=8)
    logits = torch.randn(2, 4, 20)
    return {
        "drkl": drkl, "student": student, "teacher": teacher, "rows": rows, "tokenizer": tokenizer, "trainer": trainer,
        "heldout_rows": trainer.eval_rows, "student_logits": logits[0], "teacher_logits": logits[1],
    }  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            marks=[pytest.mark.slow] * (page.name in ("analyze.md", "evaluate.md", "python.md")),
            id=str(page.relative_to(ROOT)),
        )
        for page in PAGES
        if any(">>>" not in block for block in PYTHON.findall(page.read_text()))
    ],
)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    torch.set_num_threads(1)
    monkeypatch.setattr("drkl.evaluation.evaluate.EvaluationConfig", ShortEvaluation)
    source = "\n".join(block for block in PYTHON.findall(page.read_text()) if ">>>" not in block)
    ids = stand_in(tmp_path)
    for name, path in ids.items():
        source = source.replace(f'"{name}"', f'"{path}"')
    names = assumed_names(ids) if page.name in ("evaluate.md", "analyze.md") else {}
    exec(compile(source, str(page.relative_to(ROOT)), "exec"), {"__name__": "__main__"} | names)


def flowing(page: str) -> str:
    """The text of a page without its line breaks."""
    return " ".join((DOCS / f"{page}.md").read_text().split())


VARIANTS = ("beyond", "near", "near-weights", "instruction-rest", "against-drkl")
"""The parts whose cells are named settings."""


def mean_of(part: str, name: str, key: str, model: str = "metrics", **axes: Any) -> float:
    """The mean of a metric over the seeds of a part of the evidence, from its cells."""
    cells = json.loads((ROOT / "studies" / "drkl" / part / "study.json").read_text())["cells"]
    wanted = {"variant" if part in VARIANTS else "objective.name": name, **axes}
    own = [cell for cell in cells if cell["state"] == "done" and wanted.items() <= cell["axes"].items()]
    assert len(own) >= (2 if part == "temperature" else 3)
    return sum(cell[model][key] for cell in own) / len(own)


def verdict_of(part: str, metric: str, cell: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """The verdict of two cells of a part of the evidence."""
    rows = json.loads((ROOT / "studies" / "drkl" / part / "study.json").read_text())["verdicts"]
    found = [row for row in rows if (row["metric"], row["axes"], row["baseline"]) == (metric, cell, against)]
    assert len(found) == 1
    return dict(found[0])


def of_two(part: str, metric: str, name: str = "drkl", other: str = "rkl", **axes: Any) -> dict[str, Any]:
    """The verdict of two objectives, or of two variants, by their names."""
    key = "variant" if part in VARIANTS else "objective.name"
    return verdict_of(part, metric, {key: name} | axes, {key: other} | axes)


def ends(row: dict[str, Any], digits: int, factor: float = 1) -> str:
    """The interval of a difference without its sign."""
    low, high = sorted(abs(factor * end) for end in row["interval"])
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def test_the_sentences_of_the_evidence_have_the_numbers_of_the_cells() -> None:
    text = flowing("evidence").replace("\N{MINUS SIGN}", "-")

    def off(key: str, model: str = "metrics") -> list[float]:
        return [mean_of("instruction", name, key, model) for name in ("rkl", "drkl", "fkl")]

    def own(key: str, share: float) -> list[float]:
        return [mean_of("on-policy", name, key, **{"rollouts.share": share}) for name in ("rkl", "drkl", "fkl")]

    over, distinct, tail, rkl, nll, ece = map(
        off, ("overconfidence", "distinct_2", "tail_rkl", "rkl", "teacher_nll_of_answers", "ece")
    )
    rouge, agreement = off("rouge_l_when_as_varied"), off("agreement")
    scaled, scaled_rkl = off("ece", "scaled"), off("rkl", "scaled")
    own_over, own_rkl, own_nll = (
        [*own(key, 1.0), *own(key, 0.0)] for key in ("overconfidence", "rkl", "teacher_nll_of_answers")
    )
    own_distinct = own("distinct_2", 1.0)
    for sentence in (
        f"{100 * over[0]:.1f} points more than the teacher does, DRKL's {100 * over[1]:.1f}.",
        f"(Distinct-2 {distinct[1]:.3f} for {distinct[0]:.3f},",
        f"({tail[1]:.2f} for {tail[0]:.2f} nats), and it is not farther by reverse KL ({rkl[1]:.2f} for {rkl[0]:.2f}).",
        f"{100 * abs(over[2]):.1f} points of overconfidence, a Distinct-2 of {distinct[2]:.3f}, and "
        f"{100 * (agreement[2] - agreement[1]):.1f} points more agreement than DRKL's; sampled as varied as the "
        f"teacher, it has {rouge[2] - rouge[1]:.1f} more ROUGE-L. It is {rkl[2] - rkl[1]:.2f} nats farther",
        f"of its answers is {nll[2]:.1f} nats, against {nll[1]:.1f} for DRKL's answers, {nll[0]:.1f} for reverse KL's",
        f"from {ece[0]:.3f} to {scaled[0]:.3f}; DRKL has {ece[1]:.3f} without one. "
        f"The price is {scaled_rkl[0] - rkl[0]:.2f} nats",
        f"half of the calibration error ({scaled[1]:.3f})",
        f"has {100 * own_over[0]:.1f} points of overconfidence ({100 * own_over[3]:.1f} on the data), "
        f"DRKL's {100 * own_over[1]:.1f} ({100 * own_over[4]:.1f}), "
        f"forward KL's {100 * own_over[2]:.1f} ({100 * own_over[5]:.1f}).",
        f"(Distinct-2 {own_distinct[0]:.3f}, {own_distinct[1]:.3f} and {own_distinct[2]:.3f},",
        f"{own_rkl[0]:.2f}, {own_rkl[1]:.2f} and {own_rkl[2]:.2f} nats by reverse KL, "
        f"after {own_rkl[3]:.2f}, {own_rkl[4]:.2f} and {own_rkl[5]:.2f} on the data.",
        f"{own_nll[0]:.1f}, {own_nll[1]:.1f} and {own_nll[2]:.1f} nats a token, "
        f"after {own_nll[3]:.1f}, {own_nll[4]:.1f} and {own_nll[5]:.1f}.",
    ):
        assert sentence in text, sentence
    assert 0.7 < 1 - own_over[0] / own_over[3] < 0.8
    own_ece = mean_of("on-policy", "rkl", "ece", "scaled", **{"rollouts.share": 1.0}), own("ece", 1.0)[1]
    assert (
        f"temperature has a calibration error of {own_ece[0]:.3f}, DRKL's without one {own_ece[1]:.3f} (means)" in text
    )
    assert "a third less overconfident" in (ROOT / "README.md").read_text() and 0.29 < 1 - over[1] / over[0] < 0.38
    assert 0.4 < scaled[1] / scaled[0] < 0.6 and abs(over[2]) < 0.0005


def test_the_sentences_about_verdicts_have_their_numbers() -> None:
    text, readme = flowing("evidence"), " ".join((ROOT / "README.md").read_text().split())
    own = {"rollouts.share": 1.0}
    rkl, distinct, nll, rouge = (
        of_two("on-policy", key, **own)
        for key in ("rkl", "distinct_2", "teacher_nll_of_answers", "rouge_l_when_as_varied")
    )
    assert {row["verdict"] for row in (rkl, distinct, nll, rouge)} == {"worse"}
    assert [row["exploratory"] for row in (rkl, distinct, nll, rouge)] == [False, False, True, True]
    near, summaries, summaries_rouge = of_two("near", "rkl"), of_two("summaries", "rkl"), of_two("summaries", "rouge_l")
    low, high = summaries_rouge["interval"]
    for sentence in (
        f"DRKL is {rkl['difference']:.2f} nats {ends(rkl, 2)} farther by reverse KL than reverse KL itself",
        f"(Distinct-2 {distinct['difference']:.3f} higher {ends(distinct, 3)})",
        f"Its answers are {nll['difference']:.2f} nats a token {ends(nll, 2)} less likely",
        f"it has {-rouge['difference']:.1f} less ROUGE-L {ends(rouge, 1)}",
        f"it ends at {mean_of('near', 'drkl', 'rkl'):.4f} nats, {near['difference']:.4f} {ends(near, 4)} above reverse",
        f"(+{summaries_rouge['difference']:.2f} [\N{MINUS SIGN}{-low:.2f}, {high:.2f}])",
    ):
        assert sentence in text, sentence
    others = [mean_of("near", name, "rkl") for name in ("fkl", "rkl", "srkl", "gjs", "akl")]
    assert f"between {min(others):.4f} and {max(others):.4f}" in text
    assert f"(by {near['difference']:.4f} and {summaries['difference']:.3f} nats in two pairs)" in readme
    assert {
        of_two(part, "rkl", other=other)["verdict"] for part in ("near", "summaries") for other in ("rkl", "fkl")
    } == {"worse"}
    beyond = of_two("beyond", "rkl", "fkl-rkl", "drkl")
    assert f"for {beyond['difference']:.2f} nats {ends(beyond, 2)} by reverse KL" in readme


def test_what_is_said_not_to_be_decided_is_undecided() -> None:
    text = flowing("evidence").partition("## What is not decided")[2].partition("## ")[0]
    equal = "rouge_l_when_as_varied"
    for said, rows in {
        "in every part but part 2, where DRKL has less": [
            of_two(part, equal) for part in ("instruction", "near", "summaries", "dialogue")
        ],
        "and ROUGE-L of summaries": [of_two("summaries", "rouge_l")],
        "**In dialogues** the distance by reverse KL, and variety": [
            of_two("dialogue", "rkl"),
            of_two("dialogue", "distinct_2"),
        ],
        "**In summaries** overconfidence": [of_two("summaries", "overconfidence")],
        "**In classes** accuracy": [of_two("classes", "accuracy")],
        "**On its own text** the distance of the tails, and agreement": [
            of_two("on-policy", key, **{"rollouts.share": 1.0}) for key in ("tail_rkl", "agreement")
        ],
        "**Under a temperature of 2 in the loss** overconfidence": [
            of_two("temperature", "overconfidence", **{"loss.temperature": 2.0}),
            verdict_of(
                "temperature",
                "overconfidence",
                *({"objective.name": "rkl", "loss.temperature": at} for at in (2.0, 1.0)),
            ),
        ],
    }.items():
        assert said in text, said
        assert {row["verdict"] for row in rows} == {"undecided"}, said


def test_the_limits_are_those_of_the_runs() -> None:
    text = flowing("evidence").partition("## Limits")[2]
    found = []
    for path in (ROOT / "studies" / "drkl").glob("*/cells/*/env.json"):
        made = json.loads(path.read_text())
        found.append((path.parts[-4], made["parameters"], made["steps"], made["student_step"]))
    teachers, students = ([one[1][model] / 1e6 for one in found] for model in ("teacher", "student"))
    assert f"The largest teacher has {max(teachers):.0f} million parameters" in text
    assert f"the students {min(students):.0f} to {max(students):.0f} million" in text
    steps = [max(one[2] for one in found if (one[0] == "classes") == of_classes) for of_classes in (False, True)]
    assert f"the longest training is {steps[0]} steps for text and {steps[1]:,} for classes" in text
    assert f"trainings of more than {steps[1]:,} steps" in flowing("choosing")
    earlier = [one[0] for one in found if one[2] != one[3]]
    assert earlier == ["classes"] * 6 and "six of part 5's 39 students" in text
    for part, said in (
        ("instruction", "{} of the instruction pair"),
        ("dialogue", "{} of the dialogues"),
        ("summaries", "{} of the summaries"),
        ("near", "{} of the near pair"),
        ("classes", "{:,} texts of the classes"),
    ):
        evaluations = list((ROOT / "studies" / "drkl" / part / "cells").glob("*/eval.json"))
        counts = {json.loads(path.read_text())["settings"]["data"]["heldout_rows"] for path in evaluations}
        assert len(counts) == 1 and said.format(*counts) in text, (said, counts)


def test_the_sentences_about_the_other_objectives_have_their_numbers() -> None:
    text, rest = flowing("evidence"), "instruction-rest"
    others = ("srkl", "sfkl", "gjs", "akl")
    for key in ("overconfidence", "distinct_2", "agreement"):
        assert {of_two(rest, key, name)["verdict"] for name in others} == {"better"}, key
    assert [of_two(rest, "rkl", name)["verdict"] for name in others] == [*3 * ["no difference"], "better"]
    gained = [100 * of_two(rest, "agreement", name)["difference"] for name in others]
    assert (
        f"{min(gained):.1f} to {max(gained):.1f} points more often; by reverse KL itself adaptive KL is closer" in text
    )
    rkl, fkl, agreement, over, distinct, tail, nll = (
        of_two("against-drkl", key, "akl", "drkl")
        for key in ("rkl", "fkl", "agreement", "overconfidence", "distinct_2", "tail_rkl", "teacher_nll_of_answers")
    )
    assert {row["verdict"] for row in (rkl, fkl, agreement, over, distinct)} == {"better"}
    assert {row["verdict"] for row in (tail, nll)} == {"worse"} and over["exploratory"]
    for sentence in (
        f"adaptive KL is {-rkl['difference']:.2f} nats closer by reverse KL {ends(rkl, 2)} and "
        f"{-fkl['difference']:.2f} by forward KL {ends(fkl, 2)}, has the teacher's top token "
        f"{100 * agreement['difference']:.1f} points more often {ends(agreement, 1, 100)}, is "
        f"{-100 * over['difference']:.1f} points less overconfident {ends(over, 1, 100)} and more varied (Distinct-2 "
        f"{mean_of(rest, 'akl', 'distinct_2'):.3f} for {mean_of(rest, 'drkl', 'distinct_2'):.3f}).",
        f"tails that are {tail['difference']:.2f} nats farther {ends(tail, 2)} and answers that are "
        f"{nll['difference']:.2f} nats a token less likely to the teacher {ends(nll, 2)}",
        "a calibration error of {:.3f} for {:.3f}, and {:.3f} nats for {:.3f} by reverse KL".format(
            *(mean_of("classes", name, key) for key in ("ece", "rkl") for name in ("drkl", "akl"))
        ),
    ):
        assert sentence in text, sentence
    assert {of_two("against-drkl", "tail_rkl", name, "drkl")["verdict"] for name in others} == {"worse"}
    assert {of_two("against-drkl", "rkl", name, "drkl")["verdict"] for name in ("gjs", "sfkl")} == {"worse"}
    assert of_two("near", "rkl", "akl")["verdict"] == "no difference"


def test_the_sentences_about_settings_of_drkl_have_their_numbers() -> None:
    text, rest = flowing("evidence"), "instruction-rest"
    over, rkl, agreement, distinct = (
        of_two(rest, key, "drkl-srkl", "srkl") for key in ("overconfidence", "rkl", "agreement", "distinct_2")
    )
    means = [100 * mean_of(rest, name, "overconfidence") for name in ("drkl-srkl", "srkl")]
    tail, floor = of_two(rest, "tail_rkl", "drkl-0.1", "drkl"), of_two(rest, "rkl", "drkl-floor", "drkl")
    for sentence in (
        f"is {-100 * over['difference']:.1f} points less overconfident than SRKL {ends(over, 1, 100)}, as predicted "
        f"({means[0]:.1f} for {means[1]:.1f}), and more varied; but it is {rkl['difference']:.2f} nats farther by "
        f"reverse KL {ends(rkl, 2)}, which was predicted not to be, and agrees {-100 * agreement['difference']:.1f} "
        f"points less often {ends(agreement, 1, 100)}.",
        f"its tails are {tail['difference']:.2f} nats farther than at 0.5 {ends(tail, 2)}, as predicted",
        f"the closest tails of all ({mean_of(rest, 'drkl-floor', 'tail_rkl'):.2f} nats)",
    ):
        assert sentence in text, sentence
    assert (distinct["verdict"], floor["verdict"]) == ("better", "no difference")
    names = ("fkl", "rkl", "drkl", "srkl", "drkl-srkl", "sfkl", "gjs", "akl", "drkl-0.1", "drkl-floor")
    assert min(names, key=lambda name: mean_of(rest, name, "tail_rkl")) == "drkl-floor"
    assert of_two(rest, "distinct_2", "drkl", "gjs")["verdict"] == "undecided"


def test_the_sentences_of_the_step_beyond_have_the_numbers_of_its_cells() -> None:
    text = flowing("evidence")

    def pair(key: str) -> tuple[float, float]:
        return mean_of("beyond", "fkl-rkl", key), mean_of("beyond", "drkl", key)

    over, agreement, fkl, rkl, distinct, nll = map(
        pair, ("overconfidence", "agreement", "fkl", "rkl", "distinct_2", "teacher_nll_of_answers")
    )
    assert f"{100 * (over[1] - over[0]):.1f} points less overconfident" in text
    assert f"({100 * over[0]:.1f} for {100 * over[1]:.1f})" in text
    assert f"{100 * (agreement[0] - agreement[1]):.1f} points more often" in text
    assert f"{fkl[1] - fkl[0]:.2f} nats closer by forward KL" in text
    assert f"more varied (Distinct-2 {distinct[0]:.3f} for {distinct[1]:.3f}," in text
    assert f"The price is {rkl[0] - rkl[1]:.2f} nats by reverse KL" in text
    assert f"which takes it to {rkl[0]:.2f} nats" in text
    assert f"the teacher finds {nll[0]:.1f} nats a token in them, {nll[1]:.1f} in DRKL's" in text
    forward = mean_of("beyond", "fkl", "rkl") - rkl[1]
    assert f"for {rkl[0] - rkl[1]:.2f} of the {forward:.2f} nats by reverse KL that forward KL gives up" in text


def test_the_sentences_about_dialogues_have_the_numbers_of_the_cells() -> None:
    text, names = flowing("evidence"), ("rkl", "drkl", "fkl")
    over, agreement, tail, fkl, distinct, rkl, nll = (
        [mean_of("dialogue", name, key) for name in names]
        for key in ("overconfidence", "agreement", "tail_rkl", "fkl", "distinct_2", "rkl", "teacher_nll_of_answers")
    )
    for sentence in (
        f"student has {100 * over[0]:.1f} points of overconfidence, DRKL's {100 * over[1]:.1f} and forward KL's "
        f"{100 * over[2]:.1f}.",
        f"DRKL's tails are {tail[0] - tail[1]:.2f} nats closer than reverse KL's [0.08, 0.15], it is "
        f"{fkl[0] - fkl[1]:.2f} nats closer by forward KL [0.10, 0.15]",
        f"as often ({100 * agreement[1]:.1f} %)",
        f"(Distinct-2 {distinct[1]:.3f} and {distinct[0]:.3f},",
        f"\N{MINUS SIGN}{rkl[0] - rkl[1]:.2f} nats [\N{MINUS SIGN}0.08, 0.01]",
        f"It is {rkl[0] - rkl[2]:.2f} nats closer than reverse KL by reverse KL itself [0.02, 0.07], and has "
        f"{100 * (agreement[2] - agreement[0]):.1f} points more agreement [2.0, 4.2]",
        f"{nll[2]:.1f} nats a token for {nll[0]:.1f} (DRKL {nll[1]:.1f})",
    ):
        assert sentence in text, sentence
    assert f"{100 * agreement[0]:.1f}" == f"{100 * agreement[1]:.1f}"
    assert "almost half of reverse KL's overconfidence" in (ROOT / "README.md").read_text()
    assert 0.4 < 1 - over[1] / over[0] < 0.5


def test_the_sentences_about_temperatures_have_the_numbers_of_the_cells() -> None:
    text = flowing("evidence")

    def at(temperature: float, key: str, name: str = "rkl") -> float:
        return mean_of("temperature", name, key, **{"loss.temperature": temperature})

    over, nll = (
        [at(temperature, key) for temperature in (1.0, 2.0)] for key in ("overconfidence", "teacher_nll_of_answers")
    )
    assert f"reverse KL's student has {100 * over[1]:.1f} points of overconfidence, {100 * over[0]:.1f} without" in text
    assert f"tails are {at(1.0, 'tail_rkl') - at(2.0, 'tail_rkl'):.2f} nats closer [0.06, 0.32]" in text
    lost = [100 * (at(1.0, "agreement") - at(temperature, "agreement")) for temperature in (2.0, 4.0)]
    assert (
        f"{lost[0]:.1f} points less often [1.0, 3.9]" in text and f"{lost[1]:.1f} points less often [2.0, 12.0]" in text
    )
    assert f"({nll[1]:.1f} nats a token for {nll[0]:.1f})" in text
    assert f"At 4 it is {at(4.0, 'rkl') - at(1.0, 'rkl'):.2f} nats farther by reverse KL [0.10, 0.45]" in text
    drkl_over = [at(temperature, "overconfidence", "drkl") for temperature in (1.0, 2.0)]
    assert f"DRKL without a temperature has {100 * drkl_over[0]:.1f} points of overconfidence" in text
    assert f"under a temperature of 2 DRKL has {100 * drkl_over[1]:.1f} points" in text


def test_the_sentences_about_classifiers_have_the_numbers_of_the_cells() -> None:
    text = flowing("evidence")
    ece, rkl, accuracy = (
        {name: mean_of("classes", name, key) for name in OBJECTIVES} for key in ("ece", "rkl", "accuracy")
    )
    assert f"calibration error of {ece['drkl']:.3f}, against {ece['rkl']:.3f} under reverse KL" in text
    assert f"({rkl['drkl']:.3f} nats, against {rkl['rkl']:.3f})" in text and min(rkl, key=rkl.__getitem__) == "drkl"
    assert f"({100 * accuracy['drkl']:.1f} and {100 * accuracy['rkl']:.1f} %)" in text
    assert f"better calibrated still ({ece['fkl']:.3f}), and DKD's the best ({ece['dkd']:.3f})" in text
    scaled = [mean_of("classes", name, "ece", "scaled") for name in OBJECTIVES]
    assert f"brings all of them to {min(scaled):.3f} to {max(scaled):.3f}" in text and min(ece.values()) == ece["dkd"]
    assert f"has the teacher's mean ({ece['ce']:.3f})" in text
    assert f"takes reverse KL's student to {mean_of('classes', 'rkl', 'rkl', 'scaled'):.3f} nats by reverse KL" in text


def test_the_sentences_about_the_push_have_the_numbers_of_the_runs() -> None:
    rows = pushes_page.by_student(read_rows(pushes_page.ROWS))

    def mean(part: str, column: str) -> float:
        values = pushes_page.values_of(rows[part, "rkl"], column)
        assert len(values) >= 3
        return sum(values) / len(values)

    why, evidence = map(flowing, ("why", "evidence"))
    assert f"hardly any target is matched ({100 * mean('instruction', 'matched'):.1f} %;" in why
    near = f"{100 * mean('near', 'matched'):.0f} % of"
    assert f"{near} the targets are matched there" in why and f"has {near} its targets matched" in evidence
    rest = f"{100 * mean('near', 'matched_overshoot'):.2f} points"
    assert f"K is {mean('near', 'matched_K'):.3f} nats, and reverse KL rests {rest} above the teacher" in why
    assert 0.7 < 1 - mean("instruction", "stronger") < 0.8 and "at three positions of four" in why
    near_k, far_k = mean_of("near", "rkl", "tail_rkl"), mean_of("instruction", "rkl", "tail_rkl")
    assert f"K is {near_k:.4f} nats here, {far_k:.1f} on the instruction pair" in evidence


def test_the_trl_page_names_every_field_that_trl_adds() -> None:
    text = (DOCS / "trl.md").read_text()
    for name in {*TRL_ARGUMENTS, *TRL_FIELDS, *trl.REFUSED, *trl.RENAMED}:
        assert f"`{name}`" in text, name


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == drkl.__version__
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2604.00223"


def test_a_mark_is_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert write_docs.put_between(text, "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
