"""Compensation under adapters: they stay, and with the weights beneath them compute the compensated function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForImageClassification

from hf_vitprune import Architecture, Compensation, PruningPlan, mask, prune
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.errors import AdapterError
from hf_vitprune.modeling.peft_twin import is_peft, merged_twin, tuner_layers
from hf_vitprune.peft import save_pruned_peft
from hf_vitprune.peft.absorb import can_absorb, why_merged
from hf_vitprune.peft.kinds import kind_of
from plans import few, plan_named, pruning_plans, without_scales
from tiny import assert_same, images, make, relative_error, run
from tiny_adapters import SLICED, adapted

OTHERS = [kind for kind in SLICED if kind not in ("lora", "ia3")]
VIT, SWIN = "ViTForImageClassification", "SwinForImageClassification"


def pixels(count: int = 32, seed: int = 1) -> torch.Tensor:
    return images(count, seed=seed).double()


def logits(model: Any) -> torch.Tensor:
    return run(model, pixels(4, 2))["logits"]


def checked(model: Any, plan: PruningPlan, settings: Any = "auto") -> Any:
    """The compensated PeftModel, after what must hold for every one."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = compensate_plan(model, plan, pixels(), settings)
    small = prune(model, made, allow_unchanged=True)
    # the same function as compensation of the merged model, and as the masked one
    merged = compensate_plan(merged_twin(model), plan, pixels(), settings)
    assert made.weights.keys() == merged.weights.keys()
    assert all(torch.equal(made.weights[name], tensor) for name, tensor in merged.weights.items())
    assert relative_error(logits(small), logits(mask(model, made))) < 1e-8
    assert_same(dict(model.state_dict()), before)
    return small


def stays(model: Any, plan: PruningPlan, settings: Any = "auto") -> None:
    """Every adapter that plain slices keep is there under compensation, trained or not as before.

    But for DoRA where images leave a new weight a row next to zero, by whose norm it would divide.
    """
    small, plain = checked(model, plan, settings), prune(model, plan)
    if not is_peft(plain):
        assert not is_peft(small)
        return
    base = small.get_base_model() if is_peft(small) else small
    before, after = tuner_layers(plain.get_base_model()), tuner_layers(base)
    gone = before.keys() - after.keys()
    assert after.keys() <= before.keys()
    for name in gone:
        assert any(getattr(config, "use_dora", False) for config in model.peft_config.values())
        norms = base.get_submodule(name).weight.norm(dim=1)
        assert norms.min() < 1e-7 * norms.max()
    flags = [(name, p.requires_grad, p.shape) for name, p in plain.named_parameters()]
    if not gone:
        assert flags == [(name, p.requires_grad, p.shape) for name, p in small.named_parameters()]


@pytest.mark.parametrize("kind", SLICED)
def test_adapters_stay(kind: str) -> None:
    model = adapted(make(VIT).double(), kind).double()
    stays(model, PruningPlan.random(model, 0.4))


@pytest.mark.parametrize("kind", ["lora", "ia3", *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)])
@settings(few, max_examples=3)
@given(data=st.data())
def test_adapters_stay_under_any_plan(kind: str, data: st.DataObject) -> None:
    model = adapted(make(data.draw(st.sampled_from([VIT, SWIN]))).double(), kind).double()
    plan = without_scales(data.draw(pruning_plans(Architecture.of(model.get_base_model()))))
    if not plan.removes_nothing:
        stays(model, plan, Compensation(reselect=data.draw(st.booleans())))


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_they_are_trained_merged_and_loaded_like_any_other(kind: str, tmp_path: Path) -> None:
    model = adapted(make(VIT), kind)
    small = prune(model, PruningPlan.random(model, 0.4), calibration=images(32, seed=1))
    save_pruned_peft(small, tmp_path)
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert relative_error(run(loaded)["logits"], run(small)["logits"]) < 1e-5
    run_loss = small.train()(pixel_values=images(), labels=torch.zeros(len(images()), dtype=torch.long)).loss
    run_loss.backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if p.requires_grad and "lora_B" in n)
    outputs = run(small.eval())["logits"]
    assert relative_error(run(small.merge_and_unload().eval())["logits"], outputs) < 1e-4


@pytest.mark.parametrize("kind", ["oft", "repadapter"])
def test_what_cannot_stay_is_merged(kind: str) -> None:
    model = adapted(make(VIT).double(), kind).double()
    assert "merged" in str(why_merged(model))
    assert not is_peft(checked(model, PruningPlan.random(model, 0.4)))


def test_convpass_is_refused() -> None:
    model = adapted(make(VIT), "convpass")
    with pytest.raises(AdapterError, match="Convpass bypass is not linear"):
        prune(model, PruningPlan.random(model, 0.4), calibration=images(8))


def test_factors_near_zero_are_merged_rather_than_divided_by() -> None:
    model = adapted(make(VIT).double(), "ia3").double()
    layer = next(iter(tuner_layers(model.get_base_model()).values()))
    layer.ia3_l["default"].data.view(-1)[0] = 0.0
    small = checked(model, PruningPlan.random(model, 0.4, ["mlp"]))
    assert is_peft(small)


def test_new_weights_hold_for_the_active_adapter_only() -> None:
    model = adapted(make(VIT), "lora")
    model.add_adapter("other", model.peft_config["default"])
    plan = PruningPlan.random(model, 0.4)
    assert "other as well" in str(why_merged(model))
    with pytest.raises(AdapterError, match=r"\['other'\] would not fit them: delete_adapter"):
        prune(model, plan, calibration=images(8))
    model.delete_adapter("other")
    assert is_peft(prune(model, plan, calibration=images(8)))


def test_adapters_of_layers_without_new_weights_are_untouched() -> None:
    """Only the MLP of the last layer is cut: everything below keeps its weights, bit for bit."""
    model = adapted(make(VIT), "lora")
    plan = plan_named("mlp", model)
    assert plan is not None
    plan = plan.with_layers(
        entry if entry.index == 2 else dense
        for entry, dense in zip(plan.layers, PruningPlan.dense(plan.source).layers, strict=True)
    )
    small = prune(model, plan, calibration=images(8))
    state = small.state_dict()
    for name, tensor in model.state_dict().items():
        if "layers.2" not in name:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("row", [0.0, 1e-18, 1e-200])
def test_rows_next_to_zero_end_dora(row: float) -> None:
    """It divides by their norms: what rounding leaves of them is no number."""
    model = adapted(make(VIT).double(), "dora").double()
    layer = next(iter(tuner_layers(model.get_base_model()).values()))
    weight = torch.randn(layer.get_base_layer().weight.shape, dtype=torch.float64)
    kind = kind_of(model.peft_config["default"])
    assert can_absorb(kind, layer, weight)
    weight[1] *= row
    assert not can_absorb(kind, layer, weight)
