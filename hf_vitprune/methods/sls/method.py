"""SLS as a method: trains without touching anything, then scores the layers on the training images."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import InvalidDataError
from ...utils.batches import ImageBatches
from ..depth import DepthMethod
from .config import SLSConfig
from .selection import LayerSelection, checked_floor, select_layers

logger = logging.getLogger(__name__)


class SLS(DepthMethod):
    """The decision of SLS; scores are in buffers, so that a checkpoint restores them and processes share them."""

    traits = replace(DepthMethod.traits, decides_by="images")
    config: SLSConfig
    estimated: torch.Tensor

    def __init__(self, config: SLSConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model, config.stages)
        self.architecture.check_looks("SLS")
        total, device = len(self.architecture.layers), next(model.parameters()).device
        self.floor = checked_floor(self.floor, total, config)
        self.register_buffer("estimated", torch.zeros(total, dtype=torch.bool, device=device))

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Score the layers of the model on the images, and keep what the scores say. Later calls change nothing."""
        if self.decided:
            return
        if images is None:
            raise InvalidDataError("SLS decides by labelled images, and there are none")
        selection = select_layers(model, images, self.config)
        self.record(selection.scores)
        for number in selection.estimated:
            self.estimated[number - 1] = True
        self.keep(selection.kept_layers)
        logger.info("SLS: %s", selection.reason)

    @property
    def selection(self) -> LayerSelection | None:
        """What was decided, and why; None before."""
        if not self.decided:
            return None
        estimated = (self.estimated.nonzero().squeeze(1) + 1).tolist()
        return LayerSelection.of(self.found, len(self.estimated), self.config.alpha, self.floor, estimated)

    def report(self) -> dict[str, Any]:
        record = {} if self.selection is None else self.selection.to_dict()
        return {name: record[name] for name in ("scores", "threshold", "reason", "estimated") if name in record}

    def logs(self) -> dict[str, float]:
        made = self.selection
        if made is None:
            return {}
        scores = {f"score_layer_{number}": score for number, score in made.scores.items()}
        threshold = {} if made.threshold is None else {"threshold": made.threshold}
        return {"kept_layers": made.kept_layers, **threshold, **scores}
