"""Rows of the table: one method at one target, kept in a file."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_vitprune import Compensation, count

from ..common import once
from .drawings import Split
from .measures import features, judged, latency
from .methods import methods, scored
from .tower import Decoder, agreement


def check(graph: Path, model: Any, decoder: Decoder) -> float:
    """Largest difference of saliency to the package's own graph, on two images of noise."""
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = agreement(graph, model, decoder, pixels)
    if not found < 1e-3:
        raise ValueError(f"the rebuilt tower is not the package's: maps differ by {found:.1e}")
    return found


def rows(
    model: Any,
    decoder: Decoder,
    split: Split,
    wanted: Sequence[str],
    targets: Sequence[float],
    told: dict[str, Any],
    output: Path,
) -> Iterator[dict[str, Any]]:
    """Results of every method at every target, the dense tower first; files that are there are read.

    Args:
        told: ``part`` and ``draw`` of the split, ``round`` (kept channels), ``source``, and settings of compensation.
    """
    size, images = split.queries.pixels.shape[-1], split.calibration.pixels
    whole = count(model, image_size=size).macs
    given = {key: value for key, value in told.items() if key not in ("part", "draw", "round", "source")}
    known = methods(functools.cache(lambda: scored(model, images)), told["round"], Compensation(images=None, **given))

    @functools.cache
    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        return features(model, split.gallery.pixels), features(model, split.queries.pixels)

    def row(method: str, target: float) -> dict[str, Any]:
        start = time.process_time()
        small = model if method == "dense" else known[method](model, images, target, size)
        seconds = time.process_time() - start
        found = {"method": method, "target": target, "images": len(images), "size": size, **told, "seconds": seconds}
        found |= {"macs": count(small, image_size=size).macs / whole, **judged(small, decoder, split, dense())}
        return {**found, "latency": latency(model, small, split.queries.pixels[:8])}

    for method, target in [("dense", 1.0), *((name, share) for name in wanted for share in targets)]:
        seen = f"{len(images)} images of {size}, {len(split.queries.labels)} queries"
        name = ", ".join([method, str(target), seen, *(f"{key} {value}" for key, value in told.items())])
        path = output / f"{name.replace(' ', '_')}.json"
        yield once(path, functools.partial(row, method, target))
