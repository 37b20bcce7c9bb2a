"""Layers that share norms with each other (shared Linears are refused at the door): pruned as if each had its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from tiny import images, make

VIT = "ViTForImageClassification"


def assert_alike(made: Any, expected: Any, tolerance: float) -> None:
    with torch.no_grad():
        logits = expected(images()).logits
        assert (made(images()).logits - logits).abs().max() <= tolerance * logits.abs().max()


def shared(what: str) -> Any:
    """Of four layers two pairs share a norm, or its weight."""
    model = make(VIT, num_hidden_layers=4)
    layers = model.vit.layers
    if what == "weights":
        layers[1].layernorm_before.weight = layers[0].layernorm_before.weight
        layers[3].layernorm_after.weight = layers[2].layernorm_after.weight
    else:
        layers[1].layernorm_before, layers[3].layernorm_after = layers[0].layernorm_before, layers[2].layernorm_after
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
    assert layers[2].layernorm_after.weight is layers[1].layernorm_after.weight
    assert layers[0].layernorm_before.weight is not layers[1].layernorm_before.weight
    plan = PruningPlan.magnitude(model, 0.5, ["qk", "v"])
    for made in (prune(model, plan), mask(model, plan)):
        assert made.vit.layers[1].layernorm_before.weight is made.vit.layers[0].layernorm_before.weight
    assert model.vit.layers[1].layernorm_before.weight is model.vit.layers[0].layernorm_before.weight
