"""Pruning PEFT models: the sliced adapter computes what the masked model computes, trains, and keeps its rank."""

from __future__ import annotations

import logging
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from hf_vitprune.errors import AdapterError, InvalidPlanError, UnsupportedModelError
from hf_vitprune.modeling.peft_twin import tuner_layers
from hf_vitprune.peft.kinds.stock import LoraKind
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune, truncate
from hf_vitprune.spec.architecture import Architecture
from plans import PLANS, plan_named, pruning_plans
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run, total_loss
from tiny_adapters import CONFIGS, CONVERTED, SLICED, adapted, base_info, check, randomize, targets

VIT = "ViTForImageClassification"


# ---------------------------------------------------------------------- sliced
SOME_PLANS = ("everything", "narrow inputs", "padded values", "scaled", "layers")


@pytest.mark.parametrize(
    ("kind", "plan_name"), [(k, p) for k in SLICED for p in PLANS if k in ("lora", "dora") or p in SOME_PLANS]
)
def test_sliced(kind: str, plan_name: str) -> None:
    model = make(VIT)
    plan = plan_named(plan_name, model)
    assert plan is not None
    model = adapted(model, kind)
    # a row of zeros has no direction, so DoRA's v layers are merged where heads are padded
    small = check(model, plan, merged=3 if (kind, plan_name) == ("dora", "padded values") else 0)
    assert relative_error(run(small)["logits"], run(prune(make(VIT), plan))["logits"]) > 1e-2  # the adapter acts
    for layer in tuner_layers(small.get_base_model()).values():
        assert getattr(layer, "r", {"default": 3})["default"] == 3
        if kind in ("lora", "rslora", "dora", "vera") and hasattr(layer, "lora_A"):
            assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == 3


@pytest.mark.parametrize(
    ("case", "kind", "plan_name"),
    [
        *((c, "lora", plan) for c in CLASSIFIERS if c != VIT for plan in ("everything", "layers", "narrow inputs")),
        # other kinds take what the family says in the same way: one family by default
        *(
            pytest.param(c, *row, marks=[] if c == "SwinForImageClassification" else [pytest.mark.slow])
            for c in CLASSIFIERS
            if c != VIT
            for row in (("dora", "everything"), ("ia3", "scaled"))
        ),
    ],
)
def test_families(case: str, kind: str, plan_name: str) -> None:
    model = make(case)
    plan = plan_named(plan_name, model)
    assert plan is not None
    check(adapted(model, kind), plan)


@pytest.mark.parametrize("kind", SLICED)
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_plans(kind: str, data: st.DataObject) -> None:
    model = make(VIT)
    plan = data.draw(pruning_plans(Architecture.of(model)))
    model = adapted(model, kind)
    expected = run(mask(model, plan))["logits"]
    small = prune(model, plan, allow_unchanged=True)
    assert (run(small)["logits"] - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("kind", SLICED)
def test_merging_the_sliced_adapter(kind: str) -> None:
    model = adapted(make(VIT), kind)
    small = prune(model, PruningPlan.random(model, 0.4))
    expected = run(small)["logits"]
    assert relative_error(run(small.merge_and_unload())["logits"], expected) < 1e-5


def test_vera_becomes_lora_only_where_it_must() -> None:
    model = adapted(make(VIT), "vera")
    assert prune(model, PruningPlan.random(model, 0.4, ["layers"])).peft_type == "VITPRUNE_VERA"
    assert prune(model, PruningPlan.random(model, 0.4, ["mlp"])).peft_type == "VITPRUNE_LORA"


def test_backward_equals_the_full_model() -> None:
    """Gradients of the sliced tensors are the slices of the full model's where the removed neurons are zero."""
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["fc1", "fc2"]))
    plan = PruningPlan.random(model, 0.5, ["mlp"])
    small = prune(model, plan)
    for layer, entry in zip(model.get_base_model().vit.layers, plan.layers, strict=True):
        gone = [i for i in range(48) if i not in entry.mlp]
        with torch.no_grad():  # a neuron with no outgoing weight, in base and adapter, is removed
            layer.mlp.fc2.base_layer.weight[:, gone] = 0
            layer.mlp.fc2.lora_A["default"].weight[:, gone] = 0
    total_loss(model).backward()
    total_loss(small).backward()
    for full, pruned, entry in zip(
        model.get_base_model().vit.layers, small.get_base_model().vit.layers, plan.layers, strict=True
    ):
        for part, tensor, axis in (("fc1", "lora_A", None), ("fc1", "lora_B", 0), ("fc2", "lora_A", 1)):
            expected = getattr(getattr(full.mlp, part), tensor)["default"].weight.grad
            if axis is not None:
                expected = expected.index_select(axis, torch.tensor(entry.mlp))
            actual = getattr(getattr(pruned.mlp, part), tensor)["default"].weight.grad
            assert relative_error(actual, expected) < 1e-4


