"""What several processes of one training agree on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def distributed() -> bool:
    """Whether there are other processes to work with."""
    return not _ALONE.get() and torch.distributed.is_available() and torch.distributed.is_initialized()


def shard() -> tuple[int, int]:
    """(rank, processes) of this process."""
    if not distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """What is called inside waits for no other process: each may or may not do it, and all get the same."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_first_process() -> bool:
    """Whether this process writes files; True without others."""
    return not distributed() or torch.distributed.get_rank() == 0


def broadcast(module: nn.Module) -> None:
    """Every process takes the first one's buffers and parameters."""
    if distributed():
        for tensor in (*module.buffers(), *module.parameters()):
            torch.distributed.broadcast(tensor.data, src=0)


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of every process's tensor; itself without others."""
    if distributed():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor
