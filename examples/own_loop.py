"""A plain PyTorch fine-tuning loop, and the two lines (marked) that make it distil: `python examples/own_loop.py`.

It makes its own small models and data, so that it runs anywhere in seconds. With real ones, load teacher and student
with `from_pretrained` and take the batches from your own loader; the marked lines stay as they are. What they stand
for, and what changes on several processes, is in docs/own-loop.md.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import drkl

VOCAB, STEPS, BATCH, LENGTH = 512, 40, 8, 32


def small_model(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def confident_model() -> LlamaForCausalLM:
    """In the place of a trained teacher: an untrained model that is sure of what it predicts."""
    model = small_model(layers=2, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(steps)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def main() -> list[float]:
    student = small_model(layers=1, seed=1)
    teacher = confident_model()  # 1
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for batch in batches(STEPS):
        # Without a teacher:  loss = student(**batch).loss
        loss = drkl.pair_loss(student, teacher, batch, objective="drkl")  # 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"DRKL per token: {losses[0]:.3f} nats at the first step, {losses[-1]:.3f} at the last")
    return losses


if __name__ == "__main__":
    main()
