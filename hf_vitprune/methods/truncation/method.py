"""Truncation: the plainest way to remove layers, and the baseline of those that choose by features."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...errors import InvalidConfigError, InvalidDataError
from ...plan.plan import PruningPlan
from ...plan.select import reach_target
from ...spec.architecture import Architecture, unwrap
from ...surgery.gates import DepthGate
from ...surgery.points import attach_depth_gate
from ...utils.batches import ImageBatches, run_images
from ...utils.modes import evaluating
from ..depth import DepthMethod, class_numbers
from .config import TruncationConfig
from .regained import losses_by_layer

logger = logging.getLogger(__name__)


class Truncation(DepthMethod):
    """Keeps the first layers; trains without touching anything."""

    config: TruncationConfig

    def __init__(self, config: TruncationConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        total = len(self.architecture.layers)
        if config.by_features:
            self.architecture.check_looks("truncation by features")
        if config.by_validation or config.by_features:
            self.traits = replace(self.traits, decides_by="held_out_images")
            self.floor = max(self.floor, config.min_layers)
            if config.min_layers > total:
                raise InvalidConfigError(f"min_layers is {config.min_layers}, and the model has {total} layers")
            if config.by_validation and not self.architecture.task.startswith("ForImageClassification"):
                raise InvalidConfigError(
                    f"layers='validation' goes by accuracy, and this model classifies no images "
                    f"({self.architecture.task}): layers='features' goes without labels; or give a number, or a target"
                )

    def keep_at_least(self, layers: int, reader: str) -> None:
        super().keep_at_least(layers, reader)
        self._check_depth()

    def _check_depth(self) -> None:
        """An unreachable target, or a number of layers that cannot be had, says so before any training."""
        config, total = self.config, len(self.architecture.layers)
        if config.by_validation or config.by_features:
            return
        if config.target is not None:
            self._layers_for_target()
        elif not self.floor <= config.layers < total:  # type: ignore[operator]
            raise InvalidConfigError(
                f"layers is {config.layers}; this {self.architecture.model_type} can keep {self.floor} to {total - 1} "
                f"of its {total} layers"
            )

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Fix the number of layers. Later calls change nothing.

        Raises:
            InvalidDataError: ``layers`` is ``"validation"`` or ``"features"``, and there are no images; or, for the
                first of them, no labels.
        """
        if self.decided:
            return
        if self.config.by_features:
            if images is None:
                raise InvalidDataError("truncation by features needs images, without labels, that were not trained on")
            self.keep(self._layers_by_features(unwrap(model), images))
        elif self.config.by_validation:
            if images is None:
                raise InvalidDataError("truncation by validation needs labelled images that were not trained on")
            self.keep(self._layers_by_validation(unwrap(model), images))
        elif self.config.target is not None:
            self.keep(self._layers_for_target())
        else:
            self.keep(int(self.config.layers))  # type: ignore[arg-type]
        logger.info("truncation: %d of %d layers stay", self.depth.layers, len(self.architecture.layers))

    def check_images(self, model: Any, images: ImageBatches) -> None:
        if not self.config.by_features:
            super().check_images(model, images)

    def report(self) -> dict[str, Any]:
        found = {str(layers): number for layers, number in self.found.items()}
        return {"feature_losses" if self.config.by_features else "accuracies": found} if found else {}

    def logs(self) -> dict[str, float]:
        if not self.decided:
            return {}
        what = "feature_loss" if self.config.by_features else "accuracy"
        found = {f"{what}_{layers}_layers": number for layers, number in self.found.items()}
        return {"kept_layers": self.depth.layers, **found}

    undershoot = "A layer is more than was missing: prune units of layers instead, or raise the target"

    def _layers_for_target(self) -> int:
        """As many as the target allows."""
        dense = PruningPlan.dense(self.architecture)
        total, target = len(dense.layers), self.config.target
        assert target is not None
        plan = reach_target(
            lambda removed: dense.keep_layers(range(total - removed)),
            total - self.floor,
            target,
            self.config.meter(self.architecture),
        )
        return len(plan.layers)

    def _layers_by_features(self, model: Any, images: ImageBatches) -> int:
        """As few as leave what the features of the end can be regained from."""
        found = losses_by_layer(model, images, self.config.batch_size, self.floor)
        self.record(found)
        return min(layers for layers, loss in found.items() if loss <= self.config.max_drop)

    def _layers_by_validation(self, model: Any, images: ImageBatches) -> int:
        """As few as the accuracy allows: from the top, until one fewer costs too much."""
        total = len(self.architecture.layers)
        found: dict[int, float] = {}
        for layers in tqdm(range(total, self.floor - 1, -1), desc="validating", leave=False, disable=None):
            found[layers] = self._accuracy(model, images, layers)
            if found[total] - found[layers] > self.config.max_drop + 1e-12:
                break
        self.record(found)
        allowed = [k for k, accuracy in found.items() if found[total] - accuracy <= self.config.max_drop + 1e-12]
        return min(allowed)

    def _accuracy(self, model: Any, images: ImageBatches, layers: int) -> float:
        """Top-1 accuracy with the first layers only, the trained norm and head on top."""
        device = next(model.parameters()).device
        trial = DepthGate(len(self.architecture.layers), device)
        trial.decide(layers)
        batches = ImageBatches(images, batch_size=self.config.batch_size)
        right = counted = 0
        with evaluating(model), _gated(model, self.architecture, trial):
            for batch in batches:
                labels = class_numbers(batch)
                logits = run_images(model, batch).logits
                right += int((logits.argmax(-1).cpu() == labels).sum())
                counted += int((labels >= 0).sum())
        if not counted:
            raise InvalidDataError("no image has a class: truncation by validation goes by accuracy")
        return right / counted


@contextlib.contextmanager
def _gated(model: PreTrainedModel, architecture: Architecture, gate: DepthGate) -> Iterator[None]:
    handles = attach_depth_gate(model, architecture, gate)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
