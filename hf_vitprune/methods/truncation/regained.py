"""How much of a model's features can be had from a layer below: by the best linear map, on images not fitted to."""

from __future__ import annotations

from typing import Any

import torch

from ...compensate.fits import fold
from ...compensate.moments import Moments
from ...errors import InvalidDataError
from ...losses.features import FeatureReader, feature_loss, token_weights
from ...utils.batches import ImageBatches, run_images
from ...utils.modes import evaluating

#: damping of the maps, in units of the mean variance of what they read
RIDGE = 1e-3


@torch.no_grad()
def losses_by_layer(model: Any, images: ImageBatches, batch_size: int, floor: int = 1) -> dict[int, float]:
    """Number of layers that stay -> feature loss ("cosine") that no linear map of their output makes up for.

    The maps are fitted by least squares over the tokens of every second batch, and judged on the others. Of models
    with stages, only depths within the last stage can be compared.

    Args:
        model: a transformers model.
        images: without labels; of two batches at least.
        batch_size: images a forward pass.
        floor: the fewest layers to look at.

    Raises:
        InvalidDataError: there are too few images to fit on some and judge on others.
    """
    batch_size = min(batch_size, max(1, images.images // 2))
    batches = list(ImageBatches(images, batch_size=batch_size))
    if len(batches) < 2:
        raise InvalidDataError("truncation by features fits on some images and judges on others: give two at least")
    end = FeatureReader(model)
    architecture = end.architecture
    total, stages = len(architecture.layers), architecture.stages
    below = [n for n in range(floor, total) if stages[n - 1] == stages[-1]]
    lower = FeatureReader(model, tuple(below))
    width = architecture.width(-1)
    found = dict.fromkeys(below, 0.0)
    with evaluating(model):
        moments = {n: Moments(width, width, next(model.parameters()).device) for n in below}
        for batch in batches[::2]:
            states, last, weights = _states(model, batch, lower, end)
            rows = last.new_ones(last.shape[:2]) if weights is None else weights.expand(last.shape[:2])
            for n in below:
                moments[n].add(states[n].flatten(0, 1), last.flatten(0, 1), rows.flatten())
        maps = {}
        for n in below:
            stats = moments[n].total()
            maps[n] = fold(stats, stats.xx.new_zeros(width, width), RIDGE)
        judged = 0
        for batch in batches[1::2]:
            states, last, weights = _states(model, batch, lower, end)
            judged += len(last)
            for n, (matrix, constant) in maps.items():
                mapped = states[n].to(matrix) @ matrix.T + constant
                found[n] += float(feature_loss(mapped, last.to(matrix), "cosine", weights).sum())
    return {**{n: loss / judged for n, loss in found.items()}, total: 0.0}


def _states(model: Any, batch: Any, lower: FeatureReader, end: FeatureReader) -> tuple[Any, Any, Any]:
    with lower.reading() as states, end.reading() as last:
        run_images(model, batch)
    tokens = last[0]
    return states, tokens, token_weights(end.architecture, tokens.shape[1], tokens.device)
