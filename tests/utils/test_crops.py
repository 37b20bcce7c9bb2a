"""Random parts of images: which they are, and that they follow from the seed."""

from __future__ import annotations

import torch

from hf_vitprune.utils.crops import random_crops


def ramps(images: int, side: int = 32) -> torch.Tensor:
    """(images, 2, side, side): place of every pixel from left to right and from top to bottom, in [-1, 1]."""
    places = (2 * torch.arange(side) + 1) / side - 1
    return torch.stack(torch.meshgrid(places, places, indexing="xy")).repeat(images, 1, 1, 1)


def test_parts_lie_in_the_image_and_have_the_share_of_it_that_was_asked_for() -> None:
    pixels = ramps(400)
    found = random_crops(pixels, 0.3, seed=0)
    sides = (found.amax((2, 3)) - found.amin((2, 3))) / (pixels.amax((2, 3)) - pixels.amin((2, 3)))
    area = sides.prod(1)
    assert found.abs().max() <= 1 and 0.28 < float(area.min()) < 0.4 and float(area.max()) > 0.85
    ratio = sides[:, 0] / sides[:, 1]
    assert 0.7 < float(ratio.min()) < 0.85 and 1.2 < float(ratio.max()) < 1.4
    mirrored = found[:, 0, 0, 0] > found[:, 0, 0, -1]
    assert 0.4 < float(mirrored.float().mean()) < 0.6
    centres = found.mean((2, 3))
    assert centres.std(0).min() > 0.1 and centres.mean(0).abs().max() < 0.05


def test_they_follow_from_the_seed_alone() -> None:
    pixels = ramps(4)
    first = random_crops(pixels, 0.3, seed=5)
    torch.rand(3)
    assert torch.equal(random_crops(pixels, 0.3, seed=5), first)
    assert not torch.equal(random_crops(pixels, 0.3, seed=6), first)
