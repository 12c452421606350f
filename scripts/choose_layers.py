"""Look for the layers of a model that say the most without the others: a start for `init: prune`.

Hill climbing on a few *training* rows: one layer at a time is exchanged for another (never the first or the last), and
the exchange is kept where the forward KL to the whole model falls. No training; about a second a trial on two cores
for the embedded teacher. The list in recipes/quickstart.yaml comes from

    python scripts/choose_layers.py --layers 9
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from drkl import distillation_loss
from drkl.data.collate import IGNORE_INDEX, collate
from drkl.data.config import DataConfig
from drkl.data.examples import load_examples
from drkl.data.tokenize import tokenize_examples
from drkl.models.config import StudentConfig
from drkl.models.forward import hidden_states, lm_head
from drkl.models.load import load_model, load_tokenizer, quiet_transformers
from drkl.models.student import kept_layers, layers_prefix


class Distance:
    """The forward KL of a model with some of its layers to the whole model."""

    def __init__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        self._model, self._batch, self._keep = model, batch, batch["labels"] != IGNORE_INDEX
        parent, _, self._name = layers_prefix(model).rpartition(".")
        self._parent = model.get_submodule(parent)
        self._all = list(model.get_submodule(layers_prefix(model)).children())
        self._teacher = self._logits(list(range(len(self._all))))

    def __call__(self, layers: list[int]) -> float:
        return float(distillation_loss(self._logits(layers), self._teacher, objective="fkl"))

    @torch.no_grad()
    def _logits(self, layers: list[int]) -> Tensor:
        setattr(self._parent, self._name, nn.ModuleList(self._all[i] for i in layers))
        return lm_head(self._model).logits(hidden_states(self._model, self._batch)[self._keep])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose layers")
    parser.add_argument("--data", default="bundled:dolly", help="training rows: a jsonl file")
    parser.add_argument("--rows", type=int, default=16, help="how many of them")
    parser.add_argument("--layers", type=int, required=True, help="how many layers to keep")
    parser.add_argument("--trials", type=int, default=300, help="exchanges tried")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    quiet_transformers()
    model, tokenizer = load_model(options.model, "fp32"), load_tokenizer(options.model)
    examples, _ = load_examples(DataConfig(path=options.data, eval_path=options.data))
    rows, _ = tokenize_examples(examples[: 4 * options.rows], tokenizer, max_prompt_tokens=100, max_tokens=160)
    batch = collate(rows[: options.rows], pad_id=tokenizer.pad_token_id)
    batch.pop("row_ids")
    depth = model.config.get_text_config().num_hidden_layers
    distance = Distance(model, batch)

    layers = kept_layers(StudentConfig(layers=options.layers), depth)
    best = distance(layers)
    print(f"{layers}: FKL {best:.3f}", flush=True)
    generator, seen = random.Random(options.seed), {tuple(layers)}
    for _ in tqdm(range(options.trials), mininterval=5):
        candidate = list(layers)
        for _ in range(generator.choice((1, 1, 2))):
            free = [layer for layer in range(1, depth - 1) if layer not in candidate]
            candidate[generator.randrange(1, len(candidate) - 1)] = generator.choice(free)
        candidate.sort()
        if tuple(candidate) in seen:
            continue
        seen.add(tuple(candidate))
        value = distance(candidate)
        if value < best:
            layers, best = candidate, value
            tqdm.write(f"{layers}: FKL {best:.3f}")


if __name__ == "__main__":
    main()
