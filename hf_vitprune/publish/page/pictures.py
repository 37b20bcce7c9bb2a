"""The images that models are compared on: from a folder, or labelled; and small copies of them to be shown."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...utils.data import LabelledImages
from ...utils.images import image_files, open_image, to_rgb

#: longer side of a thumbnail, in pixels: sharp at half of it on a phone's screen
THUMBNAIL = 128


@dataclass(frozen=True)
class Pictures:
    """Images by number, read when they are asked for.

    Attributes:
        read: number -> PIL image in RGB.
        source: where they are from, in words.
        labels: class numbers of the model; None where there are none.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    source: str
    labels: Sequence[int] | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, limit: int, seed: int = 0) -> Pictures:
        """At most ``limit`` images of a folder, drawn at random; errors as ``read_folder``."""
        files = image_files(folder, limit, seed)
        names = [str(path.relative_to(folder)) for path in files]
        return cls(names, lambda i: open_image(files[i]), f"{len(files)} images from {Path(folder).resolve().name}")

    @classmethod
    def from_labelled(cls, images: LabelledImages, limit: int, seed: int = 0) -> Pictures:
        """At most ``limit`` of the evaluation images, drawn at random, with their labels: a model's, where aligned."""
        rows, count = images.evaluation, len(images.evaluation)
        drawn = sorted(random.Random(seed).sample(range(count), min(limit, count)))
        column = rows[images.label_column]
        numbers = range(len(images.label_names)) if images.match is None else images.match.numbers
        labels = [int(numbers[int(column[i])]) for i in drawn]
        return cls(
            [f"image {i}" for i in drawn],
            lambda i: to_rgb(rows[drawn[i]][images.image_column]),
            f"{len(drawn)} of {count} labelled images from {Path(images.source).name}",
            labels,
        )

    def __len__(self) -> int:
        return len(self.names)

    def processed(self, processor: Any) -> _Processed:
        """The images as a model takes them: ``{"pixel_values": (channels, height, width)}`` by number."""
        return _Processed(self, processor)

    def thumbnail(self, index: int) -> str:
        """A small copy as a ``data:`` URL."""
        image = self.read(index)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        written = io.BytesIO()
        image.save(written, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


@dataclass(frozen=True)
class _Processed:
    pictures: Pictures
    processor: Any

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.processor(images=self.pictures.read(index), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels[0]}
