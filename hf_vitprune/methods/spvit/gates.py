"""Binary gates: sampled in training, at their likelier value in evaluation, fixed by a decision; and their cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...cost.meter import CostMeter
from ...plan.select import best, rounded
from ...spec.architecture import Architecture
from ...spec.layer_shape import KERNELS, LayerShape

#: of every gate, of the paper: on with probability 0.82
INITIAL_SCORE = 1.5
#: what gates choose from, by how many of the three nested gates are on
LEVELS = ("none", "conv1x1", "conv3x3", "attention")


class BinaryGates(nn.Module):
    """Gates of 0 and 1, each on with probability ``sigmoid(score)`` until a decision is taken: ``kept``."""

    kept: torch.Tensor
    #: of the relaxation, now
    temperature = 1.0

    def __init__(self, units: int, device: torch.device) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.full((units,), INITIAL_SCORE, dtype=torch.float32, device=device))
        self.register_buffer("kept", torch.ones(units, dtype=torch.bool, device=device))
        self.decided = False

    def probabilities(self) -> torch.Tensor:
        """(units,) chance of every gate to be on."""
        return self.score.sigmoid()

    def sample(self) -> torch.Tensor:
        """(units,) draws of 0 and 1, with the gradients of the logistic relaxation (straight through)."""
        uniform = torch.rand_like(self.score).clamp(1e-6, 1 - 1e-6)
        relaxed = ((self.score + uniform.logit()) / self.temperature).sigmoid()
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

    def __init__(self, device: torch.device) -> None:
        super().__init__(3, device)

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

    def __init__(self, units: int, device: torch.device, round_to: int) -> None:
        super().__init__(units, device)
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


def mixer_shape(shape: LayerShape, kind: str) -> LayerShape:
    """A layer of attention with another mixer; convolutions have the channels of one head."""
    if kind == "attention":
        return shape
    without = replace(shape, mixer=kind, heads=0, qk_dim=0, v_dim=0, attention_in=None)
    return replace(without, conv_channels=shape.v_dim, batch_norm=True) if kind in KERNELS else without


class SearchCost:
    """Cost of what gates choose, as a fraction of the dense model's.

    Attributes:
        total: the dense model's, in the meter's unit.
        lowest: what remains, as a fraction, when nothing mixes tokens and no MLP has a neuron.
    """

    def __init__(
        self,
        architecture: Architecture,
        mixers: Mapping[int, MixerGates],
        neurons: Mapping[int, NeuronGates],
        meter: CostMeter,
        gradients: str,
    ) -> None:
        self.total = meter.total(architecture)
        rest = self.total
        steps: list[list[float]] = []
        lines: list[tuple[float, float]] = []  # of every MLP: a neuron, and what there is beside neurons
        for i, stage in enumerate(architecture.stages):
            shape, width = architecture.layers[i], architecture.width(i)

            def cost(shape: LayerShape, width: int = width, stage: int = stage) -> float:
                return meter.layer(shape, width, stage)

            if i in mixers:
                kinds = [cost(mixer_shape(shape, kind)) for kind in LEVELS]
                steps.append([after - before for before, after in itertools.pairwise(kinds)])
                rest -= kinds[-1] - kinds[0]
            if i in neurons:
                gone = cost(shape) - cost(replace(shape, mlp=0, mlp_in=None))
                slope = cost(replace(shape, mlp=shape.mlp + 1)) - cost(shape)
                lines.append((slope / self.total, (gone - shape.mlp * slope) / self.total))
                rest -= gone
        self.lowest = rest / self.total
        self._gradients = gradients
        self._mixers, self._neurons = list(mixers.values()), list(neurons.values())
        # no tensor: a model moves to its device after this
        self._steps = [[step / self.total for step in row] for row in steps]
        self._lines = lines

    def expected(self) -> torch.Tensor:
        """Cost of the gates at their likelier values, a fraction; gradients are straight through.

        With ``"shared"`` gradients every gate of a product gets its cost's gradient, whatever is on above it.
        """
        cost: Any = self.lowest
        if self._mixers:
            likelier = torch.stack([gates.likelier() for gates in self._mixers])
            on = products(likelier) if self._gradients == "shared" else nested(likelier, self._gradients)
            # double: fractions of 1e-9 are a multiply-add of a large model
            cost = cost + (on * torch.tensor(self._steps, dtype=torch.float64, device=on.device)).sum()
        for gates, (slope, fixed) in zip(self._neurons, self._lines, strict=True):
            neurons = gates.likelier().sum(dtype=torch.float64)
            cost = cost + neurons * slope + (neurons.detach() > 0).double() * fixed
        return cost

    def at(self, levels: Sequence[int], counts: Sequence[int]) -> float:
        """Cost, a fraction, of mixers by their index of ``LEVELS`` and MLPs by their neurons."""
        mixers = sum(sum(row[:level]) for row, level in zip(self._steps, levels, strict=True))
        neurons = sum(n * slope + (n > 0) * fixed for n, (slope, fixed) in zip(counts, self._lines, strict=True))
        return self.lowest + mixers + neurons
