"""More from the same images: parts of them as further views, and layers trained against the dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compensated import fits, pixels
from hf_vitprune import Compensation, PruningPlan, mask, prune
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.utils.crops import SMALLEST_VIEW, random_crops
from plans import plan_named, without_scales
from tiny import make, relative_error, run

VIT, SWIN, SWIGLU = "ViTForImageClassification", "SwinForImageClassification", "Dinov2ForImageClassification-swiglu"


def test_views_are_images_and_parts_of_them() -> None:
    model, images = make(VIT).double(), pixels(8)
    plan = PruningPlan.random(model, 0.4)
    found = compensate_plan(model, plan, images, Compensation(batch_size=8, views=3))
    parts = [random_crops(images, SMALLEST_VIEW, seed) for seed in (1, 2)]
    expected = compensate_plan(model, plan, torch.cat([images, *parts]), Compensation(batch_size=8))
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name
    assert found.info["compensation"]["views"] == 3 and found.info["compensation"]["images"] == 8


@pytest.mark.parametrize(("case", "cut"), [(VIT, "everything"), (VIT, "padded values"), (SWIN, "everything"),
                                           (SWIN, "removed branches"), (SWIGLU, "everything")])  # fmt: skip
def test_trained_layers_are_closer_to_the_dense_ones(case: str, cut: str) -> None:
    model, images = make(case).double(), pixels()
    plan = plan_named(cut, model)
    assert plan is not None
    plan = without_scales(plan)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = compensate_plan(model, plan, images, Compensation(local_steps=20))
    trained = [fit for fit in fits(made) if fit["part"] == "local"]
    assert trained and all(fit["after"] <= fit["before"] for fit in trained)
    assert sum(fit["after"] for fit in trained) < sum(fit["before"] for fit in trained)
    small, same = prune(model, made, allow_unchanged=True), mask(model, made)
    outputs = [run(one, pixels(3, 2))["logits"] for one in (small, same)]
    assert relative_error(*outputs) < 1e-8
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    again = compensate_plan(model, plan, images, Compensation(local_steps=20))
    assert all(torch.equal(weight, again.weights[name]) for name, weight in made.weights.items())


def test_a_training_that_does_not_help_leaves_the_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vitprune.compensate.local.RATE", 10.0)
    model = make(VIT).double()
    plan = PruningPlan.random(model, 0.4)
    found, fitted = (compensate_plan(model, plan, pixels(), Compensation(local_steps=steps)) for steps in (2, 0))
    assert all(torch.equal(weight, found.weights[name]) for name, weight in fitted.weights.items())
    assert all(fit["after"] == fit["before"] for fit in fits(found) if fit["part"] == "local")


def test_frozen_weights_are_trained_and_stay_frozen() -> None:
    model = make(VIT).double().requires_grad_(False)
    plan = PruningPlan.random(model, 0.4)
    made = compensate_plan(model, plan, pixels(), Compensation(local_steps=20))
    assert any(fit["after"] < fit["before"] for fit in fits(made) if fit["part"] == "local")
    assert not any(weight.requires_grad for weight in prune(model, made).parameters())


@pytest.mark.parametrize("setting", [{"views": 0}, {"views": 1.5}, {"local_steps": -1}, {"local_steps": True}])
def test_impossible_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match=next(iter(setting))):
        Compensation(**setting)


def test_frames_have_no_views() -> None:
    model = make("VideoMAEForVideoClassification")
    plan = PruningPlan.random(model, 0.4, units=("mlp",))
    with pytest.raises(InvalidConfigError, match="leave views at 1"):
        prune(model, plan, calibration=pixels(4), compensate=Compensation(views=2))


def test_half_precision_is_not_trained() -> None:
    model = make(VIT).bfloat16()
    with pytest.raises(InvalidConfigError, match="float32"):
        prune(
            model,
            PruningPlan.random(model, 0.4),
            calibration=pixels().bfloat16(),
            compensate=Compensation(local_steps=1),
        )
