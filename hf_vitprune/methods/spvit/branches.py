"""The convolutions that a layer may have in place of attention: made of its weights, or with weights of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...modeling.blocks import read_inputs
from ...modeling.conv_mixer import (
    POSITIONS,
    ConvMixer,
    FoldedConvolution,
    MixerBatchNorm,
    fold_heads,
    mixer_state,
    mixing_probabilities,
)
from ...spec.layer_shape import KERNELS
from ...utils.sharding import whole

Grid = tuple[int, int]


class Attention:
    """The attention that a layer has now: its modules, and what their names are in the family."""

    def __init__(self, module: nn.Module, v: nn.Linear, o: nn.Linear, output_name: str, width: int) -> None:
        self.module, self.v, self.o = module, v, o
        self.output_name, self.width = output_name, width

    def parameters(self) -> list[nn.Parameter]:
        """All of its parameters, the output projection's too where that is a module beside it."""
        return list(nn.ModuleList([self.module, self.o]).parameters())

    def fold(self, table: torch.Tensor, temperature: float, kernel: int) -> FoldedConvolution:
        """The heads as one convolution; differentiable, and in full precision under autocast too.

        Sharded weights are gathered, those of this layer alone: every process has to ask.
        """
        v, o = whole(self.v.weight), whole(self.o.weight)
        bias = None if self.v.bias is None else whole(self.v.bias)
        with torch.autocast(v.device.type, enabled=False):
            shares = mixing_probabilities(table, temperature).to(v.dtype)
            return fold_heads(v, bias, o, shares, kernel)


class Branches(nn.Module, ABC):
    """Both convolutions of one layer."""

    @abstractmethod
    def convolve(self, kind: str, patches: torch.Tensor, grid: Grid, attention: Attention) -> torch.Tensor:
        """What a convolution mixer puts out.

        Args:
            kind: ``conv1x1`` or ``conv3x3``.
            patches: (B, rows * columns, C), normalised.
            grid: (rows, columns).
            attention: of the layer.
        """

    @abstractmethod
    def own(self, kind: str) -> list[nn.Parameter]:
        """Parameters that a convolution mixer does not share with the attention."""

    @abstractmethod
    def weights(self, kind: str, attention: Attention) -> dict[str, torch.Tensor]:
        """State dict of the ``ConvMixer`` that computes the same in eval mode."""


class SharedBranches(Branches):
    """Single path: heads of the attention, mixed by a learned table; a BatchNorm for each branch.

    Attributes:
        table: (heads, 9) parameter, m.
        kernel_norm: the BatchNorms, by kind; transformers gives no weight decay to parameters under such a name.
    """

    def __init__(
        self, heads: int, channels: int, temperature: float, device: torch.device, kinds: Iterable[str] = KERNELS
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.table = nn.Parameter(torch.ones(heads, POSITIONS, device=device))
        self.kernel_norm = nn.ModuleDict({kind: MixerBatchNorm(channels, device=device) for kind in kinds})

    def convolve(self, kind: str, patches: torch.Tensor, grid: Grid, attention: Attention) -> torch.Tensor:
        kernel = KERNELS[kind]
        folded = attention.fold(self.table, self.temperature, kernel)
        inputs = read_inputs(attention.module, patches)
        if kernel == 1:
            hidden = F.linear(inputs, folded.weight.flatten(1), folded.bias).transpose(1, 2).unflatten(2, grid)
        else:  # on CPUs, convolutions of what is not laid out for them take twice as long
            image = inputs.transpose(1, 2).contiguous().unflatten(2, grid)
            hidden = F.conv2d(image, folded.weight, folded.bias, padding=1)
        mixed = F.relu(self.kernel_norm[kind](hidden)).flatten(2).transpose(1, 2)
        bias: Any = attention.o.bias
        return F.linear(mixed, folded.output_weight, bias)

    def own(self, kind: str) -> list[nn.Parameter]:
        return [self.table, *self.kernel_norm[kind].parameters()]

    def weights(self, kind: str, attention: Attention) -> dict[str, torch.Tensor]:
        folded = attention.fold(self.table, self.temperature, KERNELS[kind])
        index = getattr(attention.module, "input_index", None)
        if index is not None:  # the convolution of a small model reads every channel
            shape = list(folded.weight.shape)
            shape[1] = attention.width
            full = folded.weight.new_zeros(shape).index_copy(1, index, folded.weight)
            folded = folded._replace(weight=full)
        bias: Any = attention.o.bias
        bias = folded.output_weight.new_zeros(attention.width) if bias is None else whole(bias)
        return mixer_state(folded, self.kernel_norm[kind].state_dict(), bias, attention.output_name)


class OwnBranches(Branches):
    """Multi-path, the paper's baseline: every candidate has weights of its own, drawn at random."""

    def __init__(self, mixers: dict[str, ConvMixer]) -> None:
        super().__init__()
        self.mixers = nn.ModuleDict(mixers)

    def convolve(self, kind: str, patches: torch.Tensor, grid: Grid, attention: Attention) -> torch.Tensor:
        return self.mixers[kind](patches, patch_grid=grid)[0]

    def own(self, kind: str) -> list[nn.Parameter]:
        return list(self.mixers[kind].parameters())

    def weights(self, kind: str, attention: Attention) -> dict[str, torch.Tensor]:
        return {name: t.detach().clone() for name, t in self.mixers[kind].state_dict().items()}
