"""Removed units in the model that trains: switched off in the forward pass, and zero in the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture
from ...surgery.cuts import find_cuts
from ...surgery.gates import UnitMask
from ...surgery.points import EMBEDDING, POINTS, point_name
from ...surgery.transplant import empty_like
from ...utils.sharding import everywhere, is_sharded
from .units import UnitSet


def set_masks(masks: nn.ModuleDict, architecture: Architecture, sets: Sequence[UnitSet], alive: torch.Tensor) -> None:
    """Switch off what is not ``alive`` (units,)."""
    kept = {(one.layer, one.kind): alive[one.places] for one in sets}
    for i, shape in enumerate(architecture.layers):
        heads = kept.get((i, "heads"), torch.ones(shape.heads, dtype=torch.bool))
        for place, size in (("queries", shape.qk_dim), ("attention_out", shape.v_dim)):
            kind = POINTS[place].unit
            channels = kept.get((i, kind), torch.ones(size, dtype=torch.bool))
            channels = channels.repeat(size // len(channels))  # rotary pairs go together
            _set(masks, point_name(i, place), (heads[:, None] & channels[None]).flatten())
        if (i, "mlp") in kept:
            _set(masks, point_name(i, "mlp_hidden"), kept[i, "mlp"])
    if (None, EMBEDDING) in kept:
        _set(masks, EMBEDDING, kept[None, EMBEDDING])


def _set(masks: nn.ModuleDict, name: str, alive: torch.Tensor) -> None:
    if name in masks:
        mask = masks[name]
        assert isinstance(mask, UnitMask)
        mask.set(alive)


class ZeroedWeights:
    """The places of all trained weights that a plan removes.

    With zeros on both sides of a removed unit, every gradient at these places is zero: only what the optimizer
    remembers of earlier steps still moves them.

    Args:
        model: the model that trains.
        plan: what stays of it.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.places: list[tuple[nn.Parameter, int, torch.Tensor]] = []
        parameters = dict(model.named_parameters())
        for cut in find_cuts(model, empty_like(model, plan), plan).values():
            parameter = parameters.get(cut.source)
            if parameter is None or not parameter.requires_grad:
                continue
            for axis, kept in cut.index.items():
                removed = torch.ones(parameter.shape[axis], dtype=torch.bool)
                removed[kept] = False
                if removed.any():
                    self.places.append((parameter, axis, removed.nonzero().squeeze(1).to(parameter.device)))

    @torch.no_grad()
    def apply(self) -> None:
        """Set them to zero."""
        for parameter, axis, removed in self.places:
            if not is_sharded([parameter]):
                parameter.index_fill_(axis, removed, 0.0)
                continue
            kept = torch.ones(parameter.shape[axis], dtype=parameter.dtype, device=removed.device)
            kept[removed] = 0.0
            parameter.mul_(everywhere(kept.view(-1, *[1] * (parameter.ndim - axis - 1)), parameter))
