"""Scores over time: a mean over the updates between two prune steps, a moving average over prune steps."""

from __future__ import annotations

import torch
from torch import nn


class RunningScores(nn.Module):
    """What has been scored so far, as buffers: a resumed run goes on with it.

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
        if self.reference:
            return average
        return average / (1 - self.momentum**prune_steps)

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
