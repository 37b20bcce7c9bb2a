"""Random parts of images, cut on the images' own device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def random_crops(pixels: torch.Tensor, smallest: float, seed: int) -> torch.Tensor:
    """Of every image a part, scaled up to the whole again (bilinear); half of them mirrored.

    Args:
        pixels: (images, channels, height, width), floating point.
        smallest: share of the image's area that a part has at least; 1: whole images. Its aspect is at most a third
            longer or flatter than the image's.
        seed: what is drawn follows from it alone, on any device.

    Returns:
        The same shape.
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
