"""Removed units in the weights of the model that trains: zero, after every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...plan.plan import PruningPlan
from ...surgery.cuts import find_cuts
from ...surgery.transplant import empty_like
from ...utils.pieces import is_spread, piece_of
from ...utils.sharding import shaped


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
