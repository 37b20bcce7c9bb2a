"""The features that layers are judged by: one vector an image and layer, by one pass over the data."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...errors import InvalidConfigError, InvalidDataError
from ...spec.architecture import Architecture, unwrap
from ...utils.batches import ImageBatches, run_images
from ...utils.examples import processed
from ...utils.modes import evaluating
from ...utils.offload import check_weights
from ..depth import class_numbers
from .config import SLSConfig

logger = logging.getLogger(__name__)


def extract_features(
    model: Any, data: Any, config: SLSConfig | None = None, layers: Sequence[int] | None = None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Features of every layer's raw output (before the final norm), in eval mode and float32, by one pass.

    The feature of an image is its class token, or the mean over its patch tokens; of a Swin layer that ends a stage,
    after the stage's patch merging. The model is given back in the mode that it was in.

    Args:
        model: stock, pruned, PEFT or PruningModel.
        data: images with class labels; anything that ``ImageBatches`` takes.
        config: ``pooling``, ``batch_size`` and ``max_samples`` are read.
        layers: layer numbers from 1; None for all.

    Returns:
        Layer number -> (images, channels) on the CPU; and the (images,) labels. Both in the order of the data, without
        images whose class is negative (-100, for no label).

    Raises:
        InvalidDataError: no labels, labels that are no classes, or features that are not finite.
        InvalidConfigError: ``pooling="cls"`` and the model has no class token.
        UnsupportedModelError: no family is registered for the model.
    """
    config = config or SLSConfig()
    Architecture.of(unwrap(model)).check_looks("SLS")
    check_weights(model, "reading features")
    data = processed(data, model)
    batches = ImageBatches(data, batch_size=config.batch_size, limit=config.max_samples)
    base = _in_float32(unwrap(model))
    architecture = Architecture.of(base)
    pool = pooling_for(architecture, config.pooling)
    chosen = range(1, len(architecture.layers) + 1) if layers is None else layers
    rows: dict[int, list[torch.Tensor]] = {number: [] for number in chosen}
    labels: list[torch.Tensor] = []
    device = next(base.parameters()).device
    with _watching(base, architecture, rows, pool), evaluating(base), torch.autocast(device.type, enabled=False):
        for batch in tqdm(batches, desc="features", leave=False, disable=None):
            labels.append(class_numbers(batch))
            run_images(base, batch)
    classes = torch.cat(labels)
    labelled = classes >= 0
    if labelled.all():
        return {number: torch.cat(parts) for number, parts in rows.items()}, classes
    if not labelled.any():
        raise InvalidDataError(f"all {len(classes)} images have a negative class (such as -100, for no label)")
    logger.warning("%d of %d images have no class and are not looked at", (~labelled).sum(), len(classes))
    return {number: torch.cat(parts)[labelled] for number, parts in rows.items()}, classes[labelled]


def check_labels(labels: Any) -> torch.Tensor:
    """(images,) class numbers.

    Raises:
        InvalidDataError: they are something else: several labels an image, fractions, or images without a class.
    """
    labels = class_numbers({"labels": labels})
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise InvalidDataError(
            f"{unlabelled} of {len(labels)} images have a negative class (such as -100, for no label): leave them out"
        )
    return labels


def check_features(features: Any, number: int, images: int | None = None) -> np.ndarray:
    """(images, channels) numbers of one layer: float64 as it is, everything else in float32.

    Raises:
        InvalidDataError: another shape, or numbers that are not finite.
    """
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
    if images is not None and len(features) != images:
        raise InvalidDataError(f"layer {number} has features of {len(features)} images, and there are {images} labels")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        raise InvalidDataError(
            f"the features of layer {number} are not finite for {bad} of {len(features)} images: the training "
            "diverged, or the images were not normalised"
        )
    return features


class _Pool:
    """A layer's output -> (batch, channels)."""

    def __init__(self, first_patch: int | None) -> None:
        self.first_patch = first_patch

    def __call__(self, output: Any) -> torch.Tensor:
        tokens = output[0] if isinstance(output, tuple) else output  # (batch, tokens, channels)
        pooled = tokens[:, 0] if self.first_patch is None else tokens[:, self.first_patch :].mean(1)
        return pooled.float().cpu()


def pooling_for(architecture: Architecture, pooling: str) -> _Pool:
    """How features of this kind are made of a layer's output.

    Raises:
        InvalidConfigError: ``pooling="cls"`` and the model has no class token.
    """
    special = architecture.family.extra_tokens_of(architecture.config)
    if pooling == "cls" and not special:
        raise InvalidConfigError(
            f"{architecture.model_type} has no class token: leave pooling at 'auto', or set it to 'mean'"
        )
    return _Pool(None if special and pooling != "mean" else special)


@contextlib.contextmanager
def _watching(
    model: nn.Module, architecture: Architecture, rows: dict[int, list[torch.Tensor]], pool: _Pool
) -> Iterator[None]:
    prefix = architecture.family.encoder_path(model)
    names = architecture.family.output_names(len(architecture.layers), architecture.depths)

    def keep(number: int) -> Any:
        return lambda module, args, output: rows[number].append(pool(output))

    handles = [model.get_submodule(prefix + names[n - 1]).register_forward_hook(keep(n)) for n in rows]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_float32(model: Any) -> Any:
    """The model, or a copy in float32 of one in half precision."""
    small = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
    return copy.deepcopy(model).float() if small else model
