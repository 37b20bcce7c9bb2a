"""What to score with, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..errors import InvalidDataError
from ..utils.batches import Form, ImageBatches


def batches_of(data: Any, form: Form | None = None) -> Iterator[dict[str, Any]]:
    """One pass over the batches.

    Args:
        data: an iterable of batches: mappings with ``pixel_values`` (batch, channels, height, width) and ``labels``
            where there are any, or pairs of both; a DataLoader (its size of batches, in the order of the data unless
            it streams); or anything that ``ImageBatches`` takes, 64 images a batch.
        form: what the model takes, as in ``ImageBatches``.

    Raises:
        InvalidDataError: there are no images, or they cannot be read.
    """
    streams = isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)
    batched = isinstance(data, (list, tuple)) and len(data) > 0 and _is_batch(data[0], form)
    batches: Iterable[dict[str, Any]]
    if streams or batched or isinstance(data, Iterator):
        batches = _each(data, form)
    elif isinstance(data, ImageBatches) and form in (None, data.form):
        batches = data
    else:
        batches = ImageBatches(data, getattr(data, "batch_size", None) or 64, form=form)
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise InvalidDataError("there are no images to score with")


def _is_batch(item: Any, form: Form | None) -> bool:
    pixels = item.get("pixel_values") if isinstance(item, Mapping) else item[0] if isinstance(item, tuple) else None
    if not isinstance(pixels, torch.Tensor):
        return False
    words = item.get("input_ids") if isinstance(item, Mapping) else None
    if words is not None:  # an example may hold several images
        return torch.as_tensor(words).ndim == 2
    return pixels.ndim >= (4 if form is None else form.axes)


def _each(batches: Iterable[Any], form: Form | None) -> Iterator[dict[str, Any]]:
    seen = 0
    for batch in batches:
        if not isinstance(batch, (Mapping, list, tuple)):
            raise InvalidDataError(f"a batch is a mapping, or a pair of images and labels, not {type(batch).__name__}")
        if not isinstance(batch, Mapping):
            batch = dict(zip(("pixel_values", "labels"), batch, strict=False))
        images = len(batch["pixel_values"]) if "pixel_values" in batch else 1
        checked = ImageBatches(batch, images, form=form, offset=seen)
        seen += checked.images
        yield from checked
