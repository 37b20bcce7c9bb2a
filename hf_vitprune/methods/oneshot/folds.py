"""What is left of a branch at smaller sizes, and how far that is from the whole: from its statistics alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...compensate.algebra import ridge_solve, value_map
from ...compensate.fits import Fit, damping, refit, squared_error
from ...compensate.moments import Statistics


class Branch(NamedTuple):
    """The end of a branch: what its last Linear reads, and how that goes on into the residual stream.

    Attributes:
        stats: moments of its inputs (n), in double precision, with what the Linear makes of them as targets (m).
        weight, bias: (m, n) and (m,) of the Linear.
        scale: (m,) LayerScale behind it; None without.
    """

    stats: Statistics
    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def of(cls, stats: Statistics, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None) -> Branch:
        """From statistics of the inputs alone."""
        effect = weight if scale is None else scale[:, None] * weight
        tx = effect @ stats.xx
        return cls(stats._replace(t=effect @ stats.x, tx=tx, tt=(tx * effect).sum(1)), weight, bias, scale)

    @property
    def effect(self) -> torch.Tensor:
        """(m, n) what the inputs add to the residual stream."""
        return self.weight if self.scale is None else self.scale[:, None] * self.weight


def value_basis(branch: Branch, heads: int) -> torch.Tensor:
    """(heads, d, d): for every head, channels of its context from the one that serves its output best to the last."""
    size = len(branch.stats.xx) // heads
    maps = branch.weight.new_zeros(heads, size, size)
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        found = value_map(branch.stats.xx[at, at], branch.effect[:, at], size)
        maps[h, : len(found)] = found  # fewer where the residual stream is narrower than the head
    return maps


def value_map_of(basis: torch.Tensor, heads: list[int], rank: int) -> torch.Tensor:
    """(len(heads) * rank, n) from all contexts to the first channels of some heads."""
    total, size, _ = basis.shape
    down = basis.new_zeros(len(heads) * rank, total * size)
    for j, h in enumerate(heads):
        down[j * rank : (j + 1) * rank, h * size : (h + 1) * size] = basis[h, :rank]
    return down


def values_left(branch: Branch, basis: torch.Tensor, heads: list[int], rank: int, ridge: float) -> Fit:
    """The output projection that reads only the first ``rank`` channels of ``basis`` of some heads."""
    size = basis.shape[1]
    start = []
    for h in heads:  # channels of a head are uncorrelated and of variance one: this is what each is worth alone
        at = slice(h * size, (h + 1) * size)
        start.append(branch.weight[:, at] @ branch.stats.xx[at, at] @ basis[h, :rank].T)
    stats = branch.stats.through(value_map_of(basis, heads, rank))
    return _shifted(branch, refit(stats, torch.cat(start, 1), branch.scale, ridge))


def neurons_left(branch: Branch, kept: list[int], ridge: float) -> Fit:
    """The Linear that reads only some of its inputs."""
    at = torch.tensor(kept, device=branch.weight.device)
    return _shifted(branch, refit(branch.stats.take(at), branch.weight[:, at], branch.scale, ridge))


def _shifted(branch: Branch, fit: Fit) -> Fit:
    return fit._replace(bias=fit.bias + branch.bias)


def error_of(stats: Statistics, ridge: float) -> float:
    """Squared error, over all outputs, of the best Linear on the inputs of ``stats``."""
    return float(squared_error(stats, *ridge_solve(stats.xx, stats.tx, damping(stats, ridge))))


def value_errors(
    branch: Branch, basis: torch.Tensor, order: list[int], ranks: list[int], ridge: float
) -> torch.Tensor:
    """(heads, len(ranks)) squared errors with the last 1, 2, ... heads of an order of removal, at each rank."""
    heads, size, _ = basis.shape
    whole = branch.stats.through(value_map_of(basis, list(range(heads)), size))
    errors = torch.zeros(heads, len(ranks), dtype=torch.float64)
    for count in range(1, heads + 1):
        kept = order[heads - count :]
        for j, rank in enumerate(ranks):
            if count < heads or rank < size:
                rows = [h * size + c for h in sorted(kept) for c in range(rank)]
                errors[count - 1, j] = error_of(whole.take(torch.tensor(rows, device=basis.device)), ridge)
    return errors
