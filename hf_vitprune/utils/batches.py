"""Images in batches, in one fixed order: what methods score with and what compensation is calibrated on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from transformers import default_data_collator

from ..errors import InvalidDataError


class ImageBatches:
    """Batches ``{"pixel_values": (batch, channels, height, width), "labels": (batch,) where there are any}``.

    Every pass gives the same batches in the order of the data, whatever shuffling a loader does.

    Args:
        data: a tensor of images (images, channels, height, width); a map-style dataset or list whose examples are
            mappings with ``pixel_values`` (or pairs of image and label); a DataLoader over one; or ImageBatches.
        batch_size: images a batch.
        limit: use only this many images, evenly spaced over the data (which may be sorted by class); None: all.
        collate_fn: makes a batch of a list of examples; by default the loader's own, or transformers' collator.
        shard: (rank, processes): every ``processes``-th batch only, from the rank's on.

    Raises:
        InvalidDataError: there are no images, or they cannot be read in a fixed order.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 64,
        limit: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if isinstance(data, (ImageBatches, DataLoader)):
            own: Any = data
            data, collate_fn = own.dataset, collate_fn or own.collate_fn
        if isinstance(data, torch.Tensor):
            if data.ndim != 4:
                raise InvalidDataError(
                    f"a tensor of images is (images, channels, height, width), not of shape {tuple(data.shape)}"
                )
            data = TensorDataset(data)
        if (
            isinstance(data, (IterableDataset, str, bytes))
            or not hasattr(data, "__getitem__")
            or not hasattr(data, "__len__")
        ):
            raise InvalidDataError(
                f"images are read several times and in order: pass a tensor, a list or a dataset with a length, not "
                f"{type(data).__name__}"
            )
        if len(data) == 0:
            raise InvalidDataError("there are no images: the data set is empty")
        if limit is not None and limit < 1:
            raise InvalidDataError(f"limit is a number of images of at least 1, not {limit}")
        if limit is not None and limit < len(data):
            data = Subset(data, [i * len(data) // limit for i in range(limit)])
        self.dataset: Any = data
        self.batch_size, self.shard = batch_size, shard
        self.collate_fn = collate_fn or default_data_collator

    @property
    def images(self) -> int:
        """Number of images, over all shards."""
        return len(self.dataset)

    def __len__(self) -> int:
        rank, processes = self.shard
        return len(range(rank * self.batch_size, self.images, processes * self.batch_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rank, processes = self.shard
        for start in range(rank * self.batch_size, self.images, processes * self.batch_size):
            examples = [self.dataset[i] for i in range(start, min(start + self.batch_size, self.images))]
            yield _checked(self.collate_fn([_as_mapping(example) for example in examples]))


@contextlib.contextmanager
def fixed_randomness(seed: int = 0) -> Iterator[None]:
    """The same random numbers every time, for data sets that augment their images; the caller's are left alone."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _as_mapping(example: Any) -> Any:
    if isinstance(example, (tuple, list)):
        image, *label = example
        return {"pixel_values": image, **({"labels": label[0]} if label else {})}
    return example


def _checked(batch: Any) -> dict[str, torch.Tensor]:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("pixel_values"), torch.Tensor):
        given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidDataError(
            f"a batch needs pixel_values of shape (batch, channels, height, width), got {given}. Put the images "
            "through the model's image processor first (hf_vitprune.utils.data.ProcessedImages does)"
        )
    pixels = batch["pixel_values"]
    if pixels.ndim != 4:
        raise InvalidDataError(f"pixel_values are (batch, channels, height, width), got {tuple(pixels.shape)}")
    if not torch.isfinite(pixels).all():
        raise InvalidDataError("there are pixel values that are not finite numbers")
    return {"pixel_values": pixels, **({"labels": batch["labels"]} if batch.get("labels") is not None else {})}
