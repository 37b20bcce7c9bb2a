"""One interface for the costs that a target can count: parts add up to wholes, for every family and shape."""

from __future__ import annotations

from typing import Any

import pytest

from hf_vitprune.cost import ClosedFormMeter, CostMeter, count
from hf_vitprune.latency.table import LatencyMeter
from hf_vitprune.spec.architecture import Architecture
from latency_tables import made_table
from plans import plan_named
from tiny import ALL_LAYERS, CASES, NECKS, make


def meter_of(metric: str, model: Any) -> CostMeter:
    architecture = Architecture.of(model)
    if metric == "latency":
        return LatencyMeter(made_table(model), architecture)
    return ClosedFormMeter(metric, architecture)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("plan_name", ["everything", "narrow inputs"])
def test_parts_of_every_kind_of_cost_add_up(case: str, plan_name: str) -> None:
    model = make(case)
    plan = plan_named(plan_name, model)
    assert plan is not None
    architecture = plan.architecture
    cost = count(architecture)
    totals: dict[str, float] = {"macs": cost.macs, "params": cost.params}
    if architecture.family.part == "vision" and case not in (*NECKS, ALL_LAYERS):
        totals["latency"] = made_table(model).predict(architecture)
    for metric, total in totals.items():
        assert meter_of(metric, model).total(architecture) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("metric", ["macs", "params", "latency"])
def test_ratio_and_differences(metric: str) -> None:
    model = make("ViTForImageClassification")
    meter = meter_of(metric, model)
    dense = Architecture.of(model)
    assert meter.ratio(dense) == 1
    small = plan_named("heads", model).architecture  # type: ignore[union-attr]
    pairs = zip(dense.layers, small.layers, strict=True)
    saved = sum(meter.layer(a, dense.width(0)) - meter.layer(b, dense.width(0)) for a, b in pairs)
    assert meter.total(dense) - meter.total(small) == pytest.approx(saved)
    assert meter.ratio(small) == pytest.approx(1 - saved / meter.total(dense))
    assert 0 < meter.ratio(small) < 1


def test_a_layer_is_costed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("ViTForImageClassification")
    meter = meter_of("macs", model)
    calls = []
    costed = meter._layer_cost
    monkeypatch.setattr(meter, "_layer_cost", lambda *key: calls.append(key) or costed(*key))
    for _ in range(3):
        meter.total(Architecture.of(model))
    assert len(calls) == 1  # three layers of one shape


def test_macs_follow_the_image_size() -> None:
    architecture = Architecture.of(make("ViTForImageClassification"))
    meter = ClosedFormMeter("macs", architecture, 32)
    assert meter.total(architecture) == count(architecture, 32).macs > count(architecture).macs
