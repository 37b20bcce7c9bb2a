"""What several processes of one training agree on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

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
    return shard()[0] == 0


def broadcast(module: nn.Module) -> None:
    """Every process takes the first one's buffers and parameters."""
    if distributed():
        for tensor in (*module.buffers(), *module.parameters()):
            torch.distributed.broadcast(tensor.data, src=0)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, in place; itself without others."""
    if distributed():
        torch.distributed.all_reduce(tensor)
    return tensor


def part_of(count: int) -> range:
    """Which of ``count`` things this process computes, where every process does a part of them."""
    rank, processes = shard()
    return range(count * rank // processes, count * (rank + 1) // processes)


def joined(part: torch.Tensor, count: int) -> torch.Tensor:
    """(count, ...) what all have computed, on every process, bit for bit the same; ``part``: of :func:`part_of`."""
    if not distributed():
        return part
    mine = part_of(count)
    together = part.new_zeros(count, *part.shape[1:])
    together[mine.start : mine.stop] = part
    return sum_over_processes(together)


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, which has the same shape on all, in the place of this one."""
    if distributed():
        torch.distributed.broadcast(tensor, src=0)
    return tensor


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of every process's tensor, in place; itself without others."""
    return sum_over_processes(tensor).div_(shard()[1])


@torch.no_grad()
def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every process gets the mean of all gradients, of zeros where one has none; None where nobody has any."""
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    if not distributed() or not learned:
        return
    there = [parameter.grad is not None for parameter in learned]
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned]
    flags = torch.tensor(there, dtype=parts[0].dtype, device=parts[0].device)
    *means, flags = mean_over_processes(torch.cat([*parts, flags])).split([*map(len, parts), len(flags)])
    for parameter, mean, share in zip(learned, means, flags.tolist(), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype) if share else None


@torch.no_grad()
def mean_statistics(modules: Iterable[nn.Module]) -> None:
    """Every process gets the mean of the running statistics of all BatchNorms."""
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    held = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    if distributed() and held:
        means = mean_over_processes(torch.cat(held)).split([len(statistic) for statistic in held])
        for statistic, mean in zip(held, means, strict=True):
            statistic.copy_(mean)


def shared_tensors(own: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of all processes, which have different names, on every process; on the CPU, sent from ``device``."""
    if not distributed():
        return own
    rank, processes = shard()
    lists: list[Any] = [None] * processes
    torch.distributed.all_gather_object(lists, [(name, t.shape, t.dtype) for name, t in own.items()])
    everything = {}
    for owner, entries in enumerate(lists):
        for name, shape, kind in entries:
            tensor = own[name].to(device) if owner == rank else torch.empty(shape, dtype=kind, device=device)
            torch.distributed.broadcast(tensor, src=owner)
            everything[name] = tensor.cpu()
    return everything
