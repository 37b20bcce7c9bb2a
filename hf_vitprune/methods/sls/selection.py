"""From scores to a number of layers: the walk from the top (arXiv 2407.14330, section 3.3), alone and in training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...errors import InvalidDataError
from ...spec.architecture import Architecture, unwrap
from ...spec.towers import find_tower, tower_module
from ...surgery.composite import layers_needed
from ...utils.batches import ImageBatches
from ..depth import DepthMethod, fewest_layers
from .config import SLSConfig
from .features import check_classes, check_features, extract_features, given_features
from .scoring import MOST_IMAGES, Score, Screened, estimated_score, layer_score, thread_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSelection:
    """How many layers stay, and why.

    Attributes:
        kept_layers: the first so many layers stay.
        scores: layer number from 1 -> silhouette coefficient, of the layers that were looked at, from the top.
        threshold: alpha times the last layer's score; None where that is not positive.
        reason: the decision in words.
        layers: number of layers before.
        estimated: with ``fast``, the layers whose score is not the full t-SNE's.
    """

    kept_layers: int
    scores: dict[int, float]
    threshold: float | None
    reason: str
    layers: int
    estimated: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, scores: dict[int, float], layers: int, alpha: float, floor: int = 1, estimated: Sequence[int] = ()
    ) -> LayerSelection:
        """What follows from the scores of layers from the top down to the first that fails, or to ``floor``."""
        top = scores[layers]
        if not top > 0:
            reason = (
                f"the last layer ({layers}) scores {top:.3f}, which is not positive: its features do not separate "
                "the classes, so that no threshold follows from it, and all layers stay"
            )
            return cls(layers, scores, None, reason, layers, tuple(estimated))
        threshold = alpha * top
        limit = f"{alpha:g} x {top:.3f} = {threshold:.3f}"
        failed = max((number for number, score in scores.items() if score < threshold), default=None)
        if failed is not None:
            kept = failed + 1
            reason = f"layer {failed} scores {scores[failed]:.3f}, under the threshold {limit}: "
        else:
            kept = floor
            reason = f"no layer down to {min(scores)} scores under the threshold {limit}: "
        stay = "all layers stay" if kept == layers else f"layers 1 to {kept} of {layers} stay"
        return cls(kept, scores, threshold, reason + stay, layers, tuple(estimated))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        scores = {str(number): score for number, score in self.scores.items()}
        return {**asdict(self), "scores": scores, "estimated": list(self.estimated)}


def select_layers(
    features_or_model: Any, labels_or_dataset: Any, config: SLSConfig | None = None, part: str | None = None
) -> LayerSelection:
    """Decide how many of the bottom layers to keep for a task (SLS, arXiv 2407.14330).

    The score of a layer is the silhouette coefficient of the true classes in a t-SNE map of its features. From the top
    down, the first layer that scores under ``alpha`` times the last layer's score ends the search, and the layer above
    it becomes the last one. Layers below are not scored.

    Args:
        features_or_model: one (images, channels) tensor or array a layer, bottom to top; or a model that was trained
            on the task (stock, PEFT, or a PruningModel).
        labels_or_dataset: the images' class numbers; or for a model, images with labels in anything that
            ``ImageBatches`` takes: all of them are used, in their order, by one pass in eval mode and float32.
        part: which tower of a bigger model (see :func:`hf_vitprune.towers`), which runs by itself; its only one by
            default.

    Raises:
        InvalidDataError: fewer than two classes, labels that are no classes, features that are not finite or do not
            match.
        UnsupportedModelError: no family is registered for the model.
    """
    config = config or SLSConfig()
    if isinstance(features_or_model, nn.Module):
        total = len(Architecture.of(features_or_model, part).layers)
        tower = tower_module(features_or_model, part)
        needed, _ = layers_needed(unwrap(features_or_model), find_tower(features_or_model, part), total)
        floor = max(needed, fewest_layers(tower, config.stages))
        read, labels = extract_features(tower, labels_or_dataset, config, range(floor, total + 1))
        features = {number: check_features(layer, number, len(labels)) for number, layer in read.items()}
    else:
        features, labels = given_features(features_or_model, labels_or_dataset, config)
        total, floor = max(features), 1
    classes = check_classes(labels)

    def score(number: int) -> float:
        return layer_score(features[number], classes, config)

    if not config.fast or len(classes) > MOST_IMAGES:
        return walk(score, total, config.alpha, floor)

    def estimate(number: int, enough: float) -> float:
        # the last layer's tells whether cheap scores are to be trusted, so its map is finished
        return estimated_score(features[number], classes, config, enough if number < total else None)

    screened = Screened(score, estimate, total, config.alpha, floor, thread_count(config))
    return replace(walk(screened, total, config.alpha, floor), estimated=tuple(screened.estimated))


def walk(score: Score, layers: int, alpha: float, floor: int = 1) -> LayerSelection:
    """Score layers from the top, by their number from 1, and stop at the first that fails or ``floor``."""
    scores: dict[int, float] = {}
    for number in tqdm(range(layers, floor - 1, -1), desc="scoring layers", leave=False, disable=None):
        scores[number] = score(number)
        selection = LayerSelection.of(scores, layers, alpha, floor)
        if selection.threshold is None or scores[number] < selection.threshold:
            break
    if selection.threshold is None:
        logger.warning("SLS: %s", selection.reason)
    return selection


class SLS(DepthMethod):
    """The decision of SLS; scores are in buffers, so that a checkpoint restores them and processes share them."""

    traits = replace(DepthMethod.traits, decides_by="images")
    config: SLSConfig
    estimated: torch.Tensor

    def __init__(self, config: SLSConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model, config.stages)
        self.architecture.check_looks("SLS")
        total, device = len(self.architecture.layers), next(model.parameters()).device
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
