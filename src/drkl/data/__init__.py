"""Data: examples (jsonl, ``datasets``) to prompts and responses to batches; the rest is in the modules."""

from drkl.data.config import DataConfig
from drkl.data.examples import Example, load_examples

__all__ = ["DataConfig", "Example", "load_examples"]
