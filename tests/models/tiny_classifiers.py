"""Random text classifiers of a few thousand weights, and a tokenizer that puts ``<s>`` and ``</s>`` around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from tests.data.tiny_tokenizers import build
from tests.models.tiny import VOCAB

CLASSES = ("card", "loan", "other")
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4},
    "roberta": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4},
    "distilbert": {"dim": 16, "n_heads": 2, "hidden_dim": 32, "n_layers": 4},
    "modernbert": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4},
    "llama": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
    },
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 4},
}


def tokenizer() -> PreTrainedTokenizerBase:
    tokens = build(extra=[f"w{i}" for i in range(VOCAB - 30)])
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[(name, tokens.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    )
    return tokens


def make(kind: str = "bert", seed: int = 0, *, classes: tuple[str, ...] = CLASSES, **changes: Any) -> PreTrainedModel:
    """With dropout where the family has it; ``pad_token_id`` is 0."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 96, "pad_token_id": 0, "initializer_range": 0.3}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    settings |= SIZES[kind] | {"id2label": dict(enumerate(classes))} | changes
    settings["label2id"] = {name: number for number, name in settings["id2label"].items()}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **settings))
    made: PreTrainedModel = model.eval()
    return made


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
