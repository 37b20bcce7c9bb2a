"""SPViT: the fine-tuning that starts from fresh, unfolded convolutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_vitprune import Architecture, PruningPlan, get_pruning_model
from hf_vitprune.contrib.spvit_start import released_start
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError
from hf_vitprune.methods.spvit import SPViTTuningConfig
from hf_vitprune.spec.configs import lineage_of
from pruning_runs import VIT, Patterns, scatter_scores, spvit, state_of, trainer
from tiny import make, relative_error, run, total_loss

SWIN = "SwinForImageClassification"
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "per_device_train_batch_size": 10, "train_dataset": Patterns()}


def found(case: str = VIT, seed: int = 3) -> PruningPlan:
    """The plan of a search that has chosen convolutions and taken neurons."""
    plan = scatter_scores(spvit(case, target=0.95, round_to=1, enforce_target=False), seed).plan()
    assert {layer.mixer for layer in plan.layers} & {"conv3x3", "conv1x1"}
    return plan


@pytest.mark.parametrize("case", [VIT, SWIN])
def test_a_fresh_start_trains_unfolded_and_is_exported_folded(case: str, tmp_path: Path) -> None:
    dense, plan = make(case), found(case, 3 if case == VIT else 1)
    before = state_of(dense)
    model = released_start(dense, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    tables = {name: p for name, p in model.named_parameters() if name.endswith("table") and "branches" in name}
    kinds = [layer.mixer for layer in plan.layers]
    assert len(tables) == sum(kind.startswith("conv") for kind in kinds)
    assert all(torch.equal(table, torch.ones_like(table)) for table in tables.values())
    run_ = trainer(model, tmp_path, max_steps=3, weight_decay=0.05, **ADAMW)
    run_.train()
    # everything that is trained has a gradient: several processes would wait for it forever
    total_loss(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(not torch.equal(table, torch.ones_like(table)) for table in tables.values())
    groups = {id(p): group for group in run_.optimizer.param_groups for p in group["params"]}
    assert all(groups[id(table)]["weight_decay"] == 0.05 for table in tables.values())
    norms = [p for name, p in model.method.named_parameters() if "kernel_norm" in name]
    assert norms and all(groups[id(norm)]["weight_decay"] == 0 for norm in norms)
    small = model.eval().export()
    assert Architecture.of(small) == plan.architecture
    assert relative_error(run(model)["logits"], run(small)["logits"]) < 1e-5
    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(run(loaded)["logits"], run(small)["logits"])
    assert lineage_of(loaded.config)["method"] == "SPViT"


def test_it_starts_from_the_mean_of_the_heads() -> None:
    """A table of ones weighs all heads alike: by hand, a 1 x 1 layer of the tiny ViT."""
    dense = make(VIT)
    plan = PruningPlan.dense(dense)
    layers = [plan.layers[0].with_mixer("conv1x1", 8), *plan.layers[1:]]
    model = released_start(dense, plan.with_layers(layers)).eval().double()
    tokens = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention = model.get_base_model().vit.layers[0].attention
    out, _ = attention(tokens, patch_grid=(2, 2))
    v = attention.v_proj(tokens[:, 1:]).unflatten(-1, (4, 8)).mean(2) / (1 + 1e-5) ** 0.5
    o = attention.o_proj.weight.unflatten(1, (4, 8)).mean(1)
    torch.testing.assert_close(out[:, 1:], v.relu() @ o.T + attention.o_proj.bias)
    assert torch.equal(out[:, 0], tokens[:, 0])


def test_resumed_and_unloaded(tmp_path: Path) -> None:
    dense, plan = make(VIT), found()
    settings = {**ADAMW, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(released_start(dense, plan), tmp_path, **settings)
    whole.train()
    again = trainer(released_start(dense, plan), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = state_of(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    bare = again.model.unload()
    assert {shape.mixer for shape in Architecture.of(bare).layers} == {"attention"}
    assert run(bare)["logits"].isfinite().all()


def test_refusals() -> None:
    dense, plan = make(VIT), found()
    with pytest.raises(InvalidPlanError, match="another shape"):
        released_start(make(VIT, num_hidden_layers=2), plan)
    with pytest.raises(InvalidPlanError, match="mixers and remove neurons only"):
        released_start(dense, PruningPlan.random(dense, 0.5, units=("heads",)))
    with pytest.raises(InvalidPlanError, match="keep every layer"):
        released_start(dense, PruningPlan.random(dense, 0.4, units=("layers",)))
    with pytest.raises(InvalidConfigError, match="leave target out"):
        SPViTTuningConfig(target=0.5, mixers=["none"])
    with pytest.raises(InvalidConfigError, match="mixers are none, conv1x1, conv3x3, attention"):
        SPViTTuningConfig(mixers=["identity"])
    with pytest.raises(InvalidPlanError, match="2 mixers are given for a model of 3"):
        get_pruning_model(dense, SPViTTuningConfig(mixers=["none", "attention"]))
    small = get_pruning_model(dense, SPViTTuningConfig(mixers=["conv1x1", "attention", "none"])).export()
    with pytest.raises(InvalidPlanError, match="layer 0 has conv1x1, which conv3x3 cannot be made of"):
        get_pruning_model(small, SPViTTuningConfig(mixers=["conv3x3", "attention", "none"]))
