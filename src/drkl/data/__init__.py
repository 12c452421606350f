"""Data: examples from files and data sets, tokenised into rows, collated into batches."""

from drkl.data.config import DataConfig
from drkl.data.examples import Example, load_examples

__all__ = ["DataConfig", "Example", "load_examples"]
