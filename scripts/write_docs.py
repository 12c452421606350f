"""Write what the docs take from the program and from committed results: `make docs`.

From the program: the table of objectives in docs/objectives/README.md, the metrics in docs/evaluate.md and
docs/classification.md, and docs/reference.md. From committed rows: the benchmarks in docs/benchmarks.md, the results in
README.md and docs/results/README.md, and the tables of docs/teacher-cache.md, docs/toy.md,
docs/families.md, docs/faults.md, docs/evidence.md, docs/choosing.md and docs/why.md.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from benchmarks import table
from drkl import cli
from drkl.display import number
from drkl.evaluation.declared import CLASS_GROUPS, GROUPS, Group
from drkl.evaluation.result import Evaluation
from drkl.objectives import describe
from drkl.reporting.tables import DIRECTIONS
from drkl.training.arguments import DistillationConfig
from scripts import choosing_page, evidence_page, families_page, faults_page, run_teacher_cache, why_page
from scripts.oracles import CLASS_ORACLES, ORACLES, Oracle

ROOT = Path(__file__).resolve().parents[1]


def put_between(text: str, name: str, body: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return f"{before}{start}{body.strip()}\n{end}{after}"


def command_output(*arguments: str) -> str:
    """Return what `drkl ARGUMENTS` prints, 110 columns wide and without colours."""
    plain = os.environ | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "110"}
    process = subprocess.run(
        [sys.executable, "-m", "drkl.cli", *arguments], capture_output=True, text=True, check=True, env=plain
    )
    return "\n".join(line.rstrip() for line in process.stdout.strip().splitlines())


def metrics(groups: Sequence[Group], oracles: Mapping[str, Oracle]) -> str:
    """Return a table for each group of metrics: definitions, and what each metric is tested against."""
    head = (
        "| metric | symbol | unit | better | definition | library | oracle | test |\n|---|---|---|---|---|---|---|---|"
    )
    parts = []
    for group in groups:
        rows = []
        for metric in group.metrics:
            oracle = oracles[metric.key]
            cells = (f"{metric.title}, `{metric.key}`", metric.symbol, metric.unit, DIRECTIONS[metric.better][0],
                     metric.definition, metric.library, oracle.source, f"`{oracle.test}`")  # fmt: skip
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("\n\n".join(part for part in (f"### {group.title}", group.note, "\n".join([head, *rows])) if part))
    return "\n\n".join(parts)


def commands() -> str:
    """List the commands of `drkl`, each with its arguments and options."""
    application = typer.main.get_command(cli.app)
    assert isinstance(application, typer.core.TyperGroup)
    blocks = []
    for name, command in application.commands.items():
        lines = [f"drkl {name}", f"  {command.help}"]
        for parameter in command.params:
            names = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
            lines.append(f"  {names}\n      {getattr(parameter, 'help', '')}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def config_fields() -> str:
    """List the fields that `DistillationConfig` adds to `TrainingArguments`, or changes, each with its default."""
    fields = {field.name: field for field in dataclasses.fields(DistillationConfig)}
    own = [fields[name] for name in DistillationConfig.__annotations__]
    return "\n".join(f"{field.name}  [{field.default!r}]\n    {field.metadata['help']}" for field in own)


def reference() -> str:
    """Return the text of docs/reference.md."""
    parts = [
        ("Commands", "What `drkl COMMAND --help` prints.", commands()),
        ("Objectives", "What `drkl objectives` prints.", command_output("objectives")),
        ("Recipes", "The keys of a recipe with their defaults: what `drkl config` prints.", command_output("config")),
        ("DistillationConfig", "The fields it adds to `transformers.TrainingArguments`, or whose default it changes.",
         config_fields()),
    ]  # fmt: skip
    blocks = [f"## {title}\n\n{note}\n\n```text\n{text}\n```\n" for title, note, text in parts]
    head = (
        "# Reference\n\nCommands, objectives, and configuration keys. `make docs` writes this page; do not edit it.\n\n"
    )
    return head + "\n".join(blocks)


RESULTS = ROOT / "docs" / "results"
# Column title, metric, factor and digits.
COLUMNS = {
    "reverse KL, nats": ("rkl", 1, 2),
    "forward KL, nats": ("fkl", 1, 2),
    "same top token, %": ("agreement", 100, 1),
    "entropy, nats": ("entropy", 1, 2),
    "overconfidence against the teacher, points": ("overconfidence", 100, 1),
    "overconfidence against the data, points": ("calibration_gap", 100, 1),
    "calibration error": ("ece", 1, 2),
    "ROUGE-L": ("rouge_l", 1, 1),
    "Distinct-2": ("distinct_2", 1, 2),
    "Self-BLEU": ("self_bleu", 1, 1),
    "accuracy, %": ("accuracy", 100, 1),
    "ECE": ("ece", 1, 3),
}
QUICKSTART = {
    "teacher": ("quickstart", "teacher"),
    "pruned student, untrained": ("quickstart", "before"),
    "warm-up (start of the three below)": ("quickstart", "warmup"),
    "DRKL": ("quickstart", "student"),
    "reverse KL": ("quickstart-rkl", "student"),
    "forward KL": ("quickstart-fkl", "student"),
}
RECIPES = {
    "dialogue": "SmolLM2, 10 of 30 layers, Schema-Guided Dialogue",
    "summarise-t5": "T5 with 9 M parameters from scratch, half of its layers, SciTLDR",
    "summarise-smollm2": "SmolLM2, 10 of 30 layers, SciTLDR",
    "gpt-scratch": "GPT-2 with 4 M parameters from scratch, half of its layers, books",
}


def cell(run: str, model: str, column: str, *, with_interval: bool = False) -> str:
    """Return a number in docs/results/RUN.eval.json as the tables print it, or with its 95 % interval."""
    metric, factor, digits = COLUMNS[column]
    result = Evaluation.load(RESULTS / f"{run}.eval.json")
    value, interval = result.value(model, metric), result.interval(model, metric)
    assert value is not None, (run, model, metric)
    text = number(factor * value, digits)
    if with_interval:
        assert interval is not None, (run, model, metric)
        text += f" [{number(factor * interval[0], digits)}, {number(factor * interval[1], digits)}]"
    return text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def results_table(models: Sequence[str], columns: Sequence[str]) -> str:
    """Return a row for each model of the quickstart."""
    rows = [[name, *(cell(*QUICKSTART[name], column) for column in columns)] for name in models]
    return markdown(["", *columns], rows)


def recipes_table() -> str:
    """Return a row for each of the other recipes: distances before and after distillation, teacher beside student."""
    rows = []
    for run, description in RECIPES.items():
        distances = [f"{cell(run, 'before', c)} to {cell(run, 'student', c)}" for c in list(COLUMNS)[:2]]
        beside = [
            f"{cell(run, 'teacher', c)}, {cell(run, 'student', c)}" for c in ("entropy, nats", "ROUGE-L", "Distinct-2")
        ]
        rows.append([f"`{run}`: {description}", *distances, cell(run, "student", "same top token, %"), *beside])
    head = [
        "recipe",
        "reverse KL, nats",
        "forward KL, nats",
        "same top token, %",
        "entropy, nats",
        "ROUGE-L",
        "Distinct-2",
    ]
    return markdown(head, rows)


def overconfidence_table() -> str:
    """Return the overconfidence of the quickstart's models with intervals."""
    columns = [column for column in COLUMNS if column.startswith("overconfidence")]
    names = ["teacher", "DRKL", "reverse KL", "forward KL"]
    rows = [[name, *(cell(*QUICKSTART[name], column, with_interval=True) for column in columns)] for name in names]
    return markdown(["", *columns], rows)


