"""The dense models: small, trained here once for every task and seed, and shared by all methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, SwinConfig, ViTConfig

from hf_vitprune.errors import InvalidConfigError

from ..common import vit_config
from .tasks import Task
from .training import fit

#: optimizer steps and learning rate of the dense models
STEPS, LEARNING_RATE = 1000, 2e-3
#: deviation of first weights: about width**-0.5; with the 0.02 of large models, so narrow ones learn far slower
INITIAL = 0.08


def shaped(task: Task, patches: int) -> dict[str, Any]:
    """What a config says of a task's images, cut into so many patches a side, and of its classes."""
    patch = task.image_size // patches
    images = {"image_size": task.image_size, "patch_size": patch, "num_channels": 1}
    return {**images, "num_labels": task.classes, "initializer_range": INITIAL}


def vit(task: Task) -> ViTConfig:
    """Six layers of width 64 on 4 x 4 patches."""
    return vit_config(64, 6, 4, **shaped(task, 4))


def swin(task: Task) -> SwinConfig:
    """Two stages of two and four layers, widths 32 and 64, windows of 4 x 4 on 8 x 8 patches."""
    return SwinConfig(embed_dim=32, depths=[2, 4], num_heads=[2, 4], window_size=4, **shaped(task, 8))


FAMILIES: dict[str, Callable[[Task], Any]] = {"vit": vit, "swin": swin}


def dense_model(family: str, task: Task, seed: int, folder: Path) -> Any:
    """The trained dense model; it is trained when ``folder`` does not have it."""
    if family not in FAMILIES:
        raise InvalidConfigError(f"families are {', '.join(FAMILIES)}; not {family!r}")
    path = folder / f"{family}-{task.name}-{seed}"
    if not (path / "model.safetensors").is_file():
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(FAMILIES[family](task))
        fit(model, task, STEPS, LEARNING_RATE, seed, what=f"training the dense {family} on {task.name}")
        unfinished = path.with_name(f".{path.name}.unfinished")
        model.save_pretrained(unfinished)
        unfinished.rename(path)
    return AutoModelForImageClassification.from_pretrained(path).eval()
