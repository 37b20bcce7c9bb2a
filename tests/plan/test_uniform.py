"""The same sizes in every layer: what a stock class holds, by every method that can give it, or why there is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from hf_vitprune import OneShotScores, PruningPlan, VTPConfig, count, criteria, get_pruning_model, mask, prune
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError, UnreachableTargetError
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.methods.oneshot.choose import _attention, _branch_cost, _mlp, check_target
from hf_vitprune.methods.oneshot.folds import of_layer
from hf_vitprune.plan.uniform import StockSizes
from hf_vitprune.spec.units import set_name
from pruning_runs import scatter_scores
from tiny import EVERY_FAMILY, assert_same, images, make, relative_error, run

#: cases whose stock class holds fewer hidden neurons alone
NEURONS_ALONE = ("CLIP", "ViTMAE", "VideoMAE", "DINOv3", "InternVL", "VitPose", "Data2Vec")
#: words of the reason why a stock class holds nothing smaller
NOTHING = {"Swin": "fix heads and MLP ratio of every stage", "Siglip": "pooling head", "Aimv2": "pooling head"}
UNITS = ("heads", "qk", "v", "mlp")


def reason(case: str) -> str | None:
    return next((words for name, words in NOTHING.items() if case.startswith(name)), None)


def assert_stock(small: Any, model: Any, plan: PruningPlan) -> None:
    """It is of the model's class, which makes it from its config, and all of its layers are alike."""
    assert type(small) is type(model)
    with torch.device("meta"):
        made = type(model)(small.config)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert len({*plan.architecture.layers}) == 1


@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_every_family_gives_a_stock_model_or_says_why_not(case: str) -> None:
    model = make(case)
    source = PruningPlan.dense(model).source
    units = tuple(unit for unit in UNITS if unit in source.units)
    scores = criteria.magnitude(model)
    settings: dict[str, Any] = {"ratio": 0.4, "scope": "uniform", "units": units, "round_to": 1}
    if reason(case):
        with pytest.raises(InvalidPlanError, match=reason(case)):
            PruningPlan.from_scores(model, scores, **settings)
        return
    plan = PruningPlan.from_scores(model, scores, **settings)
    small = prune(model, plan)
    assert_stock(small, model, plan)
    expected = run(mask(model, plan))
    assert all(relative_error(tensor, expected[name]) < 1e-4 for name, tensor in run(small).items())
    shape, whole = plan.architecture.layers[0], source.layers[0]
    assert shape.mlp < whole.mlp
    if case.startswith(NEURONS_ALONE):
        assert (shape.heads, shape.v_dim) == (whole.heads, whole.v_dim)
    elif {"heads", "qk", "v"} <= {*units}:
        assert (shape.heads, shape.qk_dim, shape.v_dim) == (2, 5, 5)  # of 4 heads of 8


def test_the_best_units_of_every_layer_stay() -> None:
    """The same numbers everywhere, and of every layer its own units."""
    model = make("ViTForImageClassification")
    scores = criteria.magnitude(model)
    plan = PruningPlan.from_scores(model, scores, ratio=0.5, scope="uniform", units=["mlp"])
    for entry in plan.layers:
        assert len(entry.mlp) == 24
        assert {*entry.mlp} == {*scores[set_name("mlp", entry.index)].topk(24).indices.tolist()}


def test_local_is_uniform_where_the_stock_class_holds_it() -> None:
    model = make("ViTForImageClassification")
    for made in (PruningPlan.magnitude, PruningPlan.random):
        local, uniform = made(model, 0.5, ["heads", "mlp"]), made(model, 0.5, ["heads", "mlp"], uniform=True)
        assert local.layers == uniform.layers and uniform.info["scope"] == "uniform"
    dino = make("Dinov2ForImageClassification")  # whose MLPs are whole multiples of the width
    assert {len(entry.mlp) for entry in PruningPlan.magnitude(dino, 0.4, ["mlp"]).layers} == {38}
    assert {len(entry.mlp) for entry in PruningPlan.magnitude(dino, 0.4, ["mlp"], uniform=True).layers} == {32}


