"""Convolutions made of the value and output weights of attention heads: SPViT, arXiv 2111.11802, section 3.

The heads share one set of weights with a 3 x 3 and a 1 x 1 bottleneck convolution. A table says how much of every head
goes into each of the nine kernel positions; folding it in gives the real kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

#: columns of the mixing table
POSITIONS = 9
#: column of the kernel's centre: positions run down the columns of the kernel, j = y + 3 x
CENTRE = 4


class FoldedConvolution(NamedTuple):
    """A bottleneck convolution from ``d`` to ``c`` channels (those of one head) and back.

    Attributes:
        weight: (c, d, k, k) of the first convolution.
        bias: (c,) of it, in front of the BatchNorm.
        output_weight: (d, c) of the linear map back; its bias is the attention's own.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    output_weight: torch.Tensor


def mixing_probabilities(table: torch.Tensor, temperature: float) -> torch.Tensor:
    """Share of every head at every kernel position.

    Args:
        table: (heads, 9), learned.
        temperature: tau; small values pick one head a position, large ones mix all alike.

    Returns:
        (heads, 9), columns sum to one.
    """
    return (table / temperature).softmax(0)


def fold_heads(
    v_weight: torch.Tensor,
    v_bias: torch.Tensor | None,
    o_weight: torch.Tensor,
    probabilities: torch.Tensor,
    kernel: int,
) -> FoldedConvolution:
    """Mix the heads into one convolution. Differentiable.

    Args:
        v_weight: (heads * c, d) of the value projection.
        v_bias: (heads * c,) of it, or None.
        o_weight: (d, heads * c) of the output projection.
        probabilities: (heads, 9) from :func:`mixing_probabilities`.
        kernel: 3, or 1 for the centre position alone.
    """
    heads = len(probabilities)
    shares = probabilities if kernel == 3 else probabilities[:, CENTRE : CENTRE + 1]
    width = v_weight.shape[1]
    # (x, y, c, d): the last of two axes made of j = y + 3 x runs fastest
    values = torch.einsum("hj,hcd->jcd", shares, v_weight.view(heads, -1, width))
    weight = values.unflatten(0, (kernel, kernel)).permute(2, 3, 1, 0)
    outputs = torch.einsum("hj,dhc->dc", shares, o_weight.unflatten(1, (heads, -1)))
    if v_bias is None:
        bias = v_weight.new_zeros(weight.shape[0])
    else:
        bias = torch.einsum("hj,hc->c", shares, v_bias.view(heads, -1))
    return FoldedConvolution(weight, bias, outputs)


def mixer_state(
    folded: FoldedConvolution, norm: dict[str, torch.Tensor], o_bias: torch.Tensor, output_name: str
) -> dict[str, torch.Tensor]:
    """State dict of the convolution mixer that computes what the heads, mixed, compute in eval mode.

    The convolution has no bias in front of its BatchNorm: the running mean takes it up.

    Args:
        folded: what :func:`fold_heads` gave.
        norm: state dict of the branch's BatchNorm.
        o_bias: (d,) of the attention's output projection.
        output_name: name of the output projection in the family.
    """
    state = {f"norm.{name}": tensor for name, tensor in norm.items()}
    state["norm.running_mean"] = norm["running_mean"] - folded.bias.to(norm["running_mean"])
    output = {f"{output_name}.weight": folded.output_weight, f"{output_name}.bias": o_bias}
    return {
        name: t.detach().contiguous().clone() for name, t in {"conv.weight": folded.weight, **state, **output}.items()
    }
