"""Compensations that must come out alike in one process and in two; started by test_compensate.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_vitprune import Compensation, PruningPlan, compensate_plan
from tiny import images, make

CASES = {"ViTForImageClassification": None, "SwinForImageClassification": ["heads", "qk", "v", "mlp"]}


def made(case: str) -> dict[str, torch.Tensor]:
    """Weights from 10 images in batches of 3: the two processes get 2 batches each, of different sizes."""
    model = make(case).double()
    plan = PruningPlan.random(model, 0.4, CASES[case])
    settings = Compensation(batch_size=3, reselect=True)
    return compensate_plan(model, plan, images(10).double(), settings).weights


def weights_of(folder: Path, case: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case}.{rank}.safetensors")


def agreed(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What one process gets; two others leave theirs in the folder."""
    here = Path(__file__).parent
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(folder)]
    done = subprocess.run([sys.executable, *command], env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: made(case) for case in CASES}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for name in CASES:
        weights = {key: tensor.contiguous() for key, tensor in made(name).items()}
        save_file(weights, f"{sys.argv[1]}/{name}.{torch.distributed.get_rank()}.safetensors")
    torch.distributed.destroy_process_group()
