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
    """A method at a share of the MACs, from so many images, with a ridge and a share of the CLS tokens in the fits."""

    method: str
    share: float
    images: int
    ridge: float = Compensation.ridge
    token_share: float | None = Compensation.token_share


def settings() -> Iterator[Setting]:
    """All of them, those that most depends on first; neighbours share their scores."""
    fits = [(1e-2, 0.3), (1e-3, 0.1), (1e-2, 0.1), (1e-1, 0.1), (1e-2, 0.03), (1e-1, 0.3), (1e-3, None)]
    for share in (0.5, 0.35):
        yield Setting("one-shot", share, 512)
        yield from (Setting("one-shot", share, 512, *fit) for fit in fits)
    for images in (2048, 128):
        for share in (0.5, 0.35):
            yield Setting("one-shot", share, images)
            yield from (Setting("one-shot", share, images, *fit) for fit in fits[:4])
    for share in (0.75, 0.6, 0.25):
        yield Setting("one-shot", share, 512)
    for method in ("magnitude, compensated", "depth, compensated", "magnitude"):
        yield from (Setting(method, share, 512) for share in SHARES)
    yield from (Setting("one-shot", share, 32) for share in (0.5, 0.35))


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
        known = methods(functools.partial(scores, one.images), bench.round_to, one.ridge, one.token_share)
        images = bench.training[order[: one.images]]
        small = known[one.method](bench.model, images, one.share, bench.size)
        seconds = time.monotonic() - clock
        validation = cosines(held_out, features(small, bench.held_out))
        row = {**one._asdict(), "draw": number, "seconds": seconds, "validation": validation}
        bench.write(f"untrained {one.method} {one.share}", {**row, "end": bench.judge(small)})
