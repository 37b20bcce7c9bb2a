"""Parts of a pruned layer: attention of free sizes, an MLP that reads some channels, and a removed branch."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..families import Family
from ..spec.layer_shape import LayerShape
from ..utils.mixing import InPlaceMixin
from .conv_mixer import GRID


def read_inputs(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The channels a pruned part reads: all, or those of its ``input_index``."""
    index = getattr(module, "input_index", None)
    if index is None:
        return hidden_states
    # on CPUs index_select along the last axis is an order of magnitude slower than gather
    return hidden_states.gather(-1, index.expand(*hidden_states.shape[:-1], -1))


def set_attention_sizes(attention: Any, shape: LayerShape, scaling: float) -> None:
    """Sizes that stock forwards, kernels and other people's code read on an attention."""
    sizes = {"num_attention_heads": shape.heads, "num_heads": shape.heads, "head_dim": shape.v_dim}
    for name, size in {**sizes, "scaling": scaling, "scale": scaling}.items():
        if hasattr(attention, name):
            setattr(attention, name, size)


class PrunedAttentionMixin(InPlaceMixin):
    """Forward for attention whose heads, q/k channels and v channels are free.

    Mixed into a family's own attention class, so that transformers still records its weights. Stock forwards infer
    the number of heads from one ``head_dim`` and silently regroup channels when it no longer holds; here every view
    is explicit. Fused kernels want q, k and v of one width: the narrower side is padded with zeros, which changes
    neither the scores nor (cropped) the context.
    """

    def set_shape(self, shape: LayerShape, scaling: float, family: Family) -> None:
        self.pruned_heads = shape.heads
        self.qk_dim, self.v_dim = shape.qk_dim, shape.v_dim
        self.pruned_scaling = scaling
        self.output_name = family.o
        self.bias_function = family.attention_bias
        set_attention_sizes(self, shape, scaling)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module: Any = self
        kwargs.pop(GRID, None)  # for convolution mixers; some kernels refuse what they do not know
        shape = hidden_states.shape[:-1]
        heads = self.pruned_heads
        inputs = read_inputs(module, hidden_states)
        query = module.q_proj(inputs).view(*shape, heads, self.qk_dim).transpose(1, 2)
        key = module.k_proj(inputs).view(*shape, heads, self.qk_dim).transpose(1, 2)
        value = module.v_proj(inputs).view(*shape, heads, self.v_dim).transpose(1, 2)
        if self.bias_function is not None:
            attention_mask = self.bias_function(module, attention_mask, shape)

        implementation = module.config._attn_implementation
        if implementation != "eager":
            width = max(self.qk_dim, self.v_dim)
            if width > self.qk_dim:
                query, key = F.pad(query, (0, width - self.qk_dim)), F.pad(key, (0, width - self.qk_dim))
            elif width > self.v_dim:
                value = F.pad(value, (0, width - self.v_dim))
        # the eager function of the family's own file, so that its quirks stay
        eager = sys.modules[self.stock_class.__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
        context, weights = attend(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout if module.training else 0.0,
            scaling=self.pruned_scaling,
            **kwargs,
        )
        context = context[..., : self.v_dim].reshape(*shape, heads * self.v_dim)
        return getattr(module, self.output_name)(context), weights


class PrunedMlpMixin(InPlaceMixin):
    """An MLP that reads only the channels of its ``input_index``."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(read_inputs(self, hidden_states))  # type: ignore[misc, arg-type]


class RemovedAttention(nn.Module):
    """Stands where a layer's attention was: contributes nothing, and records no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class RemovedMlp(nn.Module):
    """Stands where a layer's MLP was: contributes nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def layer_norm_over(
    input: torch.Tensor,
    kept: torch.Tensor,
    count: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """LayerNorm whose statistics run over the kept channels only; the removed ones come out as zero.

    Kept channels around their mean, and zeros elsewhere, have mean zero over all channels and ``count / channels`` of
    the variance over the kept ones: the fused kernel then does the rest. Picking channels by index is far slower.

    Args:
        input: (..., channels).
        kept: (channels,) ones and zeros.
        count: number of ones.
        weight, bias: (channels,) or None.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    kept = kept.to(dtype)
    inputs = input.to(dtype) * kept
    centred = torch.addcmul(inputs, inputs.sum(-1, keepdim=True) / count, kept, value=-1)
    share = count / len(kept)
    scale = kept * share**0.5 if weight is None else weight.to(dtype) * kept * share**0.5
    shift = None if bias is None else bias.to(dtype) * kept
    return F.layer_norm(centred, (len(kept),), scale, shift, eps * share)


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the kept channels: a full-size model computes with it what the narrow one computes."""

    kept: torch.Tensor
    kept_count: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        normed = layer_norm_over(input, self.kept, self.kept_count, self.weight, self.bias, self.eps)
        return normed if torch.is_autocast_enabled(input.device.type) else normed.to(input.dtype)


def mask_layer_norm(norm: nn.Module, kept: torch.Tensor) -> None:
    """Turn a LayerNorm, in place, into one over the channels ``kept`` (ascending indices)."""
    if type(norm) not in (nn.LayerNorm, MaskedLayerNorm):
        raise TypeError(f"expected a LayerNorm, got {type(norm).__name__}")
    norm.__class__ = MaskedLayerNorm
    assert isinstance(norm, MaskedLayerNorm)
    norm.kept_count = len(kept)
    zeros = torch.zeros(norm.normalized_shape, device=kept.device)
    norm.register_buffer("kept", zeros.index_fill(0, kept, 1.0), persistent=False)