# ---------------------------------------------------------------------- converted
@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("plan_name", ["everything", "scaled"])
def test_what_cannot_be_sliced_becomes_lora_where_that_is_exact(kind: str, plan_name: str) -> None:
    model = adapted(make(VIT), kind)
    plan = plan_named(plan_name, model)
    assert plan is not None
    small = check(model, plan)
    assert small.peft_type == "VITPRUNE_LORA"
    for layer in tuner_layers(small.get_base_model()).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]  # type: ignore[attr-defined]
        rows, columns = layer.get_base_layer().weight.shape
        assert a.weight.shape == (b.weight.shape[1], columns) and b.weight.shape[0] == rows
    assert prune(model, PruningPlan.random(model, 0.4, ["layers"])).peft_type == f"VITPRUNE_{kind.upper()}"


def test_an_untrained_adapter_becomes_one_that_can_be_trained() -> None:
    model = get_peft_model(make(VIT), peft.LoKrConfig(r=3, target_modules=["fc1"])).eval()
    assert relative_error(run(model)["logits"], run(make(VIT))["logits"]) < 1e-6
    small = check(model, PruningPlan.random(model, 0.4))
    layer = small.get_base_model().vit.layers[0].mlp.fc1
    total_loss(small).backward()
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


# ---------------------------------------------------------------------- merged
@pytest.mark.parametrize("kind", [k for k in CONFIGS if k not in (*SLICED, *CONVERTED, "convpass")])
def test_what_cannot_be_sliced_is_merged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(make(VIT), kind)
    plan = PruningPlan.random(model, 0.4, ["qk"])
    with caplog.at_level(logging.WARNING):
        small = prune(model, plan)
    assert relative_error(run(small)["logits"], run(mask(model, plan))["logits"]) < 1e-5
    names = base_info(small).get("merged_adapters", {"default": []})["default"]
    if kind in ("oft", "hra", "repadapter"):  # they change the inputs, which all stay
        assert not names
    else:
        assert len(names) in (6, 18) and "are merged" in caplog.text and "q_proj" in caplog.text
    check(model, PruningPlan.random(model, 0.4, ["layers"]))
    assert type(prune(model, PruningPlan.random(model, 0.4))).__name__ == "PrunedViTForImageClassification"
    assert "nothing is left" in caplog.text


def test_a_classifier_outlives_its_merged_adapter() -> None:
    model = make(VIT)
    model = adapted(model, peft.C3AConfig(block_size=8, target_modules=targets(model), modules_to_save=["classifier"]))
    small = check(model, PruningPlan.random(model, 0.4), merged=18)
    assert {n for n, p in small.named_parameters() if p.requires_grad} == {
        f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")
    }


def test_new_weights_of_the_plan_are_those_of_layer_and_adapter_together() -> None:
    model = adapted(make(VIT), "lora")
    plan = PruningPlan.random(model, 0.4, ["mlp"])
    weights = {
        "vit.layers.0.mlp.fc2.weight": torch.randn(32, 29),
        "vit.layers.1.mlp.fc2.bias": torch.randn(32),
        "classifier.weight": torch.randn(5, 32),
    }
    small = check(model, replace(plan, weights=weights))
    fc2 = small.get_base_model().vit.layers[0].mlp.fc2
    effective = fc2.get_base_layer().weight + fc2.get_delta_weight("default")
    assert relative_error(effective, weights["vit.layers.0.mlp.fc2.weight"]) < 1e-6
    assert not torch.allclose(fc2.get_base_layer().weight, effective, rtol=1e-2)


def test_two_adapters_cannot_be_merged() -> None:
    model = make(VIT)
    model = adapted(model, "c3a")
    model.add_adapter("other", peft.C3AConfig(block_size=8, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="keep one adapter"):
        prune(model, PruningPlan.random(model, 0.4))
    check(model, PruningPlan.random(model, 0.4, ["layers"]))


def test_all_layers_of_an_adapter_removed() -> None:
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[2]))
    small = truncate(model, 2)
    assert type(small).__name__ == "PrunedViTForImageClassification"
    assert_same(run(small), run(truncate(make(VIT), 2)))


