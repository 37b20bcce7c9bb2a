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
from ...plan.targets import reach_target
from ...spec.architecture import Architecture, unwrap
from ...surgery.gates import DepthGate, attach_depth_gate
from ...utils.batches import ImageBatches, run_images
from ...utils.modes import evaluating
from ..depth import DepthMethod, class_numbers
from .config import TruncationConfig

logger = logging.getLogger(__name__)


class Truncation(DepthMethod):
    """Keeps the first layers; trains without touching anything."""

    config: TruncationConfig

    def __init__(self, config: TruncationConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        total = len(self.architecture.layers)
        if config.by_validation:
            self.traits = replace(self.traits, decides_by="held_out_images")
            self.floor = max(self.floor, config.min_layers)
            if config.min_layers > total:
                raise InvalidConfigError(f"min_layers is {config.min_layers}, and the model has {total} layers")
            if not self.architecture.task.startswith("ForImageClassification"):
                raise InvalidConfigError(
                    f"layers='validation' goes by accuracy, and this model classifies no images "
                    f"({self.architecture.task}): give a number of layers, or a target"
                )

    def keep_at_least(self, layers: int, reader: str) -> None:
        super().keep_at_least(layers, reader)
        self._check_depth()

    def _check_depth(self) -> None:
        """An unreachable target, or a number of layers that cannot be had, says so before any training."""
        config, total = self.config, len(self.architecture.layers)
        if config.by_validation:
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
            InvalidDataError: ``layers="validation"``, and there are no images or they have no labels.
        """
        if self.decided:
            return
        if self.config.by_validation:
            if images is None:
                raise InvalidDataError("truncation by validation needs labelled images that were not trained on")
            self.keep(self._layers_by_validation(unwrap(model), images))
        elif self.config.target is not None:
            self.keep(self._layers_for_target())
        else:
            self.keep(int(self.config.layers))  # type: ignore[arg-type]
        logger.info("truncation: %d of %d layers stay", self.depth.layers, len(self.architecture.layers))

    def report(self) -> dict[str, Any]:
        accuracies = {str(layers): accuracy for layers, accuracy in self.found.items()}
        return {"accuracies": accuracies} if accuracies else {}

    def logs(self) -> dict[str, float]:
        if not self.decided:
            return {}
        accuracies = {f"accuracy_{layers}_layers": accuracy for layers, accuracy in self.found.items()}
        return {"kept_layers": self.depth.layers, **accuracies}

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
