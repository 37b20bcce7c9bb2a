"""What must hold for every family, every class and every plan: pruned == masked == saved and loaded, exact counts."""

from __future__ import annotations

import copy
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_vitprune.contrib.fuse import fuse_bn
from hf_vitprune.cost import count
from hf_vitprune.errors import InvalidPlanError, NativeExportError
from hf_vitprune.modeling import pruned_model_class
from hf_vitprune.modeling.native import native_config
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from hf_vitprune.spec.architecture import Architecture, dense_of
from hf_vitprune.spec.layer_shape import MIXERS
from hf_vitprune.surgery.cuts import find_cuts
from plans import PLANS, aligned, compose, needed_layers, plan_named, pruning_plans, recorded_attentions
from processes import run_python
from quick import FEW, QUICK, mostly_slow
from tiny import (
    CASES,
    CLASSIFIERS,
    EVERY_FAMILY,
    assert_same,
    eager,
    hybrid,
    images,
    lacks,
    make,
    relative_error,
    run,
    total_loss,
)

#: plans for the classes that share their layers with another class of the family
FEW_PLANS = ("embedding", "layers", "everything", "removed branches")
#: random plans a class; HYPOTHESIS_EXAMPLES=200 explores further
random_plans = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 4)),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


#: transformers computes RMSNorms (AIMv2, InternVL) and positions (RADIO) in float32, whatever the model is in
SINGLE = ("Aimv2", "Radio", "InternVL")
IN_SINGLE = (*SINGLE, *(f"Pruned{name}" for name in SINGLE))


def planned(case: str, plan: str, **changes: Any) -> tuple[PreTrainedModel, PruningPlan]:
    model = make(case, **changes)
    made = plan_named(plan, model)
    assert made is not None
    return model, made


def number_of(outputs: dict[str, torch.Tensor], key: str) -> int:
    return sum(name.startswith(f"{key}.") for name in outputs)


# ---------------------------------------------------------------------- pruned == masked
@pytest.mark.parametrize(
    ("case", "plan_name"),
    [
        # a class that another stands for is quickly cut in all units at once; one by one, slowly
        pytest.param(case, plan, marks=() if case in QUICK or plan == "everything" else pytest.mark.slow)
        for case in CASES
        for plan in (PLANS if case in EVERY_FAMILY else FEW_PLANS)
        if not lacks(case, plan)
    ],
)
def test_pruned_equals_masked(case: str, plan_name: str) -> None:
    model, plan = planned(case, plan_name, **eager(case))
    model.set_attn_implementation("eager")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = prune(model, plan)
    outputs, masked, dense = run(small, **EVERYTHING), run(mask(model, plan), **EVERYTHING), run(model)

    for name, ours, theirs in aligned(outputs, masked, plan):
        assert relative_error(ours, theirs) < 1e-5, name
    assert any(masked[name].shape != t.shape or relative_error(masked[name], t) > 1e-3 for name, t in dense.items())
    assert number_of(outputs, "attentions") == len(recorded_attentions(plan.architecture))
    if plan.source.depths is None:
        assert number_of(outputs, "hidden_states") == len(plan.layers) + 1
    assert type(small) is expected_class(model, plan)
    assert real_parameters(small) == count(small).params < real_parameters(model) == count(model).params
    assert_same(dict(model.state_dict()), before)  # the model itself is untouched


def expected_class(model: PreTrainedModel, plan: PruningPlan) -> type:
    """The model's own, where that can hold the shape."""
    try:
        native_config(plan.architecture, model.config)
    except NativeExportError:
        return pruned_model_class(type(model))
    return type(model)


def real_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", mostly_slow(CASES))
@random_plans
@given(data=st.data())
def test_any_plan(case: str, data: st.DataObject) -> None:
    """Random combinations, in double precision: equal to the mask, exact counts, JSON, and prune of prune."""
    check_any_plan(make(case, **eager(case)), case, data)


@pytest.mark.parametrize("case", mostly_slow([*CLASSIFIERS, "SwinBackbone", "Dinov2Backbone", "ViTModel"], FEW))
@random_plans
@given(data=st.data())
def test_any_plan_over_any_mixers(case: str, data: st.DataObject) -> None:
    layers = sum(CASES[case].fields.get("depths", [4]))
    mixers = data.draw(st.lists(st.sampled_from(MIXERS), min_size=layers, max_size=layers))
    check_any_plan(hybrid(case, mixers), case, data)


def check_any_plan(model: PreTrainedModel, case: str, data: st.DataObject) -> None:
    model.double()
    model.set_attn_implementation("eager")
    keep = needed_layers(model)
    plan = data.draw(pruning_plans(Architecture.of(model), keep))
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    small = check_against_mask(model, plan)
    assert count(small).params == real_parameters(small)
    assert Architecture.of(small) == plan.architecture
    assert Architecture.from_dict(json.loads(json.dumps(plan.architecture.to_dict()))) == plan.architecture

    keep = tuple(j for j, entry in enumerate(plan.layers) if entry.index in keep)
    check_against_mask(small, data.draw(pruning_plans(Architecture.of(small), keep)))


