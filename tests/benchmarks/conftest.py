"""What sweeps of VTAB-1k run on here: a task of noise, a tiny source model, settings of seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.vtab.settings import Recipe, Settings
from vtab_data import write_task

SIZES = {"train800": 32, "val200": 8, "test": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for kitti: 4 classes of noise, told apart by brightness."""
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "kitti", sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "pretrained" model with a head for other classes."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=7,
    )
    folder = tmp_path_factory.mktemp("source")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(source: Path) -> Settings:
    return Settings(
        model=str(source),
        recipe=Recipe(epochs=2, warmup_epochs=1, learning_rate=1e-2, batch_size=8),
        rank=2,
        any_size=True,
        selection=False,
        speed_batch=2,
        speed_rounds=1,
    )
