"""Mixers in the place of attention: grids, records and plans that are none are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_vitprune.errors import InvalidArchitectureError, InvalidPlanError, TokenGridError
from hf_vitprune.families import VIT
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.spec.architecture import Architecture
from tiny import (
    CASES,
    hybrid,
    images,
    make,
    run,
)

VIT_CASE = "ViTForImageClassification"


# ---------------------------------------------------------------------- what is refused
def test_tokens_that_are_no_grid() -> None:
    model = hybrid(VIT_CASE)
    encoder = model.vit
    with pytest.raises(TokenGridError, match="attention_mask"):
        encoder(images(), attention_mask=torch.ones(2, 5))
    with pytest.raises(TokenGridError, match="not told the grid"):
        encoder.layers[0](torch.randn(2, 5, 32))
    drop = encoder.layers[0].register_forward_pre_hook(lambda m, args: (args[0][:, :-1], *args[1:]))
    with pytest.raises(TokenGridError, match="4 tokens, which are not 1 special ones and a grid of 2 x 2"):
        run(model)
    drop.remove()
    run(model)


def test_families_whose_grid_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIT.__dict__, "convolutions", False)
    config = CASES[VIT_CASE].config()
    Architecture.from_layers(config, [{"mixer": "identity"}])
    with pytest.raises(InvalidArchitectureError, match="layer 0: vit models cannot mix tokens by conv3x3"):
        Architecture.from_layers(config, [{"mixer": "conv3x3"}])


@pytest.mark.parametrize(
    "row",
    [
        {"mixer": "conv5x5"},
        {"mixer": "conv3x3", "heads": 2},
        {"mixer": "conv3x3", "attention_in": 3},
        {"mixer": "conv3x3", "conv_channels": 0},
        {"mixer": "conv3x3", "conv_channels": None},
        {"mixer": "conv3x3", "batch_norm": 1},
        {"mixer": "identity", "v_dim": 4},
        {"mixer": "identity", "conv_channels": 4},
        {"mixer": "none", "qk_dim": 4},
        {"conv_channels": 4},
        {"batch_norm": True},
    ],
)
def test_impossible_mixers(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidArchitectureError, match="layer 1: "):
        Architecture.from_layers(CASES[VIT_CASE].config(), [{}, row])


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "attention"},
        {"mixer": "none"},
        {"conv_channels": "8"},
        {"batch_norm": None},
        {"num_attention_heads": 2},
        {"skip": ["attention"]},
    ],
)
def test_damaged_records(changes: dict[str, Any]) -> None:
    config = hybrid(VIT_CASE).config
    config.pruning_config["per_layer_config"]["0"].update(changes)
    with pytest.raises(InvalidArchitectureError, match="layer 0: "):
        Architecture.from_config(config)


def test_impossible_plans() -> None:
    plan = PruningPlan.dense(hybrid(VIT_CASE))
    entries = list(plan.layers)
    for change in (
        lambda e: e.with_mixer("attention"),
        lambda e: PruningPlan.dense(make(VIT_CASE)).layers[0],
    ):
        with pytest.raises(InvalidPlanError, match="layer 0: "):
            plan.with_layers([change(entries[0]), *entries[1:]]).validated()
    gone = plan.with_layers([entries[0].with_mixer("none"), *entries[1:]]).architecture
    with pytest.raises(InvalidPlanError, match="layer 0: mixer 'conv1x1' cannot be made from 'none'"):
        plan = PruningPlan.dense(gone)
        plan.with_layers([plan.layers[0].with_mixer("conv1x1", 4), *plan.layers[1:]]).validated()