def check_against_mask(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    small = prune(model, plan, allow_unchanged=True)
    pixels = images().double()
    outputs, masked = run(small, pixels, **EVERYTHING), run(mask(model, plan), pixels, **EVERYTHING)
    for name, ours, theirs in aligned(outputs, masked, plan):
        assert relative_error(ours, theirs) < (1e-5 if type(model).__name__.startswith(IN_SINGLE) else 1e-9), name
    return small


@pytest.mark.parametrize("case", CLASSIFIERS)
@random_plans
@given(data=st.data())
def test_two_prunings_are_their_composition(case: str, data: st.DataObject) -> None:
    model = make(case)
    first = data.draw(pruning_plans(Architecture.of(model)).map(without_scales))
    second = data.draw(pruning_plans(first.architecture).map(without_scales))
    twice = prune(prune(model, first, allow_unchanged=True, stock=False), second, allow_unchanged=True, stock=False)
    try:
        plan = compose(first, second).validated()
    except InvalidPlanError as error:
        # residual channels after the inputs of a part (or the reverse) can only be cut one after the other
        assert "cannot be pruned together" in str(error)
        return
    assert_same(dict(twice.state_dict()), dict(prune(model, plan, allow_unchanged=True, stock=False).state_dict()))


def without_scales(plan: PruningPlan) -> PruningPlan:
    return plan.with_layers(replace(entry, scales={}) for entry in plan.layers)


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("case", mostly_slow(CASES))
def test_every_parameter_learns_as_in_the_masked_model(case: str) -> None:
    """The gradient of the small model is the masked model's at the kept places; an optimizer moves all of it."""
    model, plan = planned(case, "everything")
    model.double()
    small, full = prune(model, plan, stock=False), mask(model, plan)
    for module in (small, full, model):
        total_loss(module, images().double()).backward()
    for name, cut in find_cuts(model, small, plan).items():
        parameter = dict(small.named_parameters()).get(name)
        if parameter is None:
            continue
        unused = model.get_parameter(cut.source).grad is None  # mask tokens, poolers that no output reads
        assert (parameter.grad is None) == unused, name
        if not unused:
            expected = cut.take(full.get_parameter(cut.source).grad)
            rtol, atol = (1e-4, 1e-5) if case.startswith(SINGLE) else (1e-8, 1e-12)
            assert torch.allclose(parameter.grad, expected, rtol=rtol, atol=atol), name

    before = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1, weight_decay=0.0)
    optimizer.step()
    for name, parameter in small.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (parameter.grad is not None and bool(parameter.grad.any())), name


def test_frozen_parameters_stay_frozen() -> None:
    model, plan = planned("ViTForImageClassification", "everything")
    model.vit.layers[1].mlp.requires_grad_(False)
    small = prune(model, plan)
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"vit.layers.1.mlp.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_follows_the_model(training: bool) -> None:
    model, plan = planned("ViTForImageClassification", "heads")
    small = prune(model.train(training), plan)
    assert all(module.training is training for module in small.modules())


# ---------------------------------------------------------------------- saved == loaded
@pytest.mark.parametrize("case", CASES)
def test_saved_equals_loaded(case: str, tmp_path: Path) -> None:
    model, plan = planned(case, "everything")
    small = prune(model, plan, stock=False)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert_same(run(copy.deepcopy(loaded)), run(small))  # kernels round otherwise on weights mapped from a file
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    assert Architecture.of(loaded) == plan.architecture
    loaded.save_pretrained(tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / weights).read_bytes()
    assert loaded.config.pruning_config == small.config.pruning_config


def test_no_stock_result_of_a_class_that_transformers_loads_otherwise() -> None:
    model, plan = planned("PixioBackbone", "layers")
    assert type(prune(model, plan)) is pruned_model_class(type(model))


@pytest.mark.parametrize("case", [c for c in CASES if c != "PixioBackbone" and not lacks(c, "layers")])
def test_stock_shapes_are_saved_and_loaded_as_the_dense_model_is(case: str, tmp_path: Path) -> None:
    model, plan = planned(case, "layers")
    small = prune(model, plan)
    assert type(small) is type(model) and small.config.pruning_info["kept_layers"] == [e.index for e in plan.layers]
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert_same(run(loaded), run(small))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert loaded.config.pruning_info == small.config.pruning_info
    assert dense_of(loaded.config, plan.source.task) == Architecture.of(model)


@pytest.mark.parametrize("plan_name", ["padded values", "removed branches", "narrow inputs"])
@pytest.mark.parametrize("case", ["SwinForImageClassification", "SiglipVisionModel"])
def test_saved_equals_loaded_for_odd_shapes(case: str, plan_name: str, tmp_path: Path) -> None:
    model, plan = planned(case, plan_name)
    small = prune(model, plan)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    assert_same(run(loaded), run(small))


