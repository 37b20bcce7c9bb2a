"""From images to tensors: as the PEFT literature does it, or as the checkpoint's own image processor does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from .images import Images

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(Protocol):
    """Two steps, so that what a cache holds between them can be small."""

    def load(self, image: Any) -> torch.Tensor:
        """PIL image -> what may be kept."""

    def finish(self, loaded: torch.Tensor) -> torch.Tensor:
        """What was kept -> (3, height, width) floats."""


@dataclass(frozen=True)
class Literature:
    """Resize to a square whatever the shape, bicubic; ImageNet's mean and deviation; no augmentation.

    Attributes:
        size: side in pixels.
    """

    size: int = 224

    def load(self, image: Any) -> torch.Tensor:
        from PIL import Image

        resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def finish(self, loaded: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (loaded / 255 - mean) / std


@dataclass(frozen=True)
class Checkpoint:
    """What the image processor saved with a checkpoint does.

    Attributes:
        processor: of transformers.
    """

    processor: Any

    def load(self, image: Any) -> torch.Tensor:
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def finish(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded


class Examples(torch.utils.data.Dataset):
    """Examples ``{"pixel_values": (3, height, width), "labels": class number}``.

    Args:
        images: to read.
        preprocessing: what makes tensors of them.
        keep: read every image once and keep it in memory.
    """

    def __init__(self, images: Images, preprocessing: Preprocessing, keep: bool = False) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.kept: dict[int, torch.Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {
            "pixel_values": self.preprocessing.finish(self._loaded(index)),
            "labels": int(self.images.labels[index]),
        }

    def _loaded(self, index: int) -> torch.Tensor:
        if self.kept is None:
            return self.preprocessing.load(self.images.read(index))
        if index not in self.kept:
            self.kept[index] = self.preprocessing.load(self.images.read(index))
        return self.kept[index]
