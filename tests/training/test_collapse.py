"""Runs that are built to go wrong, and one that goes well: what the watch says of each."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from drkl.rollouts.health import concerns_of
from drkl.runs import RunFolder
from tests.models import tiny
from tests.training.test_trainer import make_trainer, rows

END = 4


@torch.no_grad()
def model_with(seed: int, logits: dict[int, float]) -> PreTrainedModel:
    """A model that adds about so much to the logits of some tokens, wherever it is in a text."""
    model = tiny.llama(seed, layers=2, tie_word_embeddings=False)
    body = model.model
    # The first feature is the same in every state: no layer writes to it.
    body.embed_tokens.weight[:, 0] = 4.0
    for layer in body.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    for token, value in logits.items():
        model.lm_head.weight[token] = 0.0
        model.lm_head.weight[token, 0] = value / 3
    return model


TEACHERS: dict[str, tuple[dict[int, float], list[str]]] = {
    "ends as the student does": ({END: 3.0}, []),
    "never ends": ({END: -12.0}, ["unfinished"]),
    "ends at once": ({END: 20.0}, ["empty"]),
    "says one word": ({END: 0.0, 7: 9.0}, ["alike", "repeated", "unfinished"]),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ends at once", "says one word")]


@pytest.mark.parametrize("name", ["ends as the student does", "never ends", *SLOW])
@pytest.mark.slow
def test_the_watch_speaks_up_for_a_run_built_to_collapse_alone(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logits, kinds = TEACHERS[name]
    trainer = make_trainer(
        tmp_path, rows(16), model=model_with(1, {END: 3.0}), teacher=model_with(2, logits), heldout=rows(32)[16:],
        objective="rkl", rollout_share=1.0, rollout_max_new_tokens=24, learning_rate=0.1, max_steps=24,
        tokens_per_step=4000, eval_strategy="steps", eval_steps=6, lr_scheduler_type="constant",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="drkl"):
        trainer.train()
    found = concerns_of(RunFolder(tmp_path).read_train_log())
    assert sorted(concern.kind for concern in found) == kinds
    said = [record.message for record in caplog.records if record.message.startswith("Warning: Step ")]
    assert said == [f"Warning: {concern.text}" for concern in found]
