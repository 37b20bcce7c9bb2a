"""Scores of units: what sums are divided by, how they are averaged over time, and those that need no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ... import criteria
from ...spec.architecture import Architecture
from .groups import GroupedSet

#: divisors of the published code; the 12 of heads is twice what its formula says
REFERENCE_DIVISORS = {"embedding": 12.0, "heads": 12.0, "qk": 2.0, "v": 2.0, "mlp": 1.0}


def divisors(architecture: Architecture, sets: Sequence[GroupedSet], reference: bool) -> torch.Tensor:
    """(units,) what a unit's sum is divided by before it is squared: the number of tensors that were summed up.

    ``reference``: of the published code. By default the embedding's is the number of layers, a head's 6, and a
    neuron's the number of Linears that feed it (2 for SwiGLU).
    """
    branches = len(architecture.family.fc1_names(architecture.config))
    own = {**REFERENCE_DIVISORS, "embedding": float(len(architecture.layers)), "heads": 6.0, "mlp": float(branches)}
    table = REFERENCE_DIVISORS if reference else own
    return torch.cat([torch.full((one.size,), table[one.unit]) for one in sets])


class RunningScores(nn.Module):
    """The mean over the updates between two prune steps, and a moving average over prune steps: in buffers.

    Args:
        units: how many are scored.
        momentum: of the moving average.
        reference: the published average, which starts from zero after the first prune step and is not corrected for
            it; by default the average is, so that scores keep their size.
        device: of the buffers.
    """

    window: torch.Tensor
    average: torch.Tensor
    spoiled: torch.Tensor

    def __init__(self, units: int, momentum: float, reference: bool, device: torch.device) -> None:
        super().__init__()
        self.momentum, self.reference = momentum, reference
        self.register_buffer("window", torch.zeros(units, device=device))
        self.register_buffer("average", torch.zeros(units, device=device))
        self.register_buffer("spoiled", torch.zeros((), dtype=torch.int64, device=device))
        self.updates = 0  # in the window
        self.prune_steps = 0

    @property
    def empty(self) -> bool:
        return not self.updates and not self.prune_steps

    def add(self, scores: torch.Tensor) -> None:
        """Take in the scores (units,) of one update. Those that are not finite count as 0."""
        finite = torch.isfinite(scores)
        self.spoiled += (~finite).sum()
        self.window += torch.where(finite, scores, 0.0).to(self.window.dtype)
        self.updates += 1

    def current(self) -> torch.Tensor:
        """(units,) the scores to prune by, all updates so far included."""
        average, prune_steps = self._rolled()
        return average if self.reference else average / (1 - self.momentum**prune_steps)

    def roll(self) -> None:
        """Begin a new window, after a prune step."""
        average, self.prune_steps = self._rolled()
        self.average.copy_(average)
        self.window.zero_()
        self.updates = 0

    def _rolled(self) -> tuple[torch.Tensor, int]:
        if not self.updates:
            return self.average, self.prune_steps
        mean = self.window / self.updates
        if self.reference and self.prune_steps == 0:
            return mean, 1
        before = torch.zeros_like(mean) if self.reference and self.prune_steps == 1 else self.average
        return self.momentum * before + (1 - self.momentum) * mean, self.prune_steps + 1

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.updates, self.prune_steps])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.updates, self.prune_steps = map(int, state.tolist())


def magnitudes(model: Any, sets: Sequence[GroupedSet], alive: torch.Tensor) -> torch.Tensor:
    """(units,) L2 norm of every unit's weights, over the mean of its set's ``alive`` units and the size of a group.

    Norms of sets are of different sizes (a head has more weights than a neuron) and cannot be ranked as they are.
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
