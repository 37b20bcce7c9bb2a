"""How time and memory grow with width, depth, tokens and images; and where the largest towers would stand.

    python -m benchmarks.scaling --out runs/scaling    # ViT shapes on this machine's CPU, minutes of processor time
    python -m benchmarks.scaling --project             # the largest shapes on 8 GPUs, by calculation

Every shape runs in a process of its own, with one thread: seconds are those of the processor, which a shared machine
inflates less than the clock; memory is the peak of the resident set over what it was before. The exponent of a size is
the slope of a straight line through the logarithms.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import ViTForImageClassification

from hf_vitprune import (
    NViTConfig,
    OneShotScores,
    PruningPlan,
    PruningTrainer,
    SPViTConfig,
    VTPConfig,
    get_pruning_model,
    prune,
)
from hf_vitprune.compensate import Compensation
from hf_vitprune.methods import OneShotSettings

from .common import StepClock, in_process, once, quiet_arguments, resident, spent, table_of, vit_config

PATCH, BATCH = 16, 8
#: what is varied: the others stay at the middle one. Tokens are given by the side of the images
AXES = {"width": (128, 192, 384), "depth": (2, 4, 8), "side": (64, 112, 192), "images": (8, 16, 32)}
#: the same, for tests
SMALL = {"width": (64, 128), "depth": (1, 2), "side": (32, 48), "images": (4, 8)}
OPERATIONS = ("prune", "one-shot", "compensation", "VTP step", "NViT step", "SPViT step")


def shapes(axes: dict[str, tuple[int, ...]]) -> list[tuple[str, dict[str, int]]]:
    """(what is varied, sizes) of every run."""
    middle = {name: sizes[(len(sizes) - 1) // 2] for name, sizes in axes.items()}
    return [(name, {**middle, name: size}) for name, sizes in axes.items() for size in sizes]


def measure(width: int, depth: int, side: int, images: int) -> dict[str, dict[str, float]]:
    """Seconds and bytes of every operation at one shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = vit_config(width, depth, width // 32, image_size=side, patch_size=PATCH, num_labels=10)
    model = ViTForImageClassification(config).eval()
    pixels = torch.randn(images, 3, side, side)
    plan = PruningPlan.random(model, 0.5, units=("qk", "v", "mlp"), round_to=8)
    settings = OneShotSettings(images=None, batch_size=BATCH, statistics=False)
    calls: dict[str, Callable[[], Any]] = {
        "prune": lambda: prune(model, plan),
        "one-shot": lambda: OneShotScores.measure(model, pixels, settings),
        "compensation": lambda: prune(model, plan, calibration=pixels, compensate=Compensation(images=None)),
        "VTP step": lambda: _steps(model, VTPConfig(target=0.7), pixels),
        "NViT step": lambda: _steps(model, NViTConfig(target=0.7), pixels),
        "SPViT step": lambda: _steps(model, SPViTConfig(target=0.7, gate_learning_rate=3), pixels),
    }
    calls["prune"]()  # what is done once a process is done
    rows = {}
    for name, call in calls.items():
        before = resident()
        found = spent(call)
        seconds = found.processor if found.result is None or "step" not in name else found.result
        rows[name] = {"seconds": seconds, "bytes": float(max(0, found.peak - before))}
    return rows


def _steps(model: Any, config: Any, pixels: torch.Tensor, steps: int = 4) -> float:
    """Seconds of a training step on all images, the first one not counted; the gates go when it is done."""
    rows = [{"pixel_values": one, "labels": i % 10} for i, one in enumerate(pixels)] * steps
    clock = StepClock(time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        args = quiet_arguments(folder, steps, len(pixels))
        wrapped = get_pruning_model(model, config)
        PruningTrainer(wrapped, args, train_dataset=rows, compensate=False, callbacks=[clock]).train()
        wrapped.unload()
    return median(clock.seconds[1:])


# ---------------------------------------------------------------------- exponents
def exponents(rows: list[dict[str, Any]], what: str) -> dict[str, dict[str, float]]:
    """Operation -> axis -> exponent of ``seconds`` or ``bytes`` over the axis (tokens, for the side)."""
    found: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        mine = [row for row in rows if row["axis"] == axis]
        sizes = [(row["side"] // PATCH) ** 2 + 1 if axis == "side" else row[axis] for row in mine]
        for name in mine[0]["found"]:
            values = np.array([row["found"][name][what] for row in mine])
            slope = float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if values.all() else float("nan")
            found.setdefault(name, {})["tokens" if axis == "side" else axis] = slope
    return found


# ---------------------------------------------------------------------- by calculation
# Operations are counted as in the code: forward passes, products of the statistics, double precision factorisations.
# Seconds are operations over what a GPU is assumed to sustain; nothing is added for reading weights or for sending.
#: ``PROBED``: images times layers that probes run, in each of ``PROBES`` sizes
GPUS, IMAGES, PROBES, PROBED = 8, 128, 6, 48
#: operations a second that a GPU is assumed to sustain: matrices in bf16, in single, and in double precision
HALF, SINGLE, DOUBLE = 350e12, 40e12, 30e12
GIB = 2**30


class Tower(NamedTuple):
    """A published shape, at one resolution; ``gated``: the MLP has two Linears into its hidden units."""

    name: str
    width: int
    layers: int
    mlp: int
    tokens: int
    gated: bool = False

    @property
    def weights(self) -> int:
        """Parameters of the layers."""
        return self.layers * self.width * (4 * self.width + (3 if self.gated else 2) * self.mlp)

    @property
    def forward(self) -> float:
        """Operations for one image."""
        return 2.0 * self.tokens * self.weights + 4.0 * self.layers * self.tokens**2 * self.width


TOWERS = (
    Tower("ViT-g/14, 224 x 224", 1408, 40, 6144, 257),
    Tower("DINOv2-giant, 518 x 518", 1536, 40, 4096, 1370, gated=True),
    Tower("InternViT-6B, 448 x 448", 3200, 45, 12800, 1025),
)


def score_seconds(tower: Tower) -> float:
    """One-shot scores from ``IMAGES`` images, split over the GPUs; every GPU solves every ``GPUS``-th layer."""
    rows, probes = IMAGES * tower.tokens, PROBES * PROBED / 2  # each runs half of the layers
    forward = (IMAGES + probes) * tower.forward
    moments = tower.layers * rows * (tower.mlp**2 + tower.width**2)  # of q and k, head by head, next to nothing
    solved = tower.layers * (2.0 * tower.mlp**3 + 3.0 * tower.width * tower.mlp**2 + 4.0 * tower.width**3)
    return (forward / HALF + moments / SINGLE + solved / DOUBLE) / GPUS


def compensation_seconds(tower: Tower, kept: float = 0.5) -> float:
    """New weights from as many images; each layer is solved by all, since the next one waits for it.

    Queries and keys are projected once more.
    """
    rows, mlp = IMAGES * tower.tokens, kept * tower.mlp
    forward = (1 + kept) * IMAGES * tower.forward
    moments = tower.layers * rows * (mlp**2 + 2.0 * tower.width * mlp + 7.0 * tower.width**2)
    solved = tower.layers * (mlp**3 / 3 + 8.0 * tower.width * mlp**2 + 8.0 * tower.width**3)
    return (forward / HALF + moments / SINGLE) / GPUS + solved / DOUBLE


def step_seconds(tower: Tower, batch: int = 8) -> float:
    """A VTP, NViT or SPViT step of ``batch`` images a GPU: forward twice (once to recompute) and backward."""
    return 4 * batch * tower.forward / HALF


def calibration_bytes(tower: Tower, kept: float = 0.5) -> float:
    """Of one GPU: dense weights, what is left of them, both streams of its images, ten covariances of one layer."""
    streams = 2 * IMAGES / GPUS * tower.tokens * tower.width * 2
    return 2 * tower.weights * (1 + kept) + streams + 10 * 8 * max(tower.mlp, tower.width) ** 2


def streamed_bytes(tower: Tower, kept: float = 0.5) -> float:
    """The same with dense layers on the disk."""
    return calibration_bytes(tower, kept) - 2 * tower.weights * (1 - 1 / tower.layers)


def training_bytes(tower: Tower, batch: int = 8) -> float:
    """Of one GPU, FSDP2: a share of bf16 weights and gradients and of AdamW's 12 bytes; the inputs of every layer."""
    inputs = 2 * batch * tower.layers * tower.tokens * tower.width
    return 16 * tower.weights / GPUS + inputs + 4 * tower.weights / tower.layers  # a layer's weights and gradients


def projections() -> Table:
    """One row a tower."""
    headings = "scores, s", "compensation, s", "GPU memory, GiB", "streamed, GiB", "step, s", "in training, GiB"
    cells = [["", "parameters", *headings]]
    for tower in TOWERS:
        seconds = score_seconds(tower), compensation_seconds(tower)
        sizes = calibration_bytes(tower) / GIB, streamed_bytes(tower) / GIB
        times = [f"{value:.1f}" for value in (*seconds, *sizes)]
        training = [f"{step_seconds(tower):.2f}", f"{training_bytes(tower) / GIB:.1f}"]
        cells.append([tower.name, f"{tower.weights / 1e9:.2f}B", *times, *training])
    return table_of(cells, f"{GPUS} GPUs, {IMAGES} images, by calculation")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder; what is there is not repeated")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--project", action="store_true", help="only what follows by calculation")
    given = parser.parse_args(arguments)
    console = Console(width=160)
    if given.project:
        console.print(projections())
        return 0
    rows = []
    for axis, sizes in shapes(SMALL if given.small else AXES):
        file = given.out / ("-".join(f"{name}{size}" for name, size in sizes.items()) + ".json")
        found = once(file, lambda sizes=sizes: in_process(measure, *sizes.values()))
        rows.append({"axis": axis, **sizes, "found": found})
    for what, title in (("seconds", "processor seconds"), ("bytes", "peak memory")):
        found = exponents(rows, what)
        cells = [[name, *(f"{value + 0.0:.2f}" for value in row.values())] for name, row in found.items()]
        headings = ["", *next(iter(found.values()))]
        console.print(table_of([headings, *cells], f"Exponents of {title}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
