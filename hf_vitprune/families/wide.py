"""Modules that keep the dense width behind a narrowed residual stream: pooling heads and feature pyramids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils.mixing import InPlaceMixin, mix_into


class WideInputMixin(InPlaceMixin):
    """Reads a narrowed stream as a full one: kept channels go back to their places, the removed ones are zero."""

    #: of its inputs, where the channels are
    axis = -1

    def widen(self, width: int, kept: int) -> None:
        self.full_width = width
        index = torch.arange(kept, device="meta")
        self.register_buffer("input_index", index)  # type: ignore[attr-defined]

    def forward(self, hidden_state: Any, *args: Any, **kwargs: Any) -> Any:
        many = isinstance(hidden_state, (tuple, list))
        full = tuple(self._full(one) for one in hidden_state) if many else self._full(hidden_state)
        return super().forward(full, *args, **kwargs)  # type: ignore[misc]

    def _full(self, narrow: torch.Tensor) -> torch.Tensor:
        shape = list(narrow.shape)
        shape[self.axis] = self.full_width
        return narrow.new_zeros(shape).index_copy(self.axis, self.input_index, narrow)  # type: ignore[attr-defined]


class WideMapsMixin(WideInputMixin):
    """The same for maps of features (B, channels, height, width), one or several."""

    axis = 1


def read_wide(module: nn.Module, mixin: type[WideInputMixin], width: int, kept: int) -> None:
    """Let a module of the dense width read a stream of fewer channels, in place."""
    if kept == width:
        return
    known: Any = module
    if isinstance(module, WideInputMixin):  # it was narrowed before
        width = known.full_width
    mix_into(module, mixin)
    known.widen(width, kept)