def classifiers_table() -> str:
    """Return accuracy and calibration error of the classifiers of banking77."""
    runs = {"teacher": ("banking77", "teacher"), "DRKL": ("banking77", "student"),
            "reverse KL": ("banking77-rkl", "student"), "forward KL": ("banking77-fkl", "student")}  # fmt: skip
    columns = ("accuracy, %", "ECE")
    return markdown(
        ["", *columns], [[name, *(cell(*model, column) for column in columns)] for name, model in runs.items()]
    )


def results_tables() -> dict[str, str]:
    """Return the tables of README.md and docs/results/README.md by the names of their places."""
    columns = list(COLUMNS)[:10]
    short = [column for column in columns if column not in ("entropy, nats", "calibration error")]
    return {
        "students": results_table([name for name in QUICKSTART if "untrained" not in name], short),
        "quickstart": results_table(list(QUICKSTART), columns),
        "overconfidence": overconfidence_table(),
        "recipes": recipes_table(),
        "banking77": classifiers_table(),
    }


TOY = {"q_t": "q_t", "rival_q": "rival", "entropy": "entropy", "agreement": "agreement", "tvd": "TVD"}
TOY_RANKS = (8, 16, 32, 48)
Ends = Mapping[tuple[str, str, str], Mapping[str, str]]


def toy_ends() -> Ends:
    """Return the end points in docs/figures/toy-ends.csv by setting, objective and gamma."""
    with (ROOT / "docs" / "figures" / "toy-ends.csv").open(encoding="utf-8", newline="") as file:
        return {(end["setting"], end["objective"], end["gamma"]): end for end in csv.DictReader(file)}


