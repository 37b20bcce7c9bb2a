"""Fields of a pruned folder's config.json that the forward pass reads: not changed without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, ViTForImageClassification

from hf_vitprune.errors import InvalidArchitectureError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from tiny import LABELS, assert_same, make, run
from tiny_composites import dual

VIT = "ViTForImageClassification"


def saved(folder: Path, name: str = VIT, **kwargs: Any) -> Any:
    model = make(name)
    small = prune(model, PruningPlan.random(model, 0.4, units=["mlp"]), stock=False)
    small.save_pretrained(folder, **kwargs)
    return small


def edit(folder: Path, path: str, value: Any) -> None:
    fields = json.loads((folder / "config.json").read_text())
    *parents, name = path.split(".")
    inner = fields
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        (VIT, "layer_norm_eps", 0.1),
        (VIT, "hidden_act", "relu"),
        ("SwinForImageClassification", "layer_norm_eps", 0.1),
        ("Dinov2ForImageClassification", "apply_layernorm", False),
        ("DINOv3ViTModel", "rope_theta", 10.0),
        ("BeitForImageClassification", "use_mean_pooling", False),
        ("CLIPForImageClassification", "vision_config.hidden_act", "relu"),
    ],
)
def test_another_value_is_refused_by_name(name: str, path: str, value: Any, tmp_path: Path) -> None:
    small = saved(tmp_path, name)
    assert_same(run(type(small).from_pretrained(tmp_path).eval()), run(small))
    edit(tmp_path, path, value)
    with pytest.raises(InvalidArchitectureError, match=rf"for {path}, and said .* load with from_pretrained\("):
        AutoModel.from_pretrained(tmp_path)


def test_what_was_not_there_and_a_damaged_note(tmp_path: Path) -> None:
    saved(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["qkv_bias"], fields["sealed_fields"]["qkv_bias"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    AutoModel.from_pretrained(tmp_path)
    edit(tmp_path, "qkv_bias", True)
    with pytest.raises(InvalidArchitectureError, match="qkv_bias, and said 'nothing'"):
        AutoModel.from_pretrained(tmp_path)
    edit(tmp_path, "sealed_fields", 3)
    with pytest.raises(InvalidArchitectureError, match="3 for sealed_fields"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("portable", [False, True])
def test_on_purpose_and_saved_again(portable: bool, tmp_path: Path) -> None:
    small = saved(tmp_path / "a", portable=portable)
    other = AutoModelForImageClassification.from_pretrained(tmp_path / "a", layer_norm_eps=0.1).eval()
    assert not hasattr(other.config, "sealed_fields")
    assert portable != ("sealed_fields" in json.loads((tmp_path / "a" / "config.json").read_text()))
    norms = [module for module in other.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {0.1}
    assert not torch.equal(run(other)["logits"], run(small)["logits"])
    other.save_pretrained(tmp_path / "b", portable=portable)
    assert_same(run(AutoModelForImageClassification.from_pretrained(tmp_path / "b").eval()), run(other))


def test_what_is_free(tmp_path: Path) -> None:
    """Names of classes, dropout, keywords of transformers; and folders from before there was the note."""
    small = saved(tmp_path)
    names = {str(i): f"class {i}" for i in range(LABELS)}
    for path, value in (("id2label", names), ("hidden_dropout_prob", 0.3), ("problem_type", None), ("note", "mine")):
        edit(tmp_path, path, value)
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_hidden_states=True
    ).eval()
    torch.testing.assert_close(run(loaded)["logits"], run(small)["logits"])
    assert loaded.config.id2label[1] == "class 1"
    wider = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert wider.classifier.out_features == 9
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["sealed_fields"]
    fields["layer_norm_eps"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.layer_norm_eps == 0.1


def test_a_tower_in_a_bigger_model(tmp_path: Path) -> None:
    model = dual("CLIP")()[0]
    small = prune(model, PruningPlan.random(model, 0.4, units=["qk"], part="vision"))
    small.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)
    edit(tmp_path, "vision_config.layer_norm_eps", 0.1)
    with pytest.raises(InvalidArchitectureError, match="layer_norm_eps"):
        AutoModel.from_pretrained(tmp_path)


def test_a_stock_folder_has_no_note(tmp_path: Path) -> None:
    """Nothing of this package reads it."""
    model = make(VIT)
    small = prune(model, PruningPlan.magnitude(model, 0.5, units=["mlp"]))
    small.save_pretrained(tmp_path)
    assert type(small) is ViTForImageClassification
    assert "sealed_fields" not in json.loads((tmp_path / "config.json").read_text())
