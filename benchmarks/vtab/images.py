"""Labelled images that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Images:
    """Images with class numbers.

    Attributes:
        labels: (images,) integers from 0.
        read: position -> PIL image. A class with ``__call__`` rather than a closure: data loaders' workers pickle it.
    """

    labels: np.ndarray
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, positions: Sequence[int] | np.ndarray) -> Images:
        """The images at these positions, in their order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Images(self.labels[chosen], _Chosen(self.read, chosen))

    def fixed_subset(self, size: int | None) -> Images:
        """``size`` images, the same at every call, or all where there are no more (or ``size`` is None).

        They are drawn without replacement by numpy's generator of seed 0, and keep their order.
        """
        if size is None or size >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(0).choice(len(self), size, replace=False)))


def joined(first: Images, second: Images) -> Images:
    """One set of images after the other."""
    return Images(np.concatenate([first.labels, second.labels]), _Joined(first, second))


@dataclass(frozen=True)
class _Chosen:
    read: Callable[[int], Any]
    positions: np.ndarray

    def __call__(self, index: int) -> Any:
        return self.read(int(self.positions[index]))


@dataclass(frozen=True)
class _Joined:
    first: Images
    second: Images

    def __call__(self, index: int) -> Any:
        size = len(self.first)
        return self.first.read(index) if index < size else self.second.read(index - size)
