"""The features that layers are judged by: one vector an image and layer, by one pass over the data or as given."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...errors import InvalidDataError
from ...losses.features import FeatureReader
from ...spec.architecture import Architecture, unwrap
from ...utils.batches import ImageBatches, run_images
from ...utils.examples import processed
from ...utils.modes import evaluating
from ...utils.offload import check_weights
from ..depth import class_numbers
from .config import SLSConfig

logger = logging.getLogger(__name__)

#: so many images make t-SNE take minutes a layer
MANY_IMAGES = 10_000


def extract_features(
    model: Any, data: Any, config: SLSConfig | None = None, layers: Sequence[int] | None = None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Features of every layer's raw output (before the final norm), in eval mode and float32, by one pass.

    The feature of an image is its class token, or where the model has none, the mean over its patch tokens; of a Swin
    layer that ends a stage, after the stage's patch merging.

    Args:
        model: stock, pruned, PEFT or PruningModel; given back in the mode that it was in.
        data: images with class labels; anything that ``ImageBatches`` takes.
        layers: layer numbers from 1; None for all.

    Returns:
        Layer number -> (images, channels) on the CPU; and the (images,) labels. Both in the order of the data, without
        images whose class is negative (-100, for no label).

    Raises:
        InvalidDataError: no labels, or labels that are no classes.
        UnsupportedModelError: no family is registered for the model.
    """
    config = config or SLSConfig()
    Architecture.of(unwrap(model)).check_looks("SLS")
    check_weights(model, "reading features")
    batches = ImageBatches(processed(data, model), batch_size=config.batch_size, limit=config.max_samples)
    base = unwrap(model)
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in base.parameters()):
        base = copy.deepcopy(base).float()
    architecture = Architecture.of(base)
    has_class_token = architecture.family.extra_tokens_of(architecture.config) > 0

    def pooled(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, 0] if has_class_token else tokens.mean(1)).float().cpu()

    reader = FeatureReader(base, tuple(layers or range(1, len(architecture.layers) + 1)))
    rows, labels = [], []
    device = next(base.parameters()).device
    with evaluating(base), torch.autocast(device.type, enabled=False):
        for batch in tqdm(batches, desc="features", leave=False, disable=None):
            labels.append(class_numbers(batch))
            with reader.reading(pooled) as states:
                run_images(base, batch)
            rows.append(states)
    classes = torch.cat(labels)
    labelled = classes >= 0
    if not labelled.any():
        raise InvalidDataError(f"all {len(classes)} images have a negative class (such as -100, for no label)")
    if not labelled.all():
        logger.warning("%d of %d images have no class and are not looked at", (~labelled).sum(), len(classes))
    return {n: torch.cat([states[n] for states in rows])[labelled] for n in reader.points}, classes[labelled]


def given_features(features: Any, labels: Any, config: SLSConfig) -> tuple[dict[int, np.ndarray], torch.Tensor]:
    """Layer number -> features, and labels; of evenly spaced images where ``max_samples`` says so."""
    if isinstance(features, (str, dict)) or not hasattr(features, "__len__") or not len(features):
        raise InvalidDataError(
            f"give a model and a data set, or a list of (images, channels) tensors, one a layer from the bottom up, "
            f"and their labels; not {type(features).__name__}"
        )
    labels = class_numbers({"labels": labels})
    unlabelled, images = int((labels < 0).sum()), len(labels)
    if unlabelled:
        raise InvalidDataError(
            f"{unlabelled} of {images} images have a negative class (such as -100, for no label): leave them out"
        )
    layers = {number: check_features(layer, number, images) for number, layer in enumerate(features, 1)}
    limit = min(config.max_samples or images, images)
    chosen = [i * images // limit for i in range(limit)]
    return {number: layer[chosen] for number, layer in layers.items()}, labels[chosen]


def check_features(features: Any, number: int, images: int) -> np.ndarray:
    """(images, channels) numbers of one layer: float64 as it is, everything else in float32."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = (features if features.dtype == torch.float64 else features.float()).numpy()
    features = np.asarray(features)
    if features.dtype != np.float64:
        features = features.astype(np.float32, copy=False)
    if features.ndim != 2 or features.shape[1] < 2:
        raise InvalidDataError(
            f"the features of layer {number} are (images, channels) with at least 2 channels, not of shape "
            f"{features.shape}"
        )
    if len(features) != images:
        raise InvalidDataError(f"layer {number} has features of {len(features)} images, and there are {images} labels")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        raise InvalidDataError(
            f"the features of layer {number} are not finite for {bad} of {len(features)} images: the training "
            "diverged, or the images were not normalised"
        )
    return features


def check_classes(labels: torch.Tensor) -> np.ndarray:
    """(images,) class numbers."""
    classes = labels.unique()
    if len(classes) < 2:
        raise InvalidDataError(
            f"layers are judged by how well classes separate, which takes at least 2 classes: all {len(labels)} "
            f"images are of class {classes.tolist()}"
        )
    if len(labels) > MANY_IMAGES:
        logger.warning("t-SNE of %d images takes minutes a layer; SLSConfig(max_samples=...) uses fewer", len(labels))
    return labels.numpy()
