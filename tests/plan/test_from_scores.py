"""From scores to a plan: targets are met, scopes do what they say, impossible requests are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_vitprune import PruningPlan, count, criteria, mask, prune, truncate
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.criteria import UnitScores
from hf_vitprune.errors import (
    InvalidConfigError,
    InvalidPlanError,
    LatencyTableError,
    ScoresError,
    UnreachableTargetError,
    UnsupportedUnitError,
)
from hf_vitprune.plan.from_scores import SCOPES
from hf_vitprune.plan.select import Ranking
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.units import unit_sets
from latency_tables import made_table
from tiny import CLASSIFIERS, images, make, relative_error, run

VIT = "ViTForImageClassification"


def scores_of(model: Any, **changed: Any) -> UnitScores:
    """Scores 1, 2, 3, ... in every set; some of them changed."""
    architecture = Architecture.of(model)
    sets = {name: torch.arange(1.0, one.size + 1) for name, one in unit_sets(architecture).items()}
    return UnitScores(architecture, {**sets, **{name.replace("_", " "): values for name, values in changed.items()}})


# ---------------------------------------------------------------------- what is removed
@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "uniform"])  # see test_uniform.py
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_target_is_met_and_the_plan_works(case: str, scope: str) -> None:
    model = make(case)
    scores = criteria.activation(model, images())
    for metric, target in (("macs", 0.6), ("params", 0.75)):
        plan = PruningPlan.from_scores(model, scores, target, metric, scope=scope, round_to=2)
        ratio = ClosedFormMeter(metric, plan.source).ratio(plan.architecture)
        assert target - 0.12 < ratio <= target
        assert all(s.qk_dim % 2 == s.v_dim % 2 == s.mlp % 2 == 0 for s in plan.architecture.layers)
    assert plan.info["method"] == "activation scores" and plan.info["target"] == 0.75
    small = prune(model, plan)
    assert relative_error(run(small)["logits"], run(mask(model, plan))["logits"]) < 1e-5
    assert count(small).params == count(plan.architecture).params


def test_kept_units_are_the_highest() -> None:
    model = make(VIT)
    for scope in SCOPES:
        plan = PruningPlan.from_scores(model, scores_of(model), 0.5, scope=scope, units=None, round_to=4)
        for entry, shape in zip(plan.layers, plan.source.layers, strict=True):
            assert entry.mlp == tuple(range(shape.mlp))[-len(entry.mlp) :]
            assert entry.heads == tuple(range(shape.heads))[-len(entry.heads) :]
        assert plan.embedding == tuple(range(32))[-len(plan.embedding or ()) :]


def test_scopes_differ_in_who_is_compared() -> None:
    """Layer 2 has neurons of equal worth, those of layers 0 and 1 differ; layer 0's are a hundred times larger."""
    model = make(VIT)
    steep, flat = torch.arange(1.0, 49), torch.full((48,), 24.5)
    scores = scores_of(model, layer_0_mlp=100 * steep, layer_1_mlp=steep, layer_2_mlp=flat)

    def widths(scope: str, ratio: float = 1 / 3) -> list[int]:
        plan = PruningPlan.from_scores(model, scores, ratio=ratio, scope=scope, units=["mlp"], round_to=1)
        return [len(entry.mlp) for entry in plan.layers]

    assert widths("local") == [32, 32, 32]
    assert widths("isomorphic") == [48, 24, 24]  # the lowest third of all: half of layer 1, all but 24.5 of layer 2
    assert widths("global") == [24, 24, 48]  # relative to the mean of their set
    assert widths("global", 0.999) == [1, 1, 1]  # a set is never emptied


def test_isomorphic_keeps_kinds_and_stages_apart() -> None:
    model = make("SwinForImageClassification")
    scores = scores_of(model, layer_0_heads=torch.tensor([1e3, 1e3]), layer_4_mlp=torch.full((64,), 1e3))
    units = ("heads", "mlp")
    plan = PruningPlan.from_scores(model, scores, ratio=0.5, scope="isomorphic", units=units, round_to=1)
    heads, mlp = ([len(getattr(entry, unit)) for entry in plan.layers] for unit in units)
    assert heads[:2] == [2, 1] and sum(heads[2:]) == 6 and mlp[:2] == [16, 16]
    assert mlp[4] == 64 and mlp[2] == mlp[3] == 16


def test_layers_are_removed_stage_by_stage() -> None:
    model = make("SwinForImageClassification")
    scores = scores_of(model, layers=torch.tensor([1.0, 9, 8, 7, 2]))
    plan = PruningPlan.from_scores(model, scores, 0.75, scope="local", units=["layers"])
    assert plan.architecture.depths == (1, 2) and [entry.index for entry in plan.layers] == [1, 2, 3]
    with pytest.raises(UnreachableTargetError):
        PruningPlan.from_scores(model, scores, 0.2, units=["layers"])
    short = truncate(model, 2)  # nothing is left of its second stage
    plan = PruningPlan.from_scores(short, criteria.magnitude(short), 0.9, units=["layers"])
    assert plan.architecture.depths == (1, 0)


