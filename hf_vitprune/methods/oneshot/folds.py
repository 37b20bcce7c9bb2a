"""What is left of a branch at smaller sizes, and how far that is from the whole: from its statistics alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...compensate.algebra import nested_errors
from ...compensate.fits import Branch, Fit, damping
from ...compensate.moments import Statistics

#: of the ridge: fits go three rounds with it, which leaves less of an error than one
ONE_ROUND = 0.03


def values_left(branch: Branch, heads: list[int], size: int, rank: int, ridge: float) -> tuple[torch.Tensor, Fit]:
    """The best ``rank`` channels of some heads.

    Args:
        size: channels of a head.

    Returns:
        Map (len(heads) * rank, len(heads) * size) of their contexts, and the output projection that reads it.
    """
    kept = branch.take(columns(heads, size))
    down, start = kept.low_rank(size, [range(j * rank, (j + 1) * rank) for j in range(len(heads))])
    return down, Branch(kept.stats.through(down), start, branch.scale).refit(ridge)


def neurons_left(branch: Branch, kept: list[int], ridge: float) -> Fit:
    """The Linear that reads only some of its inputs."""
    return branch.take(torch.tensor(kept)).refit(ridge)


def value_errors(branch: Branch, order: list[int], size: int, ranks: list[int], ridge: float) -> torch.Tensor:
    """(heads, len(ranks)) squared errors with the last 1, 2, ... heads of an order of removal, at each rank."""
    heads = len(order)
    whole = branch.stats.through(branch.low_rank(size, [range(h * size, (h + 1) * size) for h in range(heads)])[0])
    errors = torch.zeros(heads, len(ranks), dtype=torch.float64)
    for j, rank in enumerate(ranks):
        stats = whole.take(columns(order[::-1], size, rank))
        ridge_here = ONE_ROUND * damping(stats, ridge)
        errors[:, j] = nested_errors(stats.xx, stats.tx, stats.tt.sum(), rank, ridge_here)
    if ranks[-1] == size:
        errors[-1, -1] = 0.0
    return errors


def columns(heads: list[int], size: int, rank: int | None = None) -> torch.Tensor:
    """Places of the first ``rank`` (or all) channels of some heads, among all channels."""
    return torch.tensor([head * size + c for head in heads for c in range(size if rank is None else rank)])


# ---------------------------------------------------------------------- in a file
def packed(name: str, stats: Statistics) -> dict[str, torch.Tensor]:
    """Rows, mean, and the lower triangle of the covariance."""
    rows, cols = torch.tril_indices(len(stats.xx), len(stats.xx))
    cov = stats.xx.cpu()[rows, cols].float()
    return {f"{name}_rows": torch.tensor(stats.rows).double(), f"{name}_mean": stats.x.float(), f"{name}_cov": cov}


def unpacked(name: str, tensors: Mapping[str, torch.Tensor], like: torch.Tensor) -> Statistics:
    """The statistics of inputs alone, of the kind and on the device of another tensor."""
    mean, cov = (tensors[f"{name}_{part}"].to(like) for part in ("mean", "cov"))
    rows, cols = torch.tril_indices(len(mean), len(mean), device=like.device)
    full = like.new_zeros(len(mean), len(mean))
    full[rows, cols] = full[cols, rows] = cov
    none = like.new_zeros(0)
    return Statistics(float(tensors[f"{name}_rows"]), mean, none, full, like.new_zeros(0, len(mean)), none)
