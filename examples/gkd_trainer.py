"""TRL's GKDTrainer with DRKL in the place of its loss: two lines (marked). Needs `pip install trl`.

    python examples/gkd_trainer.py TEACHER STUDENT

TEACHER and STUDENT are folders or ids of two models with one tokenizer.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

import drkl


class DRKLTrainer(GKDTrainer):  # 1
    generalized_jsd_loss = staticmethod(drkl.as_gkd_loss("drkl", gamma=0.5))  # 2


def train(teacher: str, student: str, **arguments: Any) -> Any:
    """Train for a few steps on two sentences; returns what `Trainer.train` does."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = [("What is the capital of France?", "Paris."), ("And of Italy?", "Rome.")] * 4
    messages = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in rows]
    config = GKDConfig(max_steps=3, per_device_train_batch_size=2, lmbda=0.0, report_to="none", **arguments)
    trainer = DRKLTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher),
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"messages": messages}),
    )
    return trainer.train()


if __name__ == "__main__":
    print(train(*sys.argv[1:3], output_dir="gkd"))
