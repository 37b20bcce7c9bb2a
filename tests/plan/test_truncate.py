"""Models cut to their first layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune.cost import count
from hf_vitprune.errors import (
    InvalidArchitectureError,
    InvalidPlanError,
)
from hf_vitprune.modeling.native import to_native
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune, truncate
from hf_vitprune.spec.architecture import Architecture
from tiny import CLASSIFIERS, images, make, relative_error, run

VIT = "ViTForImageClassification"


# ---------------------------------------------------------------------- truncation
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_truncate_keeps_the_first_layers(case: str) -> None:
    model = make(case)
    total = len(Architecture.of(model).layers)
    small = truncate(model, total - 1)
    plan = PruningPlan.dense(model).keep_layers(range(total - 1))
    assert len(Architecture.of(small).layers) == total - 1
    assert relative_error(run(small)["logits"], run(mask(model, plan))["logits"]) < 1e-5
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("k", [0, -1, 3, 4, 1.0, True, None, "2"])
def test_truncate_to_an_impossible_depth(k: Any) -> None:
    with pytest.raises(InvalidPlanError, match="1..2"):
        truncate(make(VIT), k)


@pytest.mark.parametrize("case", ["SwinForImageClassification", "SwinForMaskedImageModeling"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_truncated_swin_keeps_the_patch_merging_of_empty_stages(case: str, k: int, tmp_path: Path) -> None:
    model = make(case)  # stages of 2 and 3
    small = truncate(model, k)
    depths = (min(k, 2), max(k - 2, 0))
    assert Architecture.of(small).depths == depths and tuple(small.config.depths) == depths
    assert count(small).params == sum(p.numel() for p in small.parameters())
    by_hand = copy.deepcopy(model)
    for stage, depth in zip(by_hand.swin.encoder.layers, depths, strict=True):
        del stage.blocks[depth:]
    outputs, expected = run(small), run(by_hand)
    name = "logits" if "logits" in outputs else "reconstruction"
    assert torch.equal(outputs[name], expected[name])
    small.save_pretrained(tmp_path)
    assert torch.equal(run(type(small).from_pretrained(tmp_path))[name], outputs[name])
    plan = PruningPlan.dense(model).keep_layers(range(k))
    compensated = run(prune(model, plan, calibration=images(16, seed=2)))[name]
    assert (compensated - run(model)[name]).norm() <= 1.01 * (outputs[name] - run(model)[name]).norm()


def test_a_stock_swin_with_an_empty_stage_is_pruned_like_any_other(tmp_path: Path) -> None:
    model = to_native(truncate(make("SwinForImageClassification"), 2))
    assert model.config.depths == [2, 0]
    small = prune(model, PruningPlan.magnitude(model, 0.5, units=["mlp"], round_to=1))
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert torch.equal(run(again)["logits"], run(small)["logits"])
    plan = PruningPlan.magnitude(model, 0.5, units=["mlp"], round_to=1)
    assert relative_error(run(small)["logits"], run(mask(model, plan))["logits"]) < 1e-5


def test_a_stage_below_others_is_never_empty() -> None:
    plan = PruningPlan.dense(make("SwinForImageClassification"))
    with pytest.raises(InvalidArchitectureError, match="only the last stages can be empty"):
        plan.keep_layers([2, 3]).architecture  # noqa: B018
