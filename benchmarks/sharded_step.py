"""A sharded pruning step against a plain sharded one, and both against each other in turns.

``torchrun --nproc_per_node 2 -m benchmarks.sharded_step``, on CPUs with ``OMP_NUM_THREADS=1``; prints JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ViTConfig, ViTForImageClassification

from hf_vitprune import NViTConfig, VTPConfig, get_pruning_model
from hf_vitprune.utils.processes import mean_gradients

METHODS = {"VTP": VTPConfig(target=0.5), "NViT": NViTConfig(target=0.5)}


def sharded(mesh: Any) -> Any:
    """A random ViT-S of six layers, every layer sharded."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    model = ViTForImageClassification(config)
    for layer in model.vit.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Run:
    """One training; ``method`` None: plain."""

    def __init__(self, mesh: Any, config: Any) -> None:
        model = sharded(mesh)
        self.model = model if config is None else get_pruning_model(model, config)
        groups = model.parameters() if config is None else self.model.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self.gated, self.step_number = config is not None, 0

    def step(self, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        torch.distributed.barrier()
        begin = time.perf_counter()
        self.model(pixel_values=pixels, labels=labels).loss.backward()
        if self.gated:
            mean_gradients(self.model.method.parameters())
            self.model.before_step(self.step_number, 1000)
        self.optimizer.step()
        if self.gated:
            self.model.after_step(self.step_number, 1000)
        self.optimizer.zero_grad()
        self.step_number += 1
        return time.perf_counter() - begin


def measure(batch: int = 4, rounds: int = 8) -> dict[str, Any]:
    """Medians of seconds a step, and of the ratios of neighbours in time."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    runs = {"plain": Run(mesh, None), **{name: Run(mesh, config) for name, config in METHODS.items()}}
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(run.step(pixels, labels))
    times = {name: seconds[1:] for name, seconds in times.items()}  # the first is a warm-up
    result: dict[str, Any] = {name: {"seconds": statistics.median(seconds)} for name, seconds in times.items()}
    for name in METHODS:
        ratios = [own / plain for own, plain in zip(times[name], times["plain"], strict=True)]
        result[name] |= {"ratio": statistics.median(ratios), "ratios": [round(r, 3) for r in ratios]}
    return result


if __name__ == "__main__":
    measured = measure()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(measured, indent=1))
    torch.distributed.destroy_process_group()
