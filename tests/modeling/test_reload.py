"""Pruned folders and classes: none that would leave something out loads them, and every cure works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_vitprune.errors import CheckpointMismatchError
from hf_vitprune.modeling import pruned_model_class
from hf_vitprune.modeling.folder import NOT_STOCK
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import load_pruned, prune
from plans import plan_named, without_a_layer
from processes import run_python
from quick import mostly_slow
from tiny import ALL_LAYERS, CASES, CLASSIFIERS, assert_same, images, make, reset_weights, run

VIT = "ViTForImageClassification"


class MeanPooled(ViTForImageClassification):
    """Another forward, and another Linear."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.age = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutput:
        pooled = self.vit(pixel_values).last_hidden_state[:, 1:].mean(1)
        return ImageClassifierOutput(logits=torch.cat([self.classifier(pooled), self.age(pooled)], 1))


def mean_pooled(seed: int = 0) -> MeanPooled:
    model = MeanPooled(make(VIT).config)
    reset_weights(model, seed)
    return model.eval()


def with_head(case: str, seed: int = 0) -> PreTrainedModel:
    """An MLP head of 3 classes, and a frozen tensor."""
    model = make(case)
    width = model.classifier.in_features
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 3))
    reset_weights(model, seed)
    next(model.parameters()).requires_grad_(False)
    return model.eval()


def assert_exact(loaded: PreTrainedModel, small: PreTrainedModel) -> None:
    """The same tensors, and outputs to the last bit."""
    assert type(loaded) is type(small)
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert dict(loaded.named_buffers()).keys() == dict(small.named_buffers()).keys()
    assert all(torch.equal(buffer, small.get_buffer(name)) for name, buffer in loaded.named_buffers())
    for parameter in loaded.parameters():  # tensors in a mapped file are not aligned, which changes kernels
        parameter.data = parameter.data.clone()
    assert_same(run(loaded), run(small))


# ---------------------------------------------------------------------- stock classes
@pytest.mark.parametrize("case", mostly_slow(CASES))
def test_stock_classes_refuse_and_say_why(case: str, tmp_path: Path) -> None:
    """With layers removed alone, every tensor that a stock class looks for is there."""
    model = make(case)
    layers = PruningPlan.dense(model)
    mlp = layers.with_layers(replace(e, mlp=tuple(range(4 + 4 * (e.index == 0)))) for e in layers.layers)
    plans = {"sizes": mlp} if case == ALL_LAYERS else {"sizes": mlp, "layers": without_a_layer(model)}
    for name, plan in plans.items():
        small = prune(model, plan, stock=False)
        small.save_pretrained(tmp_path / name)
        for loose in (False, True):
            with pytest.raises(Exception, match=NOT_STOCK[:60]):
                type(model).from_pretrained(tmp_path / name, ignore_mismatched_sizes=loose)
        loaded = type(small).from_pretrained(tmp_path / name)
        assert_exact(loaded, small)
        assert loaded.config.pruning_config == small.config.pruning_config


