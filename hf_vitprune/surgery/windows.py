"""The whole grid of a layer that attends in windows, for what works on it beside the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Grid = tuple[int, int]
#: (layer, (B, rows * columns, C), grid) -> the same tokens as the layer's attention sees them
Windows = Callable[[Any, torch.Tensor, Grid], torch.Tensor]


class LayerGrid:
    """A hook in front of a layer, which keeps the grid (rows, columns) that it gets; behind its norm, the tokens.

    ``windows``: the family's way to cut a grid.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.layer: Any = None
        self.grid: Grid = (0, 0)
        self.tokens: torch.Tensor | None = None

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.grid = layer, args[1] if len(args) > 1 else kwargs["input_dimensions"]

    def take(self) -> torch.Tensor:
        """(B, rows * columns, C), the normalised tokens before they are cut; once a call."""
        tokens, self.tokens = self.tokens, None
        assert tokens is not None
        return tokens

    def cut(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, rows * columns, C) as the layer's attention sees them."""
        return self.windows(self.layer, tokens, self.grid)

    def attach(self, layer: nn.Module, norm: nn.Module | None = None) -> list[RemovableHandle]:
        """Watch a layer, and its norm where the tokens are asked for; handles of the hooks."""
        handles = [layer.register_forward_pre_hook(self, with_kwargs=True)]
        if norm is not None:
            handles.append(norm.register_forward_hook(self.norm_hook()))
        return handles

    def norm_hook(self) -> NormOutput:
        return NormOutput(self)


class NormOutput:
    """A hook behind the norm of a layer whose grid is watched."""

    def __init__(self, place: LayerGrid) -> None:
        self.place = place

    def __call__(self, norm: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.place.tokens = output
