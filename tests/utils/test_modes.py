"""What is around a call: threads that make models of their own, and inference mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_vitprune import OneShotScores, PruningPlan, criteria, mask, prune, truncate
from tiny import images, make

VIT = "ViTForImageClassification"


def test_nothing_is_patched_while_models_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' ``no_init_weights`` is for all threads, and two of them at once leave it switched on for good."""
    functions = {name: getattr(nn.init, name) for name in ("kaiming_uniform_", "uniform_", "normal_", "ones_")}
    methods = PreTrainedModel.init_weights, PreTrainedModel.tie_weights
    made = 0
    reset = nn.Linear.reset_parameters

    def check(linear: nn.Linear) -> None:
        nonlocal made
        made += 1
        assert all(getattr(nn.init, name) is function for name, function in functions.items())
        assert PreTrainedModel.init_weights is methods[0] and torch.get_default_dtype() == torch.float32
        reset(linear)

    model = make(VIT)
    scores = criteria.random(model)
    monkeypatch.setattr(nn.Linear, "reset_parameters", check)
    small = prune(model, PruningPlan.from_scores(model, scores, target=0.5, round_to=1), calibration=images(4))
    PruningPlan.random(model, 0.5, ("heads", "mlp", "embedding"), uniform=True)
    small.save_pretrained(tmp_path / "small", portable=True)
    half = prune(make(VIT).bfloat16(), PruningPlan.from_scores(model, scores, target=0.5, round_to=1))
    assert made > 0 and {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    monkeypatch.undo()
    assert (
        AutoModelForImageClassification.from_pretrained(tmp_path / "small").num_parameters() == small.num_parameters()
    )


def test_threads_prune_at_once() -> None:
    model, pixels = make(VIT), images(4)
    plan = PruningPlan.random(model, 0.5)

    def work(_: int) -> torch.Tensor:
        return prune(model, plan, calibration=pixels)(pixels).logits.detach()

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(work, range(8))
    assert all(torch.equal(first, other) for other in others)
    linear = nn.Linear(64, 64)
    assert 0 < linear.weight.abs().max() <= 1 / 8


@pytest.mark.parametrize("call", [prune, mask, lambda model, plan: truncate(model, 2)])
def test_made_in_inference_mode_trained_later(call: Any) -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.5)
    with torch.inference_mode():
        small = call(model, plan)
        OneShotScores.measure(model, images(4))
        criteria.taylor(model, [{"pixel_values": images(4), "labels": torch.arange(4) % 5}])
    small.train()(images(4), labels=torch.arange(4) % 5).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_another_default_precision() -> None:
    model, plan, pixels = make(VIT), PruningPlan.random(make(VIT), 0.5), images(4)
    expected = prune(model, plan, calibration=pixels).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = prune(model, plan, calibration=pixels).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
