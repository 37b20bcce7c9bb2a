"""Images that models are compensated from, in many forms, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compensated import distance, fits, logits, pixels
from hf_vitprune import Compensation, OneShotScores, PruningPlan, prune
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.errors import InvalidConfigError, InvalidDataError, InvalidPlanError, UnsupportedModelError
from plans import plan_named
from tiny import assert_same, images, make, relative_error, run

VIT, SWIN = (f"{name}ForImageClassification" for name in ("ViT", "Swin"))


def test_images_may_come_in_many_forms() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4)
    tensor = images(10)
    examples = [{"pixel_values": image, "labels": 0} for image in tensor]
    expected = prune(model, plan, calibration=tensor)
    for calibration in (examples, torch.utils.data.DataLoader(examples, batch_size=3, shuffle=True)):  # type: ignore[arg-type]
        assert_same(dict(prune(model, plan, calibration=calibration).state_dict()), dict(expected.state_dict()))
    some = compensate_plan(model, plan, tensor, Compensation(images=4))
    assert some.info["compensation"]["images"] == 4


@pytest.mark.parametrize("case", [SWIN, "Dinov2ForImageClassification"])
def test_other_image_sizes_where_the_model_takes_them(case: str) -> None:
    """Swin pads 20 x 20 images up to whole windows: padding is no token."""
    model = make(case)
    plan = PruningPlan.random(model, 0.4, ["heads", "qk", "v", "mlp"])
    wide = images(16, size=24 if case != SWIN else 22)
    small = prune(model, plan, calibration=wide)
    dense, plain = run(model, wide)["logits"], run(prune(model, plan), wide)["logits"]
    assert distance(run(small, wide)["logits"], dense) < distance(plain, dense)


# ---------------------------------------------------------------------- bad input
def test_bad_images_are_refused() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4)
    broken = images(4)
    broken[1, 0, 0, 0] = torch.nan
    for calibration, message in (
        (images(4)[:0], "empty"),
        ([], "empty"),
        (images(4, size=24), "does not take images of shape.*interpolate_pos_encoding"),
        (images(4)[:, :1], "does not take images of shape"),
        (broken, "not finite"),
        (images(4)[0], "images, channels"),
        ("folder", "pass a tensor"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            prune(model, plan, calibration=calibration)


def test_features_that_are_not_finite_are_refused() -> None:
    model = make(VIT)
    model.vit.layers[1].mlp.fc1.bias.data.fill_(3e38)  # finite, and what follows is not
    with pytest.raises(InvalidDataError, match="features of the calibration images are not finite"):
        prune(model, PruningPlan.random(model, 0.4, ["mlp"]), calibration=images(4))


def test_very_few_or_blank_images_are_damped_and_said() -> None:
    model = make(VIT).double()
    plan = PruningPlan.random(model, 0.4)
    made = compensate_plan(model, plan, pixels(1))
    assert any("fewer tokens than features" in note for note in made.info["compensation"]["notes"])
    assert any("ridge" in fit for fit in fits(made))
    for calibration in (pixels(1), torch.zeros(6, 3, 16, 16).double(), pixels(1).expand(8, -1, -1, -1)):
        small = prune(model, plan, calibration=calibration)
        assert all(tensor.isfinite().all() for tensor in small.state_dict().values())
        outputs, dense = logits(small, pixels(16, 3)), logits(model, pixels(16, 3))
        assert relative_error(outputs, dense) < 2  # no blow-up away from the images


def test_impossible_settings_are_refused() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4)
    for wrong in ("some", ("fc3",), (), ("mlp", "mlp"), None, 3):
        with pytest.raises(InvalidConfigError):
            prune(model, plan, calibration=images(4), compensate=wrong)
    for field, value in (
        ("ridge", 0), ("ridge", True), ("ridge", float("nan")), ("token_share", 1), ("token_share", "x"),
        ("images", 0), ("batch_size", None), ("reselect", 1), ("parts", "mlp"),
    ):  # fmt: skip
        with pytest.raises(InvalidConfigError, match=field):
            Compensation(**{field: value})
    with pytest.raises(InvalidConfigError, match="needs calibration images"):
        prune(model, plan, compensate=("mlp",))


def side_by_side(layer: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
    mlp = layer.mlp(layer.layernorm_after(hidden))
    return hidden + layer.attention(layer.layernorm_before(hidden), *args)[0] + mlp


def post_norm(layer: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
    hidden = layer.layernorm_before(hidden + layer.attention(hidden, *args)[0])
    return layer.layernorm_after(hidden + layer.mlp(hidden))


@pytest.mark.parametrize("forward", [side_by_side, post_norm])
def test_layers_of_another_order_are_refused_by_name(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4, ["mlp"])
    monkeypatch.setattr(type(model.vit.layers[0]), "forward", forward)
    for refused in (
        lambda: compensate_plan(model, plan, images(4)),
        lambda: OneShotScores.measure(model, images(4)),
    ):
        with pytest.raises(UnsupportedModelError, match=r"vit\.layers\.0 of this vit model is not what"):
            refused()


def test_compensate_none_and_no_images_slice_only() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4)
    expected = dict(prune(model, plan).state_dict())
    assert_same(dict(prune(model, plan, calibration=images(4), compensate="none").state_dict()), expected)


def test_plans_that_cannot_be_compensated_are_refused() -> None:
    model = make(VIT)
    scaled = plan_named("scaled", model)
    with pytest.raises(InvalidPlanError, match="folds factors"):
        prune(model, scaled, calibration=images(4))
    made = compensate_plan(model, PruningPlan.random(model, 0.4), images(4))
    with pytest.raises(InvalidPlanError, match="carries new weights already"):
        prune(model, made, calibration=images(4))
    with pytest.raises(InvalidPlanError, match="another shape"):
        prune(make(SWIN), PruningPlan.random(model, 0.4), calibration=images(4))
    model.classifier.to("meta")
    with pytest.raises(UnsupportedModelError, match="one device"):
        compensate_plan(model, PruningPlan.random(model, 0.4), images(4))
