"""Numbers that are none: a training stops at the first, nothing with such weights is exported or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer

from hf_vitprune import (
    NViTConfig,
    PruningCallback,
    PruningPlan,
    PruningTrainer,
    SLSConfig,
    SPViTConfig,
    VTPConfig,
    get_pruning_model,
    prune,
    truncate,
)
from hf_vitprune.errors import NotFiniteError
from hf_vitprune.utils.finite import all_finite_fast, check_finite
from pruning_runs import SMALL_GROUPS, Images, arguments
from tiny import make

VIT = "ViTForImageClassification"
CONFIGS: dict[str, Any] = {
    "vtp": VTPConfig(target=0.6, round_to=4),
    "nvit": NViTConfig(target=0.6, group_sizes=SMALL_GROUPS),
    "spvit": SPViTConfig(target=0.8, gate_learning_rate=0.5),
    "sls": SLSConfig(alpha=0.3),
}


class OneBadImage(Images):
    """The tenth image holds one value that is no number."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = super().__getitem__(i)
        if i == 9:
            row["pixel_values"][1, 2, 3] = float("nan")
        return row


def finite(model: Any) -> bool:
    return all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", CONFIGS)
def test_one_bad_image_stops_the_training_before_its_step(method: str, tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), CONFIGS[method])
    trainer = PruningTrainer(model, arguments(tmp_path, max_steps=12), train_dataset=OneBadImage(16))
    with pytest.raises(NotFiniteError, match=r"after \d steps comes a batch whose image \d \(from 0\) has pixel"):
        trainer.train()
    assert finite(model) and trainer.state.global_step < 4


def test_a_plain_trainer_stops_too(tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), VTPConfig(target=0.6, round_to=4))
    args = arguments(tmp_path, max_steps=12)
    trainer = Trainer(model, args, train_dataset=OneBadImage(16), callbacks=[PruningCallback()])
    with pytest.raises(
        NotFiniteError, match=r"gradients of the ViTForImageClassification are not finite after \d+ st"
    ):
        trainer.train()
    assert finite(model)


def test_fine_tuning_a_small_model_stops_too(tmp_path: Path) -> None:
    model = make(VIT)
    small = prune(model, PruningPlan.random(model, 0.4))
    trainer = PruningTrainer(small, arguments(tmp_path, max_steps=4, learning_rate=1e30), train_dataset=Images(16))
    with pytest.raises(NotFiniteError, match=r"after \d steps, of images that are finite: lower the learning rate"):
        trainer.train()


def test_a_loop_of_ones_own_stops_after_the_step() -> None:
    model = get_pruning_model(make(VIT), VTPConfig(target=0.6, round_to=4)).train()
    optimizer = torch.optim.SGD(model.parameter_groups(), lr=0.1)
    images = torch.stack([Images(4)[i]["pixel_values"] for i in range(4)])
    model(pixel_values=images * float("inf"), labels=torch.arange(4)).loss.backward()
    model.before_step(0, 2)
    optimizer.step()
    with pytest.raises(
        NotFiniteError, match=r"weights of the .* are not finite after 1 steps \(.*the training diverges"
    ):
        model.after_step(0, 2)


def test_a_scaler_may_skip_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16: losses and gradients that overflow are its business; the weights stay finite."""
    model = get_pruning_model(make(VIT), VTPConfig(target=0.6, round_to=4))
    trainer = PruningTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=Images(16))
    trainer.args.fp16 = True  # what a GPU would train in
    steps = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: steps(*a, **k) * float("inf"))
    trainer.train()
    assert model.method.decided and finite(model)


def test_nothing_is_made_of_such_weights(tmp_path: Path) -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4)
    small = prune(model, plan, stock=False)
    model.vit.layers[1].mlp.fc1.weight.data[0, 0] = float("nan")
    words = r"1 tensors of the ViTForImageClassification are not finite \(vit.layers.1.mlp.fc1.weight, .*so it is not "
    for refused, what in (
        (lambda: prune(model, plan), "pruned"),
        (lambda: truncate(model, 2), "pruned"),
        (lambda: get_pruning_model(model, VTPConfig(target=0.5)), "trained"),
    ):
        with pytest.raises(NotFiniteError, match=words + what):
            refused()
    small.vit.layernorm.bias.data[0] = float("-inf")
    with pytest.raises(NotFiniteError, match="it is not saved: a training diverged"):
        small.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "model.safetensors").exists()


def test_what_diverges_after_the_decision_is_not_exported(tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), VTPConfig(target=0.6, round_to=4))
    PruningTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=Images(16)).train()
    model.model.vit.layers[0].mlp.fc1.bias.data[0] = float("inf")
    for refused in (model.export, lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(NotFiniteError, match="fc1.bias"):
            refused()


def test_checkpoints_of_before_are_exported(tmp_path: Path) -> None:
    """What was learned is in the state dict: a PruningModel that has loaded one counts as trained."""
    model = get_pruning_model(make(VIT), VTPConfig(target=0.6, round_to=4))
    PruningTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=Images(16)).train()
    again = get_pruning_model(make(VIT), VTPConfig(target=0.6, round_to=4))
    again.load_state_dict(model.state_dict())
    assert again.plan().layers == model.plan().layers
    again.save_pretrained(tmp_path / "small")
    assert finite(AutoModelForImageClassification.from_pretrained(tmp_path / "small"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_look_at_many_tensors(value: float) -> None:
    """Those whose lengths are no numbers of their type are looked at one by one."""
    tensors = [torch.full((3, 4), 6e4).half(), torch.randn(5), torch.full((2,), 3e38), torch.empty(0), None]
    assert all_finite_fast(tensors)
    for place in (0, 1, 2):
        held = [None if t is None else t.clone() for t in tensors]
        held[place].flatten()[1] = value  # type: ignore[union-attr]
        assert not all_finite_fast(held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_one_value_in_a_tensor_is_found(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        layer = torch.nn.Linear(40, 25).to(dtype)
        check_finite(layer, "saved")
        layer.weight.data[7, 13] = value
        with pytest.raises(NotFiniteError, match=r"1 tensors of the Linear are not finite \(weight"):
            check_finite(layer, "saved")


def test_tensors_that_have_nothing_to_look_at() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.empty, layer.whole = torch.nn.Buffer(torch.zeros(0)), torch.nn.Buffer(torch.ones(3, dtype=torch.int64))
    layer.eighth = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    check_finite(layer, "saved", layer.state_dict())
