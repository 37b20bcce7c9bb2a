"""What a backbone's features are worth: against the dense model's, and by the classes of the nearest images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import InvalidDataError
from ..losses.features import FeatureReader
from ..utils.batches import ImageBatches, run_images
from ..utils.modes import evaluating
from .metrics import FeatureCosine, NearestNeighbourAccuracy, NeighbourAgreement


@torch.no_grad()
def image_features(
    model: Any, data: Any, *, part: str | None = None, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, channels) :func:`image_vectors`, and (images) class numbers, None where the data has none.

    Args:
        model: a backbone, or a bigger model with a tower in it.
        data: images, with class numbers where there are any: what ``ImageBatches`` takes.
        part: which tower of a bigger model; its only one by default.
        batch_size: images a forward pass.

    Raises:
        InvalidDataError: the tower gives no tokens, or does not take the images.
    """
    reader = FeatureReader(model, part=part)
    rows: list[torch.Tensor] = []
    labels: list[int] = []
    with evaluating(reader.tower):
        for batch in tqdm(ImageBatches(data, batch_size), "features", leave=False, delay=3):
            with reader.reading() as states:
                run_images(reader.tower, batch)
            rows.append(image_vectors(reader, states[0]).float().cpu())
            labels += batch["labels"].tolist() if "labels" in batch else []
    return torch.cat(rows).numpy(), np.asarray(labels) if labels else None


def image_vectors(reader: FeatureReader, tokens: torch.Tensor) -> torch.Tensor:
    """(images, channels): CLS, or where there is none, the mean over patches.

    Args:
        tokens: (images, tokens, channels) that left the tower, or a map (images, channels, height, width).

    Raises:
        InvalidDataError: they are neither.
    """
    family, config = reader.architecture.family, reader.architecture.config
    registers = getattr(family.sizes_config(config), "num_register_tokens", 0) or 0
    if tokens.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    if tokens.ndim != 3:
        raise InvalidDataError(f"features are (images, tokens, channels), and these are {tuple(tokens.shape)}")
    return tokens[:, 0] if family.extra_tokens_of(config) > registers else tokens[:, registers:].mean(1)


def evaluate_features(
    features: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    dense: np.ndarray | None = None,
    gallery: tuple[np.ndarray, np.ndarray] | None = None,
    k: int = 5,
) -> dict[str, float]:
    """Metrics of features, those that there is something for.

    Args:
        features: (images, channels).
        labels: (images) class numbers: gives ``k_nearest_neighbour_accuracy``.
        dense: the dense model's: gives ``feature_cosine`` (where both are as wide) and ``shared_k_neighbours``.
        gallery: features and labels of the images that are looked up, by this same model; None: of all other images.
        k: number of neighbours.

    Raises:
        InvalidDataError: there are fewer than two images, or features that are no numbers.
    """
    found: dict[str, float] = {}
    if labels is not None:
        others = {} if gallery is None else {"gallery": gallery[0], "gallery_labels": gallery[1]}
        found |= NearestNeighbourAccuracy().compute(predictions=features, references=labels, k=k, **others)
    if dense is not None:
        if dense.shape == features.shape:
            found |= FeatureCosine().compute(predictions=features, references=dense)
        found |= NeighbourAgreement().compute(predictions=features, references=dense, k=k)
    return found