def test_random_and_magnitude_are_from_scores() -> None:
    model = make(VIT)
    settings: dict[str, Any] = {"ratio": 0.4, "scope": "local", "units": None, "round_to": 4}
    for name, made in (("magnitude", criteria.magnitude(model)), ("random", criteria.random(model, 2))):
        thin = getattr(PruningPlan, name)(model, 0.4, round_to=4, **({"seed": 2} if name == "random" else {}))
        if name == "magnitude":
            assert thin == PruningPlan.from_scores(model, made, **settings)
        assert thin.info["method"] == f"{name} scores"


def test_own_scores_may_leave_sets_out() -> None:
    model = make(VIT)
    own = {f"layer {i} mlp": torch.arange(48.0).flip(0) for i in range(3)}
    plan = PruningPlan.from_scores(model, own, ratio=0.5, units=["mlp"], scope="local")
    assert all(entry.mlp == tuple(range(24)) for entry in plan.layers)
    with pytest.raises(ScoresError, match="no scores of layer 0 qk"):
        PruningPlan.from_scores(model, own, ratio=0.5)


def test_latency_is_a_target() -> None:
    model = make(VIT)
    table = made_table(model)
    plan = PruningPlan.from_scores(model, scores_of(model), 0.8, "latency", latency_table=table)
    assert table.predict(plan.architecture) <= 0.8 * table.predict(plan.source)
    other: dict[str, Any] = {"latency_table": made_table(model, device="another card")}
    with pytest.raises(LatencyTableError, match="allow_other_device"):
        PruningPlan.from_scores(model, scores_of(model), 0.8, "latency", **other)
    assert PruningPlan.from_scores(model, scores_of(model), 0.8, "latency", **other, allow_other_device=True) == plan


def test_ties_are_spread_over_the_sets() -> None:
    ranking = Ranking({"a": torch.ones(8), "b": torch.ones(4), "c": torch.full((4,), 2.0)})
    assert [int(kept.sum()) for kept in ranking.kept(6).values()] == [4, 2, 4]
    assert [int(kept.sum()) for kept in ranking.kept(14).values()] == [0, 0, 2]
    assert not any(kept.any() for kept in ranking.kept(16).values())


# ---------------------------------------------------------------------- what is refused
def test_impossible_requests() -> None:
    model = make(VIT)
    scores = scores_of(model)
    requests: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, InvalidPlanError, "either target"),
        ({"target": 0.5, "ratio": 0.5}, InvalidPlanError, "either target"),
        ({"target": 1.0}, InvalidPlanError, "strictly between"),
        ({"target": float("nan")}, InvalidPlanError, "strictly between"),
        ({"ratio": 0}, InvalidPlanError, "strictly between"),
        ({"target": 0.5, "scope": "all"}, InvalidPlanError, "global, local, isomorphic"),
        ({"target": 0.5, "units": ["head"]}, UnsupportedUnitError, "heads"),
        ({"target": 0.5, "round_to": 0}, InvalidPlanError, "round_to"),
        ({"target": 0.5, "target_metric": "flops"}, InvalidPlanError, "macs, params or latency"),
        ({"target": 0.5, "target_metric": "latency"}, InvalidPlanError, "go together"),
        ({"target": 0.5, "latency_table": "table.json"}, InvalidPlanError, "go together"),
        (
            {"target": 0.5, "target_metric": "latency", "latency_table": "t.json"},
            InvalidPlanError,
            "LatencyTable.load",
        ),
        ({"target": 0.01}, UnreachableTargetError, "smallest model"),
        ({"ratio": 0.001}, InvalidPlanError, "removes no unit"),
        ({"ratio": 0.5, "target_metric": "params"}, InvalidPlanError, "a ratio counts units"),
        ({"ratio": 0.5, "image_size": 64}, InvalidPlanError, "a ratio counts units"),
        ({"target": 0.5, "image_size": "64"}, InvalidConfigError, "image_size is a number of pixels"),
    ]
    for settings, error, message in requests:
        with pytest.raises(error, match=message):
            PruningPlan.from_scores(model, scores, **settings)


def test_scores_of_another_model() -> None:
    model = make(VIT)
    for other in (make(VIT, num_hidden_layers=2), make("DeiTForImageClassification"), make(VIT, intermediate_size=40)):
        with pytest.raises(ScoresError, match="another architecture"):
            PruningPlan.from_scores(model, scores_of(other), 0.5)
    small = prune(model, PruningPlan.from_scores(model, scores_of(model), 0.7))
    with pytest.raises(ScoresError, match="score this model"):
        PruningPlan.from_scores(small, scores_of(model), 0.5)
    assert PruningPlan.from_scores(small, criteria.magnitude(small), 0.9, round_to=1)


def test_models_that_read_some_channels_keep_their_embedding() -> None:
    model = make(VIT)
    dense = PruningPlan.dense(model)
    narrow = prune(model, dense.with_layers(replace(entry, mlp_in=tuple(range(16))) for entry in dense.layers))
    with pytest.raises(InvalidPlanError, match="cannot be pruned together"):
        PruningPlan.magnitude(narrow, 0.5)
    plan = PruningPlan.from_scores(narrow, criteria.magnitude(narrow), 0.8, round_to=1)
    assert relative_error(run(prune(narrow, plan))["logits"], run(mask(narrow, plan))["logits"]) < 1e-5