FRESH = """
import copy, pickle, sys, torch, transformers
from tiny import assert_same, run
small, outputs = pickle.load(open(sys.argv.pop(1), "rb"))  # how models are sent to spawned processes
assert_same(run(small), outputs)
import hf_vitprune.modeling as modeling
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    # AutoBackbone takes no local folders (it asks the Hub whether the folder is a repository)
    auto = getattr(modeling, f"Pruned{name}") if name.endswith("Backbone") else transformers.AutoModel
    if "For" in name:
        auto = getattr(transformers, "AutoModelFor" + name.partition("For")[2])
    model = auto.from_pretrained(folder)
    assert type(model).__name__ == f"Pruned{name}", type(model)
    expected = torch.load(f"{folder}/outputs.pt", weights_only=True)
    assert_same(run(copy.deepcopy(model)), expected)
print("exact")
"""


#: classes beside the classifiers that a fresh process loads
OTHERS = (
    "SwinBackbone",
    "ViTForMaskedImageModeling",
    "ViTModel",
    "DINOv3ViTModel",
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
    "Swinv2ForImageClassification",
    "CLIPTextModel",
)


def test_a_fresh_process_loads_the_same_models(tmp_path: Path) -> None:
    model, plan = planned("SiglipVisionModel", "narrow inputs")
    small = prune(model, plan)
    small = prune(small, PruningPlan.random(small, 0.5, units=["mlp"]))
    (tmp_path / "sent").write_bytes(pickle.dumps((small, run(small))))
    arguments = [str(tmp_path / "sent")]
    for case in (*(c for c in CLASSIFIERS if "-" not in c), *OTHERS):
        model, plan = planned(case, "everything")
        hybrids = [hybrid(case), fuse_bn(hybrid(case))] if plan.source.family.convolutions else []
        for number, small in enumerate([prune(model, plan, stock=False), *hybrids]):
            folder = tmp_path / f"{case}-{number}"
            small.save_pretrained(folder)
            torch.save(run(small), folder / "outputs.pt")
            arguments += [case, str(folder)]
    assert run_python(FRESH, *arguments).endswith("exact\n")


# ---------------------------------------------------------------------- kernels, image sizes, dtypes
@pytest.mark.parametrize("plan_name", ["qk", "v", "padded values", "everything"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_fused_kernels_equal_eager_attention(case: str, plan_name: str) -> None:
    model, plan = planned(case, plan_name)
    small = prune(model, plan)
    small.set_attn_implementation("eager")
    eager = run(small)["logits"]
    small.set_attn_implementation("sdpa")
    assert relative_error(run(small)["logits"], eager) < 1e-5


def picky_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any):
    """Like flash attention: q, k and v must be of one width, and so is the output."""
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    assert len(widths) == 1, f"q, k, v widths {widths}"
    SEEN_WIDTHS.append(widths.pop())
    return sdpa_attention_forward(module, query, key, value, *args, **kw)


SEEN_WIDTHS: list[int] = []


@pytest.mark.parametrize("plan_name", ["qk", "v"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_registered_kernels_get_one_width(case: str, plan_name: str) -> None:
    """Flash kernels crop v without a word where it is wider than q; ours is padded before they see it."""
    AttentionInterface.register("picky", picky_attention)
    model, plan = planned(case, plan_name)
    small = prune(model, plan)
    expected = run(small)["logits"]
    for module in small.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "picky"
    SEEN_WIDTHS.clear()
    assert relative_error(run(small)["logits"], expected) < 1e-5
    assert [max(shape.qk_dim, shape.v_dim) for shape in plan.architecture.layers] == SEEN_WIDTHS


INTERPOLATED = [c for c in CLASSIFIERS if not c.startswith("Swin")]


@pytest.mark.parametrize("size", [24, (32, 16)])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_other_image_sizes(case: str, size: int | tuple[int, int]) -> None:
    model, plan = planned(case, "everything")
    small, full = prune(model, plan), mask(model, plan)
    how = {"interpolate_pos_encoding": True} if case in INTERPOLATED and "Dinov2" not in case else {}
    pixels = images(size=size)
    assert relative_error(run(small, pixels, **how)["logits"], run(full, pixels, **how)["logits"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_dtype_is_kept(case: str, dtype: torch.dtype) -> None:
    model, plan = planned(case, "everything")
    exact = run(prune(model, plan))["logits"]
    small = prune(model.to(dtype), plan)
    assert {p.dtype for p in small.parameters()} == {dtype} and torch.get_default_dtype() == torch.float32
    logits = run(small, images().to(dtype))["logits"]
    assert logits.dtype == dtype
    assert relative_error(logits.float(), exact) < (0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_autocast(case: str) -> None:
    model, plan = planned(case, "everything")
    small, full = prune(model, plan), mask(model, plan)
    exact = run(small)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        logits, masked = run(small)["logits"], run(full)["logits"]
    assert logits.dtype == masked.dtype
    assert relative_error(logits.float(), exact) < 0.15