def test_several_adapters() -> None:
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["q_proj", "fc1"]))
    model.add_adapter("second", LoraConfig(r=5, target_modules=["v_proj", "fc1"], modules_to_save=["classifier"]))
    model.add_adapter("top", LoraConfig(r=2, target_modules=["fc2"], layers_to_transform=[2]))
    for name in ("second", "top", "default"):
        model.set_adapter(name)
        randomize(model, seed=len(name))
    plan = PruningPlan.random(model, 0.4).keep_layers([0, 1])
    small = prune(model, plan)
    assert list(small.peft_config) == ["default", "second"] and small.active_adapter == "default"
    for name in ("second", "default"):
        for each in (model, small):
            each.set_adapter(name)
        check(model, plan)
        assert_same(run(small), run(prune(model, plan)))
    model.base_model.set_adapter(["default", "second"])
    assert check(model, plan).base_model.active_adapters == ["default", "second"]


def test_trained_tensors_stay_those() -> None:
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name or "layernorm_before" in name or "to_save.default.bias" in name)
    small = prune(model.train(), PruningPlan.random(model, 0.4))
    assert {n for n, p in small.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert small.training and small.get_base_model().vit.training
    frozen = truncate(adapted(make(VIT), replace(LoraConfig(r=3, target_modules=["fc1"]), inference_mode=True)), 2)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training


def test_low_precision() -> None:
    model = make(VIT).to(torch.bfloat16)
    model = randomize(get_peft_model(model, LoraConfig(r=3, target_modules=targets(model)))).eval()
    plan = PruningPlan.random(model, 0.4)
    small = prune(model, plan)
    assert {n: p.dtype for n, p in small.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    pixels = images().to(torch.bfloat16)
    assert relative_error(run(small, pixels)["logits"], run(mask(model, plan), pixels)["logits"]) < 5e-2


def test_pruning_twice() -> None:
    model = adapted(make(VIT), "dora")
    first = prune(model, PruningPlan.random(model, 0.3))
    second = check(first, PruningPlan.random(first, 0.3, ["mlp", "heads", "layers"]))
    assert second.peft_type == first.peft_type == "VITPRUNE_LORA"


def test_gates_of_a_running_method_are_not_sliced_with_it() -> None:
    model = adapted(make(VIT), "lora")
    plan = PruningPlan.random(model, 0.4)
    expected = run(prune(model, plan))
    hooks = [m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)) for m in tuner_layers(model).values()]
    assert_same(run(prune(model, plan)), expected)
    for hook in hooks:
        hook.remove()


def test_magnitude_counts_the_adapter() -> None:
    model = adapted(make(VIT), "lora")
    merged = adapted(make(VIT), "lora").merge_and_unload()
    assert PruningPlan.magnitude(model, 0.4) == PruningPlan.magnitude(merged, 0.4)
    assert PruningPlan.magnitude(model, 0.4) != PruningPlan.magnitude(make(VIT), 0.4)


# ---------------------------------------------------------------------- refused
def test_refused() -> None:
    model = adapted(make(VIT), "lora")
    plan = PruningPlan.random(model, 0.4)
    with pytest.raises(InvalidPlanError):
        prune(model, PruningPlan.dense(model))
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        prune(model, plan)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match="disabled"):
        prune(model, plan)
    model.base_model.enable_adapter_layers()
    plain = make(VIT)
    plain.add_adapter(LoraConfig(r=3, target_modules=["q_proj"]))
    for call in (prune, mask):
        with pytest.raises(AdapterError, match="from_pretrained"):
            call(plain, plan)
    with pytest.raises(AdapterError, match="bare parameters"):
        prune(adapted(make(VIT), LoraConfig(target_parameters=["layers.0.mlp.fc1.weight"])), plan)
    mixed = get_peft_model(make(VIT), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises((AdapterError, UnsupportedModelError)):
        prune(mixed, plan)


def test_a_wrong_slice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraKind, "sides", {**LoraKind.sides, "lora_B": "none"})
    model = adapted(make(VIT), "lora")
    with pytest.raises(AdapterError, match=r"PEFT made .*lora_B.* where the old adapters have .*lora_B"):
        prune(model, PruningPlan.random(model, 0.4, ["mlp"]))
    monkeypatch.undo()
    monkeypatch.setattr(LoraKind, "scaled", "nothing")
    plan = plan_named("scaled", Architecture.of(model))
    with pytest.raises(AdapterError, match="differs"):
        prune(model, plan)
