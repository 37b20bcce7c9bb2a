"""The convolutions that a layer may have in place of attention: made of its weights, or with weights of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...errors import InvalidConfigError, UnsupportedModelError
from ...families import LayerPaths
from ...modeling.blocks import read_inputs
from ...modeling.conv_mixer import (
    POSITIONS,
    FoldedConvolution,
    MixerBatchNorm,
    fold_heads,
    mixer_state,
    mixing_probabilities,
)
from ...modeling.structure import conv_mixer
from ...spec.architecture import Architecture
from ...spec.layer_shape import KERNELS
from ...utils.modules import get
from ...utils.sharding import whole
from .gates import mixer_shape

Grid = tuple[int, int]

#: temperature of the mixing table, by family; others as ViT
MIXING_TEMPERATURES = {"swin": 100.0}
MIXING_TEMPERATURE = 0.01


@dataclass
class Attention:
    """The attention that a layer has now: its modules, the name of its output in the family, and the width."""

    module: nn.Module
    v: nn.Linear
    o: nn.Linear
    output_name: str
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel, architecture: Architecture, i: int, paths: LayerPaths) -> Attention:
        """Of layer ``i``."""
        v, o = checked_linear(model, paths.v), checked_linear(model, paths.o)
        return cls(get(model, paths.attention), v, o, architecture.family.o, architecture.width(i))

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


def checked_linear(model: PreTrainedModel, path: str) -> nn.Linear:
    """A Linear whose weights can be multiplied by gates."""
    module = get(model, path)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise UnsupportedModelError(
            f"SPViT makes convolutions of the weights of {path}, a {type(module).__name__}: load the model in "
            "floating point, without quantisation or adapters"
        )
    return module


class SharedBranches(nn.Module):
    """Single path: heads of the attention, mixed by a learned table; a BatchNorm for each branch.

    Attributes:
        table: (heads, 9) parameter, m; ones at the start.
        kernel_norm: the BatchNorms, by kind; transformers gives no weight decay to parameters under such a name.
    """

    def __init__(
        self, architecture: Architecture, i: int, like: torch.Tensor, kinds: Iterable[str] = tuple(KERNELS)
    ) -> None:
        """Of layer ``i``, one of attention; on the device of a weight of it, and as precise, at least float32."""
        super().__init__()
        shape = architecture.layers[i]
        self.temperature = MIXING_TEMPERATURES.get(architecture.family.model_type, MIXING_TEMPERATURE)
        self.table = nn.Parameter(torch.ones(shape.heads, POSITIONS))
        self.kernel_norm = nn.ModuleDict({kind: MixerBatchNorm(shape.v_dim) for kind in kinds})
        self.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def convolve(self, kind: str, patches: torch.Tensor, grid: Grid, attention: Attention) -> torch.Tensor:
        """What ``conv1x1`` or ``conv3x3`` puts out for (B, rows * columns, C), normalised."""
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
        """Parameters that a convolution mixer does not share with the attention."""
        return [self.table, *self.kernel_norm[kind].parameters()]

    def weights(self, kind: str, attention: Attention) -> dict[str, torch.Tensor]:
        """State dict of the ``ConvMixer`` that computes the same in eval mode."""
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


class OwnBranches(nn.Module):
    """Multi-path, the paper's baseline: every candidate has weights of its own, drawn at random; as the above."""

    def __init__(self, architecture: Architecture, i: int, like: torch.Tensor) -> None:
        super().__init__()
        shape, width, name = architecture.layers[i], architecture.width(i), architecture.family.o
        # they see patches only
        self.mixers = nn.ModuleDict({kind: conv_mixer(mixer_shape(shape, kind), width, 0, name) for kind in KERNELS})
        self.to(like.device, like.dtype)

    def convolve(self, kind: str, patches: torch.Tensor, grid: Grid, attention: Attention) -> torch.Tensor:
        return self.mixers[kind](patches, patch_grid=grid)[0]

    def own(self, kind: str) -> list[nn.Parameter]:
        return list(self.mixers[kind].parameters())

    def weights(self, kind: str, attention: Attention) -> dict[str, torch.Tensor]:
        return {name: t.detach().clone() for name, t in self.mixers[kind].state_dict().items()}


Branches = SharedBranches | OwnBranches


def refuse_zero(how: str) -> None:
    """Raises:
    InvalidConfigError: the model is trained under DeepSpeed.
    """
    if how != "fsdp2":
        raise InvalidConfigError(
            "SPViT uses weights outside of their Linears, and other branches on every process, which DeepSpeed does "
            "not follow: use FSDP2 or DDP"
        )
