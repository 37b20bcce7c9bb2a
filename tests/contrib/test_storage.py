"""The accounting of T tasks: counted on disk and in memory alike, and small for the models it is made for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_vitprune import prune, truncate
from hf_vitprune.contrib.storage import storage_report
from hf_vitprune.errors import AdapterError, InvalidDataError
from hf_vitprune.peft import save_pruned_peft
from hf_vitprune.plan.plan import PruningPlan
from tiny import make
from tiny_adapters import adapted

VIT = "ViTForImageClassification"


def task(folder: Path, depth: int) -> Any:
    base = AutoModelForImageClassification.from_pretrained(folder / "dense")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return truncate(adapted(base, config), depth)


def test_report(tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    tasks = {f"task {depth}": task(tmp_path, depth) for depth in (1, 2)}
    for name, model in tasks.items():
        model.save_pretrained(str(tmp_path / name))
    narrow = prune(make(VIT), PruningPlan.random(make(VIT), 0.4, seed=1))
    narrow.save_pretrained(tmp_path / "narrow")
    on_disk = storage_report(
        tmp_path / "dense", [tmp_path / name for name in tasks], {name: tmp_path / "narrow" for name in tasks}
    )
    in_memory = storage_report(make(VIT), tasks, {name: narrow for name in tasks})
    weights = sum(p.numel() for p in make(VIT).parameters())
    for report in (on_disk, in_memory):
        assert report.backbone.params == weights and report.layers == 3
        assert [t.kept_layers for t in report.tasks] == [1, 2] and [t.name for t in report.tasks] == list(tasks)
        assert [t.adapter_params for t in report.tasks] == [2 * 2 * 2 * 32, 2 * 2 * 2 * 2 * 32]  # q and v, A and B
        assert [t.head_params for t in report.tasks] == [5 * 32 + 5] * 2
        assert report.params == weights + sum(t.params for t in report.tasks)
        assert report.models_params == 2 * sum(t.numel() for t in narrow.state_dict().values())
    assert in_memory.bytes == 4 * in_memory.params and in_memory.tasks[0].bytes == 4 * in_memory.tasks[0].params
    files = [f for name in tasks for f in (tmp_path / name).iterdir()] + list((tmp_path / "dense").iterdir())
    assert on_disk.bytes == sum(file.stat().st_size for file in files)
    assert json.loads(json.dumps(on_disk.to_dict()))["tasks"][1]["kept_layers"] == 2
    console = Console(file=io.StringIO(), width=120)
    console.print(on_disk.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("task 1", "2 of 3", "backbone + 2 adapters + 2 integers", "2 models", "256", "165"):
        assert part in text, text
    # without an alternative: a copy of the backbone a task
    plain = storage_report(make(VIT), tasks)
    assert plain.models_params == 2 * weights


def test_stock_adapters_keep_all_layers(tmp_path: Path) -> None:
    model = adapted(make(VIT), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    for adapter in (model, tmp_path):
        (row,) = storage_report(make(VIT), {"all": adapter}).tasks
        assert row.kept_layers == 3 and row.adapter_params == 3 * 2 * 2 * 32 and row.head_params == 0


def test_refused(tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    truncated = task(tmp_path, 2)
    with pytest.raises(AdapterError, match=r"task 1 belongs to another backbone: a vit .* this vit of 4 layers"):
        storage_report(make(VIT, num_hidden_layers=4), [truncated])
    with pytest.raises(AdapterError, match="this deit of 3 layers"):
        storage_report(make("DeiTForImageClassification"), [truncated])
    narrow = prune(adapted(make(VIT), LoraConfig(r=2, target_modules=["q_proj"])), PruningPlan.random(make(VIT), 0.4))
    save_pruned_peft(narrow, tmp_path / "narrow")
    for adapter in (narrow, tmp_path / "narrow"):
        with pytest.raises(AdapterError, match="narrowed"):
            storage_report(make(VIT), [adapter])
    for adapter in (tmp_path, make(VIT)):
        with pytest.raises(InvalidDataError, match="adapter"):
            storage_report(make(VIT), [adapter])
    with pytest.raises(InvalidDataError, match="no model"):
        storage_report(tmp_path / "nowhere", [truncated])
    whole = sum(p.numel() for p in narrow.merge_and_unload().parameters())  # the adapter beside it is no part of it
    assert storage_report(tmp_path / "narrow", []).backbone.params == whole
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(InvalidDataError, match="no weights"):
        storage_report(tmp_path / "dense", [])


def test_vit_base_under_two_percent(tmp_path: Path) -> None:
    """ViT-B/16, LoRA r = 8 on q and v, truncated: less than one fiftieth of the backbone's bytes."""
    with torch.device("meta"):
        base, backbone = (ViTForImageClassification(ViTConfig(num_labels=100)) for _ in range(2))
    base.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    truncate(get_peft_model(base, config), 11).save_pretrained(str(tmp_path))
    report = storage_report(backbone, [tmp_path])
    assert report.backbone.bytes == 4 * report.backbone.params == 4 * (85_798_656 + 100 * 769)
    (row,) = report.tasks
    assert row.adapter_params == 11 * 2 * 2 * 8 * 768 and row.head_params == 100 * 769 and row.kept_layers == 11
    assert row.bytes < 0.02 * report.backbone.bytes
