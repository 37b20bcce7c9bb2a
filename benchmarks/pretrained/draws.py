"""Pruned without training, from several draws of unlabelled images: every method, share, number of images, ridge."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from hf_vitprune import Compensation

from .measures import cosines, features
from .methods import methods, scored
from .recovering import Bench

SHARES = (0.75, 0.6, 0.5, 0.35, 0.25)
#: of training a layer after its fits
LOCAL_STEPS = 100


class Setting(NamedTuple):
    """A method at a share of the MACs, from so many images, with settings of compensation."""

    method: str
    share: float
    images: int
    ridge: float = Compensation.ridge
    token_share: float | None = Compensation.token_share
    views: int = 1
    local_steps: int = 0


def settings() -> Iterator[Setting]:
    """Of a draw, those that most depends on first; neighbours share their scores."""
    first = Setting("one-shot", 0.5, 512)
    yield from (first._replace(share=share) for share in (0.5, 0.35))
    for method in ("magnitude, compensated", "magnitude", "depth, compensated"):
        yield first._replace(method=method)
    yield from (first._replace(share=share) for share in (0.75, 0.6, 0.25))
    yield from (first._replace(share=share, views=4, local_steps=LOCAL_STEPS) for share in (0.5, 0.35))
    fits = [(1e-4, 0.3), (1e-2, 0.3), (1e-1, 0.3), (1e-3, 0.1), (1e-3, None)]
    for ridge, token_share in fits:
        yield from (first._replace(share=share, ridge=ridge, token_share=token_share) for share in (0.5, 0.35))


def curve() -> Iterator[Setting]:
    """From fewer images than draws have, and from more."""
    yield from (Setting("one-shot", 0.5, images) for images in (1024, 256, 128, 2048))


def draw(bench: Bench, number: int, wanted: Callable[[], Iterator[Setting]] = settings) -> None:
    """Rows of one draw, until the time is over: measures on the asked images, cosines on those held out as well.

    What is chosen is chosen by the latter.
    """
    order = torch.randperm(len(bench.training), generator=torch.Generator().manual_seed(number)).to(bench.device)

    @functools.lru_cache(maxsize=1)
    def scores(images: int) -> Any:
        return scored(bench.model, bench.training[order[:images]])

    held_out = features(bench.model, bench.held_out)
    for one in wanted():
        if bench.left < 0:
            print(f"draw {number}: stopped before {one}", flush=True)
            return
        clock = time.process_time()
        names = ("ridge", "token_share", "views", "local_steps")
        fits = Compensation(images=None, **{name: getattr(one, name) for name in names})
        known = methods(functools.partial(scores, one.images), bench.round_to, fits)
        images = bench.training[order[: one.images]]
        small = known[one.method](bench.model, images, one.share, bench.size)
        seconds = time.process_time() - clock
        validation = cosines(held_out, features(small, bench.held_out))
        row = {**one._asdict(), "draw": number, "cpu_seconds": seconds, "validation": validation}
        bench.write(f"untrained {one.method} {one.share}", {**row, "end": bench.judge(small)})


def three(bench: Bench) -> None:
    """The first settings, from three draws."""
    for number in range(3):
        draw(bench, number, lambda: itertools.islice(settings(), 2))
