"""Image files: found in folders, read as transformers' pipelines read them, and looked through for damage."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import InvalidDataError
from .extras import need

#: what follows the last pixel in a whole file of these formats, within so many bytes of the end
_ENDS = {"JPEG": (b"\xff\xd9", 32), "PNG": (b"IEND", 12)}


def read_folder(folder: str | Path, processor: Any, limit: int | None = None, seed: int = 0) -> torch.Tensor:
    """Unlabelled images of a folder and below, through an image processor: (images, channels, height, width).

    Args:
        folder: with image files in it, or in sub-folders of any depth, which are read in the order of their paths.
        processor: a transformers image processor.
        limit: this many of them, drawn at random by ``seed``; None or more than there are: all.

    Raises:
        InvalidDataError: there is no such folder, no image in it, or one that cannot be read.
    """
    pixels: list[torch.Tensor] = []
    for path in tqdm(image_files(folder, limit, seed), "reading images", delay=3, leave=False):
        image = open_image(path)
        try:
            pixels.append(processor(images=image, return_tensors="pt")["pixel_values"][0])
        except ValueError as error:
            raise InvalidDataError(
                f"the image processor cannot take {path}: {error}. Mend it or take it out"
            ) from error
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        raise InvalidDataError(
            f"the image processor gives images of {len(sizes)} sizes ({', '.join(map(str, sorted(sizes)[:3]))}): have "
            "it resize and crop them to one"
        )
    return torch.stack(pixels)


def image_files(folder: str | Path, limit: int | None = None, seed: int = 0) -> list[Path]:
    """Paths of the images of a folder, in their order; arguments and errors as :func:`read_folder`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidDataError(f"{folder} is no folder; give a folder with image files")
    if limit is not None and limit < 1:
        raise InvalidDataError(f"limit is a number of images of at least 1, not {limit}")
    files = sorted(walk_images(folder))
    if not files:
        raise InvalidDataError(f"there are no images in {folder} nor below it (.png, .jpg and the like)")
    if limit is not None and limit < len(files):
        files = sorted(random.Random(seed).sample(files, limit))
    return files


def walk_images(folder: Path) -> Iterator[Path]:
    """Image files at any depth, through links too, once each; hidden files (``._a.png`` of macOS) are passed over."""
    need("images", "PIL")
    from PIL import Image

    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    known, seen = known - {".pdf", ".mpg"}, set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and place not in seen)
        if place in seen:  # a link that leads back
            continue
        seen.add(place)
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in known:
                yield Path(here, name)


def open_image(path: Path) -> Any:
    """An image file as :func:`upright` makes it.

    Raises:
        InvalidDataError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return upright(image)
    except reading_errors() as error:
        raise InvalidDataError(f"{path} cannot be read as an image: {error}. Mend it or take it out") from error


def upright(image: Any) -> Any:
    """A PIL image in RGB, turned as its EXIF data says; errors as :func:`to_rgb`."""
    from PIL import ImageOps

    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Any) -> Any:
    """A PIL image in RGB: the first frame, without transparency, and of 16-bit greys the upper half of the bits.

    Raises:
        ValueError: its pixels are 32-bit numbers, of which no one says what is black and what is white.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):  # PIL's own conversion makes every grey above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}) of no stated range; save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def check_images(files: Sequence[Path], source: str) -> None:
    """Look at size, header and end of every file: enough for empty, cut-off and misnamed ones, without decoding all.

    Raises:
        InvalidDataError: some cannot be read; names them, and says why.
    """
    with ThreadPoolExecutor(8) as pool:
        found = tqdm(pool.map(_damage, files), "checking images", len(files), delay=3, leave=False)
        damaged = [(path, why) for path, why in zip(files, found, strict=True) if why is not None]
    if damaged:
        named = "; ".join(f"{path} ({why})" for path, why in damaged[:5])
        raise InvalidDataError(
            f"{len(damaged)} of the {len(files)} images of {source} cannot be read: {named}"
            f"{' and so on' if len(damaged) > 5 else ''}. Mend them or take them out"
        )


def reading_errors() -> tuple[type[Exception], ...]:
    """What PIL raises for files that are no whole images."""
    from PIL import Image, UnidentifiedImageError

    return (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _damage(path: Path) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        if path.stat().st_size == 0:
            return "an empty file"
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                to_rgb(image)
            end, within = _ENDS.get(image.format or "", (b"", 0))
            if not end or end not in _last_bytes(path, within):
                image.load()
    except UnidentifiedImageError:
        return "not an image"
    except reading_errors() as error:
        return " ".join(str(error).split())
    return None


def _last_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()
