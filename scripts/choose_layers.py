"""Search for the layers of a model to keep as the start of a student (`init: prune`).

Two searches on a few *training* rows, without any training. The score of a set of layers is its forward KL to the full
model; lower is better. First elimination: from the full model down, layer by layer, keep the --beam best sets of each
size. Then exchange: swap one kept layer for one left out, always the best swap, until none helps. The first and the
last layer stay. A trial costs a forward pass over --rows rows: about 1,500 trials took 40 seconds on a GPU, and take an
hour and a half on two cores (--beam 1: a third of that). The list in recipes/quickstart.yaml comes from

    python scripts/choose_layers.py --layers 10
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from drkl import distillation_loss
from drkl.data.config import DataConfig
from drkl.data.examples import load_examples
from drkl.data.tokenize import tokenize_examples
from drkl.models.config import StudentConfig
from drkl.models.forward import lm_head
from drkl.models.load import load_model, load_tokenizer, quiet_transformers
from drkl.models.precision import pick_device
from drkl.models.readout import Batch, batches
from drkl.models.shorten import layer_lists, stacks_of
from drkl.models.student import kept_layers

Layers = tuple[int, ...]


class Distance:
    """The forward KL, in nats, of a model with some of its layers to the full model; each set is computed once."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self._model, self._batch = model, batch
        (stack,) = stacks_of(model.config)
        ((name, layers),) = layer_lists(model, model, stack, stack.available)[0].items()
        parent, _, self._name = name.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._all = list(layers)
        self._teacher = self._logits(tuple(range(len(self._all))))
        self._known: dict[Layers, float] = {}
        self._bar = tqdm(unit=" trials", mininterval=5)

    def __call__(self, layers: Layers) -> float:
        if layers not in self._known:
            self._known[layers] = float(distillation_loss(self._logits(layers), self._teacher, objective="fkl"))
            self._bar.update()
        return self._known[layers]

    @torch.no_grad()
    def _logits(self, layers: Layers) -> Tensor:
        setattr(self._parent, self._name, nn.ModuleList(self._all[i] for i in layers))
        return lm_head(self._model).logits(self._batch.states(self._model))


def eliminate(distance: Distance, depth: int, count: int, beam: int) -> Layers:
    """Remove layers one by one down to ``count``, and keep the ``beam`` best sets of each size."""
    kept: list[Layers] = [tuple(range(depth))]
    while len(kept[0]) > count:
        smaller = {tuple(layer for layer in layers if layer != out) for layers in kept for out in layers[1:-1]}
        kept = sorted(smaller, key=distance)[:beam]
    return kept[0]


def exchange(distance: Distance, depth: int, layers: Layers) -> Layers:
    """Swap one layer for another, the best swap each time, until none helps."""
    while True:
        left_out = [layer for layer in range(depth) if layer not in layers]
        neighbours = [
            tuple(sorted({*layers, new} - {old})) for old in layers[1:-1] for new in left_out if 0 < new < depth - 1
        ]
        best = min(neighbours, key=distance, default=layers)
        if distance(best) >= distance(layers):
            return layers
        layers = best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the model")
    parser.add_argument("--data", default="bundled:dolly", help="training rows: a jsonl file")
    parser.add_argument("--rows", type=int, default=32, help="number of training rows")
    parser.add_argument("--layers", type=int, required=True, help="number of layers to keep, at least 2")
    parser.add_argument("--beam", type=int, default=4, help="number of sets kept at each size")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args()

    quiet_transformers()
    device = pick_device(options.device)
    model, tokenizer = load_model(options.model, "fp32"), load_tokenizer(options.model)
    nn.Module.to(model, device)
    examples, _ = load_examples(DataConfig(path=options.data, eval_path=options.data))
    rows, _ = tokenize_examples(examples[: 4 * options.rows], tokenizer, max_prompt_tokens=100, max_tokens=160)
    (batch,) = batches(rows[: options.rows], pad_id=tokenizer.pad_token_id, tokens_per_batch=2**30)
    depth = model.config.get_text_config().num_hidden_layers
    if not 2 <= options.layers <= depth:
        parser.error(f"--layers is {options.layers}; expected 2 to {depth}, the model's number of layers")
    distance = Distance(model, batch)

    spaced = tuple(kept_layers(StudentConfig(layers=options.layers), depth))
    print(f"evenly spaced      {list(spaced)}: FKL {distance(spaced):.3f}", flush=True)
    best = eliminate(distance, depth, options.layers, options.beam)
    print(f"after elimination  {list(best)}: FKL {distance(best):.3f}", flush=True)
    best = exchange(distance, depth, best)
    print(f"after exchange     {list(best)}: FKL {distance(best):.3f}", flush=True)


if __name__ == "__main__":
    main()
