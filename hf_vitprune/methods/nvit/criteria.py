"""Scores that need no gradients: what gradient scores are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import criteria
from .units import GroupedSet


def magnitudes(model: Any, sets: Sequence[GroupedSet], alive: torch.Tensor) -> torch.Tensor:
    """(units,) L2 norm of every unit's weights, over the mean of its set and the size of a group.

    Norms of sets are of different sizes (a head has more weights than a neuron) and cannot be ranked as they are.

    Args:
        model: stock, or a PeftModel (its adapters merged).
        alive: (units,) booleans; the mean is over these.
    """
    norms = criteria.magnitude(model)
    parts = []
    for one in sets:
        norm = norms[one.name]
        mean = norm[alive[one.places]].mean().clamp(min=torch.finfo(norm.dtype).tiny)
        parts.append(norm / mean / one.group)
    return torch.cat(parts)


def random_scores(sets: Sequence[GroupedSet], seed: int) -> torch.Tensor:
    """(units,) uniform draws, over the size of a group: sets then shrink alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(one.size, generator=generator) / one.group for one in sets])
