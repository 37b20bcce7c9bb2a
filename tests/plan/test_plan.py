"""Plans: what random and magnitude remove, what is refused, JSON files, new weights, truncation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

from hf_vitprune import criteria
from hf_vitprune.cost import count
from hf_vitprune.errors import (
    InvalidConfigError,
    InvalidPlanError,
    UnsupportedModelError,
    UnsupportedUnitError,
)
from hf_vitprune.plan.plan import PAD, PruningPlan
from hf_vitprune.pruning import mask, prune, truncate
from hf_vitprune.spec.architecture import Architecture
from plans import plan_named
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run

UNITS = ("heads", "qk", "v", "mlp", "embedding", "layers")
VIT = "ViTForImageClassification"


def kept_share(plan: PruningPlan, unit: str) -> float:
    """Kept share of a unit inside the sets that it was cut from."""
    entry, shape = plan.layers[0], plan.source.layers[plan.layers[0].index]
    kept_and_full = {
        "heads": (len(entry.heads), shape.heads),
        "qk": (len(entry.qk[0]), shape.qk_dim),
        "v": (len(entry.v[0]), shape.v_dim),
        "mlp": (len(entry.mlp), shape.mlp),
        "embedding": (plan.architecture.hidden_size, plan.source.hidden_size),
        "layers": (len(plan.layers), len(plan.source.layers)),
    }
    kept, full = kept_and_full[unit]
    return kept / full


# ---------------------------------------------------------------------- what is removed
@pytest.mark.parametrize("make_plan", [PruningPlan.random, PruningPlan.magnitude])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6])
def test_ratio_is_respected_within_rounding(make_plan: Any, unit: str, ratio: float) -> None:
    model = make(VIT)
    plan = make_plan(model, ratio, units=[unit])
    sizes = {"heads": 4, "qk": 8, "v": 8, "mlp": 48, "embedding": 32, "layers": 3}
    assert abs(kept_share(plan, unit) - (1 - ratio)) <= 0.5 / sizes[unit] + 1e-9
    for other in set(UNITS) - {unit}:
        assert kept_share(plan, other) == 1


def test_default_units_are_all_sizes_but_not_depth() -> None:
    plan = PruningPlan.random(make(VIT), 0.5)
    assert {unit for unit in UNITS if kept_share(plan, unit) < 1} == set(UNITS) - {"layers"}
    plan = PruningPlan.random(make("SwinForImageClassification"), 0.5)
    assert plan.embedding is None and len(plan.layers) == 5 and len(plan.layers[0].heads) == 1


def test_summary_states_what_stays() -> None:
    summary = PruningPlan.random(make(VIT), 0.5, units=("heads", "mlp")).summary()
    assert summary == {"layers": 1, "heads": 0.5, "qk": 0.5, "v": 0.5, "mlp": 0.5, "embedding": 1}


@pytest.mark.parametrize(("round_to", "mlp", "qk", "embedding"), [(1, 29, 5, 19), (4, 28, 4, 20), (8, 32, 8, 16)])
def test_round_to(round_to: int, mlp: int, qk: int, embedding: int) -> None:
    shape = PruningPlan.random(make(VIT), 0.4, round_to=round_to).architecture
    assert (shape.layers[0].mlp, shape.layers[0].qk_dim, shape.hidden_size) == (mlp, qk, embedding)
    assert shape.layers[0].heads == 2  # never rounded


def test_random_is_determined_by_its_seed() -> None:
    model = make(VIT)
    torch.manual_seed(1)
    first = PruningPlan.random(model, 0.4, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert PruningPlan.random(model, 0.4, seed=3) == first
    assert PruningPlan.random(model, 0.4, seed=4) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert PruningPlan.random(Architecture.of(model), 0.4, seed=3) == first


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_magnitude_keeps_the_larger_units(case: str) -> None:
    """Units scaled to almost nothing go, in every family."""
    model = make(case)
    architecture = Architecture.of(model)
    prefix = architecture.family.encoder_path(model)
    for i, name in enumerate(architecture.layer_names()):
        paths = architecture.family.layer_paths(prefix, name, architecture.config)
        head_dim = architecture.layers[i].qk_dim
        with torch.no_grad():
            for path in paths.fc1:
                model.get_submodule(path).weight[1::2] *= 1e-3
            model.get_submodule(paths.fc2).weight[:, 1::2] *= 1e-3
            for path in (paths.q, paths.k, paths.v):
                model.get_submodule(path).weight[:head_dim] *= 1e-3
            model.get_submodule(paths.o).weight[:, :head_dim] *= 1e-3
    plan = PruningPlan.magnitude(model, 0.5, units=("heads", "mlp"))
    for entry, shape in zip(plan.layers, architecture.layers, strict=True):
        assert entry.mlp == tuple(range(0, shape.mlp, 2)) and 0 not in entry.heads


def test_magnitude_of_layers_and_channels() -> None:
    model = make(VIT)
    with torch.no_grad():
        for name, parameter in model.vit.layers[1].named_parameters():
            parameter *= 1e-3 if name.endswith("proj.weight") or "fc" in name else 1
        for layer in model.vit.layers:
            for projection in (layer.attention.q_proj, layer.attention.k_proj):
                projection.weight.view(4, 8, 32)[:, ::2] *= 1e-3
            for module in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj, layer.mlp.fc1):
                module.weight[:, :16] *= 1e-3
            for module in (layer.attention.o_proj, layer.mlp.fc2):
                module.weight[:16] *= 1e-3
    assert [e.index for e in PruningPlan.magnitude(model, 0.34, units=["layers"]).layers] == [0, 2]
    assert PruningPlan.magnitude(model, 0.5, units=["qk"]).layers[0].qk == ((1, 3, 5, 7),) * 4
    assert PruningPlan.magnitude(model, 0.5, units=["embedding"]).embedding == tuple(range(16, 32))


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, math.nan, math.inf, True, False, "0.5", None, [0.5]])
@pytest.mark.parametrize("make_plan", [PruningPlan.random, PruningPlan.magnitude])
def test_ratio_outside_its_range(make_plan: Any, ratio: Any) -> None:
    with pytest.raises(InvalidPlanError, match="strictly between 0 and 1"):
        make_plan(make(VIT), ratio)


@pytest.mark.parametrize("unit", UNITS)
def test_ratio_that_empties_a_set(unit: str) -> None:
    with pytest.raises(InvalidPlanError, match="empties"):
        PruningPlan.random(make(VIT), 0.995, units=[unit])
    with pytest.raises(ValueError):  # a caller who knows only the standard exceptions
        PruningPlan.random(make(VIT), 0.995, units=[unit])


@pytest.mark.parametrize("unit", UNITS)
def test_ratio_that_removes_nothing(unit: str) -> None:
    with pytest.raises(InvalidPlanError, match="removes no unit"):
        PruningPlan.random(make(VIT), 0.001, units=[unit])


@pytest.mark.parametrize("round_to", [0, -8, 2.0, True, None, "8"])
def test_round_to_that_is_no_positive_integer(round_to: Any) -> None:
    with pytest.raises(InvalidPlanError, match="round_to"):
        PruningPlan.random(make(VIT), 0.5, round_to=round_to)


@pytest.mark.parametrize("units", [[], "heads", ["head"], ["heads", "tokens"]])
def test_unknown_units(units: Any) -> None:
    with pytest.raises(UnsupportedUnitError, match="heads"):
        PruningPlan.random(make(VIT), 0.5, units=units)


def test_units_are_read_more_than_once() -> None:
    with pytest.raises(UnsupportedUnitError, match="got <generator"):
        PruningPlan.random(make(VIT), 0.5, units=(unit for unit in ("mlp", "heads")))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [None, "0", 1.5, True, -1])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    with pytest.raises(InvalidConfigError, match="seed is a whole number"):
        PruningPlan.random(make(VIT), 0.5, seed=seed)


def test_what_is_no_plan_is_named_with_its_cure() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.5)
    cures = {
        "a dict: PruningPlan.from_dict": plan.to_dict(),
        "a str: PruningPlan.load": "plan.json",
        "Path: PruningPlan.load": Path("plan.json"),
        "a UnitScores: PruningPlan.from_scores": criteria.magnitude(model),
        "Architecture$": plan.architecture,
        "a NoneType$": None,
    }
    for words, thing in cures.items():
        for call in (prune, mask):
            with pytest.raises(InvalidPlanError, match=f"a PruningPlan, not .*{words.removeprefix('a ')}"):
                call(model, thing)


def test_swin_has_no_embedding_to_prune() -> None:
    model = make("SwinForImageClassification")
    with pytest.raises(UnsupportedUnitError, match="embedding"):
        PruningPlan.random(model, 0.5, units=["embedding"])
    with pytest.raises(UnsupportedUnitError, match="embedding"):
        prune(model, replace(PruningPlan.dense(model), embedding=(0, 1)))


def foreign_models() -> dict[str, Any]:
    bert = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    return {
        "ResNet": ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
        "Bert": BertModel(BertConfig(**bert, vocab_size=20)),
        "Linear": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("name", ["ResNet", "Bert", "Linear"])
def test_unknown_models(name: str) -> None:
    model = foreign_models()[name]
    plan = PruningPlan.random(make(VIT), 0.5)
    calls = {
        "random": lambda: PruningPlan.random(model, 0.5),
        "magnitude": lambda: PruningPlan.magnitude(model, 0.5),
        "prune": lambda: prune(model, plan),
        "mask": lambda: mask(model, plan),
        "truncate": lambda: truncate(model, 1),
        "count": lambda: count(model),
        "architecture": lambda: Architecture.of(model),
    }
    for call in calls.values():
        with pytest.raises(UnsupportedModelError, match="supported|vision-only") as caught:
            call()
        assert isinstance(caught.value, TypeError)


def test_plans_for_other_models() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.5)
    others = {
        "family": make("DeiTForImageClassification"),
        "depth": make(VIT, num_hidden_layers=4),
        "width": make(VIT, hidden_size=64, num_attention_heads=8),
        "heads": make(VIT, num_attention_heads=2),
        "mlp": make(VIT, intermediate_size=40),
        "pruned before": prune(model, plan),
    }
    for other in others.values():
        for carry_out in (prune, mask):
            with pytest.raises(InvalidPlanError, match="the plan was made for"):
                carry_out(other, plan)
    same_shape = make(VIT, seed=5, image_size=32, num_labels=9)
    assert prune(same_shape, plan).num_labels == 9


def test_plan_for_equal_sizes_with_another_attention_scale() -> None:
    """2 heads of 16 cut to 8 have the shape of 2 of 4 heads of 8, but another softmax temperature."""
    wide = make(VIT, num_attention_heads=2)
    plan = PruningPlan.dense(wide)
    halves = plan.with_layers(e.keep_channels("qk", range(8)).keep_channels("v", range(8)) for e in plan.layers)
    narrow = make(VIT)
    fewer = PruningPlan.random(narrow, 0.5, units=["heads"])
    assert halves.architecture.layers == fewer.architecture.layers
    second = PruningPlan.random(halves.architecture, 0.5, units=["mlp"])
    assert prune(prune(wide, halves, stock=False), second)
    with pytest.raises(InvalidPlanError, match="the plan was made for"):
        prune(prune(narrow, fewer, stock=False), second)


def test_plan_for_another_kind_of_mlp() -> None:
    plain = make("Dinov2ForImageClassification", mlp_ratio=3)
    gated = make("Dinov2ForImageClassification-swiglu", mlp_ratio=4)
    gated_sizes = Architecture.of(gated).layers[0].mlp
    plan = PruningPlan.dense(plain)
    with pytest.raises(InvalidPlanError, match="the plan was made for"):
        prune(gated, plan.with_layers(replace(e, mlp=e.mlp[:gated_sizes]) for e in plan.layers))


def test_a_layer_without_heads_is_another_mixer() -> None:
    entry = PruningPlan.dense(make(VIT)).layers[1]
    with pytest.raises(InvalidPlanError, match=r"with_mixer\('none'\)"):
        entry.keep_heads([])
    with pytest.raises(InvalidPlanError, match=r"layer 1 has the heads \[0, 1, 2, 3\], not \[4\]"):
        entry.keep_heads([0, 4])
    cured = PruningPlan.dense(make(VIT))
    cured = cured.with_layers(e.with_mixer("none") if e.index == 1 else e for e in cured.layers)
    assert Architecture.of(prune(make(VIT), cured)).layers[1].mixer == "none"


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_plan_that_removes_nothing(case: str) -> None:
    model = make(case)
    plan = PruningPlan.dense(model)
    assert plan.removes_nothing
    with pytest.raises(InvalidPlanError, match="removes nothing"):
        prune(model, plan)
    assert_same(run(prune(model, plan, allow_unchanged=True)), run(model))


BROKEN_PLANS: dict[str, Any] = {
    "no layer": lambda p: replace(p, layers=()),
    "layer out of range": lambda p: p.with_layers([*p.layers[:2], replace(p.layers[2], index=3)]),
    "negative layer": lambda p: p.with_layers([replace(p.layers[0], index=-1), *p.layers[1:]]),
    "layer twice": lambda p: p.with_layers([p.layers[0], p.layers[0]]),
    "layers out of order": lambda p: p.with_layers([p.layers[1], p.layers[0]]),
    "no head": lambda p: p.with_layers([replace(p.layers[0], heads=(), qk=(), v=())]),
    "head out of range": lambda p: p.with_layers([replace(p.layers[0], heads=(0, 1, 2, 4))]),
    "head twice": lambda p: p.with_layers([replace(p.layers[0], heads=(0, 1, 2, 2))]),
    "a qk list too few": lambda p: p.with_layers([replace(p.layers[0], qk=p.layers[0].qk[1:])]),
    "qk lists of two lengths": lambda p: p.with_layers([replace(p.layers[0], qk=((0, 1), (0,), (1, 2), (3, 4)))]),
    "empty qk lists": lambda p: p.with_layers([replace(p.layers[0], qk=((), (), (), ()))]),
    "v channel out of range": lambda p: p.with_layers([replace(p.layers[0], v=((8,),) * 4)]),
    "v channel below PAD": lambda p: p.with_layers([replace(p.layers[0], v=((-2,),) * 4)]),
    "v channel twice": lambda p: p.with_layers([replace(p.layers[0], v=((1, 1),) * 4)]),
    "neuron out of range": lambda p: p.with_layers([replace(p.layers[0], mlp=(48,))]),
    "neuron that is no integer": lambda p: p.with_layers([replace(p.layers[0], mlp=(1.0,))]),
    "no embedding": lambda p: replace(p, embedding=()),
    "embedding out of range": lambda p: replace(p, embedding=(31, 32)),
    "embedding out of order": lambda p: replace(p, embedding=tuple(reversed(range(32)))),
    "no inputs": lambda p: p.with_layers([replace(p.layers[0], attention_in=())]),
    "inputs out of range": lambda p: p.with_layers([replace(p.layers[0], mlp_in=(32,))]),
    "inputs and embedding": lambda p: replace(p, embedding=(0, 1)).with_layers([replace(p.layers[0], mlp_in=(0,))]),
    "unknown mixer": lambda p: p.with_layers([replace(p.layers[0], mixer="pool")]),
    "scales of another length": lambda p: p.with_layers([replace(p.layers[0], scales={"mlp": (1.0,)})]),
    "scales of an unknown unit": lambda p: p.with_layers([replace(p.layers[0], scales={"heads": (1.0,) * 4})]),
}


@pytest.mark.parametrize("name", BROKEN_PLANS)
def test_impossible_plans(name: str) -> None:
    model = make(VIT)
    plan = BROKEN_PLANS[name](PruningPlan.dense(model))
    for carry_out in (prune, mask):
        with pytest.raises(InvalidPlanError):
            carry_out(model, plan)


def test_backbone_keeps_the_layers_whose_outputs_it_gives() -> None:
    model = make("Dinov2Backbone")
    plan = PruningPlan.dense(model)
    with pytest.raises(InvalidPlanError, match="out_features"):
        prune(model, plan.keep_layers([0, 1]))
    small = prune(model, plan.keep_layers([0, 2]))
    assert small.out_features == ["stage1", "stage2"] and len(run(small)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_replace_sliced_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(VIT).to(dtype)
    plan = PruningPlan.random(model, 0.5, units=["mlp"])
    name = "vit.layers.1.mlp.fc2.weight"
    weights = {name: torch.randn(32, 24).to(dtype), "classifier.bias": torch.arange(5).to(dtype)}
    plan = replace(plan, weights=weights)
    plan.save(tmp_path / "plan.json")
    pixels = images().to(dtype)
    expected = run(prune(model, plan), pixels)
    assert not torch.equal(expected["logits"], run(prune(model, replace(plan, weights={})), pixels)["logits"])
    from_json = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    for again in (PruningPlan.load(tmp_path / "plan.json"), from_json):
        assert_same(again.weights, weights)
        assert_same(run(prune(model, again), pixels), expected)
    error = relative_error(run(mask(model, plan), pixels)["logits"], expected["logits"])
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    small = prune(model, plan)
    small.get_parameter(name).data.zero_()
    assert weights[name].any()  # the plan's tensor was copied


@pytest.mark.parametrize(
    "weights", [{"vit.layers.1.mlp.fc2.weight": torch.zeros(32, 48)}, {"vit.layers.1.mlp.fc3.weight": torch.zeros(1)}]
)
def test_new_weights_without_a_place(weights: dict[str, torch.Tensor]) -> None:
    model = make(VIT)
    plan = replace(PruningPlan.random(model, 0.5, units=["mlp"]), weights=weights)
    for carry_out in (prune, mask):
        with pytest.raises(InvalidPlanError, match="new weight"):
            carry_out(model, plan)


def test_padded_channels_are_zero() -> None:
    model = make(VIT)
    plan = plan_named("padded values", model)
    small = prune(model, plan)
    rows = [c for row in plan.layers[0].v for c in row]
    zero = [i for i, c in enumerate(rows) if c == PAD]
    assert zero and not small.vit.layers[0].attention.v_proj.weight[zero].any()
    assert not small.vit.layers[0].attention.v_proj.bias[zero].any()
    assert not small.vit.layers[0].attention.o_proj.weight[:, zero].any()


@pytest.mark.parametrize("layers", [[0, 99], [-1], ["1", 7], [0.5]])
def test_layers_that_the_model_does_not_have(layers: list[Any]) -> None:
    plan = PruningPlan.dense(make("ViTForImageClassification"))
    with pytest.raises(InvalidPlanError, match=r"the model has layers 0\.\.\d+, not"):
        plan.keep_layers(layers)
    assert plan.keep_layers([1]).keep_layers([0, 1]) == plan.keep_layers([1])
