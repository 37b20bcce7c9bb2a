"""Random parts of images, cut on the images' own device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .batches import ImageBatches

#: a view of an image is a part of at least this share of its area
SMALLEST_VIEW = 0.5


def random_crops(pixels: torch.Tensor, smallest: float, seed: int) -> torch.Tensor:
    """Of every image a part, scaled up to the whole again (bilinear); half of them mirrored.

    Args:
        pixels: (images, channels, height, width), floating point; so is the result.
        smallest: share of the image's area that a part has at least; its aspect differs by at most a third.
        seed: what is drawn follows from it alone, on any device.
    """
    images = len(pixels)
    area, stretch, x, y, mirror = torch.rand(5, images, generator=torch.Generator().manual_seed(seed))
    area = smallest + (1 - smallest) * area
    stretch = torch.exp((2 * stretch - 1) * math.log(4 / 3))
    width, height = ((area * factor).sqrt().clamp(max=1) for factor in (stretch, 1 / stretch))
    affine = torch.zeros(images, 2, 3)
    affine[:, 0, 0] = torch.where(mirror < 0.5, -width, width)
    affine[:, 1, 1] = height
    affine[:, 0, 2], affine[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    grid = F.affine_grid(affine.to(pixels), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


class Views:
    """Batches of images, each followed by as many again of random parts of the same images, the same at every pass.

    Args:
        batches: of images; what else is in a batch stays as it is.
        views: of every image, itself included.
    """

    def __init__(self, batches: ImageBatches, views: int) -> None:
        self.batches, self.views = batches, views

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, processes = self.batches.shard
        for i, batch in enumerate(self.batches):
            yield batch
            for view in range(1, self.views):
                seed = (i * processes + rank) * self.views + view
                yield {**batch, "pixel_values": random_crops(batch["pixel_values"], SMALLEST_VIEW, seed)}
