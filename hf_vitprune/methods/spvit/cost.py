"""The cost of a search as a function of its gates (arXiv 2111.11802): in multiply-adds or parameters.

It is what ``count`` gives, written as a sum over gates: a layer's mixer costs ``g1 c1 + g2 (c3 - c1) + g3 (cm - c3)``
with the costs of its candidates, an MLP its neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...cost.meter import CostMeter
from ...spec.architecture import Architecture
from ...spec.layer_shape import KERNELS, LayerShape
from .gates import LEVELS, MixerGates, NeuronGates, nested, products


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
