"""The examples of the documentation run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from datasets import Image as ImageFeature
from PIL import Image

import toy_method
from hf_vitprune import PruningPlan, prune
from hf_vitprune.methods import config_class_of, registry
from processes import ROOT
from pruning_runs import arguments
from tiny import LABELS, images, make

DOCS = ROOT / "docs"


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_criteria(capsys, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    train = [{"pixel_values": x, "labels": torch.tensor(i % LABELS)} for i, x in enumerate(images(8))]
    names = {"model": make("ViTForImageClassification"), "train": train}
    names |= {"MyConfig": toy_method.ToyConfig, "MyMethod": toy_method.Toy}
    blocks = examples("criteria.md")
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert 0.3 < float(capsys.readouterr().out.split()[0]) <= 0.5
    assert [len(entry.mlp) for entry in names["plan"].layers] == [32] * 3
    assert config_class_of("toy") is toy_method.ToyConfig


def test_features(tmp_path: Path) -> None:
    dense = make("ViTModel")
    plan = PruningPlan.magnitude(dense, 0.5, units=["mlp"])
    data = [{"pixel_values": x} for x in images(24)]
    names = {"dense": dense, "plan": plan, "small": prune(dense, plan), "images": data}
    names |= {"train": data[:16], "held_out": data[16:]}
    names["args"] = arguments(tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    blocks = examples("features.md")
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["done"].best in names["done"].losses


def test_the_paper_index_names_files_that_are_there() -> None:
    text = (DOCS / "paper_index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.(?:py|json))", text))
    homes = [ROOT, ROOT / "hf_vitprune", ROOT / "tests", ROOT / "benchmarks" / "vtab"]
    assert len(named) > 30 and not [name for name in named if not any((home / name).is_file() for home in homes)]


def test_evaluate(tmp_path: Path, monkeypatch) -> None:
    from datasets import Dataset
    from transformers import ViTImageProcessorPil

    monkeypatch.chdir(tmp_path)
    pictures = [Image.new("RGB", (16, 16), (40 * i, 20, 10)) for i in range(6)]
    dataset = Dataset.from_dict({"image": pictures, "label": [0, 1] * 3}).cast_column("image", ImageFeature())
    names = {"model": make("ViTForImageClassification"), "dataset": dataset}
    names["processor"] = ViTImageProcessorPil(size={"height": 16, "width": 16})
    (block,) = examples("evaluate.md")
    exec(block, names)
    assert 0 <= names["metrics"]["accuracy"] <= 1 and len(names["ranks"]) == 6
    assert '"data": "pets"' in (tmp_path / "results.json").read_text()
