"""How time and memory grow with width, depth, tokens and images; and where the largest towers would stand.

    python -m benchmarks.scaling --out runs/scaling    # ViT shapes on this machine's CPU, minutes of processor time
    python -m benchmarks.scaling --project             # the largest shapes on 8 GPUs, by calculation

Every shape runs in a process of its own, with one thread: seconds are those of the processor, which a shared machine
inflates less than the clock; memory is the peak of the resident set over what it was before. The exponent of a size is
the slope of a straight line through the logarithms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

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

from .memory import resident, spent

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
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 32, intermediate_size=4 * width,
        image_size=side, patch_size=PATCH, num_labels=10,
    )  # fmt: skip
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
    clock = _ProcessorClock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=len(pixels), report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=1e-5,
        )  # fmt: skip
        wrapped = get_pruning_model(model, config)
        PruningTrainer(wrapped, args, train_dataset=rows, compensate=False, callbacks=[clock]).train()
        wrapped.unload()
    return median(clock.seconds[1:])


class _ProcessorClock(TrainerCallback):
    def __init__(self) -> None:
        self.begun, self.seconds = 0.0, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.begun)


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


def _table(title: str, found: dict[str, dict[str, float]]) -> Table:
    columns = list(next(iter(found.values())))
    table = Table("", *columns, title=title)
    for name, row in found.items():
        table.add_row(name, *(f"{row[column] + 0.0:.2f}" for column in columns))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder; what is there is not repeated")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--project", action="store_true", help="only what follows by calculation")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(**json.loads(given.one))))
        return 0
    console = Console(width=160)
    if given.project:
        from .projection import projections

        console.print(projections())
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for axis, sizes in shapes(SMALL if given.small else AXES):
        file = given.out / ("-".join(f"{name}{size}" for name, size in sizes.items()) + ".json")
        if not file.is_file():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scaling", "--one", json.dumps(sizes)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            file.write_text(done.stdout.splitlines()[-1])
        rows.append({"axis": axis, **sizes, "found": json.loads(file.read_text())})
    for what, title in (("seconds", "processor seconds"), ("bytes", "peak memory")):
        console.print(_table(f"Exponents of {title}", exponents(rows, what)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
