"""What several processes of one training have to agree on."""

from __future__ import annotations

import torch
from torch import nn


def is_first_process() -> bool:
    """Whether this process writes files; True without others."""
    return not _distributed() or torch.distributed.get_rank() == 0


def broadcast(module: nn.Module) -> None:
    """Every process takes the first one's buffers and parameters."""
    if _distributed():
        for tensor in (*module.buffers(), *module.parameters()):
            torch.distributed.broadcast(tensor.data, src=0)


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of every process's tensor; itself without others."""
    if _distributed():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
