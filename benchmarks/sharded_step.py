"""A sharded pruning step against a plain step of the same sharded model, by the Trainer, in turns.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m benchmarks.sharded_step --way fsdp2    # or zero2, zero3

On CPUs (gloo); a ViT-S of random weights and six layers, four images a process. Of every turn the first two steps do
not count. Prints JSON: medians of seconds a step, and of every turn the ratio to the plain training next to it. ZeRO
wants deepspeed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import DistributedConfig, Trainer, TrainingArguments, ViTForImageClassification

from hf_vitprune import NViTConfig, PruningTrainer, SPViTConfig, VTPConfig, get_pruning_model

from .common import StepClock, quiet_arguments, vit_config

METHODS: dict[str, Any] = {
    "VTP": VTPConfig(target=0.5),
    "NViT": NViTConfig(target=0.5),
    # slowly enough that all gates are on until the last steps
    "SPViT": SPViTConfig(target=0.5, gate_learning_rate=0.3),
}
WARM_UP = 2


class Noise(Dataset[dict[str, Any]]):
    """Images of noise, always the same."""

    def __init__(self, length: int, side: int) -> None:
        self.length, self.pixels = length, torch.randn(16, 3, side, side)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[i % 16], "labels": i % 2}


def settings(way: str, folder: str, steps: int) -> TrainingArguments:
    changes: dict[str, Any] = {}
    if way.startswith("zero"):
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        zero = {"zero_optimization": {"stage": int(way[-1])}, **dict.fromkeys(sizes, "auto")}
        changes["deepspeed"] = zero | {"gradient_clipping": "auto"}
    return quiet_arguments(folder, steps, 4, **changes)


def turn(dense: Path, way: str, method: Any, steps: int) -> list[float]:
    """Seconds of every step of one training; ``method`` None: plain."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        args = settings(way, folder, steps)  # before the model: ZeRO-3 cuts it to pieces while it is loaded
        spread = {"distributed_config": DistributedConfig(fsdp_size=torch.distributed.get_world_size())}
        model: Any = ViTForImageClassification.from_pretrained(dense, **(spread if way == "fsdp2" else {}))  # type: ignore[arg-type]
        data = Noise(4 * steps * torch.distributed.get_world_size(), model.config.image_size)
        if method is None:
            Trainer(model, args, train_dataset=data, callbacks=[clock]).train()
        else:
            wrapped = get_pruning_model(model, method)
            PruningTrainer(wrapped, args, train_dataset=data, compensate=False, callbacks=[clock]).train()
    gc.collect()
    return clock.seconds[WARM_UP:]


def measure(dense: Path, way: str, rounds: int, steps: int) -> dict[str, Any]:
    """Method -> ``seconds`` a step, and ``ratios`` to the plain step of each turn with their median."""
    methods = {"plain": None, **{n: c for n, c in METHODS.items() if n != "SPViT" or way == "fsdp2"}}
    medians: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            medians[name].append(statistics.median(turn(dense, way, method, steps)))
    found: dict[str, Any] = {name: {"seconds": round(statistics.median(m), 3)} for name, m in medians.items()}
    for name in list(methods)[1:]:
        ratios = [own / plain for own, plain in zip(medians[name], medians["plain"], strict=True)]
        found[name] |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=("fsdp2", "zero2", "zero3"), default="fsdp2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of every turn")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    given = parser.parse_args(arguments)
    torch.distributed.init_process_group("gloo")
    if given.way.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")  # as TrainingArguments do on GPUs
    torch.manual_seed(0)
    config = vit_config(64, 2, 4, image_size=32) if given.small else vit_config(384, 6)
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)
        ViTForImageClassification(config).save_pretrained(folder[0])  # the first process does
        torch.distributed.barrier()
        found = measure(Path(folder[0]), given.way, given.rounds, given.steps)
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found, indent=1))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
