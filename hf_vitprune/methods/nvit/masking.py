"""Removed units in the model that trains: switched off in the forward pass, and zero in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture
from ...surgery.cuts import find_cuts
from ...surgery.gates import UnitMask
from ...surgery.points import EMBEDDING, POINTS, point_name
from ...surgery.transplant import empty_like
from ...utils.pieces import is_spread, piece_of
from ...utils.sharding import shaped
from .groups import GroupedSet


def set_masks(
    masks: nn.ModuleDict, architecture: Architecture, sets: Sequence[GroupedSet], alive: torch.Tensor
) -> None:
    """Switch off what is not ``alive`` (units,)."""
    kept = {(one.layer, one.unit): alive[one.places] for one in sets}
    units = {point_name(i, "mlp_hidden"): kept.get((i, "mlp")) for i in range(len(architecture.layers))}
    units[EMBEDDING] = kept.get((None, EMBEDDING))
    for i, shape in enumerate(architecture.layers):
        heads = kept.get((i, "heads"), torch.ones(shape.heads, dtype=torch.bool))
        for place, size in (("queries", shape.qk_dim), ("attention_out", shape.v_dim)):
            channels = kept.get((i, POINTS[place]), torch.ones(size, dtype=torch.bool))
            channels = channels.repeat(size // len(channels))  # rotary pairs go together
            units[point_name(i, place)] = (heads[:, None] & channels[None]).flatten()
    for name, mask in masks.items():
        there = units.get(name)
        if there is not None:
            assert isinstance(mask, UnitMask)
            mask.set(there)


class ZeroedWeights:
    """The places of all trained weights that a plan removes.

    With zeros on both sides of a removed unit, every gradient at these places is zero: only what the optimizer
    remembers of earlier steps still moves them.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.whole: list[tuple[nn.Parameter, int, torch.Tensor]] = []
        self.pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        parameters = dict(model.named_parameters())
        with shaped(model):
            cuts = find_cuts(model, empty_like(model, plan), plan).values()
            found = [(parameters[cut.source], cut.index) for cut in cuts if cut.source in parameters]
            sizes = [parameter.shape for parameter, _ in found]
        for (parameter, index), shape in zip(found, sizes, strict=True):
            removed = {}
            for axis, kept in index.items():
                gone = torch.ones(shape[axis], dtype=torch.bool)
                gone[kept] = False
                if gone.any():
                    removed[axis] = gone.nonzero().squeeze(1).to(parameter.device)
            if removed and parameter.requires_grad:
                self._add(parameter, shape, removed)

    def _add(self, parameter: Any, shape: torch.Size, removed: dict[int, torch.Tensor]) -> None:
        if not isinstance(parameter, DTensor) and parameter.shape == shape:
            self.whole += [(parameter, axis, places) for axis, places in removed.items()]
        piece = piece_of(parameter) if is_spread([parameter]) else None
        if piece is not None:
            kept = torch.ones(shape, dtype=torch.bool, device=parameter.device)
            for axis, places in removed.items():
                kept.index_fill_(axis, places, False)
            mine = piece.part_of(kept).clone()
            self.pieces += [(values, mine) for values in piece.places]

    @torch.no_grad()
    def apply(self) -> None:
        """Set them to zero."""
        for parameter, axis, places in self.whole:
            parameter.index_fill_(axis, places, 0.0)
        for values, kept in self.pieces:
            values.mul_(kept)
