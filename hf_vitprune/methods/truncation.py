"""Truncation: the first layers stay; a baseline, and the plain way where the number of layers is known."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..compensate.fits import fold
from ..compensate.moments import Moments
from ..errors import InvalidConfigError, InvalidDataError
from ..losses.features import FeatureReader, feature_loss, token_weights
from ..plan.plan import PruningPlan
from ..plan.select import reach_target
from ..spec.architecture import unwrap
from ..surgery.gates import DepthGate
from ..surgery.points import attach_depth_gate
from ..utils.batches import ImageBatches, run_images
from ..utils.modes import evaluating
from ..utils.settings import check_counts, check_number
from .base import PruningConfig
from .depth import DepthMethod, class_numbers

logger = logging.getLogger(__name__)

VALIDATION = "validation"
FEATURES = "features"
#: of the accuracy, and of the cosine of features
MAX_DROPS = {VALIDATION: 0.01, FEATURES: 0.05}
#: damping of the maps between features, in units of the mean variance of what they read
RIDGE = 1e-3


@dataclass
class TruncationConfig(PruningConfig):
    """Keep the first layers: a given number, as many as a cost allows, or as few as accuracy or features allow.

    Attributes:
        layers: how many stay; or ``"validation"``: as few as cost at most ``max_drop`` of the accuracy; or
            ``"features"``, without labels: as few as leave features from which a linear map regains those of all
            layers, but for ``max_drop``. None where ``target`` (fraction of the cost that may remain) is given.
        max_drop: with ``"validation"``: accuracy that may be lost against all layers, in [0, 1], without retraining
            (0.01 by default). With ``"features"``: one minus the mean cosine, CLS counting as much as all patches
            (0.05 by default).
        batch_size: with these two: images a forward pass.
    """

    unused: ClassVar = {"gate_learning_rate": "truncation has no gates"}
    layers: int | str | None = None
    max_drop: float = None  # type: ignore[assignment]  # see MAX_DROPS
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.layers is None) == (self.target is None):
            raise InvalidConfigError(
                "give either layers (how many stay, or 'validation') or target (cost that stays), not "
                + ("both" if self.target is not None else "none")
            )
        if self.layers is not None and not self.by_images and (type(self.layers) is not int or self.layers < 1):
            raise InvalidConfigError(
                f"layers is a whole number of at least 1, 'validation' or 'features', not {self.layers!r}"
            )
        if self.max_drop is None:
            self.max_drop = MAX_DROPS.get(str(self.layers), MAX_DROPS[VALIDATION])
        check_number("max_drop", self.max_drop, highest=1)
        check_counts(self, "batch_size")

    @property
    def by_images(self) -> bool:
        return self.layers in MAX_DROPS

    def to_dict(self) -> dict[str, Any]:
        """Without what says nothing for the way chosen."""
        without = set() if self.by_images else {"max_drop", "batch_size"}
        if self.target is None:
            without |= {"target", "target_metric", "latency_table", "latency_batch_size", "allow_other_device"}
        return {name: value for name, value in super().to_dict().items() if name not in without}


class Truncation(DepthMethod):
    """Keeps the first layers; trains without touching anything."""

    config: TruncationConfig
    undershoot = "A layer is more than was missing: prune units of layers instead, or raise the target"

    def __init__(self, config: TruncationConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        if not config.by_images:
            return
        self.traits = replace(self.traits, decides_by="held_out_images")
        if config.layers == FEATURES:
            self.architecture.check_looks("truncation by features")
        elif not self.architecture.task.startswith("ForImageClassification"):
            raise InvalidConfigError(
                f"layers='validation' goes by accuracy, and this model classifies no images "
                f"({self.architecture.task}): layers='features' goes without labels; or give a number, or a target"
            )

    def keep_at_least(self, layers: int, reader: str) -> None:
        """As the parent's; an unreachable target or number of layers says so before any training."""
        super().keep_at_least(layers, reader)
        config, total = self.config, len(self.architecture.layers)
        if config.target is not None:
            self._layers_for_target(config.target)
        elif isinstance(config.layers, int) and not self.floor <= config.layers < total:
            raise InvalidConfigError(
                f"layers is {config.layers}; this {self.architecture.model_type} can keep {self.floor} to {total - 1} "
                f"of its {total} layers"
            )

    def check_images(self, model: Any, images: ImageBatches) -> None:
        if self.config.layers != FEATURES:
            super().check_images(model, images)

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Fix the number of layers. Later calls change nothing."""
        config = self.config
        if self.decided:
            return
        if config.target is not None:
            self.keep(self._layers_for_target(config.target))
        elif isinstance(config.layers, int):
            self.keep(config.layers)
        elif images is None:
            kind = "labelled images" if config.layers == VALIDATION else "images, without labels,"
            raise InvalidDataError(f"truncation by {config.layers} needs {kind} that were not trained on")
        else:
            drops = self._drops(unwrap(model), images)
            self.keep(min(layers for layers, drop in drops.items() if drop <= config.max_drop + 1e-12))
        logger.info("truncation: %d of %d layers stay", self.depth.layers, len(self.architecture.layers))

    def report(self) -> dict[str, Any]:
        found = {str(layers): number for layers, number in self.found.items()}
        return {"feature_losses" if self.config.layers == FEATURES else "accuracies": found} if found else {}

    def logs(self) -> dict[str, float]:
        if not self.decided:
            return {}
        what = "feature_loss" if self.config.layers == FEATURES else "accuracy"
        found = {f"{what}_{layers}_layers": number for layers, number in self.found.items()}
        return {"kept_layers": self.depth.layers, **found}

    def _layers_for_target(self, target: float) -> int:
        """As many as the target allows."""
        dense = PruningPlan.dense(self.architecture)
        total, meter = len(dense.layers), self.config.meter(self.architecture)

        def without(removed: int) -> PruningPlan:
            return dense.keep_layers(range(total - removed))

        return len(reach_target(without, total - self.floor, target, meter).layers)

    def _drops(self, model: Any, images: ImageBatches) -> dict[int, float]:
        """Number of layers that stay -> what is lost; accuracies from the top, until one fewer costs too much."""
        if self.config.layers == FEATURES:
            losses = losses_by_layer(model, images, self.config.batch_size, self.floor)
            self.record(losses)
            return losses
        total = len(self.architecture.layers)
        found: dict[int, float] = {}
        for layers in tqdm(range(total, self.floor - 1, -1), desc="validating", leave=False, disable=None):
            found[layers] = self._accuracy(model, images, layers)
            if found[total] - found[layers] > self.config.max_drop + 1e-12:
                break
        self.record(found)
        return {layers: found[total] - accuracy for layers, accuracy in found.items()}

    def _accuracy(self, model: Any, images: ImageBatches, layers: int) -> float:
        """Top-1 accuracy with the first layers only, the trained norm and head on top."""
        trial = DepthGate(len(self.architecture.layers), next(model.parameters()).device)
        trial.decide(layers)
        right = counted = 0
        handles = attach_depth_gate(model, self.architecture, trial)
        try:
            with evaluating(model):
                for batch in ImageBatches(images, batch_size=self.config.batch_size):
                    labels = class_numbers(batch)
                    logits = run_images(model, batch).logits
                    right += int((logits.argmax(-1).cpu() == labels).sum())
                    counted += int((labels >= 0).sum())
        finally:
            for handle in handles:
                handle.remove()
        if not counted:
            raise InvalidDataError("no image has a class: truncation by validation goes by accuracy")
        return right / counted


@torch.no_grad()
def losses_by_layer(model: Any, images: ImageBatches, batch_size: int, floor: int = 1) -> dict[int, float]:
    """Number of layers that stay -> feature loss ("cosine") that no linear map of their output makes up for.

    The maps are fitted by least squares over the tokens of every second batch, and judged on the others. Of models
    with stages, only depths within the last stage can be compared.
    """
    batches = list(ImageBatches(images, batch_size=min(batch_size, max(1, images.images // 2))))
    if len(batches) < 2:
        raise InvalidDataError("truncation by features fits on some images and judges on others: give two at least")
    end = FeatureReader(model)
    architecture = end.architecture
    total, stages = len(architecture.layers), architecture.stages
    below = [n for n in range(floor, total) if stages[n - 1] == stages[-1]]
    lower = FeatureReader(model, tuple(below))
    width = architecture.width(-1)

    def states_of(batch: Any) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        with lower.reading() as states, end.reading() as last:
            run_images(model, batch)
        return states, last[0], token_weights(architecture, last[0].shape[1], last[0].device)

    with evaluating(model):
        moments = {n: Moments(width, width, next(model.parameters()).device) for n in below}
        for batch in batches[::2]:
            states, last, weights = states_of(batch)
            rows = last.new_ones(last.shape[:2]) if weights is None else weights.expand(last.shape[:2])
            for n in below:
                moments[n].add(states[n].flatten(0, 1), last.flatten(0, 1), rows.flatten())
        stats = {n: moments[n].total() for n in below}
        maps = {n: fold(one, one.xx.new_zeros(width, width), RIDGE) for n, one in stats.items()}
        found, judged = dict.fromkeys(below, 0.0), 0
        for batch in batches[1::2]:
            states, last, weights = states_of(batch)
            judged += len(last)
            for n, (matrix, constant) in maps.items():
                mapped = states[n].to(matrix) @ matrix.T + constant
                found[n] += float(feature_loss(mapped, last.to(matrix), "cosine", weights).sum())
    return {**{n: loss / judged for n, loss in found.items()}, total: 0.0}
