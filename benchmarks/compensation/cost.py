"""Seconds and memory of one-shot pruning on a ViT of random weights, in a process of its own.

Seconds are those of the processor, added up over threads: other processes inflate them less than the clock.

Memory is the peak of the resident set since the process began: once it has imported torch and transformers, made the
model and the images and run 32 of the images (``loaded``), and at the end, with the pruned model in hand (``peak``).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from hf_vitprune.publish.report import human


def measured(width: int, layers: int, images: int, threads: int, statistics: bool) -> list[str]:
    """Cells of a row of the table."""
    command = [sys.executable, "-m", __spec__.name, *map(str, (width, layers, images, threads, int(statistics)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    seconds = [row[name] for name in ("score", "choose", "compensate")]
    passes = (row["score"] + row["compensate"]) / row["dense"]
    peaks = [f"{row[name] / row['loaded']:.2f}" for name in ("scored", "peak")]
    added = f"{(row['peak'] - row['loaded']) / row['model']:.2f}"
    times = [*(f"{value:.1f}" for value in (*seconds, sum(seconds))), f"{passes:.1f}"]
    return [human(row["params"]), *times, f"{row['loaded'] / 2**20:.0f} MiB", *peaks, added]


def _peak() -> float:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _here(width: int, layers: int, images: int, threads: int, statistics: bool) -> dict[str, Any]:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from hf_vitprune import OneShotScores, prune
    from hf_vitprune.methods import OneShotSettings

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=1000,
    )
    model = ViTForImageClassification(config).eval()
    pixels = torch.randn(images, 3, 224, 224)

    @torch.no_grad()
    def dense() -> float:
        start = time.process_time()
        for batch in pixels.split(OneShotSettings.batch_size):
            model(pixel_values=batch)
        return time.process_time() - start

    with torch.no_grad():
        model(pixel_values=pixels[:32])  # the model with its images, and one batch: what any use of it takes
    passes = [dense()]
    row: dict[str, Any] = {"loaded": _peak(), "model": sum(4 * p.numel() for p in model.parameters())}
    row["params"] = row["model"] // 4
    start = time.process_time()
    scores = OneShotScores.measure(model, pixels, OneShotSettings(images=None, statistics=statistics))
    row["score"], row["scored"] = time.process_time() - start, _peak()
    start = time.process_time()
    plan = scores.plan(0.5)
    row["choose"] = time.process_time() - start
    start = time.process_time()
    prune(model, plan, calibration=pixels)
    row["compensate"], row["peak"] = time.process_time() - start, _peak()
    passes.append(dense())
    return {**row, "dense": sum(passes) / 2}


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(_here(*numbers[:4], statistics=bool(numbers[4]))))
