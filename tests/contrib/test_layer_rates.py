"""Layer-wise learning rates, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_vitprune.contrib.augment import AugmentedTrainer, decay_by_layer, depths
from hf_vitprune.errors import InvalidConfigError
from pruning_runs import VIT, gated, trainer
from tiny import make


def test_what_comes_first_learns_slowest() -> None:
    """Three layers at 0.8: embeddings 0.8^4, layers 0.8^3 to 0.8, norm and head 1."""
    model = make(VIT).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    decay_by_layer(optimizer, model, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for start, power in (("vit.embeddings", 4), ("vit.layers.0.", 3), ("vit.layers.2.", 1), ("vit.layernorm", 0)):
        mine = [p for name, p in model.named_parameters() if name.startswith(start)]
        assert mine and all(rates[id(p)] == pytest.approx(0.5 * 0.8**power, rel=1e-12) for p in mine)
    assert rates[id(model.classifier.weight)] == 0.5
    before = model.vit.layers[0].mlp.fc1.bias.detach().clone()
    model.vit.layers[0].mlp.fc1.bias.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(model.vit.layers[0].mlp.fc1.bias.detach(), before - 0.5 * 0.512, rtol=0, atol=1e-15)


def test_patch_merging_goes_with_the_stage_before_it() -> None:
    model = make("SwinForImageClassification")  # two and three layers
    of = depths(model)
    found = {name: of[id(p)] for name, p in model.named_parameters()}
    assert found["swin.encoder.layers.0.downsample.reduction.weight"] == 2
    assert found["swin.encoder.layers.1.blocks.2.mlp.fc1.weight"] == 5
    assert found["swin.embeddings.patch_embeddings.projection.weight"] == 0
    assert found["swin.layernorm.weight"] == found["classifier.weight"] == 6


def test_in_a_training_with_gates(tmp_path: Path) -> None:
    """Gates keep their rate; weight decay stays where it was; the schedule multiplies every rate alike."""
    settings = {"kind": AugmentedTrainer, "max_steps": 4, "learning_rate": 0.1, "lr_scheduler_type": "linear"}
    model = gated(gate_learning_rate=0.3)
    run = trainer(model, tmp_path, layer_decay=0.5, weight_decay=0.05, **settings)
    run.create_optimizer_and_scheduler(4)
    groups = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    base = model.get_base_model()
    fc1, head = base.vit.layers[2].mlp.fc1, base.classifier
    assert groups[id(fc1.weight)]["lr"] == pytest.approx(0.05) and groups[id(head.weight)]["lr"] == pytest.approx(0.1)
    assert (groups[id(fc1.weight)]["weight_decay"], groups[id(fc1.bias)]["weight_decay"]) == (0.05, 0)
    assert all(groups[id(gate)]["lr"] == 0.3 for gate in model.method.gate_parameters())
    run.optimizer.step()
    run.lr_scheduler.step()
    assert groups[id(fc1.weight)]["lr"] == pytest.approx(0.75 * 0.05)
    run.train()


def test_impossible_factors() -> None:
    for decay in (0, 1.5, -0.1, float("nan"), True, "0.5"):
        with pytest.raises(InvalidConfigError, match=r"layer_decay is a factor in \(0, 1\]"):
            decay_by_layer(torch.optim.SGD(make(VIT).parameters(), lr=1.0), make(VIT), decay)
