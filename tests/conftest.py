"""Quiet libraries, one thread, fixed seeds."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
import transformers

from browser import browser, visits  # noqa: F401  fixtures

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
# processes that tests start, too: sums of another number of threads differ in the last bit
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_finish() -> None:
    """What is imported by now stays for good. The Trainer collects garbage at every training: without all that."""
    gc.collect()
    gc.freeze()
