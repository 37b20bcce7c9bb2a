"""Compensated plans: their weights on the disk, padded channels, factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compensated import logits, pixels
from hf_vitprune import PruningPlan, mask, prune
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.spec.configs import lineage_of
from plans import each_layer, plan_named, without_scales
from tiny import assert_same, images, make, relative_error, run

VIT = "ViTForImageClassification"


def test_a_compensated_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    model = make(VIT)
    made = compensate_plan(model, PruningPlan.random(model, 0.4), images(8))
    made.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert_same(loaded.weights, made.weights)
    small = prune(model, loaded)
    assert_same(dict(small.state_dict()), dict(prune(model, made).state_dict()))
    small.save_pretrained(tmp_path / "model")
    assert_same(run(type(small).from_pretrained(tmp_path / "model")), run(small))
    assert lineage_of(small.config)["compensation"]["images"] == 8


def test_padded_channels_stay_zero() -> None:
    """Masks have no place for them."""
    model = make(VIT)
    plan = plan_named("padded values", model)
    assert plan is not None
    small = prune(model, plan, calibration=images(8))
    padded = [j for j, row in enumerate(plan.layers[0].v) for c in row if c == -1]
    assert padded
    for layer, entry in zip(small.vit.layers, plan.layers, strict=True):
        rows = [c == -1 for row in entry.v for c in row]
        assert not layer.attention.v_proj.weight[rows].any() and not layer.attention.o_proj.weight[:, rows].any()


def test_a_plan_with_factors_follows_its_reference() -> None:
    """The reference holds the factors of all units, those that go included."""
    model = make(VIT).double()
    dense = each_layer(
        PruningPlan.dense(model),
        lambda e: replace(
            e, scales={"mlp": tuple(0.2 + 0.04 * i for i in range(48)), "v": tuple(1.5 - 0.03 * i for i in range(32))}
        ),
    )
    reference = mask(model, dense)
    plan = each_layer(
        dense,
        lambda e: replace(
            e.keep_channels("v", range(4)),
            mlp=e.mlp[8:],
            scales={"mlp": e.scales["mlp"][8:], "v": tuple(s for i, s in enumerate(e.scales["v"]) if i % 8 < 4)},
        ),
    )
    made = compensate_plan(model, plan, pixels(), reference=dense)
    expected = logits(reference, pixels(16, 3))
    error = relative_error(logits(prune(model, made), pixels(16, 3)), expected)
    assert error < relative_error(logits(prune(model, plan), pixels(16, 3)), expected)
    assert relative_error(logits(mask(model, made), pixels(16, 3)), logits(prune(model, made), pixels(16, 3))) < 1e-8
    bare = without_scales(plan)
    assert_same(
        dict(prune(model, made).state_dict()),
        dict(prune(reference, compensate_plan(reference, bare, pixels())).state_dict()),
    )
