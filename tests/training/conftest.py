from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import logging


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    """One thread, so that sums are the same in every process; no bars in the output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
