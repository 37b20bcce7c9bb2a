"""The README: short, its snippets run and print what stands below them, its table is the one of docs/families.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_vitprune import count
from processes import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZE, "intermediate_size": 64, "image_size": 16, "patch_size": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the models and images of the snippets lie, small."""
    torch.manual_seed(0)
    text = {**SIZE, "intermediate_size": 64, "vocab_size": 99}
    digits = {str(i): i for i in range(10)}
    models = {
        "facebook/dinov2-small": Dinov2Model(
            Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
        ),
        "openai/clip-vit-base-patch32": CLIPModel(
            CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
        ),
        "hf-vitprune-demo/dense": ViTForImageClassification(
            ViTConfig(**VISION, label2id=digits, id2label={i: name for name, i in digits.items()})
        ),
    }
    for name, model in models.items():
        side = 28 if "dino" in name else 16
        for part in (model, ViTImageProcessorPil(size={"height": side, "width": side})):
            part.save_pretrained(tmp_path / name)
    (tmp_path / "drawings").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "drawings" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("snippet", range(3), ids=["images", "gates", "inside"])
def test_snippets_run_and_print_what_they_say(snippet: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = SNIPPETS[snippet]
    names: dict[str, Any] = {}
    before = {path.name for path in folder.iterdir()}
    exec(code.replace("num_train_epochs=8", "max_steps=4, use_cpu=True"), names)
    printed = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert [NUMBER.sub("#", line) for line in printed] == [NUMBER.sub("#", line) for line in output.splitlines()]
    dense = names.get("clip", names.get("model"))
    part = {"part": "vision"} if "clip" in names else {}
    assert 0.2 < count(names["small"], **part).macs / count(dense, **part).macs <= (0.55 if part else 0.5)
    made = {path.name for path in folder.iterdir()} - before - {"runs"}
    assert len(made) == 1 and (folder / made.pop() / "model.safetensors").exists()


def test_all_snippets_are_run() -> None:
    assert len(SNIPPETS) == README.count("```python") == 3


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 130


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 15 and not [link for link in links if not (ROOT / link).exists()]


def test_the_table_is_that_of_the_families() -> None:
    """Rows of several types here, one a type there."""

    def rows(text: str, title: str) -> list[dict[str, str]]:
        table = text[text.index(title) :].split("\n\n")[0].splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]

    said = {name: row for row in rows(README, "| `model_type`") for name in row["`model_type`"].split()}
    page = (ROOT / "docs" / "families.md").read_text()
    found = {row["`model_type`"]: row for row in rows(page, "| `model_type`")}
    assert said.keys() == found.keys()
    here = {"q/k": "qk", "MLP": "mlp"}
    for name, row in said.items():
        columns = [column for column in row if column != "`model_type`"]
        assert {c: row[c] for c in columns} == {c: found[name][here.get(c, c)] for c in columns}, name


def test_promises_name_tests_that_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "promises.md").read_text())
    assert len(named) > 20 and not [path for path in named if not (ROOT / path).exists()]