@pytest.mark.parametrize(
    "case", ["CLIPVisionModel", "DINOv3ViTModel", "InternVLVisionModel", "SiglipVisionModel-headless", "ViTMAEModel"]
)
def test_heads_go_with_the_width_where_a_config_has_no_head_dim(case: str) -> None:
    model = make(case)
    scores = criteria.magnitude(model)
    plan = PruningPlan.from_scores(model, scores, ratio=0.5, scope="uniform", units=[*UNITS, "embedding"], round_to=8)
    small = prune(model, plan)
    assert_stock(small, model, plan)
    shape = plan.architecture.layers[0]
    assert plan.architecture.hidden_size == shape.heads * shape.v_dim == 16
    again = type(small).from_pretrained(None, config=small.config, state_dict=small.state_dict())
    assert_same(run(small), run(again.eval()))


@pytest.mark.parametrize("case", ["VideoMAEForVideoClassification", "Aimv2VisionModel-native"])
def test_widths_that_no_stock_class_makes_positions_for_are_refused(case: str) -> None:
    model = make(case)
    units = [*UNITS, "embedding"]
    with pytest.raises(InvalidPlanError, match="leave the unit 'embedding' out"):
        PruningPlan.from_scores(model, criteria.magnitude(model), ratio=0.5, scope="uniform", units=units)


def test_a_target_is_met_from_below() -> None:
    model = make("ViTForImageClassification")
    for target in (0.7, 0.4):
        plan = PruningPlan.from_scores(model, criteria.magnitude(model), target=target, scope="uniform")
        left = count(plan.architecture).macs / count(model).macs
        assert target - 0.12 < left <= target
    with pytest.raises(UnreachableTargetError):
        PruningPlan.from_scores(
            make("CLIPVisionModel"), criteria.magnitude(make("CLIPVisionModel")), 0.3, scope="uniform"
        )


def test_queries_and_values_go_together_or_stay() -> None:
    model = make("ViTForImageClassification")
    with pytest.raises(InvalidPlanError, match="no stock class holds fewer of v"):
        PruningPlan.magnitude(model, 0.4, ["v"], uniform=True)
    cut = prune(model, PruningPlan.random(model, 0.5, ["mlp"]).keep_layers([0, 2]))
    assert StockSizes(PruningPlan.dense(cut).source, ["heads"], 1).smallest().heads == 1  # pruned before: alike


def test_layers_that_differ_already_are_refused() -> None:
    model = make("ViTForImageClassification")
    plan = PruningPlan.dense(model)
    rows = [entry.keep_heads(range(1 + entry.index)) for entry in plan.layers]
    small = prune(model, plan.with_layers(rows))
    with pytest.raises(InvalidPlanError, match="layer 1 has heads 2, layer 0 has 1"):
        PruningPlan.magnitude(small, 0.4, ["mlp"], uniform=True)


# ---------------------------------------------------------------------- methods
@pytest.fixture(scope="module")
def scored() -> tuple[Any, OneShotScores]:
    model = make("ViTForImageClassification")
    return model, OneShotScores.measure(model, images(16), OneShotSettings(images=None))


def test_one_shot_takes_the_best_of_all_common_sizes(scored: tuple[Any, OneShotScores]) -> None:
    model, scores = scored
    plan = scores.plan(0.6, round_to=2, uniform=True)
    assert_stock(prune(model, plan, calibration=images(16)), model, plan)
    assert count(plan.architecture).macs <= 0.6 * count(model).macs
    assert plan.info["uniform"] and plan.info["error"] > scores.plan(0.6, round_to=2).info["error"]
    goal = check_target(scores.architecture, scores.settings, target=0.6, round_to=2)
    found = []
    sides: list[list[Any]] = [[], []]
    for i, shape in enumerate(scores.architecture.layers):
        asked = i, shape, of_layer(scores.tensors, i), goal, _branch_cost(scores.architecture, goal.meter, i)
        for side, make_branch in zip(sides, (_attention, _mlp), strict=True):
            side.append(make_branch(*asked))
    for attention, mlp in product(range(len(sides[0][0].sizes)), range(len(sides[1][0].sizes))):
        heads, qk, v = sides[0][0].sizes[attention]
        (neurons,) = sides[1][0].sizes[mlp]
        rows = [shape.__class__("attention", heads, qk, v, neurons) for shape in scores.architecture.layers]
        cost = count(scores.architecture.replace(layers=tuple(rows))).macs
        if qk == v and cost <= 0.6 * count(model).macs:
            error = sum(float(branch.options.errors[attention]) for branch in sides[0])
            found.append(error + sum(float(branch.options.errors[mlp]) for branch in sides[1]))
    assert plan.info["error"] == pytest.approx(min(found))


