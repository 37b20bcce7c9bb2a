"""dSprites drawn from its factors: the two VTAB tasks on it, with VTAB's own split, and nothing to download.

A dSprites image is one white shape on black, given by five factors. Shapes are drawn by formula; against published
frames a handful of pixels on the outline differ, so numbers are reported for "dSprites (re-rendered)".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import cached_assets_path

from hf_vitprune.errors import InvalidDataError

from ..common import write_atomically
from .images import Images
from .tasks import TEST, TRAIN, VALIDATION

SIDE = 64
SHAPES = ("square", "ellipse", "heart")
#: values of shape, scale, orientation, x and y; an index counts them like the digits of a number, y fastest
FACTORS = (3, 6, 40, 32, 32)
NAMES = ("shape", "scale", "orientation", "x", "y")
COUNT = 737280
TITLE = "dSprites (re-rendered)"
#: task -> (title, label of an image as a function of its factors, 16 classes)
LABELS = {
    "dsprites_loc": (f"{TITLE} location", lambda factors: factors["x"] // 2),
    "dsprites_ori": (f"{TITLE} orientation", lambda factors: factors["orientation"] * 2 // 5),
}
#: where the splits lie in VTAB's order of all images
_RANGES = {TRAIN: (0, 800), VALIDATION: (589824, 590024), TEST: (663552, COUNT)}
#: sha256 of the order of all images, as little-endian 32-bit integers
_DIGEST = "8a22f07d9467bf1e3b053e27e5e6979ca85172c2f518b5650240d857f727dce6"

#: images drawn at once: a million pixels in double precision, several times over
_AT_ONCE = 256
_SQUARE = 9.6
_ELLIPSE = (12.76, 7.22)
#: outline of the heart's right half: angle in degrees from the horizontal -> distance from the centre
_HEART = {
    **{-90: 9.66, -87.5: 8.58, -85: 8.14, -82.5: 7.80, -80: 7.12, -77.5: 7.13, -75: 6.84, -70: 6.54, -65: 6.25},
    **{-60: 6.11, -55: 5.95, -50: 5.91, -45: 5.97, -40: 5.94, -35: 6.02, -30: 6.17, -25: 6.33, -20: 6.62},
    **{-15: 6.86, -10: 7.27, -5: 7.64, 0: 7.97, 5: 8.75, 10: 9.19, 15: 9.74, 20: 10.18, 25: 10.66, 30: 10.87},
    **{35: 11.13, 40: 11.24, 45: 11.30, 50: 11.20, 55: 11.02, 60: 10.74, 65: 10.34, 70: 9.68, 75: 8.90},
    **{77.5: 8.41, 80: 7.92, 82.5: 7.31, 85: 6.60, 87.5: 6.08, 90: 5.07},
}


def factors_of(indices: np.ndarray) -> dict[str, np.ndarray]:
    """Name of a factor -> its value (counted from 0) in every image."""
    return dict(zip(NAMES, np.unravel_index(indices, FACTORS), strict=True))


# ---------------------------------------------------------------------- drawing
def render(indices: np.ndarray) -> np.ndarray:
    """(n, 64, 64) bytes, 0 or 255, of the images with these numbers. No anti-aliasing: a pixel's centre decides."""
    indices = np.asarray(indices)
    parts = [indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE)]
    return np.concatenate([_render(part) for part in parts])


def _render(indices: np.ndarray) -> np.ndarray:
    factors = {name: value[:, None, None] for name, value in factors_of(indices).items()}
    centre = np.arange(SIDE) + 0.5
    dx = centre[None, None, :] - (16 + 32 * factors["x"] / 31)
    dy = centre[None, :, None] - (16 + 32 * factors["y"] / 31)
    angle = 2 * np.pi * factors["orientation"] / 39
    size = 0.5 + 0.1 * factors["scale"]
    u = (dx * np.cos(angle) - dy * np.sin(angle)) / size
    v = (dx * np.sin(angle) + dy * np.cos(angle)) / size
    inside = np.empty(u.shape, dtype=bool)
    for shape, contains in enumerate((_in_square, _in_ellipse, _in_heart)):
        chosen = factors["shape"][:, 0, 0] == shape
        inside[chosen] = contains(u[chosen], v[chosen])
    return inside.astype(np.uint8) * 255


def _in_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (abs(u) < _SQUARE) & (abs(v) < _SQUARE)


def _in_ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u / _ELLIPSE[0]) ** 2 + (v / _ELLIPSE[1]) ** 2 < 1


def _in_heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Left of the edge of the outline that the ray from the centre through the point crosses."""
    a, b = abs(u), -v
    degrees = np.array(list(_HEART))
    radii = np.array(list(_HEART.values()))
    corner_a, corner_b = radii * np.cos(np.radians(degrees)), radii * np.sin(np.radians(degrees))
    edge = np.searchsorted(degrees, np.degrees(np.arctan2(b, a)), side="right") - 1
    edge = np.clip(edge, 0, len(degrees) - 2)
    start_a, start_b = corner_a[edge], corner_b[edge]
    along_a, along_b = corner_a[edge + 1] - start_a, corner_b[edge + 1] - start_b
    return along_a * (b - start_b) - along_b * (a - start_a) > 0


# ---------------------------------------------------------------------- VTAB's split
@lru_cache(maxsize=1)
def vtab_order() -> np.ndarray:
    """(737280,) numbers of all images in the order that VTAB takes its splits from: by md5 of ``train<number>``.

    It is kept in the assets cache of huggingface_hub, and made again where what is found there is damaged.
    """
    path = Path(cached_assets_path("hf_vitprune", namespace="vtab")) / "dsprites_order.npy"
    if path.is_file():
        try:
            order = np.load(path, allow_pickle=False)
        except (ValueError, EOFError):
            order = np.empty(0)
        if _digest(order) == _DIGEST:
            return order
    order = _computed_order()
    if _digest(order) != _DIGEST:
        raise InvalidDataError("the order of dSprites does not come out as VTAB's (its sha256 differs)")
    write_atomically(path, lambda file: np.save(file, order, allow_pickle=False))
    return order


def _computed_order() -> np.ndarray:
    digests = b"".join(hashlib.md5(b"train%d" % i, usedforsecurity=False).digest() for i in range(COUNT))
    halves = np.frombuffer(digests, dtype=">u8").reshape(COUNT, 2)
    return np.lexsort((halves[:, 1], halves[:, 0])).astype(np.int32)


def _digest(order: np.ndarray) -> str:
    return hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()


def read_dsprites(task: str) -> dict[str, Images]:
    """train800, val200 and test of ``dsprites_loc`` or ``dsprites_ori``; images are drawn when they are read."""
    return {split: labelled(vtab_order()[slice(*ends)], task) for split, ends in _RANGES.items()}


def labelled(indices: np.ndarray, task: str) -> Images:
    """The images with these numbers, labelled for one of the two tasks."""
    _, label = LABELS[task]
    return Images(np.asarray(label(factors_of(indices)), dtype=np.int64), SpriteReader(indices))


def unused_by_vtab(count: int) -> np.ndarray:
    """``count`` images that are in no split of VTAB-1k: for pretraining."""
    start, end = _RANGES[TRAIN][1], _RANGES[VALIDATION][0]
    if count > end - start:
        raise InvalidDataError(f"{count} images are asked for, {end - start} are outside the splits of VTAB-1k")
    return vtab_order()[start : start + count]


@dataclass(frozen=True)
class SpriteReader:
    """Position -> image, drawn."""

    indices: np.ndarray

    def __call__(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(render(self.indices[index : index + 1])[0]).convert("RGB")
