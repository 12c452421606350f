"""Write what the docs take from the program itself and from measured rows: `make docs`.

The table of objectives in docs/objectives/README.md, docs/reference.md, the metrics in docs/evaluate.md and
docs/classification.md, the benchmarks' tables in README.md, and the tables of docs/toy.md from the end points that
`drkl toy` wrote.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import table
from drkl.evaluation.declared import CLASS_GROUPS, GROUPS, Group
from drkl.objectives import describe
from drkl.reporting.tables import DIRECTIONS
from scripts.oracles import CLASS_ORACLES, ORACLES, Oracle

ROOT = Path(__file__).resolve().parents[1]


def put_between(text: str, name: str, body: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return f"{before}{start}{body.strip()}\n{end}{after}"


def printed(*arguments: str) -> str:
    """What `drkl ARGUMENTS` prints, 110 columns wide and without colours."""
    plain = os.environ | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, "-m", "drkl.cli", *arguments], capture_output=True, text=True, check=True, env=plain
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def metrics(groups: Sequence[Group], oracles: Mapping[str, Oracle]) -> str:
    """A table for each group of metrics: what each is, and what it is tested against."""
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


def reference() -> str:
    """docs/reference.md."""
    parts = [("Objectives", printed("objectives")), ("Configuration", printed("config"))]
    blocks = [f"## {title}\n\n```text\n{text}\n```\n" for title, text in parts]
    return "# Reference\n\nWritten by `make docs`.\n\n" + "\n".join(blocks)


TOY = {"q_t": "q_t", "rival_q": "rival", "entropy": "entropy", "agreement": "agreement", "tvd": "TVD"}
TOY_RANKS = (8, 16, 32, 48)
Ends = Mapping[tuple[str, str, str], Mapping[str, str]]


def toy_ends() -> Ends:
    """The end points in docs/figures/toy-ends.csv, by setting, objective and gamma."""
    with (ROOT / "docs" / "figures" / "toy-ends.csv").open(encoding="utf-8", newline="") as file:
        return {(end["setting"], end["objective"], end["gamma"]): end for end in csv.DictReader(file)}


def toy_table(ends: Ends, settings: Sequence[str], columns: Sequence[str]) -> str:
    """A row for each objective, the columns of each setting side by side; a setting's teacher stands above its own."""
    entropies = [setting.split("-h")[1].split("-")[0] for setting in settings]
    found = {(objective, gamma): None for setting, objective, gamma in ends if setting in settings}
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
    for objective, gamma in found:
        some = [ends.get((setting, objective, gamma)) for setting in settings]
        cells = [toy_cell(end, key) for end in some for key in columns]
        lines.append(f"| `{objective}` | {gamma} | {' | '.join(cells)} |")
    return "\n".join(lines)


def toy_cell(end: Mapping[str, str] | None, key: str) -> str:
    """A mean over seeds; for the agreement with highest minus lowest."""
    if end is None:
        return ""
    spread = f" ({float(end['agreement_spread']):.3f})" if key == "agreement" else ""
    return f"{float(end[key]):.3f}{spread}"


def toy_rank_table(ends: Ends) -> str:
    """The flat teacher's students of several ranks: probability of the target and of its rival, and agreement."""
    names = {rank: "capacity-v1000-h4.15-random" + ("" if rank == 8 else f"-r{rank}") for rank in TOY_RANKS}
    lines = [
        "| objective | γ | " + " | ".join(f"rank {rank}" for rank in TOY_RANKS) + " |",
        "|---|---|---|---|---|---|",
    ]
    for setting, objective, gamma in ends:
        if setting == names[TOY_RANKS[-1]]:
            some = [ends[name, objective, gamma] for name in names.values()]
            cells = [" / ".join(f"{float(end[key]):.3f}" for key in ("q_t", "rival_q", "agreement")) for end in some]
            lines.append(f"| `{objective}` | {gamma} | {' | '.join(cells)} |")
    return "\n".join(lines)


def toy_tables() -> dict[str, str]:
    """The tables of docs/toy.md by the name of their place."""
    ends = toy_ends()
    columns = list(TOY)
    return {
        "toy-random": toy_table(ends, [f"capacity-v1000-h{entropy}-random" for entropy in ("4.15", "1.4")], columns),
        "toy-warm": toy_table(ends, [f"capacity-v1000-h{entropy}-warm" for entropy in ("4.15", "1.4")], columns),
        "toy-wide": toy_table(ends, [f"capacity-v50000-h{entropy}-random" for entropy in ("4.15", "1.4")], columns),
        "toy-rank": toy_rank_table(ends),
    }


def pages() -> dict[Path, str]:
    """Every page that is written or in part written, and its text as it should be."""
    objectives, readme = ROOT / "docs" / "objectives" / "README.md", ROOT / "README.md"
    evaluate, classification = ROOT / "docs" / "evaluate.md", ROOT / "docs" / "classification.md"
    toy = ROOT / "docs" / "toy.md"
    text, toy_text = readme.read_text(), toy.read_text()
    for name, body in table.tables().items():
        text = put_between(text, name, body)
    for name, body in toy_tables().items():
        toy_text = put_between(toy_text, name, body)
    return {
        objectives: put_between(objectives.read_text(), "objectives", describe.as_markdown()),
        readme: text,
        evaluate: put_between(evaluate.read_text(), "metrics", metrics(GROUPS, ORACLES)),
        classification: put_between(classification.read_text(), "metrics", metrics(CLASS_GROUPS, CLASS_ORACLES)),
        ROOT / "docs" / "reference.md": reference(),
        toy: toy_text,
    }


def main() -> None:
    """Write the pages that changed."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
