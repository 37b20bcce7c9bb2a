"""What is recovered, in which order: lists of jobs for one process each, most wanted first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel

from hf_vitprune.training.recovery import Recovery

from .draws import draws, images
from .recovering import Bench

SHARES = (0.75, 0.6, 0.5, 0.35, 0.25)
#: about what two CPU cores do in half an hour, at 140 x 140 in float32
SHORT_STEPS = 400
#: of a layer, what half an hour leaves to the fits from all drawings
LOCAL_STEPS = 1200
#: smallest share of an image that is trained on
CROPS = 0.35


def latency(bench: Bench, steps: int) -> None:
    """Every share untrained, and the time it takes: alone on the device."""
    for share in SHARES:
        bench.write(f"one-shot {share}", {"start": bench.judge(bench.one_shot(share))})
    bench.write("magnitude 0.5", {"start": bench.judge(bench.magnitude(0.5))})
    dtype = torch.bfloat16 if torch.device(bench.device).type == "cuda" else torch.float32
    bench.latency(list(SHARES), (1, 8, 64), dtype)


def short(bench: Bench, steps: int) -> None:
    """The recipe of a short training: rate, parts of images, loss of the compensated and of the plain start."""
    half, third = partial(bench.one_shot, 0.5), partial(bench.one_shot, 0.35)
    plain = partial(bench.magnitude, 0.5)
    settings = Recovery(steps=min(steps, SHORT_STEPS), batch_size=32, crops=CROPS, warmup=0.1)
    each = bench.step_time(half, settings)
    print(f"short: {each:.4f} s a step", flush=True)

    def tried(name: str, start: Callable, rates: tuple[float, ...], crops: float | None = CROPS) -> float:
        """The rate with the smallest loss of held-out images."""
        found = {}
        for rate in rates:
            what = f"short {name}, rate {rate:g}, crops {crops}"
            done = bench.train(what, start, replace(settings, learning_rate=rate, crops=crops), each)
            if done is not None:
                found[rate] = done.losses[done.best]
        return min(found, key=lambda rate: found[rate]) if found else rates[0]

    best = tried("one-shot 0.5", half, (3e-5, 1e-4, 3e-4))
    tried("one-shot 0.5", half, (best,), crops=None)
    tried("one-shot 0.35", third, (best, 2 * best))
    tried("magnitude 0.5", plain, (1e-4, 3e-4))
    tried("one-shot 0.5", half, (1e-5, 2 * best))


def refit(
    bench: Bench, steps: int, views: int = 1, shares: tuple[float, ...] = (0.5, 0.35), most: int = SHORT_STEPS
) -> None:
    """Half an hour of two cores: compensated from all drawings, layers trained after their fits; towers are kept."""
    for share in shares:
        if bench.left < 0:
            print(f"refitted {share}: skipped, the time is over", flush=True)
            continue
        clock = time.process_time()
        local = min(steps, most)
        small = bench.refitted(share, views=views, local_steps=local)
        row = {"views": views, "local_steps": local, "cpu_seconds": time.process_time() - clock}
        bench.write(f"refitted {share}", {**row, "end": bench.judge(small)})
        small.save_pretrained(_kept(bench, share))


def trained(bench: Bench, steps: int) -> None:
    """What ``refit`` has kept, trained as a whole."""
    for share in (0.5, 0.35):
        if not _kept(bench, share).is_dir():
            print(f"refitted {share}: not there, refit writes it", flush=True)
            continue
        start = partial(AutoModel.from_pretrained, _kept(bench, share))
        settings = Recovery(steps=min(steps, SHORT_STEPS), batch_size=32, checks=4)
        bench.train(f"refitted {share}, then trained", start, settings, seconds_a_step=0)


def _kept(bench: Bench, share: float) -> Path:
    return bench.output.parent / f"refitted-{share}"


def _long(bench: Bench, steps: int, wanted: list[tuple[str, Callable, float]]) -> None:
    """Thousands of steps; the first is shortened where time is too short, the others are left out then."""
    bf16 = torch.device(bench.device).type == "cuda"
    settings = Recovery(steps=steps, batch_size=32, crops=CROPS, warmup=0.1, bf16=bf16)
    each = bench.step_time(wanted[0][1], settings)
    print(f"{wanted[0][0]}: {each:.4f} s a step", flush=True)
    for i, (name, start, rate) in enumerate(wanted):
        chosen = replace(settings, learning_rate=rate)
        if i == 0:
            chosen = replace(chosen, steps=max(1, min(steps, int(0.8 * bench.left / each))))
        bench.train(f"long {name}, rate {rate:g}", start, chosen, each)


def half(bench: Bench, steps: int) -> None:
    """Half of the MACs, and more, compensated."""
    shares = ((0.5, 1e-4), (0.5, 3e-4), (0.75, 1e-4))
    _long(bench, steps, [(f"one-shot {share}", partial(bench.one_shot, share), rate) for share, rate in shares])


def third(bench: Bench, steps: int) -> None:
    """Less of them, compensated."""
    shares = (0.35, 0.25, 0.6)
    _long(bench, steps, [(f"one-shot {share}", partial(bench.one_shot, share), 1e-4) for share in shares])


def plain(bench: Bench, steps: int) -> None:
    """Half of the MACs by magnitude, sliced."""
    _long(bench, steps, [("magnitude 0.5", partial(bench.magnitude, 0.5), rate) for rate in (3e-4, 1e-4)])


def stock(bench: Bench, steps: int) -> None:
    """A smaller stock model of about the same cost: from random weights, and from every other layer."""
    every = partial(bench.stock, 0.5, first=True)
    starts = [("random", partial(bench.stock, 0.5), 5e-4), ("every other layer", every, 3e-4)]
    _long(bench, steps, [(f"stock 0.5, {name}", start, rate) for name, start, rate in starts])


#: name -> (side of the images, what is done with the steps of a long training)
JOBS: dict[str, tuple[int, Callable[[Bench, int], None]]] = {
    "latency": (224, latency),
    "short": (140, short),
    "refit": (140, refit),
    "refit2": (140, partial(refit, views=2)),
    "refit-half": (140, partial(refit, shares=(0.5,), most=LOCAL_STEPS)),
    "refit-third": (140, partial(refit, shares=(0.35,), most=LOCAL_STEPS)),
    "trained": (140, trained),
    "half": (224, half),
    "third": (224, third),
    "plain": (224, plain),
    "stock": (224, stock),
    "draws": (140, draws),
    "images": (140, images),
}
