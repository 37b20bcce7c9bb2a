"""Pruned without training, from several draws of unlabelled images, and from fewer or more of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hf_vitprune import Compensation

from .measures import cosines, features
from .methods import one_shot, scored
from .recovering import Bench


def draw(bench: Bench, number: int, wanted: Sequence[tuple[float, int]]) -> None:
    """Rows of one draw, until the time is over: measures on the asked images, cosines on those held out as well.

    What is chosen is chosen by the latter. ``wanted``: (share of the MACs, images).
    """
    order = torch.randperm(len(bench.training), generator=torch.Generator().manual_seed(number)).to(bench.device)
    held_out = features(bench.model, bench.held_out)
    for share, images in wanted:
        if bench.left < 0:
            print(f"draw {number}: stopped before {share} of the MACs from {images} images", flush=True)
            return
        clock = time.process_time()
        seen = bench.training[order[:images]]
        scores = scored(bench.model, seen)
        small = one_shot(lambda scores=scores: scores, bench.round_to, Compensation(images=None))(
            bench.model, seen, share, bench.size
        )
        seconds = time.process_time() - clock
        row = {"method": "one-shot", "share": share, "images": images, "draw": number, "cpu_seconds": seconds}
        row["validation"] = cosines(held_out, features(small, bench.held_out))
        bench.write(f"untrained one-shot {share}", {**row, "end": bench.judge(small)})


def draws(bench: Bench, steps: int) -> None:
    """Two shares, from three draws."""
    for number in range(3):
        draw(bench, number, [(0.5, 512), (0.35, 512)])


def images(bench: Bench, steps: int) -> None:
    """From fewer images than draws have, and from more."""
    draw(bench, 0, [(0.5, number) for number in (1024, 256, 128, 2048)])
