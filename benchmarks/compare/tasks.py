"""The data sets: small real or re-rendered images, in memory, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_vitprune.errors import InvalidConfigError

from ..vtab.data import read_digits
from ..vtab.dsprites import LABELS, SIDE, labelled, render, unused_by_vtab, vtab_order
from ..vtab.images import Images
from ..vtab.tasks import TEST, TRAIN, VALIDATION

#: images of dSprites for training and for choosing settings (none is in a split of VTAB-1k), and for the test
SPRITES = {TRAIN: 8000, VALIDATION: 1000, TEST: 2000}


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Images (n, 1, side, side) in [-1, 1] and class numbers (n,), as a Trainer takes them."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = torch.from_numpy(pixels.astype(np.float32))
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Unlabelled(Dataset[dict[str, torch.Tensor]]):
    """The images of a set, without their labels."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.examples.pixels[index]}


@dataclass(frozen=True)
class Task:
    """One data set. ``test`` gives the numbers of a report; whatever is chosen is chosen on ``validation``.

    Attributes:
        image_size: side in pixels; images have one channel.
    """

    name: str
    classes: int
    image_size: int
    train: Examples | Unlabelled
    validation: Examples
    test: Examples

    def unlabelled(self) -> Task:
        """The same with the labels of its training images thrown away."""
        return self if isinstance(self.train, Unlabelled) else replace(self, train=Unlabelled(self.train))


def _digits() -> Task:
    """scikit-learn's digits at twice their 8 x 8 pixels: 800 to train on, 200 to choose by, 797 to test."""
    side = 16

    def examples(images: Images) -> Examples:
        pictures = [np.asarray(images.read(i).convert("L").resize((side, side))) for i in range(len(images))]
        return Examples(np.stack(pictures)[:, None] / 127.5 - 1, images.labels)

    parts = read_digits()
    return Task("digits", 10, side, *(examples(parts[split]) for split in (TRAIN, VALIDATION, TEST)))


def _sprites(name: str) -> Task:
    """A dSprites task of VTAB, with more images to train on than the 1000 of VTAB-1k."""
    others = unused_by_vtab(SPRITES[TRAIN] + SPRITES[VALIDATION])
    tested = vtab_order()[-SPRITES[TEST] :]  # VTAB's test split is the end of the order
    parts = (others[: SPRITES[TRAIN]], others[SPRITES[TRAIN] :], tested)
    examples = (Examples(render(part)[:, None] / 127.5 - 1, labelled(part, name).labels) for part in parts)
    return Task(name, 16, SIDE, *examples)


TASKS: dict[str, Callable[[], Task]] = {"digits": _digits}
TASKS |= {name: (lambda name=name: _sprites(name)) for name in LABELS}


@lru_cache(maxsize=2)
def load_task(name: str) -> Task:
    """The task of this name."""
    if name not in TASKS:
        raise InvalidConfigError(f"tasks are {', '.join(TASKS)}; not {name!r}")
    return TASKS[name]()
