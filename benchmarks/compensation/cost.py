"""Seconds and memory of one-shot pruning on a ViT of random weights, in a process of its own.

Seconds are those of the processor, added up over threads: other processes inflate them less than the clock.

Memory is the peak of the resident set since the process began: once it has imported torch and transformers, made the
model and the images and run 32 of the images (``loaded``), and at the end, with the pruned model in hand (``peak``).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import ViTForImageClassification

from hf_vitprune import OneShotScores, prune
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.publish.report import human

from ..common import in_process, vit_config


def measured(width: int, layers: int, images: int, threads: int, statistics: bool) -> list[str]:
    """Cells of a row of the table."""
    row = in_process(here, width, layers, images, threads, statistics)
    seconds = [row[name] for name in ("score", "choose", "compensate")]
    passes = (row["score"] + row["compensate"]) / row["dense"]
    peaks = [f"{row[name] / row['loaded']:.2f}" for name in ("scored", "peak")]
    added = f"{(row['peak'] - row['loaded']) / row['model']:.2f}"
    times = [*(f"{value:.1f}" for value in (*seconds, sum(seconds))), f"{passes:.1f}"]
    return [human(row["params"]), *times, f"{row['loaded'] / 2**20:.0f} MiB", *peaks, added]


def here(width: int, layers: int, images: int, threads: int, statistics: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(width, layers, num_labels=1000)).eval()
    pixels = torch.randn(images, 3, 224, 224)
    row: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], Any], peak: str = "") -> Any:
        start = time.process_time()
        result = call()
        row[name] = row.get(name, 0.0) + time.process_time() - start
        if peak:
            row[peak] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return result

    @torch.no_grad()
    def dense() -> None:
        for batch in pixels.split(OneShotSettings.batch_size):
            model(pixel_values=batch)

    with torch.no_grad():  # the model with its images, and one batch: what any use of it takes
        timed("first", lambda: model(pixel_values=pixels[:32]))
    timed("dense", dense, "loaded")
    params = sum(p.numel() for p in model.parameters())
    settings = OneShotSettings(images=None, statistics=statistics)
    scores = timed("score", lambda: OneShotScores.measure(model, pixels, settings), "scored")
    plan = timed("choose", lambda: scores.plan(0.5))
    timed("compensate", lambda: prune(model, plan, calibration=pixels), "peak")
    timed("dense", dense)
    return {**row, "dense": row["dense"] / 2, "params": params, "model": 4 * params}
