"""Off-policy against on-policy: three objectives, three shares of sampled answers, from one warmed-up student.

    python -m scripts.run_on_policy            # trains, evaluates, compares; finished parts are not done again
    python -m scripts.run_on_policy --only rkl-1

Everything is run by the command line, so that each run can be repeated alone: its env.json has the command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/on-policy")
WARMUP = FOLDER / "warmup"
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


def train(name: str) -> None:
    """Train one run, or go on with it."""
    objective, share = name.split("-")
    run = FOLDER / name
    if (run / "student").is_dir():
        return
    if (run / "config.yaml").is_file():
        drkl("distill", "--resume", str(run))
        return
    drkl(
        "distill", "quickstart", *SETTINGS, f"run.name={name}", f"objective.name={objective}",
        "student.init=pretrained", "student.layers=null", f"student.model={WARMUP / 'student'}",
        f"training.max_steps={STEPS}", f"rollouts.share={share}",
    )  # fmt: skip


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


if __name__ == "__main__":
    main()
