"""The part of a parameter, its gradient and what its optimizer steps, that a process answers for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Piece:
    """Some elements of a flattened parameter.

    Attributes:
        shape: of the whole parameter.
        start: number of the first element.
        values: (n,) what the optimizer steps.
        places: views of all copies of these values on this process: what is changed there in place, is changed.
        gradient: (n,) of the whole update, averaged over processes; None where there is none.
        copies: processes that have this very piece.
    """

    shape: torch.Size
    start: int
    values: Tensor
    gradient: Tensor | None
    places: tuple[Tensor, ...] = ()
    copies: int = 1

    def over(self, axis: int, products: Tensor) -> Tensor:
        """Sums of (n,) products over the rows (0) of the parameter, (rows,), or its columns (1), (elements a row,).

        Of the whole parameter, they are the sums of those of all pieces.
        """
        length = math.prod(self.shape[1:])
        padded = F.pad(products, (self.start % length, -(self.start + len(products)) % length))
        block = padded.view(len(padded) // length, length)
        if axis == 1:
            return block.sum(0)
        rows = products.new_zeros(self.shape[0])
        first = self.start // length
        rows[first : first + len(block)] = block.sum(1)
        return rows

    def part_of(self, whole: Tensor) -> Tensor:
        """(n,) these elements of a tensor of the whole parameter's shape."""
        return whole.flatten()[self.start : self.start + len(self.values)]


def is_spread(parameters: Iterable[Tensor]) -> bool:
    """Whether a process has only its piece of one of the parameters, or of its gradient."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters)


def piece_of(parameter: nn.Parameter) -> Piece | None:
    """This process's piece; None where it has none of a parameter that others have."""
    if hasattr(parameter, "ds_id"):
        return _of_zero3(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return _of_zero12(parameter)
    gradient = parameter.grad
    if not isinstance(parameter, DTensor):
        return Piece(
            parameter.shape, 0, parameter.detach().flatten(), None if gradient is None else gradient.flatten()
        )
    mesh, rank, parts, copies = parameter.device_mesh, 0, 1, 1
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            rank, parts = mesh.get_local_rank(axis), mesh.size(axis)
        else:
            copies *= mesh.size(axis)
    rows = min(rank * -(-parameter.shape[0] // parts), parameter.shape[0])
    local = None if gradient is None else gradient.to_local().flatten()  # type: ignore[attr-defined]
    values = parameter.to_local().detach().flatten()
    return Piece(parameter.shape, rows * math.prod(parameter.shape[1:]), values, local, (values,), copies)


def _of_zero3(parameter: Any) -> Piece | None:
    """Of a parameter that DeepSpeed has cut into equal parts, the last one padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    size = parameter.ds_tensor.numel()
    start = size * parameter.ds_zero_partition_rank
    count = min(size, parameter.ds_numel - start)
    if count <= 0:
        return None
    trained = parameter.requires_grad and hasattr(parameter, "_z3_optimizer")
    values = (safe_get_local_fp32_param(parameter) if trained else parameter.ds_tensor).detach()
    gradient = safe_get_local_grad(parameter) if trained else None
    values = values.flatten()[:count]
    gradient = None if gradient is None else gradient.flatten()[:count]
    return Piece(parameter.ds_shape, start, values, gradient, (values, parameter.ds_tensor.data.flatten()[:count]))


def _of_zero12(parameter: Any) -> Piece | None:
    """Of a parameter that every process has whole, and whose optimizer DeepSpeed has spread."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.lp_fragment_address
    try:
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    except (KeyError, ValueError, TypeError):  # there is none outside of a step
        gradient = None
    if gradient is not None and len(gradient) != address.numel:
        gradient = gradient[address.start : address.start + address.numel]
    values = mapping.hp_fragment.detach()
    return Piece(parameter.shape, address.start, values, gradient, (values,))