def toy_table(ends: Ends, settings: Sequence[str], columns: Sequence[str]) -> str:
    """Return a row for each objective, with the settings side by side and their teachers in the first row."""
    entropies = [setting.split("-h")[1].split("-")[0] for setting in settings]
    variants = {(objective, gamma): None for setting, objective, gamma in ends if setting in settings}
    lines = [
        "| objective | γ | " + " | ".join(TOY[key] + (f", {entropy}" if key == columns[0] else "")
                                         for entropy in entropies for key in columns) + " |",
        "|---|---|" + "---|" * len(settings) * len(columns),
    ]  # fmt: skip
    firsts = [next(end for (name, *_), end in ends.items() if name == setting) for setting in settings]
    teachers = [
        {"q_t": f"{float(first['p_t']):.3f}", "entropy": entropy, "agreement": "1", "tvd": "0"}.get(key, "")
        for entropy, first in zip(entropies, firsts, strict=True)
        for key in columns
    ]
    lines.append(f"| teacher | | {' | '.join(teachers)} |")
    for objective, gamma in variants:
        chosen = [ends.get((setting, objective, gamma)) for setting in settings]
        cells = [toy_cell(end, key) for end in chosen for key in columns]
        lines.append(f"| `{objective}` | {gamma} | {' | '.join(cells)} |")
    return "\n".join(lines)


def toy_cell(end: Mapping[str, str] | None, key: str) -> str:
    """Return the mean over seeds; for the agreement also the highest minus the lowest."""
    if end is None:
        return ""
    spread = f" ({float(end['agreement_spread']):.3f})" if key == "agreement" else ""
    return f"{float(end[key]):.3f}{spread}"


def toy_rank_table(ends: Ends) -> str:
    """Return the flat teacher's students by rank: probability of the target and of its rival, and agreement."""
    names = {rank: "capacity-v1000-h4.15-random" + ("" if rank == 8 else f"-r{rank}") for rank in TOY_RANKS}
    lines = [
        "| objective | γ | " + " | ".join(f"rank {rank}" for rank in TOY_RANKS) + " |",
        "|---|---|---|---|---|---|",
    ]
    for setting, objective, gamma in ends:
        if setting == names[TOY_RANKS[-1]]:
            chosen = [ends[name, objective, gamma] for name in names.values()]
            cells = [" / ".join(f"{float(end[key]):.3f}" for key in ("q_t", "rival_q", "agreement")) for end in chosen]
            lines.append(f"| `{objective}` | {gamma} | {' | '.join(cells)} |")
    return "\n".join(lines)


def toy_tables() -> dict[str, str]:
    """Return the tables of docs/toy.md by the names of their places."""
    ends = toy_ends()
    columns = list(TOY)
    return {
        "toy-random": toy_table(ends, [f"capacity-v1000-h{entropy}-random" for entropy in ("4.15", "1.4")], columns),
        "toy-warm": toy_table(ends, [f"capacity-v1000-h{entropy}-warm" for entropy in ("4.15", "1.4")], columns),
        "toy-wide": toy_table(ends, [f"capacity-v50000-h{entropy}-random" for entropy in ("4.15", "1.4")], columns),
        "toy-rank": toy_rank_table(ends),
    }


def pages() -> dict[Path, str]:
    """Return the text that every page with generated parts should have."""
    docs = ROOT / "docs"
    results, studies = results_tables(), evidence_page.Results.read()
    parts = {
        ROOT / "README.md": {"students": results["students"]} | choosing_page.digest(studies),
        docs / "results" / "README.md": {name: results[name] for name in results if name != "students"},
        docs / "benchmarks.md": table.tables(),
        docs / "teacher-cache.md": table.topk_probe_tables() | run_teacher_cache.tables(),
        docs / "data.md": table.data_scale_tables(),
        docs / "scale.md": table.memory_tables(),
        docs / "objectives" / "README.md": {"objectives": describe.as_markdown()},
        docs / "evaluate.md": {"metrics": metrics(GROUPS, ORACLES)},
        docs / "classification.md": {"metrics": metrics(CLASS_GROUPS, CLASS_ORACLES)},
        docs / "toy.md": toy_tables(),
        docs / "families.md": families_page.parts(),
        docs / "faults.md": faults_page.parts(),
        docs / "evidence.md": evidence_page.parts(studies),
        docs / "choosing.md": choosing_page.parts(studies),
        docs / "why.md": why_page.parts(studies),
    }
    texts = {docs / "reference.md": reference()}
    for path, bodies in parts.items():
        text = path.read_text(encoding="utf-8")
        for name, body in bodies.items():
            text = put_between(text, name, body)
        texts[path] = text
    return texts


def main() -> None:
    """Write the pages that changed."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
