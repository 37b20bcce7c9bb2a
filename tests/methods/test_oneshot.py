"""One-shot scores: errors as they are measured, the exact best plan, and a file that any budget is cut from."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vitprune import Architecture, OneShotScores, PruningPlan, count, mask, prune
from hf_vitprune.errors import (
    InvalidConfigError,
    InvalidDataError,
    InvalidPlanError,
    LatencyTableError,
    UnreachableTargetError,
    UnsupportedModelError,
    UnsupportedUnitError,
)
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.methods.oneshot import check_target
from hf_vitprune.methods.oneshot.allocate import Options, allocate, undominated
from hf_vitprune.methods.oneshot.choose import _attention, _branch_cost, _mlp, at_output
from hf_vitprune.methods.oneshot.measure import Measurement
from hf_vitprune.methods.oneshot.probe import read_outputs
from hf_vitprune.modeling.peft_twin import is_peft, merged_twin
from hf_vitprune.utils.batches import ImageBatches
from latency_tables import made_table
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run
from tiny_adapters import adapted

VIT, SWIN, DINO = (f"{name}ForImageClassification" for name in ("ViT", "Swin", "Dinov2"))
FEW = OneShotSettings(probe_images=4)


def pixels(count: int = 48, seed: int = 1) -> torch.Tensor:
    return images(count, seed=seed).double()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def scored() -> dict[str, tuple[object, OneShotScores]]:
    """Model and scores of three families."""
    found = {}
    for case in (VIT, SWIN, DINO):
        model = make(case).double()
        found[case] = model, OneShotScores.measure(model, pixels(), FEW)
    return found


# ---------------------------------------------------------------------- the knapsack
numbers = st.integers(0, 12)


def best_error(groups: list[Options], budget: float) -> float:
    """The least sum of errors of all choices within the budget, each looked at."""
    every = itertools.product(*(zip(g.costs, g.errors, strict=True) for g in groups))
    return min(sum(e for _, e in choice) for choice in every if sum(c for c, _ in choice) <= budget)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    groups=st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), min_size=1, max_size=4),
    share=st.floats(0, 1.1),
    scale=st.sampled_from([1.0, 1e-9, 1e9]),
)
def test_allocation_is_the_best_there_is(groups: list, share: float, scale: float) -> None:
    options = [
        Options(np.array([c for c, _ in group]) * scale, np.array([e for _, e in group]) * 1e-4) for group in groups
    ]
    lowest, highest = (sum(f(g.costs) for g in options) for f in (min, max))
    budget = lowest + share * (highest - lowest) + 1e-3 * scale  # costs are whole: no choice sits on the budget
    chosen, gap = allocate(options, budget)
    cost, error = (sum(float(g[k][p]) for g, p in zip(options, chosen, strict=True)) for k in (0, 1))
    assert cost <= budget and error == pytest.approx(best_error(options, budget), abs=1e-12)
    assert gap <= 1e-6 * max(float(np.ptp(group.errors)) for group in options) * (1 + 1e-9)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(UnreachableTargetError, match="cheapest"):
        allocate([Options(np.array([2.0, 3.0]), np.array([1.0, 0.0]))], 1.9)


def test_too_many_partial_choices_widen_the_gap_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vitprune.methods.oneshot.allocate.STATES", 3)
    generator = np.random.default_rng(0)
    gaps = []
    for _ in range(40):
        groups = [Options(generator.random(6), generator.random(6)) for _ in range(4)]
        budget = 0.4 * sum(group.costs.max() for group in groups)
        chosen, gap = allocate(groups, budget)
        error = sum(float(group.errors[p]) for group, p in zip(groups, chosen, strict=True))
        assert best_error(groups, budget) <= error <= best_error(groups, budget) + gap + 1e-12
        gaps.append(gap)
    assert max(gaps) > 1e-4


def test_thousands_of_options_are_solved_to_a_millionth_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    """As many as twelve layers of 1,536 neurons have at round_to=1; a solver for integers took over eight minutes."""
    generator = np.random.default_rng(0)
    kept = np.arange(1537)
    groups = [
        Options(kept * cost, error * (1 - kept / 1536) ** power * (1 + 0.01 * generator.random(1537)))
        for cost, error, power in generator.uniform([300, 0.1, 1], [900, 1, 4], (12, 3))
    ]
    budget = 0.5 * sum(group.costs[-1] for group in groups)
    start = time.process_time()
    chosen, gap = allocate(groups, budget)
    assert time.process_time() - start < 10  # 0.2 s on a quiet machine
    assert gap <= 1.1e-6
    cost, error = (sum(float(g[k][p]) for g, p in zip(groups, chosen, strict=True)) for k in (0, 1))
    # no price of cost gives a bound above what was found, and the best one gives nearly that
    bounds = [
        sum(float((g.errors + price * g.costs).min()) for g in groups) - price * budget
        for price in np.geomspace(1e-8, 1e-5, 2000)
    ]
    assert cost <= budget and max(bounds) <= error <= max(bounds) + 1e-4
    assert capfd.readouterr() == ("", "")


def test_dominated_options_go() -> None:
    options = Options(np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([1.0, 5.0, 5.0, 2.0, 1.0]))
    assert undominated(options).tolist() == [1, 3, 0]


@pytest.mark.parametrize("metric", ["macs", "params", "latency"])
@pytest.mark.parametrize("case", [VIT, SWIN])
def test_no_plan_within_the_target_has_a_smaller_error(case: str, metric: str, scored: dict) -> None:
    """Against all plans of the two lowest layers' options (the others are fixed by their scores to stay whole)."""
    model, scores = scored[case]
    architecture = scores.architecture
    table = {"latency_table": made_table(model), "allow_other_device": True} if metric == "latency" else {}
    goal = {"target": 0.6, "target_metric": metric, "round_to": 8, **table}
    checked = check_target(architecture, FEW, **goal)
    tensors = {
        name: t * 1e6 if name.endswith("_seen") and int(name.split(".")[0]) > 0 else t
        for name, t in scores.tensors.items()
    }
    plan = replace(scores, tensors=tensors).plan(**goal)
    meter, rows = checked.meter, []
    for i, shape in enumerate(architecture.layers):
        mine = {name.partition(".")[2]: t for name, t in tensors.items() if name.split(".")[0] == str(i)}
        cost = _branch_cost(architecture, meter, i)
        rows += [_attention(i, shape, mine, checked, cost), _mlp(i, shape, mine, checked, cost)]
    assert meter.ratio(plan.architecture) <= 0.6
    # layer costs add up from those of their branches
    whole = meter.total(architecture) - sum(row.options.costs[0] for row in rows)
    chosen = [_position(row, plan) for row in rows]
    assert meter.total(plan.architecture) == pytest.approx(
        whole + sum(row.options.costs[p] for row, p in zip(rows, chosen, strict=True))
    )
    best = sum(row.options.errors[p] for row, p in zip(rows, chosen, strict=True))
    assert plan.info["error"] == pytest.approx(best) and plan.info["gap"] <= 1e-5 * best
    generator = np.random.default_rng(0)
    budget = 0.6 * meter.total(architecture) - whole
    for _ in range(3000):  # any other choice, at random
        other = [int(generator.integers(len(row.sizes))) for row in rows]
        if sum(row.options.costs[p] for row, p in zip(rows, other, strict=True)) <= budget:
            assert sum(row.options.errors[p] for row, p in zip(rows, other, strict=True)) >= best - 1e-9
    for row, position in itertools.product(range(len(rows)), range(60)):  # and every change of one branch
        other = [position if j == row else p for j, p in enumerate(chosen)]
        if (
            position < len(rows[row].sizes)
            and sum(r.options.costs[p] for r, p in zip(rows, other, strict=True)) <= budget
        ):
            assert sum(r.options.errors[p] for r, p in zip(rows, other, strict=True)) >= best - 1e-9


