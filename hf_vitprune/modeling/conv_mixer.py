"""Mixers in the place of attention: convolutions over the patch grid, and the identity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import TokenGridError
from ..families.base import patch_grid

#: keyword under which models hand the grid of patches (down, across) to their layers
GRID = "patch_grid"


class MixerBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose running statistics see every batch once, under gradient checkpointing too.

    There the forward pass runs a second time, inside the backward pass, on the same batch.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # torch has no public way to ask; its own module tracker does the same
        if self.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            assert self.running_mean is not None and self.running_var is not None
            unused = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(input, *unused, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
        return super().forward(input)


class ConvMixer(nn.Module):
    """A bottleneck of two convolutions over the patch grid: k x k with BatchNorm and ReLU, then 1 x 1.

    Zero padding keeps the grid's size. Special tokens (CLS, distillation, registers; they come first) are not on the
    grid: they come out as they went in, that is normalised. SPViT, arXiv 2111.11802, section 3.
    """

    def __init__(
        self, kernel: int, channels: int, batch_norm: bool, width: int, special_tokens: int, output_name: str
    ) -> None:
        super().__init__()
        self.special_tokens = special_tokens
        self.shape = (kernel, channels, batch_norm)
        self.output_name = output_name
        # a bias in front of BatchNorm would do nothing
        self.conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=not batch_norm)
        self.norm = MixerBatchNorm(channels) if batch_norm else nn.Identity()
        self.add_module(output_name, nn.Linear(channels, width))

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, patch_grid: tuple[int, int] | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Mix (B, special tokens + rows * columns, C), ``patch_grid``: (rows, columns)."""
        special, patches = split_tokens(hidden_states, self.special_tokens, patch_grid)
        assert patch_grid is not None
        patches = patches.transpose(1, 2).contiguous()
        mixed = F.relu(self.norm(self.conv(patches.unflatten(2, patch_grid))))
        output = getattr(self, self.output_name)(mixed.flatten(2).transpose(1, 2))
        return torch.cat([special, output], dim=1) if self.special_tokens else output, None


def split_tokens(
    hidden_states: torch.Tensor, special: int, patch_grid: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(special tokens, patches) of (B, special + rows * columns, C); TokenGridError where these are no grid."""
    if patch_grid is None:
        raise TokenGridError(
            "a convolution mixer was not told the grid of patches; call the model itself (not its forward, "
            "encoder or layers) with pixel_values"
        )
    rows, columns = patch_grid
    if hidden_states.shape[1] != special + rows * columns:
        raise TokenGridError(
            f"a convolution mixer got {hidden_states.shape[1]} tokens, which are not {special} special ones and a "
            f"grid of {rows} x {columns} patches; tokens cannot be added, dropped or merged in such a model"
        )
    return hidden_states[:, :special], hidden_states[:, special:]


class IdentityMixer(nn.Module):
    """Gives back its (normalised) input, for every token: what published SPViT checkpoints have for a skip."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def follow_grid(encoder: nn.Module) -> None:
    """Let an encoder tell its layers the grid of patches of its images, where it has convolution mixers."""
    if any(isinstance(module, ConvMixer) for module in encoder.modules()) and (
        give_grid not in encoder._forward_pre_hooks.values()
    ):
        encoder.register_forward_pre_hook(give_grid, with_kwargs=True)


def give_grid(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook in front of the encoder. An argument, unlike state, stays with its batch in a backward pass."""
    pixels = kwargs.get("pixel_values", args[0] if args else None)
    if pixels is None:
        return None  # the encoder says so itself
    if kwargs.get("attention_mask") is not None:
        raise TokenGridError("convolution mixers cannot leave tokens out: drop the attention_mask")
    return args, {**kwargs, GRID: patch_grid(encoder.config, tuple(pixels.shape[-2:]))}


# ---------------------------------------------------------------------- convolutions made of heads
# SPViT, arXiv 2111.11802, section 3: the heads share their weights with a 3 x 3 and a 1 x 1 bottleneck convolution. A
# table says how much of every head goes into each kernel position; folding it in gives the real kernels.
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
    """(heads, 9), columns sum to one: the share of every head at every kernel position.

    Args:
        table: (heads, 9), learned.
        temperature: tau; small values pick one head a position, large ones mix all alike.
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
        norm: state dict of the branch's BatchNorm.
        o_bias: (d,) of the attention's output projection, which is called ``output_name``.
    """
    state = {f"norm.{name}": tensor for name, tensor in norm.items()}
    state["norm.running_mean"] = norm["running_mean"] - folded.bias.to(norm["running_mean"])
    state |= {f"{output_name}.weight": folded.output_weight, f"{output_name}.bias": o_bias}
    return {name: t.detach().contiguous().clone() for name, t in {"conv.weight": folded.weight, **state}.items()}
