"""Pruned without training, from several draws of unlabelled images: every method, share, number of images, ridge."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hf_vitprune import Compensation

from .measures import cosines, features
from .methods import methods, scored
from .recovering import Bench

SHARES = (0.75, 0.6, 0.5, 0.35, 0.25)


class Setting(NamedTuple):
    """A method at a share of the MACs, from so many images, with a ridge."""

    method: str
    share: float
    images: int
    ridge: float = Compensation.ridge


def settings() -> Iterator[Setting]:
    """All of them, those that most depends on first; neighbours share their scores."""
    for share in SHARES:
        yield Setting("one-shot", share, 512)
    for method in ("magnitude, compensated", "depth, compensated", "magnitude"):
        for share in SHARES:
            yield Setting(method, share, 512)
    for share in (0.5, 0.35):
        for ridge in (1e-2, 1e-1):
            yield Setting("one-shot", share, 512, ridge)
    for images in (128, 2048, 32):
        for share in (0.5, 0.35):
            yield Setting("one-shot", share, images)
            if images == 128:
                for ridge in (1e-2, 1e-1):
                    yield Setting("one-shot", share, images, ridge)


def draw(bench: Bench, number: int, wanted: Iterator[Setting] | None = None) -> None:
    """Rows of one draw, until the time is over: measures on the asked images, cosines on those held out as well.

    What is chosen is chosen by the latter.
    """
    order = torch.randperm(len(bench.training), generator=torch.Generator().manual_seed(number)).to(bench.device)

    @functools.lru_cache(maxsize=1)
    def scores(images: int) -> Any:
        return scored(bench.model, bench.training[order[:images]])

    held_out = features(bench.model, bench.held_out)
    for one in settings() if wanted is None else wanted:
        if bench.left < 0:
            print(f"draw {number}: stopped before {one}", flush=True)
            return
        clock = time.monotonic()
        known = methods(functools.partial(scores, one.images), bench.round_to, one.ridge)
        images = bench.training[order[: one.images]]
        small = known[one.method](bench.model, images, one.share, bench.size)
        seconds = time.monotonic() - clock
        validation = cosines(held_out, features(small, bench.held_out))
        row = {**one._asdict(), "draw": number, "seconds": seconds, "validation": validation}
        bench.write(f"untrained {one.method} {one.share}", {**row, "end": bench.judge(small)})
