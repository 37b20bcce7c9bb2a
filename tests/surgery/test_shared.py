"""Layers that share parameters or modules with each other: pruned as if each had its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune import SPViTConfig, VTPConfig, get_pruning_model
from hf_vitprune.errors import ModelMismatchError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from pruning_runs import scatter_scores
from tiny import images, make

VIT = "ViTForImageClassification"


def assert_alike(made: Any, expected: Any, tolerance: float) -> None:
    with torch.no_grad():
        logits = expected(images()).logits
        assert (made(images()).logits - logits).abs().max() <= tolerance * logits.abs().max()


def shared(what: str) -> Any:
    """Of four layers two pairs share a weight, or their whole MLPs."""
    model = make(VIT, num_hidden_layers=4)
    layers = model.vit.layers
    if what == "weights":
        layers[1].mlp.fc1.weight, layers[3].mlp.fc2.weight = layers[0].mlp.fc1.weight, layers[2].mlp.fc2.weight
    else:
        layers[1].mlp, layers[3].mlp = layers[0].mlp, layers[2].mlp
    return model


@pytest.mark.parametrize("kept", [[0, 1], [1, 2], [1, 3], [0, 2, 3], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("what", ["weights", "modules"])
def test_whole_layers(what: str, kept: list[int]) -> None:
    model = shared(what)
    expected = copy.deepcopy(model)
    expected.vit.layers = nn.ModuleList(expected.vit.layers[i] for i in kept)
    plan = PruningPlan.dense(model).keep_layers(kept)
    for made in (prune(model, plan), mask(model, plan)):
        assert_alike(made, expected, 1e-6)


@pytest.mark.parametrize("units", [["mlp"], ["heads", "mlp", "embedding"]], ids="+".join)
@pytest.mark.parametrize("what", ["weights", "modules"])
def test_units(what: str, units: list[str]) -> None:
    """Each layer keeps its own units, as in a model of equal layers that share nothing."""
    model, alone = shared(what), make(VIT, num_hidden_layers=4)
    alone.load_state_dict(model.state_dict())
    plan = PruningPlan.random(model, 0.5, units)
    expected = prune(alone, plan)
    for made in (prune(model, plan), mask(model, plan)):
        assert_alike(made, expected, 1e-5)


def test_what_is_still_alike_is_one_parameter() -> None:
    model = shared("weights")
    layers = prune(model, PruningPlan.dense(model).keep_layers([1, 2, 3])).vit.layers
    assert layers[2].mlp.fc2.weight is layers[1].mlp.fc2.weight
    assert layers[0].mlp.fc1.weight is not layers[1].mlp.fc1.weight
    plan = PruningPlan.magnitude(model, 0.5, ["qk", "v"])
    for made in (prune(model, plan), mask(model, plan)):
        assert made.vit.layers[1].mlp.fc1.weight is made.vit.layers[0].mlp.fc1.weight
    assert model.vit.layers[1].mlp.fc1.weight is model.vit.layers[0].mlp.fc1.weight


@pytest.mark.parametrize("config", [VTPConfig(target=0.6, round_to=1), SPViTConfig(target=0.6, round_to=1)], ids=str)
def test_gates_and_shared_modules(config: Any) -> None:
    """One module in two layers would be gated twice; shared weights are not."""
    model = shared("modules")
    with pytest.raises(ModelMismatchError, match="vit.layers.0.mlp and vit.layers.1.mlp are one module"):
        get_pruning_model(model, config)
    layers = model.vit.layers
    layers[1].mlp, layers[3].mlp = copy.deepcopy(layers[0].mlp), copy.deepcopy(layers[2].mlp)
    for cured in (model, shared("weights")):
        gated = scatter_scores(get_pruning_model(cured, config)).eval()
        assert_alike(gated.export(compensate="none"), gated, 1e-5)
