"""Trainings that die in the middle: each in a fork of one process, which says afterwards how they ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from hf_vitprune import DistillationConfig, PruningModel, SPViTConfig, VTPConfig, get_pruning_model
from hf_vitprune.methods import NViT
from pruning_runs import DROPOUT, VIT, Images, gated, lora_model, make, nvit, trainer

STEPS = 6


def vit() -> PruningModel:
    return gated(VIT, DROPOUT, sparsity_weight=0.01, sparsity_warmup=0.5, gate_learning_rate=0.05)


def lora() -> PruningModel:
    torch.manual_seed(3)  # the adapters' weights
    model = lora_model(lora_dropout=0.1)
    return get_pruning_model(model, VTPConfig(target=0.7, round_to=4, uneven=True, gate_learning_rate=0.05))


def decided() -> PruningModel:
    """Fine-tuning with masks."""
    torch.manual_seed(4)
    model = vit()
    for score in model.method.gate_parameters():
        torch.nn.init.uniform_(score, 0.5, 1.5)
    model.decide()
    return model


def pruning_on_the_way() -> PruningModel:
    """Groups go after every second update, before and after the run dies; in the middle of a window."""
    return nvit(VIT, DROPOUT, target=0.3, interval=2, pruning_share=1.0)


def search() -> PruningModel:
    """Gates are drawn at random, BatchNorms count."""
    config = SPViTConfig(target=0.6, gate_learning_rate=0.4, patience=3)
    return get_pruning_model(make(VIT, **DROPOUT), config)


#: name -> the model, the step after which the run dies, settings of the Trainer
KILLED: dict[str, tuple[Callable[[], PruningModel], int, dict[str, Any]]] = {
    "vit": (vit, 3, {"distillation": DistillationConfig("soft", weight=0.5)}),
    "lora": (lora, 5, {}),
    "decided": (decided, 2, {}),
    "nvit": (pruning_on_the_way, 3, {"distillation": NViT.distillation}),
    "spvit": (search, 4, {"distillation": DistillationConfig("hard", weight=0.5)}),
}


def training(name: str, folder: Path, **changes: Any) -> Any:
    """The whole training of a case: two epochs of 12 images, dropout, momentum, accumulation, a checkpoint a step."""
    make_model, _, settings = KILLED[name]
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS}
    optimizer = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0}
    all_settings = {
        **batches,
        **optimizer,
        "train_dataset": Images(12),
        "save_strategy": "steps",
        **settings,
        **changes,
    }
    return trainer(make_model(), folder / name, **all_settings)


class Die(TrainerCallback):
    """In the middle of the update that follows a step: after the first micro-batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os._exit(9)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            training(name, Path(sys.argv[1]), callbacks=[Die(KILLED[name][1])]).train()
            os._exit(0)
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

__all__ = ["KILLED", "STEPS", "make", "training"]
