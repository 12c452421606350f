"""Random models of a few thousand weights, and rows for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drkl.data import Example
from drkl.data.tokenize import Row, tokenize_examples
from tests.data.tiny_tokenizers import build

VOCAB = 64


@contextmanager
def one_thread() -> Iterator[None]:
    """These models are too small for two threads: waiting for each other takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tokenizer() -> PreTrainedTokenizerBase:
    return build(extra=[f"w{i}" for i in range(VOCAB - 30)])


def llama(seed: int = 0, *, vocab: int = VOCAB, **changes: Any) -> PreTrainedModel:
    """Wide weights make its distributions far from flat; float64 leaves no rounding to tests of equality."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=96, initializer_range=0.4, bos_token_id=1, eos_token_id=None,
        **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=96, initializer_range=0.4, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def mistral(seed: int = 0) -> PreTrainedModel:
    """Its attention reaches back three tokens only."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=96, sliding_window=4, initializer_range=0.4, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return MistralForCausalLM(config).double().eval()


def bloom(seed: int = 0) -> PreTrainedModel:
    """ALiBi: it takes no positions. In float32: with transformers 5.23 its padding is NaN in float64."""
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.4, eos_token_id=None
    )
    return BloomForCausalLM(config).eval()


def rows(count: int = 6) -> list[Row]:
    words = "hi hello there a b c d".split()
    examples = []
    for i in range(count):
        prompt = " ".join(words[(i + j) % len(words)] for j in range(1 + i % 4))
        response = " ".join(words[(2 * i + j) % len(words)] for j in range(2 + i % 3))
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        examples.append(Example(f"id-{i}", turns))
    made, _ = tokenize_examples(examples, tokenizer(), max_prompt_tokens=32, max_tokens=64)
    return made
