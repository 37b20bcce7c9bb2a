"""Training without a Trainer, and with one whose callback was forgotten: what was not learned is not decided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, default_data_collator

from hf_vitprune import NViTConfig, PruningModel, SPViTConfig, TruncationConfig, VTPConfig, get_pruning_model
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError, NotFiniteError
from pruning_runs import SMALL_GROUPS, VIT, Patterns, gated, lora_model, nvit, state_of, trainer
from tiny import assert_same, images, make, run

CONFIGS: dict[str, Callable[[], Any]] = {
    "VTP": lambda: VTPConfig(pruning_ratio=0.4, round_to=4, sparsity_weight=0.01),
    "NViT": lambda: NViTConfig(target=0.6, group_sizes=SMALL_GROUPS),
    "NViT magnitude": lambda: NViTConfig(target=0.6, group_sizes=SMALL_GROUPS, criterion="magnitude"),
    "SPViT": lambda: SPViTConfig(target=0.6, gate_learning_rate=1.0, round_to=4),
}


def own_loop(model: PruningModel, steps: int = 4, guided: bool = True) -> None:
    """Plain SGD at 0.1, four images a step in the order of the data."""
    optimizer = torch.optim.SGD(model.parameter_groups(), lr=0.1)
    data = Patterns(4 * steps)
    model.train()
    for step in range(steps):
        batch = default_data_collator([data[i] for i in range(4 * step, 4 * step + 4)])
        model(**batch).loss.backward()
        if guided:
            model.before_step(step, steps)
        optimizer.step()
        if guided:
            model.after_step(step, steps)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_own_loop_ends_like_a_trainer(name: str, tmp_path: Path) -> None:
    mine, theirs = (get_pruning_model(make(VIT), CONFIGS[name]()) for _ in range(2))
    data = Patterns(16)
    run_ = trainer(theirs, tmp_path, max_steps=4, train_dataset=data)
    run_._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    run_.train()
    own_loop(mine)
    mine.decide()
    if name != "SPViT":  # which draws gates: the Trainer has drawn other random numbers before
        assert_same(mine.state_dict(), state_of(theirs))
    assert mine.plan().architecture != mine.method.architecture
    before = get_pruning_model(make(VIT), CONFIGS[name]())
    assert any(not torch.equal(mine.state_dict()[key], t) for key, t in before.state_dict().items())


def test_the_penalty_is_a_gradient_of_the_gates_alone() -> None:
    model = gated(sparsity_weight=0.05).train()
    penalty = model.before_step(0, 10)
    gates = model.method.gate_parameters()
    assert penalty is not None and penalty.item() == pytest.approx(0.05 * sum(g.numel() for g in gates))
    assert all(torch.equal(g.grad, torch.full_like(g, 0.05)) for g in gates)
    assert all(p.grad is None for p in model.model.parameters())
    model.before_step(1, 10)
    assert all(torch.allclose(g.grad, torch.full_like(g, 0.1)) for g in gates)


@pytest.mark.parametrize("wrapped", ["stock", "LoRA"])
def test_parameter_groups_hold_every_live_parameter_once(wrapped: str) -> None:
    inner = make(VIT) if wrapped == "stock" else lora_model()
    model = get_pruning_model(inner, VTPConfig(target=0.5, gate_learning_rate=0.7))
    weights, gates = model.parameter_groups(weight_decay=0.3)
    live = {id(p) for p in model.parameters() if p.requires_grad}
    assert [id(p) for p in gates["params"]] == [id(p) for p in model.method.gate_parameters()]
    assert sorted(map(id, weights["params"] + gates["params"])) == sorted(live)
    assert (weights["weight_decay"], gates["weight_decay"], gates["lr"]) == (0.3, 0.0, 0.7)
    assert len(get_pruning_model(make(VIT), TruncationConfig(layers=2)).parameter_groups()) == 1


# ---------------------------------------------------------------------- nothing learned
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loop_without_the_method_is_not_exported(name: str) -> None:
    model = get_pruning_model(make(VIT), CONFIGS[name]())
    own_loop(model, guided=False)
    for export in (model.plan, model.export, model.decide):
        with pytest.raises(InvalidPlanError, match=r"was trained without .*before_step\(\) and after_step\(\)"):
            export()
    own_loop(model)  # the cure
    model.export()


@pytest.mark.parametrize("name", ["VTP", "NViT", "SPViT"])
@pytest.mark.parametrize("wrapped", ["stock", "LoRA"])
def test_no_training_at_all_is_not_exported(name: str, wrapped: str) -> None:
    if name == "SPViT" and wrapped == "LoRA":
        pytest.skip("SPViT takes no adapters")
    model = get_pruning_model(make(VIT) if wrapped == "stock" else lora_model(), CONFIGS[name]())
    with pytest.raises((InvalidPlanError, RuntimeError), match="train the PruningModel first"):
        model.export()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forgotten_callback_is_found_at_the_first_step(name: str, tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), CONFIGS[name]())
    before = state_of(model)
    with pytest.raises(InvalidConfigError, match="this Trainer has no PruningCallback"):
        trainer(model, tmp_path, kind=Trainer).train()
    assert_same(model.state_dict(), before)


def test_a_look_at_the_gradients_is_no_training() -> None:
    model = get_pruning_model(make(VIT), CONFIGS["NViT magnitude"]()).train()
    model(images(2), labels=torch.tensor([0, 1])).loss.backward()
    assert model.export() is not None


def test_truncation_needs_no_callback(tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), TruncationConfig(layers=2))
    trainer(model, tmp_path, kind=Trainer).train()
    assert len(model.export().vit.layers) == 2


@pytest.mark.parametrize("make_model", [gated, nvit, lambda: get_pruning_model(make(VIT), TruncationConfig(layers=2))])
def test_a_diverged_training_is_not_exported(make_model: Callable[[], PruningModel], tmp_path: Path) -> None:
    class Broken(Patterns):
        def __getitem__(self, i: int) -> dict[str, Any]:
            row = super().__getitem__(i)
            return {**row, "pixel_values": row["pixel_values"] * float("nan" if i == 5 else 1)}

    with pytest.raises(NotFiniteError, match="pixel values that are not finite"):
        trainer(make_model(), tmp_path, max_steps=6, train_dataset=Broken()).train()


def test_what_diverged_unwatched_is_not_decided() -> None:
    model = get_pruning_model(make(VIT), TruncationConfig(layers=2))
    own_loop(model, guided=False)
    model.model.vit.layers[0].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidPlanError, match="1 tensors of the model are not finite"):
        model.export()


def test_a_copy_and_a_pickle_are_whole(tmp_path: Path) -> None:
    model = gated()
    own_loop(model)
    model.decide()
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert isinstance(other, PruningModel) and other.plan() == model.plan()
        assert_same(run(other.eval()), run(model.eval()))
        other(images(2))  # by position, as the wrapped model takes it
