"""Mixers in the place of attention: convolutions over the patch grid, and the identity."""

from __future__ import annotations

from typing import Any

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
        """Mix tokens.

        Args:
            hidden_states: (B, special tokens + rows * columns, C).
            patch_grid: (rows, columns).

        Raises:
            TokenGridError: no grid is given, or the tokens do not form it.
        """
        special, patches = split_tokens(hidden_states, self.special_tokens, patch_grid)
        assert patch_grid is not None
        patches = patches.transpose(1, 2).contiguous()
        mixed = F.relu(self.norm(self.conv(patches.unflatten(2, patch_grid))))
        output = getattr(self, self.output_name)(mixed.flatten(2).transpose(1, 2))
        return torch.cat([special, output], dim=1) if self.special_tokens else output, None


def split_tokens(
    hidden_states: torch.Tensor, special: int, patch_grid: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(special tokens, patches) of (B, special + rows * columns, C).

    Raises:
        TokenGridError: no grid is given, or the tokens do not form it.
    """
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
    """Hook in front of the encoder. As an argument, unlike as state, the grid stays with its batch in a backward pass.

    Raises:
        TokenGridError: an attention mask is given, and convolutions cannot leave tokens out.
    """
    pixels = kwargs.get("pixel_values", args[0] if args else None)
    if pixels is None:
        return None  # the encoder says so itself
    if kwargs.get("attention_mask") is not None:
        raise TokenGridError("convolution mixers cannot leave tokens out: drop the attention_mask")
    return args, {**kwargs, GRID: patch_grid(encoder.config, tuple(pixels.shape[-2:]))}
