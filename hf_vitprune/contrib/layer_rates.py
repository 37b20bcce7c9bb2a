"""Layer-wise learning rates (Bao et al., BEiT, arXiv 2106.08254): early layers learn slower than late ones."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import InvalidConfigError
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture, unwrap


def check_layer_decay(decay: float) -> None:
    """Raises:
    InvalidConfigError: it is no factor in (0, 1].
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1 or math.isnan(decay):
        raise InvalidConfigError(f"layer_decay is a factor in (0, 1] from a layer to the one before it, not {decay!r}")


def depths(model: Any) -> dict[int, int]:
    """Id of every parameter of the model -> its depth: of layer i of L, from 1, it is i.

    What is registered in front of the layers (embeddings) has 0, what lies between two (Swin's patch merging) that of
    the first of them, what comes behind (norm, head) L + 1. Gates of a PruningModel are not among them.
    """
    base = unwrap(model)
    layers = [paths.layer + "." for paths in layer_paths(base, Architecture.of(base))]
    names = {name: id(parameter) for name, parameter in base.named_parameters()}
    depth_of = {name: i for name in names for i, path in enumerate(layers, start=1) if name.startswith(path)}
    inside = [name in depth_of for name in names]
    behind = len(inside) - inside[::-1].index(True)  # the last layer's last one, and one more
    depth, found = 0, {}
    for place, (name, identity) in enumerate(names.items()):
        depth = depth_of.get(name, depth)
        found[identity] = len(layers) + 1 if place >= behind else depth
    return found


def decay_by_layer(optimizer: torch.optim.Optimizer, model: Any, decay: float) -> None:
    """Split the optimizer's groups: at depth i of L the rate is ``decay ** (L + 1 - i)`` of the group's.

    Args:
        optimizer: new, without a scheduler yet.
        model: what it trains; parameters that are not the model's own (gates) keep their rate.
        decay: in (0, 1]; 1 changes nothing.

    Raises:
        InvalidConfigError: an impossible ``decay``.
    """
    check_layer_decay(decay)
    if decay == 1:
        return
    known = depths(model)
    head = max(known.values())
    groups = []
    for group in optimizer.param_groups:
        by_depth: dict[int, list[Any]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(known.get(id(parameter), head), []).append(parameter)
        groups += [
            {**group, "params": parameters, "lr": group["lr"] * decay ** (head - depth)}
            for depth, parameters in sorted(by_depth.items())
        ]
    optimizer.param_groups[:] = groups
