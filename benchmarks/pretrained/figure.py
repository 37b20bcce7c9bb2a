"""What towers see, side by side: saliency of a few test drawings through the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_vitprune.utils.extras import need

from .drawings import MEAN, STD, Drawings
from .measures import features
from .tower import Decoder


def one_a_class(queries: Drawings, classes: int) -> torch.Tensor:
    """(classes, 3, size, size): the first drawing of each of so many classes, evenly spaced over all."""
    total = int(queries.labels.max()) + 1
    wanted = [total * i // classes for i in range(classes)]
    return torch.stack([queries.pixels[queries.labels == label][0] for label in wanted])


def draw(path: Path, towers: dict[str, Any], decoder: Decoder, pixels: torch.Tensor) -> None:
    """A row of drawings (images, 3, size, size), and a row of maps a tower; ``towers``: title -> tower."""
    need("figures", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (int(pixels.shape[2]), int(pixels.shape[3]))
    with torch.no_grad():
        maps = {name: decoder(features(tower, pixels)[:, 1:], size) for name, tower in towers.items()}
    rows = {"": (pixels * STD + MEAN).clamp(0, 1).permute(0, 2, 3, 1), **maps}
    figure, axes = pyplot.subplots(
        len(rows), len(pixels), figsize=(1.2 * len(pixels), 1.25 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.numpy(), cmap="magma")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
