"""Stochastic depth (Huang et al., arXiv 1603.09382) for models whose config has none: ViT, DeiT, CLIP, SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidConfigError
from ..spec.towers import unwrap
from ..utils.hooks import GateHook
from ..utils.modules import get
from .own_layers import own_layers


def attach_drop_path(model: Any, rate: float) -> list[RemovableHandle]:
    """While ``model`` trains, drop a layer's attention or MLP for some images; the others are scaled up.

    The chance grows evenly from 0 in the first layer to ``rate`` in the last (DeiT trains with 0.1). Attach it after
    the gates of a pruning method, and remove it before an export: by the handles that this returns.

    Args:
        model: stock or pruned, or a PruningModel.
        rate: of the last layer, in [0, 1).

    Raises:
        InvalidConfigError: an impossible rate, or the model has a ``drop_path_rate`` in its config.
        UnsupportedModelError: it is a bigger model with towers in it.
    """
    if not 0 <= rate < 1:
        raise InvalidConfigError(f"the rate of drop path lies in [0, 1), not {rate!r}")
    base = unwrap(model)
    if rate and hasattr(base.config, "drop_path_rate"):
        raise InvalidConfigError(
            f"{base.config.model_type} models drop paths themselves: load this one with drop_path_rate={rate}"
        )
    layers = own_layers(base)
    handles: list[RemovableHandle] = []
    for i, (entry, shape) in enumerate(layers):
        chance = rate * i / max(1, len(layers) - 1)
        attention, mlp = (entry.attention, entry.o, shape.mixer != "none"), (entry.mlp, entry.fc2, shape.mlp > 0)
        for module, last, there in (attention, mlp) if chance else ():
            if not there:
                continue
            beside = not last.startswith(f"{module}.")  # as in VideoMAE, whose residual comes in behind it
            handles.append(get(base, last if beside else module).register_forward_hook(_DropPath(chance)))
    return handles


class _DropPath(GateHook):
    """Behind a branch: (B, tokens, C) alone, or first in a tuple."""

    def __init__(self, chance: float) -> None:
        self.chance = chance

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if not module.training:
            return output
        branch, *rest = output if isinstance(output, tuple) else (output,)
        kept = torch.rand((len(branch), 1, 1), device=branch.device) >= self.chance
        branch = branch * kept.to(branch.dtype) / (1 - self.chance)
        return (branch, *rest) if isinstance(output, tuple) else branch
