"""Rows of the table: one method at one target, kept in a file."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_vitprune import Compensation, count

from .drawings import Split
from .measures import features, judged, latency
from .methods import methods, scored
from .tower import Decoder, agreement


def check(graph: Path, model: Any, decoder: Decoder) -> float:
    """Largest difference of saliency to the package's own graph, on two images of noise.

    Raises:
        ValueError: it is more than rounding.
    """
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
    output.mkdir(parents=True, exist_ok=True)
    size, images = split.queries.pixels.shape[-1], split.calibration.pixels
    dense, whole = None, count(model, image_size=size).macs
    given = {key: value for key, value in told.items() if key not in ("part", "draw", "round", "source")}
    settings = Compensation(images=None, **given)
    known = methods(functools.cache(lambda: scored(model, images)), told["round"], settings)
    for method, target in [("dense", 1.0), *((name, share) for name in wanted for share in targets)]:
        seen = f"{len(images)} images of {size}, {len(split.queries.labels)} queries"
        name = ", ".join([method, str(target), seen, *(f"{key} {value}" for key, value in told.items())])
        path = output / f"{name.replace(' ', '_')}.json"
        if not path.exists():
            dense = dense or (features(model, split.gallery.pixels), features(model, split.queries.pixels))
            start = time.process_time()
            small = model if method == "dense" else known[method](model, images, target, size)
            row = {"method": method, "target": target, "images": len(images), "size": size, **told}
            row |= {"macs": count(small, image_size=size).macs / whole, "seconds": time.process_time() - start}
            row |= judged(small, decoder, split, dense)
            row["latency"] = latency(model, small, split.queries.pixels[:8])
            path.write_text(json.dumps(row, indent=1))
        yield json.loads(path.read_text())
