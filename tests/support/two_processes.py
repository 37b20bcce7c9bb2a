"""Runs that must end alike in one process and in two; started by test_two_processes.py with torch.distributed.run."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer

from hf_vitprune import DistillationConfig, NViTConfig, PruningCallback, PruningModel, SLSConfig, get_pruning_model
from hf_vitprune.methods import NViT
from pruning_runs import SMALL_GROUPS, Images, Patterns, gated, lora_model, nvit, scatter_scores, state_of, trainer

Run = tuple[PruningModel, dict[str, Any], dict[str, Any]]


#: what the other four show, too, in other combinations
SLOW = ("accumulated", "NViT, adapters")


def runs(slow: bool) -> dict[str, Run]:
    """Name -> model, settings of the Trainer, and what divides the global batch of 8 over two processes.

    Args:
        slow: those of :data:`SLOW`, too.
    """
    common = {"train_dataset": Images(dtype=torch.float64), "max_steps": 2}
    soft = DistillationConfig("soft", weight=0.5, temperature=2.0)

    def model(**settings: Any) -> PruningModel:
        return scatter_scores(gated(sparsity_weight=0.05, **settings)).double()

    def adapters() -> PruningModel:
        torch.manual_seed(5)
        config = NViTConfig(target=0.4, group_sizes=SMALL_GROUPS, pruning_share=1.0)
        return get_pruning_model(lora_model(dropout=False), config).double()

    def layers() -> PruningModel:
        torch.manual_seed(5)
        config = SLSConfig(alpha=0.5, iterations=250, perplexity=3.0)
        return get_pruning_model(lora_model(dropout=False), config).double()

    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = {"kind": Trainer, "callbacks": [PruningCallback()]}
    checkpointed = {"distillation": soft, "activation_checkpointing": True, "max_grad_norm": 0.5}
    found: dict[str, Run] = {
        "accumulated": (model(gate_learning_rate=0.3), common, halves),
        "distilled, checkpointed, clipped": (model(target=0.6), {**common, **checkpointed}, {}),
        "plain Trainer": (model(binarize=True), {**common, **plain}, halves),
        "NViT": (
            nvit(target=0.4, pruning_share=1.0).double(),
            {**common, "distillation": NViT.distillation, "max_grad_norm": 0.5, "learning_rate": 1e-3},
            halves,
        ),
        "NViT, adapters": (adapters(), {**common, **plain, "learning_rate": 1e-3}, halves),
        "SLS, adapters": (layers(), {**common, **plain, "train_dataset": Patterns(dtype=torch.float64)}, halves),
    }
    return {name: run for name, run in found.items() if slow or name not in SLOW}


def train(run: Run, folder: Path, processes: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State and plan at the end; the batch of an update is 8 images in both cases."""
    model, settings, halved = run
    batch = {"per_device_train_batch_size": 8 // processes, **(halved if processes == 2 else {})}
    trainer(model, folder, **settings, **batch).train()
    return state_of(model), model.plan().to_dict()


if __name__ == "__main__":
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    plans = {}
    for name, run in runs(slow=sys.argv[2] == "slow").items():
        state, plans[name] = train(run, out / name, processes=2)
        save_file(state, out / f"{name}.{rank}.safetensors")
    apart = scatter_scores(gated(), seed=rank)  # a decision is the first process', whatever the others think
    apart.decide()
    plans["apart"] = apart.plan().to_dict()
    apart = nvit(criterion="random", seed=rank, eta=0)
    apart.decide()
    one = apart.method.masks["layer0_mlp_hidden"]
    assert one.kept == int(one.mask.sum()) == len(apart.plan().layers[0].mlp)
    plans["NViT apart"] = apart.plan().to_dict()["layers"]
    apart = get_pruning_model(gated().unload(), SLSConfig(iterations=250, perplexity=3.0))
    apart.decide(Patterns(noise=0.1 if rank == 0 else 5.0))
    plans["SLS apart"] = apart.plan().to_dict()
    (out / f"plans.{rank}.json").write_text(json.dumps(plans))
    gc.collect()  # trainers refer to themselves, and so keep the process group and its threads alive
    torch.distributed.destroy_process_group()  # gloo's threads, left running, can abort a process that ends
