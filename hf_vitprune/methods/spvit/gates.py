"""Binary gates: sampled in training, taken at their likelier value in evaluation, fixed by a decision."""

from __future__ import annotations

import torch
from torch import nn

from ...plan.select import best, rounded

#: what gates choose from, by how many of the three nested gates are on
LEVELS = ("none", "conv1x1", "conv3x3", "attention")


class BinaryGates(nn.Module):
    """Gates of 0 and 1, each on with probability ``sigmoid(score)`` until a decision is taken: ``kept``."""

    kept: torch.Tensor

    def __init__(self, units: int, initial: float, device: torch.device) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.full((units,), float(initial), device=device))
        self.register_buffer("kept", torch.ones(units, dtype=torch.bool, device=device))
        self.decided = False

    def probabilities(self) -> torch.Tensor:
        """(units,) chance of every gate to be on."""
        return self.score.sigmoid()

    def sample(self) -> torch.Tensor:
        """(units,) draws of 0 and 1, with the gradients of the logistic relaxation (straight through)."""
        uniform = torch.rand_like(self.score).clamp(1e-6, 1 - 1e-6)
        relaxed = (self.score + uniform.logit()).sigmoid()
        return (relaxed > 0.5).to(relaxed.dtype) + (relaxed - relaxed.detach())

    def likelier(self) -> torch.Tensor:
        """(units,) 1 where P > .5, with the gradients of ``sigmoid(P - .5)``: what the cost term counts."""
        probability = self.probabilities()
        soft = (probability - 0.5).sigmoid()
        return (probability > 0.5).to(soft.dtype) + (soft - soft.detach())

    def decide(self, kept: torch.Tensor) -> None:
        """Fix the gates for good: ``kept`` (units,) booleans."""
        self.kept.copy_(kept)
        self.decided = True

    def get_extra_state(self) -> torch.Tensor:
        """Whether a decision was taken (a tensor: safetensors holds nothing else)."""
        return torch.tensor([self.decided])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.decided = bool(state.item())


class MixerGates(BinaryGates):
    """The three nested gates of a layer: 1 x 1, 3 x 3, attention."""

    def __init__(self, initial: float, device: torch.device) -> None:
        super().__init__(3, initial, device)

    def level(self, threshold: float = 0.0) -> int:
        """How many gates are on, from the simplest up to the first that is off: an index of :data:`LEVELS`.

        Scores over the threshold are on; 0 is P > .5. What was decided stays.
        """
        on = self.kept if self.decided else self.score.detach() > threshold
        return sum(on.cumprod(0).tolist())

    def decide_level(self, level: int) -> None:
        self.decide(torch.arange(3, device=self.kept.device) < level)


class NeuronGates(BinaryGates):
    """One gate for every hidden neuron of an MLP; thresholds as of :class:`MixerGates`."""

    def __init__(self, units: int, initial: float, device: torch.device, round_to: int) -> None:
        super().__init__(units, initial, device)
        self.round_to = round_to

    def count(self, threshold: float = 0.0) -> int:
        """How many neurons stay: those over the threshold, rounded."""
        if self.decided:
            return int(self.kept.sum())
        count, size = int((self.score.detach() > threshold).sum()), len(self.score)
        return count if count == size else rounded(count, size, self.round_to, least=0)

    def on(self, threshold: float = 0.0) -> torch.Tensor:
        """(units,) booleans: the neurons that stay, the ones most likely to be on."""
        if self.decided:
            return self.kept
        kept = torch.zeros_like(self.kept)
        kept[list(best(self.score.detach(), self.count(threshold)))] = True
        return kept


#: which gates learn from the products that are on; see :func:`nested`
GATE_GRADIENTS = ("shared", "topmost")


def products(gates: torch.Tensor) -> torch.Tensor:
    """Cumulative products of (..., 3) gates: a more complex mixer needs the simpler ones to be on."""
    first, second, third = gates.unbind(-1)
    return torch.stack([first, first * second, first * second * third], dim=-1)


def nested(gates: torch.Tensor, gradients: str) -> torch.Tensor:
    """Cumulative products of (..., 3) gates, without the gradients that the mixers below one that is on would give.

    Args:
        gates: of ones and zeros.
        gradients: ``"shared"``: a product below one that is on is a constant, and all gates of a product learn from
            it (the authors' code). ``"topmost"``: the gates below it are constants, in every product; only the most
            complex mixer that is on, and those above it, are in question.
    """
    with torch.no_grad():
        below = (products(gates) > 0.5)[..., 1:]
    below = torch.cat([below, torch.zeros_like(below[..., :1])], dim=-1)  # nothing is over attention
    if gradients == "topmost":
        return products(torch.where(below, gates.detach(), gates))
    together = products(gates)
    return torch.where(below, together.detach(), together)
