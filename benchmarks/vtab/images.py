"""Labelled images that are read when they are asked for, and tensors made of them.

Preprocessing is as the PEFT literature has it, or as the checkpoint's own image processor does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Images with class numbers.

    Attributes:
        labels: (images,) integers from 0.
        read: position -> PIL image. A class with ``__call__`` rather than a closure: data loaders' workers pickle it.
    """

    labels: np.ndarray
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, positions: Sequence[int] | np.ndarray) -> Images:
        """The images at these positions, in their order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Images(self.labels[chosen], _Chosen(self.read, chosen))

    def fixed_subset(self, size: int | None) -> Images:
        """``size`` images, the same at every call and in their order; all where there are no more, or for None."""
        if size is None or size >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(0).choice(len(self), size, replace=False)))


def joined(first: Images, second: Images) -> Images:
    """One set of images after the other."""
    return Images(np.concatenate([first.labels, second.labels]), _Joined(first, second))


@dataclass(frozen=True)
class _Chosen:
    read: Callable[[int], Any]
    positions: np.ndarray

    def __call__(self, index: int) -> Any:
        return self.read(int(self.positions[index]))


@dataclass(frozen=True)
class _Joined:
    first: Images
    second: Images

    def __call__(self, index: int) -> Any:
        size = len(self.first)
        return self.first.read(index) if index < size else self.second.read(index - size)


# ---------------------------------------------------------------------- tensors
class Preprocessing(Protocol):
    """Two steps, so that what a cache holds between them can be small."""

    def load(self, image: Any) -> torch.Tensor:
        """PIL image -> what may be kept."""

    def finish(self, loaded: torch.Tensor) -> torch.Tensor:
        """What was kept -> (3, height, width) floats."""


@dataclass(frozen=True)
class Literature:
    """Resize to a square of ``size`` pixels whatever the shape, bicubic; ImageNet's mean and deviation."""

    size: int = 224

    def load(self, image: Any) -> torch.Tensor:
        resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def finish(self, loaded: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (loaded / 255 - mean) / std


@dataclass(frozen=True)
class Checkpoint:
    """What the image processor saved with a checkpoint does."""

    processor: Any

    def load(self, image: Any) -> torch.Tensor:
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def finish(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded


class Examples(torch.utils.data.Dataset):
    """Examples ``{"pixel_values": (3, height, width), "labels": class number}``; ``keep``: read every image once."""

    def __init__(self, images: Images, preprocessing: Preprocessing, keep: bool = False) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.kept: dict[int, torch.Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        kept = {} if self.kept is None else self.kept
        if index not in kept:
            kept[index] = self.preprocessing.load(self.images.read(index))
        return {"pixel_values": self.preprocessing.finish(kept[index]), "labels": int(self.images.labels[index])}
