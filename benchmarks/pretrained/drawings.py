"""Some 8,000 drawings in folders by subject: Debian's package openclipart-png, fetched into the cache folder."""

from __future__ import annotations

import random
import subprocess
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

PACKAGE = "openclipart-png"
FOLDER = "usr/share/openclipart/png"
#: a dozen photographs, of nature
PHOTOGRAPHS = "mate-backgrounds", "usr/share/backgrounds/mate/nature"
#: what is asked about: settings are chosen on the first, and what they give is reported on the second
PARTS = ("validation", "test")
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Drawings(NamedTuple):
    """Images (n, 3, size, size), and the number of the folder that each lies in."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def take(self, chosen: torch.Tensor) -> Drawings:
        return Drawings(self.pixels[chosen], self.labels[chosen])


class Split(NamedTuple):
    """Three sets without a common image: to calibrate with (labels unused), to compare with, to be asked about."""

    calibration: Drawings
    gallery: Drawings
    queries: Drawings


def fetch(cache: Path, package: str = PACKAGE, inside: str = FOLDER) -> Path:
    """Folder of the drawings (or of another package's images), fetched by apt where it is not there yet."""
    installed, folder = Path("/") / inside, cache / inside
    if installed.is_dir():
        return installed
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["apt-get", "download", package], cwd=cache, capture_output=True, text=True, check=False)
        packages = sorted(cache.glob(f"{package}_*.deb"))
        if not packages:
            raise FileNotFoundError(f"apt cannot fetch {package}: {done.stderr.strip()[-500:]}")
        subprocess.run(["dpkg", "-x", str(packages[0]), str(cache)], check=True)
    return folder


def split(
    folder: Path,
    size: int,
    calibration: int,
    classes: int,
    each: int,
    part: str = "test",
    draw: int = 0,
    as_bytes: bool = False,
) -> Split:
    """The ``classes`` folders with most drawings give ``each`` images to the gallery, to validation and to test, the
    same ones at every call; the ``draw`` of calibration images is from what is left over of all folders.

    Args:
        part: whose images the queries are, ``validation`` or ``test``.
        as_bytes: images are (n, 3, size, size) of bytes, as :func:`normalised` takes them.
    """
    generator = random.Random(0)
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        if _is_small(path):
            found.setdefault(str(path.parent.relative_to(folder)), []).append(path)
    for paths in found.values():
        generator.shuffle(paths)
    largest = sorted(found, key=lambda name: -len(found[name]))[:classes]
    asked = [[(path, label) for path in found[name][: 3 * each]] for label, name in enumerate(largest)]
    rest = [(path, -1) for name, paths in found.items() for path in paths[3 * each if name in largest else 0 :]]
    random.Random(1 + draw).shuffle(rest)
    if len(rest) < calibration or len(largest) < classes or any(len(group) < 3 * each for group in asked):
        raise ValueError(f"too few drawings in {folder}: ask for fewer classes or images")
    first = each * (1 + PARTS.index(part))
    gallery = [pair for group in asked for pair in group[:each]]
    queries = [pair for group in asked for pair in group[first : first + each]]
    sets = Split(*(_read(pairs, size) for pairs in (rest[:calibration], gallery, queries)))
    return sets if as_bytes else Split(*(Drawings(normalised(one.pixels), one.labels) for one in sets))


def photographs(folder: Path, size: int, count: int, draw: int = 0) -> torch.Tensor:
    """(count, 3, size, size) parts of photographs, squares of a tenth to a half of the largest one, normalised."""
    found, generator = sorted(folder.glob("*.jpg")), random.Random(1 + draw)
    parts = []
    for i in range(count):
        with Image.open(found[i % len(found)]) as image:
            image.draft("RGB", (image.width // 2, image.height // 2))
            whole = image.convert("RGB")
        side = max(1, round(min(whole.size) * generator.uniform(0.1, 0.5) ** 0.5))
        left, top = (generator.randint(0, length - side) for length in whole.size)
        part = whole.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        parts.append(torch.from_numpy(np.asarray(part).transpose(2, 0, 1).copy()))
    return normalised(torch.stack(parts))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes -> what the tower takes, on the same device."""
    return (pixels.float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


def _is_small(path: Path) -> bool:
    """Whether Pillow takes the image: a few of the package have hundreds of millions of pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path):
                return True
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return False


def _read(pairs: list[tuple[Path, int]], size: int) -> Drawings:
    pixels = torch.stack([torch.from_numpy(_square(path, size)) for path, _ in pairs])
    return Drawings(pixels, torch.tensor([label for _, label in pairs]))


def _square(path: Path, size: int) -> np.ndarray:
    """(3, size, size) of bytes: on white, as large as fits."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image.thumbnail((size, size))
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square.convert("RGB")).transpose(2, 0, 1).copy()
