"""What does a search step of SPViT cost, in time and memory?

    python -m benchmarks.spvit                       # ViT-S/16, batch 8, against a plain step; about three minutes
    python -m benchmarks.spvit --model vit-base --batch-size 4 --rounds 5

A step is forward, backward, cost term, clipping and AdamW. Plain fine-tuning, the single-path search and the
multi-path baseline take turns in one run; the ratio is the median over the rounds. Peak memory is that of a fresh
process that takes a few steps, less what the imports needed. Weights are random. ``--json FILE`` keeps the numbers.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import ViTForImageClassification

from hf_vitprune import SPViTConfig, get_pruning_model

from .common import in_process, interleaved, ratio, resident, show, spent, step_of
from .speed import WIDTHS, dense_config

SIDES = {"plain": None, "single-path": True, "multi-path": False}


def made(model: str, side: str) -> Any:
    """A model in training, searched or not."""
    torch.manual_seed(0)
    plain: Any = ViTForImageClassification(dense_config(model)).train()
    single_path = SIDES[side]
    if single_path is None:
        return plain
    return get_pruning_model(plain, SPViTConfig(target=0.5, single_path=single_path)).train()


def peak(model: str, side: str, batch_size: int, steps: int) -> int:
    """Bytes at the peak of this process, over what it held before the model was made."""
    before = resident()

    def train() -> None:
        step = step_of(made(model, side), batch_size)
        for _ in range(steps):
            step()

    return spent(train).peak - before


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WIDTHS)}.")] = "vit-small",
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    rounds: Annotated[int, typer.Option(help="Steps of every side.")] = 15,
    memory_steps: Annotated[int, typer.Option(help="Steps under which memory is measured; 0: not.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the numbers.")] = None,
) -> None:
    """Time and memory of search steps."""
    models = {side: made(model, side) for side in SIDES}
    samples = interleaved({side: step_of(one, batch_size) for side, one in models.items()}, rounds)
    peaks = {side: in_process(peak, model, side, batch_size, memory_steps) for side in SIDES} if memory_steps else {}
    rows = []
    for side, one in models.items():
        trained = sum(p.numel() for p in one.parameters() if p.requires_grad) / 1e6
        row = {"what": side, "trained parameters, 10^6": trained, "step, s": statistics.median(samples[side])}
        row["against plain"] = ratio(samples[side], samples["plain"])
        if peaks:
            row |= {"peak memory, MB": peaks[side] / 1e6, "of the plain one": peaks[side] / peaks["plain"]}
        rows.append(row)
    show({f"training steps of {model}, batch {batch_size},": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
