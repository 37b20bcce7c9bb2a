"""Reader of the layout that the field distributes: a folder a task, with a list file a split.

``<root>/<task>/train800.txt`` has a line an image, ``images/train800val200/000000.jpg 7``: the path from the task's
folder, white space, the class number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_vitprune.errors import InvalidDataError

from .images import Images
from .tasks import SPLITS, TEST, TRAIN, VALIDATION, Task


@dataclass(frozen=True)
class FileReader:
    """Position -> image, read from a file."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.paths[index]) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            raise InvalidDataError(f"{self.paths[index]} is no image that Pillow can read") from error


def find_folder(root: Path, task: Task) -> Path | None:
    """The task's folder under ``root``, by any of its names, if there is one with list files."""
    folders = (root / name for name in task.names)
    return next((f for f in folders if any((f / f"{split}.txt").is_file() for split in SPLITS)), None)


def read_folder(folder: Path, task: Task) -> dict[str, Images]:
    """All splits of a task; ``train800val200`` only where it has a list of its own.

    Raises:
        InvalidDataError: a list is missing, or as :func:`read_list`.
    """
    missing = [f"{split}.txt" for split in (TRAIN, VALIDATION, TEST) if not (folder / f"{split}.txt").is_file()]
    if missing:
        raise InvalidDataError(f"{folder} has no {', '.join(missing)}: the folder of {task.name} is not complete")
    present = [split for split in SPLITS if (folder / f"{split}.txt").is_file()]
    return {split: read_list(folder / f"{split}.txt", task.classes) for split in present}


def read_list(path: Path, classes: int) -> Images:
    """The images of one list file.

    Args:
        path: the list; images are named from its folder.
        classes: labels lie in 0..classes-1.

    Raises:
        InvalidDataError: a line without a label, a label that is no class, an image that is not there; the message
            has the file and the line.
    """
    paths, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        words = line.rsplit(maxsplit=1)  # the path may hold white space itself
        if len(words) < 2:
            raise InvalidDataError(f"{where}: a path and a class number are expected, not {line.strip()!r}")
        labels.append(_label(words[1], classes, where))
        paths.append(_image_path(path.parent / words[0].strip(), where))
    if not paths:
        raise InvalidDataError(f"{path} lists no images")
    return Images(np.asarray(labels, dtype=np.int64), FileReader(tuple(paths)))


def _label(text: str, classes: int, where: str) -> int:
    try:
        label = int(text)
    except ValueError:
        raise InvalidDataError(f"{where}: {text!r} is no class number; a line is '<path> <number>'") from None
    if not 0 <= label < classes:
        raise InvalidDataError(f"{where}: class {label} is out of range, classes are 0 to {classes - 1}")
    return label


def _image_path(image: Path, where: str) -> Path:
    """The image, also where it was saved as png rather than as the jpg of the list."""
    for candidate in (image, image.with_suffix(".png")):
        if candidate.is_file():
            return candidate
    raise InvalidDataError(f"{where}: there is no image {image}")
