"""Off-policy against on-policy: three objectives, three shares of sampled answers, from one warmed-up student.

    python -m scripts.run_on_policy    # trains, evaluates, compares; finished parts are not done again
    python -m scripts.run_on_policy --only rkl-1

Everything is run by the command line, so that each run can be repeated alone: its env.json has the command.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from drkl.evaluation.result import Evaluation
from drkl.runs import read_jsonl, write_text

FOLDER = Path("runs/on-policy")
WARMUP = FOLDER / "warmup"
RESULTS = Path("docs/results/on-policy")
OBJECTIVES = ("fkl", "rkl", "drkl")
SHARES = ("0", "0.5", "1")
STEPS = 80
SETTINGS = (
    "stages=[]", f"run.dir={FOLDER}", "training.eval_every=40", "training.save_every=40", "rollouts.max_new_tokens=64",
)  # fmt: skip
FIRST = (
    "run.name=warmup", "objective.name=fkl", "training.max_steps=90", "training.learning_rate=7e-4",
    "training.eval_every=45", "training.save_every=45", "stages=[]", f"run.dir={FOLDER}",
)  # fmt: skip


def drkl(*words: str) -> None:
    """Run the command line."""
    subprocess.run([sys.executable, "-m", "drkl", *words], check=True)


def names() -> list[str]:
    """The nine runs."""
    return [f"{objective}-{share}" for objective in OBJECTIVES for share in SHARES]


def distill(run: Path, *words: str) -> None:
    """Train a run of the quickstart's with some settings, go on with it, or leave it as it is where it is finished."""
    if (run / "student").is_dir():
        return
    if (run / "config.yaml").is_file():
        drkl("distill", "--resume", str(run))
        return
    drkl("distill", "quickstart", *words)


def train(name: str) -> None:
    """Train one run, or go on with it."""
    objective, share = name.split("-")
    distill(
        FOLDER / name, *SETTINGS, f"run.name={name}", f"objective.name={objective}",
        "student.init=pretrained", "student.layers=null", f"student.model={WARMUP / 'student'}",
        f"training.max_steps={STEPS}", f"rollouts.share={share}",
    )  # fmt: skip


COLUMNS = {
    "rkl": "reverse KL", "fkl": "forward KL", "agreement": "same top token", "entropy": "entropy",
    "overconfidence": "overconfidence", "distinct_2": "distinct-2", "self_bleu": "self-BLEU", "rouge_l": "ROUGE-L",
    "repetition": "repetition", "ended": "ended",
}  # fmt: skip
LOGGED = {
    "eval_rollout_finished": "finished", "eval_rollout_distinct2": "distinct-2 of answers",
    "eval_rollout_loss": "loss on answers", "eval_loss": "loss on responses",
}  # fmt: skip


def table(done: list[str]) -> str:
    """The numbers of the students, a line for each."""
    lines = [["", "share", *COLUMNS.values(), *LOGGED.values(), "seconds a step"]]
    first = Evaluation.load(FOLDER / done[0] / "eval.json")
    for model, name in (("teacher", "teacher"), ("before", "warm-up")):
        lines.append([name, "", *(_show(first, model, key) for key in COLUMNS), *[""] * (len(LOGGED) + 1)])
    for name in done:
        objective, share = name.split("-")
        evaluation = Evaluation.load(FOLDER / name / "eval.json")
        log = read_jsonl(FOLDER / name / "train.jsonl")
        last = [line for line in log if "eval_loss" in line][-1]
        logged = [f"{last[key]:.3f}" if key in last else "" for key in LOGGED]
        seconds = [line["seconds_generating"] + line["seconds_learning"] for line in log if "seconds_learning" in line]
        pace = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
        lines.append([objective, share, *(_show(evaluation, "student", key) for key in COLUMNS), *logged, pace])
    head, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest]) + "\n"


def _show(evaluation: Evaluation, model: str, key: str) -> str:
    value = evaluation.value(model, key)
    return "" if value is None else f"{value:.3f}"


def write_results(done: list[str]) -> None:
    """Write the page, the tables and the paired differences to docs/results/on-policy/."""
    runs = [str(FOLDER / name) for name in done]
    drkl("report", *runs, "--output", str(RESULTS / "report.html"))
    drkl("report", *runs, "--format", "csv", "--output", str(RESULTS / "tables.csv"))
    write_text(RESULTS / "table.md", table(done))
    pairs = [(f"{objective}-0", f"{objective}-{share}") for objective in OBJECTIVES for share in SHARES[1:]]
    pairs += [(f"{other}-1", "drkl-1") for other in ("fkl", "rkl")] + [("rkl-0", "drkl-0")]
    for a, b in pairs:
        target = RESULTS / f"compare-{a}-{b}.md"
        drkl("compare", str(FOLDER / a), str(FOLDER / b), "--format", "md", "--output", str(target))
    for name in done:
        shutil.copy(FOLDER / name / "eval.json", RESULTS / f"{name}.eval.json")
        shutil.copy(FOLDER / name / "train.jsonl", RESULTS / f"{name}.train.jsonl")


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=names(), default=names())
    chosen = parser.parse_args().only
    if not (WARMUP / "student").is_dir():
        drkl("distill", "quickstart", *FIRST)
    for name in chosen:
        train(name)
    for name in chosen:
        if not (FOLDER / name / "eval.json").is_file():
            drkl("evaluate", str(FOLDER / name))
    if chosen == names():
        write_results(chosen)


if __name__ == "__main__":
    main()
