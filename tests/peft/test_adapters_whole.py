"""An adapter loads whole or not at all: PEFT itself passes over tensors that are missing or have no place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_vitprune.errors import AdapterError, CheckpointMismatchError
from hf_vitprune.peft import save_pruned_peft
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from tiny import assert_same, make, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], init_lora_weights=False)
    model = get_peft_model(make("ViTForImageClassification"), config).eval()
    small = prune(model, PruningPlan.random(model, 0.4, units=["mlp"]))
    made = tmp_path_factory.mktemp("adapter")
    save_pruned_peft(small, made)
    loaded = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(made / "base"), made).eval()
    assert_same(run(loaded), run(small))
    return made


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])  # of whole modules PEFT misses a part itself
@pytest.mark.parametrize("damage", ["gone", "renamed"])
def test_a_part_of_an_adapter_is_refused(folder: Path, tmp_path: Path, part: str, damage: str) -> None:
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(name for name in sorted(whole) if part in name)
    changed = dict(whole)
    tensor = changed.pop(name)
    if damage == "renamed":
        changed[name.replace(part, f"{part}_old")] = tensor
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    try:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatchError, match=part):
            PeftModel.from_pretrained(base, folder)
    finally:
        save_file(whole, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        *({"use_rslora": True}, {"lora_alpha": 3}, {"r": None}, {"target_modules": ["q_proj", True]}),
        *({"modules_to_save": True}, {"lora_ga_config": 1}, {"rank_pattern": {"q_proj": 3}}, {"digest": {}}),
    ],
    ids=str,
)
def test_a_config_that_was_changed_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copied / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    base = AutoModelForImageClassification.from_pretrained(copied / "base")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not as it was saved"):
        PeftModel.from_pretrained(base, copied)


def test_a_loaded_config_may_be_changed_and_saved(folder: Path, tmp_path: Path) -> None:
    config: Any = PeftConfig.from_pretrained(folder)
    changed = dataclasses.replace(config, lora_alpha=5)
    changed.save_pretrained(tmp_path)
    again: Any = PeftConfig.from_pretrained(tmp_path)
    assert again.lora_alpha == 5 and again.target_modules == config.target_modules
