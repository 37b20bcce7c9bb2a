"""Sharded trainings that go wrong, on two processes (or, to resume, on another number); started by test_sharded.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import two_shards
from hf_vitprune import VTPConfig
from pruning_runs import state_of
from two_shards import SINGLE_PRECISION, pruning_model, train, zero


class Dies(TrainerCallback):
    """The second process ends without a word, in the middle of a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 2:
            os._exit(3)


def begin(case: str, out: Path) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    what, way = case.split(":")
    changes: dict[str, Any] = {}
    dtype = torch.float64
    if way.startswith("zero"):
        changes, dtype = {"deepspeed": zero(way), **SINGLE_PRECISION}, torch.float32
    alive = two_shards.arguments(out / way, **{k: v for k, v in changes.items() if k == "deepspeed"})
    if what == "disagree" and rank == 1:
        two_shards.RUNS["vtp"] = (VTPConfig(target=0.9, gate_learning_rate=0.3, round_to=4), {})
    model = pruning_model(out, "vtp", way, dtype)
    del alive
    if what == "dies":
        changes["callbacks"] = [Dies()]
    if what == "saved":
        changes["save_strategy"] = "steps"
    train(model, out / way, "vtp", world, resume=what == "resume", plugin=way == "plugin", **changes)
    if rank == 0:
        save_file(state_of(model.method), out / f"{what}.{way}.safetensors")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    if "zero" in "".join(sys.argv[2:]):
        import deepspeed

        deepspeed.init_distributed("gloo")
    for argument in sys.argv[2:]:
        begin(argument, Path(sys.argv[1]))
