"""Compensations and scores that must come out alike in one process and in two; started by test_compensate.py."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_vitprune import Compensation, OneShotScores, PruningPlan
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.methods import OneShotSettings
from processes import run
from pruning_runs import gated, scatter_scores
from tiny import images, make

CASES = {"ViTForImageClassification": None, "SwinForImageClassification": ["heads", "qk", "v", "mlp"]}
SCORES = "scores of a Swin"
EXPORT = "export on the first process alone"
#: one batch: the second process has none
FEW, FEW_SCORES = "few images", "scores of few images"
NAMES = (*CASES, SCORES, EXPORT, FEW, FEW_SCORES)


def made(case: str, rank: int = 0) -> dict[str, torch.Tensor]:
    """Weights from 10 images in batches of 3: the two processes get 2 batches each, of different sizes."""
    if case == EXPORT:
        model = scatter_scores(gated()).double()
        model.decide()
        return {} if rank else dict(model.export(calibration=images(10).double()).state_dict())
    if case == FEW:
        plan = PruningPlan.random(model := make("ViTForImageClassification").double(), 0.4)
        return compensate_plan(model, plan, images(3).double(), Compensation(batch_size=3)).weights
    if case == FEW_SCORES:
        model = make("ViTForImageClassification").double()
        return OneShotScores.measure(model, images(3).double(), OneShotSettings(batch_size=3)).tensors
    if case == SCORES:
        model = make("SwinForImageClassification").double()
        settings = OneShotSettings(batch_size=3, statistics=True)
        return OneShotScores.measure(model, images(10).double(), settings).tensors
    plan = PruningPlan.random(model := make(case).double(), 0.4, CASES[case])
    settings = Compensation(batch_size=3, reselect=True, views=2, local_steps=4 if case.startswith("ViT") else 0)
    return compensate_plan(model, plan, images(10).double(), settings).weights


def weights_of(folder: Path, case: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case}.{rank}.safetensors")


def agreed(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What one process gets; two others leave theirs in the folder."""
    run(__file__, str(folder))
    return {case: made(case) for case in NAMES}


def one_of_two(folder: str, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in NAMES:
        weights = {key: tensor.contiguous() for key, tensor in made(name, rank).items()}
        save_file(weights, f"{folder}/{name}.{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # forked after the imports, which take longer than all the rest
    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(target=one_of_two, args=(sys.argv[1], rank)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    sys.exit(any(process.exitcode != 0 for process in pair))