def _position(row, plan) -> int:
    shape = plan.architecture.layers[row.layer]
    return row.sizes.index((shape.mlp,) if len(row.sizes[0]) == 1 else (shape.heads, shape.qk_dim, shape.v_dim))


# ---------------------------------------------------------------------- errors are what they are said to be
@torch.no_grad()
@pytest.mark.parametrize("case", [VIT, SWIN, DINO])
def test_probed_errors_are_those_of_the_pruned_model(case: str, scored: dict) -> None:
    """A layer's MLP halved, and its values: the model made so loses at its output what the scores say."""
    model, scores = scored[case]
    few = pixels()[[i * 48 // 4 for i in range(4)]]
    expected = read_outputs(model(pixel_values=few))
    layer = 1
    shape = scores.architecture.layers[layer]
    order = scores.tensors[f"{layer}.neurons"].tolist()
    dense = PruningPlan.dense(model)
    entry = dense.layers[layer]
    for name, cut, size in (
        ("neurons", replace(entry, mlp=tuple(sorted(order[shape.mlp - shape.mlp // 2 :]))), shape.mlp // 2),
        ("values", entry.keep_channels("v", range(4)), 4),
        ("queries", entry.keep_channels("qk", range(4)), 4),
    ):
        plan = dense.with_layers([*dense.layers[:layer], cut, *dense.layers[layer + 1 :]])
        small = prune(model, scores.compensate(model, plan))
        outputs = read_outputs(small(pixel_values=few))
        error = float((outputs - expected).square().sum() / expected.square().sum())
        seen = scores.tensors[f"{layer}.{name}_seen"][0, 1].item()
        assert error == pytest.approx(seen, rel=0.02), (name, size)  # the file holds single precision


def test_features_are_judged_by_direction_and_special_tokens_as_much_as_patches() -> None:
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = read_outputs(SimpleNamespace(last_hidden_state=tokens), special=1)
    other = read_outputs(SimpleNamespace(last_hidden_state=3 * tokens + 1), special=1)
    assert found is not None and other is not None and torch.allclose(found, other, atol=1e-6)
    lengths = found.view(2, 5, 8).square().sum(-1)
    assert torch.allclose(lengths[:, 0], lengths[:, 1:].sum(1)) and torch.allclose(
        lengths.sum(1), torch.tensor(5.0).double()
    )
    alike = read_outputs(SimpleNamespace(last_hidden_state=tokens))
    assert alike is not None and torch.allclose(alike.view(2, 5, 8).norm(dim=-1), torch.ones(2, 5).double())


def test_between_probes_errors_follow_a_power_law() -> None:
    seen = torch.tensor([[1.0, 2.0], [100.0, 200.0], [10.0, 20.0]]).double()
    wanted = torch.tensor([0.0, 0.5, 1.0, 50.0, 1000.0])
    assert at_output(wanted, seen).tolist() == pytest.approx([0, 1, 2, 100, 2000])
    assert at_output(wanted, torch.zeros(2, 2)).tolist() == [0] * 5
    assert at_output(wanted, torch.tensor([[1.0, 3.0], [1.0, 2.0]])).isfinite().all()


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_every_family(case: str, scored: dict) -> None:
    """At half of the cost: masked == pruned, closer to the dense model than slices, with images and without."""
    model, scores = scored.get(case) or (make(case).double(), None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = scores or OneShotScores.measure(model, pixels(), FEW)
    plan = scores.plan(0.5, round_to=2)
    assert 0.4 < count(plan.architecture).macs / count(model).macs <= 0.5
    dense = run(model, pixels())["logits"]  # of noise, with noise for weights, nothing carries over to other images
    made = scores.compensate(model, plan)
    small = prune(model, made)
    assert Architecture.of(small) == plan.architecture
    found = run(small, pixels())["logits"]
    assert relative_error(run(mask(model, made), pixels())["logits"], found) < 1e-8
    slices = distance(run(prune(model, plan), pixels())["logits"], dense)
    assert distance(found, dense) < slices
    assert distance(run(prune(model, plan, calibration=pixels()), pixels())["logits"], dense) < slices
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    "case",
    ["ViTModel", "Dinov2Backbone", "SwinForMaskedImageModeling", "RfDetrDinov2Backbone", "InternVLVisionModel-normed"],
)
def test_models_without_a_classifier(case: str) -> None:
    model = make(case).double()
    plan = OneShotScores.measure(model, pixels(8), FEW).plan(0.7, "params", round_to=4, units=["mlp", "v"])
    assert count(plan.architecture).params <= 0.7 * count(model).params
    assert {shape.heads for shape in plan.architecture.layers} == {
        shape.heads for shape in Architecture.of(model).layers
    }


def test_a_pruned_model_can_be_scored() -> None:
    model = prune(make(VIT), PruningPlan.random(make(VIT), 0.4, ["heads", "qk", "mlp"]))
    plan = OneShotScores.measure(model, images(16), FEW).plan(0.7, round_to=1)
    assert plan.architecture.layers[0].heads <= 2 and not plan.removes_nothing


def test_a_peft_model_is_scored_with_its_adapters_and_keeps_them() -> None:
    model = adapted(make(VIT), "lora")
    scores = OneShotScores.measure(model, images(16), FEW)
    merged = OneShotScores.measure(merged_twin(model), images(16), FEW)
    assert_same(scores.tensors, merged.tensors)
    small = prune(model, scores.plan(0.6, round_to=2), calibration=images(16))
    assert is_peft(small) and count(small).macs <= 0.6 * count(model).macs


# ---------------------------------------------------------------------- elastic
@pytest.mark.parametrize("case", [VIT, SWIN])
def test_what_is_kept_in_a_file_gives_what_fresh_scores_give(case: str, scored: dict, tmp_path: Path) -> None:
    model, scores = scored[case]
    loaded = OneShotScores.load(scores.save(tmp_path / "new" / "scores.safetensors"))
    assert (loaded.images, loaded.settings, loaded.fingerprint) == (48, FEW, scores.fingerprint)
    for target in (0.8, 0.4):
        fresh, kept = scores.plan(target, round_to=4), loaded.plan(target, round_to=4)
        assert kept == fresh
        assert_same(loaded.compensate(model, kept).weights, scores.compensate(model, fresh).weights)
    again = OneShotScores.measure(model, pixels(), FEW)
    assert_same(again.tensors, scores.tensors)


def test_nothing_removed_changes_nothing(scored: dict) -> None:
    model, scores = scored[VIT]
    assert scores.compensate(model, PruningPlan.dense(model)).weights == {}
    assert scores.plan(0.999, round_to=1, units=["mlp"]).summary()["mlp"] > 0.98


# ---------------------------------------------------------------------- bad input
def test_scores_of_another_model_are_refused(scored: dict, tmp_path: Path) -> None:
    model, scores = scored[VIT]
    plan = scores.plan(0.5, round_to=4)
    for other, message in (
        (make(SWIN), "not of this swin"),
        (make(VIT, seed=1).double(), "other weights"),
        (make(VIT), "dtype"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            scores.compensate(other, plan)
    with pytest.raises(UnsupportedModelError, match="merged weights"):
        scores.compensate(adapted(make(VIT), "lora"), plan)
    bare = OneShotScores.measure(model, pixels(4), replace(FEW, statistics=False))
    with pytest.raises(InvalidDataError, match="without statistics"):
        bare.compensate(model, plan)
    (tmp_path / "junk").write_bytes(b"junk")
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "junk", tmp_path / "model" / "model.safetensors"):
        with pytest.raises(InvalidDataError, match="no file of one-shot scores"):
            OneShotScores.load(path)


def test_plans_beyond_the_statistics_are_refused(scored: dict) -> None:
    model, scores = scored[VIT]
    for units in (["layers"], ["embedding"]):
        with pytest.raises(InvalidPlanError, match="from statistics alone"):
            scores.compensate(model, PruningPlan.random(model, 0.4, units))
    made = scores.compensate(model, scores.plan(0.5, round_to=4))
    with pytest.raises(InvalidPlanError, match="carries new weights"):
        scores.compensate(model, made)


def test_impossible_settings_are_refused(scored: dict) -> None:
    model, scores = scored[VIT]
    for settings_, error, message in (
        ({"target": 0.01}, UnreachableTargetError, "cannot be reached: with the smallest size"),
        ({"target": 1.0}, InvalidConfigError, "target"),
        ({"target": 0.5, "round_to": 0}, InvalidConfigError, "round_to"),
        ({"target": 0.5, "units": ["layers"]}, UnsupportedUnitError, "choice of heads, qk, v, mlp"),
        ({"target": 0.5, "units": []}, UnsupportedUnitError, "choice of"),
        ({"target": 0.5, "target_metric": "energy"}, InvalidConfigError, "target_metric"),
        ({"target": 0.5, "target_metric": "latency"}, InvalidConfigError, "go together"),
        (
            {"target": 0.5, "target_metric": "latency", "latency_table": made_table(make(SWIN))},
            LatencyTableError,
            "another model",
        ),
    ):
        with pytest.raises(error, match=message):
            scores.plan(**settings_)
    for field, value in (("images", 0), ("probe_images", 0), ("sizes", 1.5), ("ridge", -1), ("statistics", 1)):
        with pytest.raises(InvalidConfigError, match=field):
            OneShotSettings(**{field: value})
    for data, message in (
        (images(4)[:0], "empty"),
        (images(4, size=24), "does not take"),
        (images(4) * math.nan, "finite"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            OneShotScores.measure(make(VIT), data)


@pytest.mark.parametrize("layers, expected", [(3, 4), (12, 4), (16, 3), (60, 1)])
def test_deep_models_are_probed_by_fewer_images(layers: int, expected: int) -> None:
    """What probes take grows with the square of the depth, but for that."""
    model = make("ViTForImageClassification", num_hidden_layers=layers)
    started = Measurement(model, ImageBatches(images(8), 4), OneShotSettings())
    assert len(started.probe.batch["pixel_values"]) == expected
