"""Failures of other pruners, each shown not to happen here (those about PEFT adapters are in test_adapters.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig

from hf_vitprune.cost import count
from hf_vitprune.cost.closed_form import cost_parts
from hf_vitprune.errors import CheckpointMismatchError, InvalidPlanError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from hf_vitprune.spec.architecture import Architecture
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run

VIT = "ViTForImageClassification"


def halved_heads(model: PreTrainedModel) -> PruningPlan:
    """Every second q, k and v channel of every head."""
    plan = PruningPlan.dense(model)
    return plan.with_layers(
        e.keep_channels("qk", range(0, s.qk_dim, 2)).keep_channels("v", range(0, s.v_dim, 2))
        for e, s in zip(plan.layers, plan.source.layers, strict=True)
    )


# 1. a v5 ViT with narrower heads runs and returns wrong logits
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_1_narrower_heads_are_not_merged(case: str) -> None:
    model = make(case)
    plan = halved_heads(model)
    small = prune(model, plan)
    logits, exact = run(small)["logits"], run(mask(model, plan))["logits"]
    assert relative_error(logits, exact) < 1e-5
    for shape, dense in zip(Architecture.of(small).layers, plan.source.layers, strict=True):
        assert (shape.heads, shape.qk_dim * 2) == (dense.heads, dense.qk_dim)


def test_1_what_the_stock_forward_does_with_the_same_weights() -> None:
    """The failure itself: the stock attention takes 4 heads of 4 for 2 heads of 8, without a word."""
    model = make(VIT)
    small = prune(model, halved_heads(model))
    broken = make(VIT)
    for layer, narrow in zip(broken.vit.layers, small.vit.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.attention, name, getattr(narrow.attention, name))
    assert relative_error(run(broken)["logits"], run(small)["logits"]) > 0.01


# 2. an optimizer built before pruning keeps dead tensors
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_2_the_optimizer_sees_every_live_parameter(case: str) -> None:
    model = make(case)
    stale = torch.optim.SGD(model.parameters(), lr=1.0)
    small = prune(model, PruningPlan.random(model, 0.4))
    held = {id(p) for group in stale.param_groups for p in group["params"]}
    # pruning makes a new model: an optimizer of the old one has none of its tensors, so nothing is trained by halves
    assert not held & {id(p) for p in small.parameters()}

    optimizer = torch.optim.SGD(small.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    nn.functional.cross_entropy(small(pixel_values=images()).logits, torch.tensor([0, 3])).backward()
    optimizer.step()
    still = {name for name, p in small.named_parameters() if torch.equal(p, before[name])}
    no_gradient = {name for name, p in small.named_parameters() if p.grad is None}
    # a shift of every key leaves the softmax as it is; heads and tokens that no logit reads have no gradient
    assert all("k_proj.bias" in name or name in no_gradient for name in still)
    assert all("mask_token" in name or ".head." in name or "post_layernorm" in name for name in no_gradient)


# 5. a pruned model with no parameter removed, and no complaint
@pytest.mark.parametrize("case", CLASSIFIERS)
@pytest.mark.parametrize(
    "make_plan",
    [
        PruningPlan.dense,
        lambda model: PruningPlan.random(model, 0.01, units=["heads"]),
        lambda model: PruningPlan.random(model, 0.1, units=["qk", "v"], round_to=4),
        lambda model: PruningPlan.magnitude(model, 0.1, units=["layers"]),
    ],
    ids=["dense", "small ratio", "rounded away", "no layer"],
)
def test_5_pruning_that_removes_nothing_says_so(case: str, make_plan: Callable[[Any], PruningPlan]) -> None:
    model = make(case)
    with pytest.raises(InvalidPlanError, match="removes n"):
        prune(model, make_plan(model))


# 6. counters that miss the two attention matmuls
def test_6_macs_include_both_attention_matmuls() -> None:
    config = ViTConfig(num_labels=1000)
    cost = count(Architecture.dense(config))
    assert cost.macs == pytest.approx(17.564e9, rel=1e-4)
    matmuls = 12 * 2 * 197 * 197 * 768
    assert cost.macs - matmuls == pytest.approx(16.85e9, rel=1e-3)  # what counters of modules give
    parts = {part.name: part.macs for part in cost_parts(Architecture.dense(config))}
    assert parts["layer 0 attention"] == 197 * 4 * 768 * 768 + 2 * 197 * 197 * 768


@pytest.mark.parametrize("unit", ["qk", "v"])
def test_6_each_matmul_follows_its_own_width(unit: str) -> None:
    model = make(VIT)
    plan = PruningPlan.dense(model)
    half = plan.with_layers(entry.keep_channels(unit, range(4)) for entry in plan.layers)
    tokens, channels, width = 5, 4 * 4, 32
    matrices = 2  # q and k, or v and the output
    saved = 3 * (tokens * matrices * channels * width + tokens * tokens * channels)
    assert count(plan.architecture).macs - count(half.architecture).macs == saved


# 7. the reload
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_7_reload_needs_no_pickle_and_no_flag(case: str, tmp_path: Path) -> None:
    model = make(case)
    small = prune(model, halved_heads(model))
    small.save_pretrained(tmp_path)
    assert_same(run(AutoModelForImageClassification.from_pretrained(tmp_path)), run(small))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]


@pytest.mark.parametrize(("stated", "message"), [(2, "also holds"), (4, "config.json says|lacks")])
def test_7_a_depth_that_is_not_the_checkpoints_is_refused(stated: int, message: str, tmp_path: Path) -> None:
    """A layer-pruned model saved under its old depth reloads elsewhere as a deep one with random layers."""
    model = make(VIT, num_hidden_layers=5)
    small = prune(model, PruningPlan.dense(model).keep_layers([0, 2, 4]), stock=False)
    other = prune(model, PruningPlan.dense(model).keep_layers(range(stated)), stock=False)
    other.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path / "weights")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "weights" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointMismatchError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == stated
    assert len({name.split(".")[2] for name in load_file(tmp_path / "model.safetensors") if ".layers." in name}) == 3
