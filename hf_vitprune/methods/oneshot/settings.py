"""How units are scored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...compensate.settings import Compensation
from ...utils.settings import check_counts, check_flags


@dataclass(frozen=True)
class OneShotSettings:
    """How the sizes of every layer are scored, from unlabelled images and without gradients.

    Attributes:
        images: at most this many, evenly spaced over the data; None takes all.
        batch_size: images a forward pass.
        ridge, token_share: as in :class:`Compensation`.
        probe_images: of them, how many run on to the output to see what a smaller branch does there (six sizes a
            layer); fewer in models of more than 12 layers, down to one from 48 on.
        sizes: q/k and v channels of a head are scored at this many sizes, evenly spaced.
        statistics: keep the covariances too, from which :meth:`OneShotScores.compensate` works without images.
    """

    images: int | None = 128
    batch_size: int = 16
    ridge: float = Compensation.ridge
    token_share: float | None = Compensation.token_share
    probe_images: int = 4
    sizes: int = 8
    statistics: bool = True

    def __post_init__(self) -> None:
        Compensation(images=self.images, batch_size=self.batch_size, ridge=self.ridge, token_share=self.token_share)
        check_counts(self, "probe_images", "sizes")
        check_flags(self, "statistics")

    def ranks(self, size: int) -> list[int]:
        """Numbers of channels that are scored, of ``size``; the last is all."""
        step = math.ceil(size / self.sizes)
        return [*range(step, size, step), size]
