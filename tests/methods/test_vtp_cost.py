"""VTP: what a ratio of the channels saves, and targets in multiply-adds and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassification

from hf_vitprune import PruningPlan, VTPConfig, count
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.errors import (
    UnreachableTargetError,
)
from hf_vitprune.methods import method_for
from pruning_runs import VIT, gated, scatter_scores

SIZES = {"attention_in": 32, "attention_out": 32, "mlp_in": 32, "mlp_hidden": 48}


def deit_base(**settings: Any) -> PruningPlan:
    """The plan for a DeiT-B (100 classes, without weights) with uniformly random scores."""
    with torch.device("meta"):
        model = DeiTForImageClassification(DeiTConfig(num_labels=100))
    config = VTPConfig(**settings)
    method = method_for(config)(config, model)
    method.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for one in method.gates.values():
        one.mask.fill_(1)
        one.score.data.copy_(torch.rand(len(one.score), generator=generator))
    return method.choose()


@pytest.mark.parametrize(("ratio", "paper_params", "paper_macs"), [(0.4, 0.453, 0.430), (0.2, 0.221, 0.220)])
def test_savings_on_deit_base_are_near_the_papers(ratio: float, paper_params: float, paper_macs: float) -> None:
    """Of a block's 12 d^2 weights, 7 are cut on one side (q, k, o, fc2) and 5 on both (v, fc1).

    With scores that fall alike everywhere, a ratio r leaves 7 (1-r) + 5 (1-r)^2 of 12: half of them at 40 %. The
    paper's learned scores fall unalike (it prints 45.3 % and 43.0 % on ImageNet-100, 22.1 % and 22.0 % at 20 % on
    ImageNet-1K), and it may count v or fc1 on one side only, which gives 40 % at the least.
    """
    plan = deit_base(pruning_ratio=ratio)
    dense, small = count(plan.source), count(plan.architecture)
    params, macs = 1 - small.params / dense.params, 1 - small.macs / dense.macs
    keep = 1 - ratio
    blocks = 12 * 12 * 768**2 / dense.params
    assert params == pytest.approx(blocks * (1 - (7 * keep + 5 * keep**2) / 12), abs=0.01)
    assert params == pytest.approx(paper_params, abs=0.055)
    assert macs == pytest.approx(paper_macs, abs=0.055)
    assert params > ratio and macs > ratio


# ---------------------------------------------------------------------- targets
@pytest.mark.parametrize("round_to", [1, 4])
def test_target_is_met_by_the_weakest_threshold(round_to: int) -> None:
    """The plans of all thresholds, one by one: the chosen one meets the target, the next weaker one does not."""
    method = scatter_scores(gated(VIT, {"num_hidden_layers": 2})).method
    total = 2 * sum(SIZES.values())

    def plan_of(**settings: Any) -> PruningPlan:
        method.config = VTPConfig(round_to=round_to, **settings)
        return method.choose()

    plans = [plan_of(pruning_ratio=k / total) for k in range(1, total)]
    places: dict[str, int] = {}
    for k, plan in enumerate(plans):
        places.setdefault(str(plan.layers), k)
    for metric in ("macs", "params"):
        meter = ClosedFormMeter(metric, plans[0].source)
        ratios = [meter.ratio(p.architecture) for p in plans]
        for target in (0.4, 0.5, 0.61, 0.8):
            k = places[str(plan_of(target=target, target_metric=metric).layers)]
            assert target - 0.06 < ratios[k] <= target < ratios[k - 1]  # a step of a head is worth 0.05


def test_macs_are_counted_at_the_size_asked_for() -> None:
    """Attention grows with the square of the tokens and is cut less, so a larger image needs a stronger cut."""
    plans = [deit_base_like(image_size) for image_size in (None, 256)]
    assert count(plans[1].architecture).macs < count(plans[0].architecture).macs
    assert count(plans[1].architecture, 256).macs <= 0.6 * count(plans[1].source, 256).macs


def deit_base_like(image_size: int | None) -> PruningPlan:
    return scatter_scores(gated(VIT, {"patch_size": 4}, target=0.6, image_size=image_size)).method.choose()


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_an_unreachable_target_raises_before_any_training(metric: str) -> None:
    with pytest.raises(UnreachableTargetError, match=r"0\.0[0-9]+ of the " + metric + r".*smallest model.*round_to"):
        gated(target=0.02, target_metric=metric)
    with pytest.raises(UnreachableTargetError):
        gated(target=0.6, target_metric=metric, points=["mlp_in"])
