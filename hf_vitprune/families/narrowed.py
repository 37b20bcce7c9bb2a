"""Modules that keep the dense width where the residual stream was narrowed: pooling heads, pyramids, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils.mixing import InPlaceMixin, mix_into


class NarrowedMixin(InPlaceMixin):
    """Knows the dense width, and by the buffer ``input_index`` (kept,) which of its channels the stream has."""

    full_width: int

    def narrow(self, width: int, kept: int) -> None:
        module: Any = self
        module.full_width = width
        module.register_buffer("input_index", torch.arange(kept, device="meta"))


class WideInputMixin(NarrowedMixin):
    """Reads a narrowed stream as a full one: kept channels go back to their places, the removed ones are zero."""

    #: of its inputs, where the channels are
    axis = -1

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


def narrow_module(module: nn.Module, mixin: type[NarrowedMixin], width: int, kept: int) -> None:
    """Let a module of the dense width serve a stream of ``kept`` of ``width`` channels, in place."""
    if kept == width:
        return
    known: Any = module
    if isinstance(module, NarrowedMixin):  # it was narrowed before
        width = known.full_width
    mix_into(module, mixin)
    known.narrow(width, kept)
