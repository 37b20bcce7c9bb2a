"""Bytes of the tensors that are alive."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def only_new_objects() -> Iterator[None]:
    """What was there before is out of the collector's sight: it would look through it at every count."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all tensors that the collector sees, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
