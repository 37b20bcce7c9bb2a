"""Norms over the residual stream, of both kinds, and the same over some of its channels only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UnsupportedUnitError
from ..utils.mixing import InPlaceMixin, mix_into, stock_type

#: names under which RMSNorms keep the number that is added to the mean square
_EPSILONS = ("eps", "variance_epsilon")


def norm_kind(module: nn.Module) -> str | None:
    """``"layer"`` for a LayerNorm, ``"rms"`` for torch's RMSNorm or one of transformers'; None for all else."""
    if stock_type(module) is nn.LayerNorm:
        return "layer"
    if isinstance(module, nn.RMSNorm) or (
        stock_type(module).__name__.endswith("RMSNorm")
        and set(module._parameters) == {"weight"}
        and any(hasattr(module, name) for name in _EPSILONS)
    ):
        return "rms"
    return None


def norm_width(module: Any) -> int | None:
    """Channels that a norm runs over; None for what is no norm."""
    if norm_kind(module) is None:
        return None
    weight = module._parameters.get("weight")
    return module.normalized_shape[-1] if weight is None else len(weight)


def norm_over(norm: Any, input: torch.Tensor, kept: torch.Tensor, count: int) -> torch.Tensor:
    """What a norm gives whose statistics run over the kept channels only; the removed ones come out as zero.

    Kept channels around their mean, and zeros elsewhere, have mean zero over all channels and ``count / channels`` of
    the variance over the kept ones: the fused kernel then does the rest. Picking channels by index is far slower.

    Args:
        norm: LayerNorm or RMSNorm over all channels.
        input: (..., channels).
        kept: (channels,) ones and zeros.
        count: number of ones.

    Returns:
        (..., channels), in float32 or wider.

    Raises:
        UnsupportedUnitError: it is a norm of another kind.
    """
    kind = norm_kind(norm)
    if kind is None:
        raise _unknown(norm)
    dtype = torch.promote_types(input.dtype, torch.float32)
    kept = kept.to(dtype)
    share = count / len(kept)
    scale = kept * share**0.5 if norm.weight is None else norm.weight.to(dtype) * kept * share**0.5
    inputs = input.to(dtype) * kept
    if kind == "rms":
        return F.rms_norm(inputs, (len(kept),), scale, _epsilon(norm, input.dtype) * share)
    centred = torch.addcmul(inputs, inputs.sum(-1, keepdim=True) / count, kept, value=-1)
    shift = None if norm.bias is None else norm.bias.to(dtype) * kept
    return F.layer_norm(centred, (len(kept),), scale, shift, norm.eps * share)


def _unknown(norm: nn.Module) -> UnsupportedUnitError:
    return UnsupportedUnitError(
        f"the residual stream passes a {type(norm).__name__}, whose statistics over some channels are not known: "
        "leave the unit 'embedding' out (units=...)"
    )


def _epsilon(norm: nn.Module, dtype: torch.dtype) -> float:
    values = [getattr(norm, name) for name in _EPSILONS if getattr(norm, name, None) is not None]
    return values[0] if values else torch.finfo(dtype).eps  # torch's default


class MaskedNormMixin(InPlaceMixin):
    """A norm over the kept channels: a full-size model computes with it what the narrow one computes."""

    kept: torch.Tensor
    kept_count: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        normed = norm_over(self, input, self.kept, self.kept_count)
        return normed if torch.is_autocast_enabled(input.device.type) else normed.to(input.dtype)


def mask_norm(norm: nn.Module, kept: torch.Tensor) -> None:
    """Turn a norm, in place, into one over the channels ``kept`` (ascending indices).

    Raises:
        UnsupportedUnitError: it is a norm of a kind that is not known.
    """
    if norm_kind(norm) is None:
        raise _unknown(norm)
    zeros = torch.zeros(norm_width(norm) or 0, device=kept.device)
    mix_into(norm, MaskedNormMixin)
    masked: Any = norm
    masked.kept_count = len(kept)
    norm.register_buffer("kept", zeros.index_fill(0, kept, 1.0), persistent=False)