def test_one_shot_says_what_cannot_be_reached_or_held(scored: tuple[Any, OneShotScores]) -> None:
    with pytest.raises(UnreachableTargetError, match="cannot be reached"):
        scored[1].plan(0.05, uniform=True)
    with pytest.raises(InvalidPlanError, match="no stock class holds fewer of v"):
        scored[1].plan(0.9, units=("v",), uniform=True)


@pytest.mark.parametrize("goal", [{"target": 0.6}, {"pruning_ratio": 0.4}])
@pytest.mark.parametrize("binarize", [False, True])
def test_vtp_cuts_whole_heads_and_neurons(goal: dict[str, float], binarize: bool) -> None:
    model = make("ViTForImageClassification")
    wrapped = get_pruning_model(model, VTPConfig(**goal, uniform=True, binarize=binarize, round_to=4))
    assert wrapped.method.config.points == ("attention_out", "mlp_hidden")
    scatter_scores(wrapped)
    plan = wrapped.plan()
    assert_stock(prune(model, plan), model, plan)
    first = plan.architecture.layers[0]
    assert first.qk_dim == first.v_dim == 8 and first.mlp % 4 == 0 and first.mlp < 48
    for entry in plan.layers:
        score = wrapped.method.gates[f"layer{entry.index}_attention_out"].score.detach().abs()
        assert {*entry.heads} == {*score.view(4, 8).sum(1).topk(len(entry.heads)).indices.tolist()}
    if "target" in goal:
        assert count(plan.architecture).macs <= 0.6 * count(model).macs


def test_vtp_takes_the_largest_common_sizes_next_to_its_ranking() -> None:
    model = make("ViTForImageClassification")
    scores = {
        f"layer{i}_{point}": size for i in range(3) for point, size in (("attention_out", 32), ("mlp_hidden", 48))
    }
    for strong in ("attention_out", "mlp_hidden"):  # the other point's units all go first
        wrapped = get_pruning_model(model, VTPConfig(target=0.6, uniform=True, round_to=4))
        for name, size in scores.items():
            worth = torch.rand(size, generator=torch.Generator().manual_seed(size)) + (
                10 if name.endswith(strong) else 0
            )
            wrapped.method.gates[name].score.data.copy_(worth)
        source, shape = wrapped.plan().source, wrapped.plan().architecture.layers[0]
        fitting = {
            (heads, mlp)
            for heads, mlp in product(range(1, 5), range(4, 49, 4))
            if count(source.replace(layers=tuple(replace(s, heads=heads, mlp=mlp) for s in source.layers))).macs
            <= 0.6 * count(model).macs
        }
        assert (shape.heads, shape.mlp) in fitting and (shape.heads, shape.mlp + 4) not in fitting
        # all of the strong point, as far as the target allows
        assert (shape.heads, shape.mlp)[strong == "mlp_hidden"] == max(
            pair[strong == "mlp_hidden"] for pair in fitting
        )
    with pytest.raises(UnreachableTargetError, match="the smallest model these settings allow"):
        get_pruning_model(model, VTPConfig(target=0.1, uniform=True, round_to=4))


def test_vtp_settings_that_contradict_are_refused() -> None:
    for settings in ({"uneven": True}, {"points": ("mlp_in",)}):
        with pytest.raises(InvalidConfigError, match="uniform=True cuts whole heads"):
            VTPConfig(target=0.5, uniform=True, **settings)
    model = make("ViTForImageClassification")
    with pytest.raises(InvalidConfigError, match="cuts every layer"):
        get_pruning_model(model, VTPConfig(target=0.5, uniform=True, target_modules="0"))
    with pytest.raises(InvalidPlanError, match="only whole layers"):
        get_pruning_model(make("SwinForImageClassification"), VTPConfig(target=0.5, uniform=True))
