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
from drkl.reporting.metrics import DIRECTIONS
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


TOY = {
    "target_error": "\\|q_t − p_t\\|", "q_t": "q_t", "entropy": "entropy", "agreement": "agreement", "fkl": "KL(p‖q)",
    "rkl": "KL(q‖p)", "tvd": "TVD", "tail_error": "TVD in the tail",
}  # fmt: skip


def toy_tables() -> str:
    """The end points of each toy setting: means over the seeds, and highest minus lowest where it matters most."""
    with (ROOT / "docs" / "figures" / "toy-ends.csv").open(encoding="utf-8", newline="") as file:
        ends = list(csv.DictReader(file))
    blocks = []
    for setting in dict.fromkeys(end["setting"] for end in ends):
        some = [end for end in ends if end["setting"] == setting]
        head = f"### `{setting}`: p_t {float(some[0]['p_t']):.3f}, {some[0]['seeds']} seeds"
        lines = [head, "", f"| objective | γ | {' | '.join(TOY.values())} |", "|---|---|" + "---|" * len(TOY)]
        for end in some:
            cells = [f"{float(end[key]):.3f}" for key in TOY]
            for place, key in enumerate(TOY):
                if key in ("q_t", "agreement"):
                    cells[place] += f" ({float(end[f'{key}_spread']):.3f})"
            lines.append(f"| `{end['objective']}` | {end['gamma']} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def pages() -> dict[Path, str]:
    """Every page that is written or in part written, and its text as it should be."""
    objectives, readme = ROOT / "docs" / "objectives" / "README.md", ROOT / "README.md"
    evaluate, classification = ROOT / "docs" / "evaluate.md", ROOT / "docs" / "classification.md"
    toy = ROOT / "docs" / "toy.md"
    text = readme.read_text()
    for name, body in table.tables().items():
        text = put_between(text, name, body)
    return {
        objectives: put_between(objectives.read_text(), "objectives", describe.as_markdown()),
        readme: text,
        evaluate: put_between(evaluate.read_text(), "metrics", metrics(GROUPS, ORACLES)),
        classification: put_between(classification.read_text(), "metrics", metrics(CLASS_GROUPS, CLASS_ORACLES)),
        ROOT / "docs" / "reference.md": reference(),
        toy: put_between(toy.read_text(), "toy", toy_tables()),
    }


def main() -> None:
    """Write the pages that changed."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