def test_folders_of_format_version_1_load(tmp_path: Path) -> None:
    model = make(VIT)
    small = prune(model, plan_named("padded values", model))
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pruning_config"]["version"] == 2 and config["hidden_size"] == NOT_STOCK
    config["pruning_config"]["version"] = 1
    config["hidden_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_exact(AutoModelForImageClassification.from_pretrained(tmp_path), small)


# ---------------------------------------------------------------------- classes of users
def test_a_class_of_ones_own(tmp_path: Path) -> None:
    model = mean_pooled()
    small = prune(model, plan_named("padded values", model))
    small.save_pretrained(tmp_path)
    for refused in (AutoModelForImageClassification, pruned_model_class(ViTForImageClassification)):
        with pytest.raises(CheckpointMismatchError, match=r"MeanPooled.* its modules age would be left out"):
            refused.from_pretrained(tmp_path)
    for loaded in (pruned_model_class(MeanPooled).from_pretrained(tmp_path), load_pruned(mean_pooled(5), tmp_path)):
        assert_exact(loaded, small)
    encoder = AutoModel.from_pretrained(tmp_path)  # which is what it was
    assert torch.equal(encoder(images()).last_hidden_state, small.vit(images()).last_hidden_state)


def test_what_was_changed_after_the_class_had_made_it(tmp_path: Path) -> None:
    model = mean_pooled()
    model.age = nn.Identity()
    small = prune(model, plan_named("padded values", model))
    small.save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError, match="age is a torch.nn.modules.linear.Identity"):
        pruned_model_class(MeanPooled).from_pretrained(tmp_path)
    given = mean_pooled(5)
    with pytest.raises(CheckpointMismatchError, match="age is a torch.nn.modules.linear.Identity in the pruned model"):
        load_pruned(given, tmp_path)
    given.age = nn.Identity()
    assert_exact(load_pruned(given, tmp_path), small)


STOCK = """
import sys, torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification
class MyViT(ViTForImageClassification):
    pass
model = MyViT.from_pretrained(sys.argv[1]).eval()
assert "hf_vitprune" not in sys.modules
print(type(model).__name__, len(model.vit.layers))
"""


@pytest.mark.slow
def test_a_stock_shape_of_ones_own_class_needs_no_library(tmp_path: Path) -> None:
    model = mean_pooled()
    small = prune(model, PruningPlan.dense(model).keep_layers([0, 2]))
    assert type(small) is MeanPooled
    small.save_pretrained(tmp_path)
    assert_exact(MeanPooled.from_pretrained(tmp_path), small)
    assert_exact(load_pruned(mean_pooled(5), tmp_path), small)
    assert run_python(STOCK, str(tmp_path)) == "MyViT 2\n"


# ---------------------------------------------------------------------- load_pruned
@pytest.mark.parametrize("plan_name", ["everything", "layers", "padded values"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_heads_and_activations_of_ones_own(case: str, plan_name: str, tmp_path: Path) -> None:
    model = with_head(case)
    plan = plan_named(plan_name, model)
    assert plan is not None
    for stock in (True, False):
        small = prune(model, plan, stock=stock)
        small.save_pretrained(tmp_path / str(stock), max_shard_size="6KB")
        loaded = load_pruned(with_head(case, seed=5), tmp_path / str(stock))
        assert_exact(loaded, small)
        assert not next(loaded.parameters()).requires_grad
        if type(small) is not type(model):
            with pytest.raises(CheckpointMismatchError, match="modules classifier.*load_pruned"):
                AutoModelForImageClassification.from_pretrained(tmp_path / str(stock), ignore_mismatched_sizes=True)


def test_other_dense_models_are_refused(tmp_path: Path) -> None:
    model = make(VIT)
    small = prune(model, plan_named("padded values", model))
    small.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "dense")
    for given, folder, message in (
        (make(VIT, num_hidden_layers=4), "small", "was made from a vit of 3 layers .* a vit of 4 layers"),
        (make("DeiTForImageClassification"), "small", "was made from a vit"),
        (make(VIT), "dense", "holds no pruned model"),
        (small, "small", "is pruned itself"),
        (with_head(VIT), "small", r"lacks 4 of its tensors \(first: classifier.1.bias\)"),
    ):
        with pytest.raises(CheckpointMismatchError, match=message):
            load_pruned(given, tmp_path / folder)


def test_a_keyword_that_transformers_passes_over_is_refused(tmp_path: Path) -> None:
    small = prune(make(VIT), PruningPlan.random(make(VIT), 0.4), stock=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'portabel'"):
        small.save_pretrained(tmp_path / "small", portabel=True)
    assert not (tmp_path / "small").exists()
    small.save_pretrained(tmp_path / "small", safe_serialization=True, max_shard_size="1GB", is_main_process=True)
