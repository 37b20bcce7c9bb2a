"""One-shot scores and compensation with the images split over processes: seconds against one process.

    python -m benchmarks.split_images --shape 384x12 --images 64,128 --processes 1,2

A ViT of random weights, images of 224 x 224, one thread a process (gloo). Every number of processes is started by
torchrun; seconds are those of the clock, between barriers. What does not depend on the images (solving, sending,
looking at the layers) is the value at no images of the line through the two numbers of images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import ViTForImageClassification

from hf_vitprune import OneShotScores, PruningPlan, prune
from hf_vitprune.methods import OneShotSettings

from .common import table_of, vit_config

PARTS = ("scores", "compensation")


def measure(width: int, layers: int, images: list[int], parts: list[str]) -> dict[str, dict[str, float]]:
    """Part -> number of images -> seconds, on every process. Without scores, magnitudes say what goes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(width, layers)).eval()
    pixels = torch.randn(max(images), 3, 224, 224)
    found: dict[str, dict[str, float]] = {part: {} for part in parts}
    plan = None if "scores" in parts else PruningPlan.magnitude(model, 0.5, units=["heads", "qk", "v", "mlp"])
    with torch.no_grad():
        model(pixel_values=pixels[:8])  # what a first pass takes more
    for count in images:
        some = pixels[:count]
        settings = OneShotSettings(images=None, statistics=False, batch_size=8)
        if "scores" in parts:
            scores, found["scores"][str(count)] = _timed(lambda: OneShotScores.measure(model, some, settings))  # noqa: B023
            plan = scores.plan(0.5)
        if "compensation" in parts:
            _, found["compensation"][str(count)] = _timed(lambda: prune(model, plan, calibration=some))  # noqa: B023
    return found


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    torch.distributed.barrier()
    begin = time.perf_counter()
    result = call()
    torch.distributed.barrier()
    return result, time.perf_counter() - begin


def table(shape: str, found: dict[int, dict[str, dict[str, float]]]) -> Table:
    """Seconds by the number of processes, how many times as fast, and the share that images do not change."""
    first = next(iter(found.values()))
    counts = list(next(iter(first.values())))
    columns = [f"{count} images, s (times)" for count in counts]
    cells = [["", "processes", *columns, "without images, s"]]
    for part in [*first, *(["both"] if len(first) > 1 else [])]:
        alone = None
        for processes, parts in found.items():
            seconds = [sum(parts[name][c] for name in ([part] if part in parts else parts)) for c in counts]
            alone = alone or seconds
            row = [f"{s:.1f} ({a / s:.2f})" for s, a in zip(seconds, alone, strict=True)]
            (x, y), (low, high) = (int(counts[0]), int(counts[-1])), (seconds[0], seconds[-1])
            constant = low - (high - low) / (y - x) * x if y > x else float("nan")
            cells.append([part, str(processes), *row, f"{constant:.1f}"])
    return table_of(cells, f"ViT {shape}, one thread a process")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="384x12", help="width x layers")
    parser.add_argument("--images", default="64,128", help="numbers, with commas")
    parser.add_argument("--processes", default="1,2", help="numbers, with commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is measured, with commas")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.here:
        torch.distributed.init_process_group("gloo")
        width, layers = map(int, given.shape.split("x"))
        found = measure(width, layers, [int(count) for count in given.images.split(",")], given.parts.split(","))
        if torch.distributed.get_rank() == 0:
            print(json.dumps(found))
        torch.distributed.destroy_process_group()
        return 0
    results = {}
    for processes in map(int, given.processes.split(",")):
        start = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        own = ["-m", __spec__.name, "--here", "--shape", given.shape, "--images", given.images, "--parts", given.parts]
        command = [sys.executable, *start, *own]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        results[processes] = json.loads(done.stdout.splitlines()[-1])
    Console(width=140).print(table(given.shape, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
