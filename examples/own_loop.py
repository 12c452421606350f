"""A plain PyTorch fine-tuning loop, and the 12 lines (marked) that make it distil: `python examples/own_loop.py`.

It makes its own small models and data, so that it runs anywhere in seconds. With real ones, load teacher and student
with `from_pretrained` and take the batches from your own loader; the marked lines stay as they are.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import drkl  # 1

VOCAB, STEPS, BATCH, LENGTH = 512, 40, 8, 32


def small_model(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(steps)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def main() -> list[float]:
    student = small_model(layers=1, seed=1)
    teacher = small_model(layers=2, seed=0).eval().requires_grad_(False)  # 2
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)  # an untrained model says nothing; this one is sure of what it says
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    objective = drkl.make_objective("drkl", gamma=0.5)  # 3
    losses = []
    for batch in batches(STEPS):
        # The loop without a teacher had one line here:  loss = student(**batch).loss
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}  # 4
        hidden = student.model(**inputs).last_hidden_state[:, :-1]  # 5: what position t predicts is token t + 1
        with torch.no_grad():  # 6
            teacher_hidden = teacher.model(**inputs).last_hidden_state[:, :-1]  # 7
        labels = batch["labels"][:, 1:]  # 8: -100 where a token does not count
        heads = student.lm_head.weight, teacher.lm_head.weight  # 9
        loss = drkl.fused_distillation_loss(  # 10
            hidden,
            heads[0],
            teacher_hidden,
            heads[1],
            labels,
            objective=objective,  # 11
        )  # 12
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"DRKL per token: {losses[0]:.3f} nats at the first step, {losses[-1]:.3f} at the last")
    return losses


if __name__ == "__main__":
    main()
