"""A search of SPViT on two processes; started by test_spvit.py with torch.distributed.run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_vitprune import SPViTConfig, get_pruning_model
from hf_vitprune.methods.spvit import method
from pruning_runs import DROPOUT, VIT, Patterns, state_of, trainer
from tiny import make, relative_error, run

if __name__ == "__main__":
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    method.TOLERANCE = 0.3
    for name, settings in (("shared", {}), ("own", {"single_path": False}), ("checkpointed", {})):
        config = SPViTConfig(target=0.6, gate_learning_rate=0.3, patience=2, **settings)
        model = get_pruning_model(make(VIT, **DROPOUT), config)
        torch.manual_seed(rank)  # processes draw differently
        trainer(
            model, out / name, optim="adamw_torch", learning_rate=1e-3, max_steps=20, train_dataset=Patterns(),
            per_device_train_batch_size=5, gradient_accumulation_steps=2,
            activation_checkpointing=name == "checkpointed",
        ).train()  # fmt: skip
        small = model.export()
        assert relative_error(run(model.eval())["logits"], run(small.eval())["logits"]) < 1e-5
        save_file(state_of(model), out / f"{name}.{rank}.safetensors")
        save_file(state_of(small), out / f"{name}.small.{rank}.safetensors")
