"""Calibration from what processors make beside batches of images: packed patches, videos, crops, random masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_vitprune import OneShotScores, PruningPlan, criteria, mask, prune
from hf_vitprune.errors import InvalidDataError, UnsupportedModelError
from hf_vitprune.methods.sls.features import extract_features
from hf_vitprune.utils.batches import ImageBatches
from tiny import feed, images, make, relative_error, tensors
from tiny_composites import COMPOSITES, llava_next

#: of their cases ``tiny.feed`` makes a processor's batch; the last of SigLIP 2's images is padded
CASES = [
    "Siglip2VisionModel",
    "Siglip2ForImageClassification",
    "VideoMAEForVideoClassification",
    "VideoMAEForPreTraining",
    "ViTMAEModel",
    "ViTMAEForPreTraining",
]


def data(model: Any, rows: int = 24) -> dict[str, Any]:
    return feed(model, images(rows))


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every floating tensor; of padded patches nothing."""
    found = {name: value for name, value in tensors(model(**batch)) if value.is_floating_point()}
    seen = batch.get("pixel_attention_mask")
    return {n: v[seen.bool()] if seen is not None and v.ndim == 3 else v for n, v in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_compensation_and_one_shot_scores(case: str) -> None:
    """What is fitted is nearer to the dense model than slices, on the images that it was fitted on."""
    model = make(case)
    batch = data(model)
    scores = OneShotScores.measure(model, batch)
    assert scores.images == 24
    plan = scores.plan(0.6, round_to=1)
    dense = outputs(model, batch)
    fitted, plain = prune(model, plan, calibration=batch), prune(model, plan)
    name = next(iter(dense))
    assert relative_error(outputs(plain, batch)[name], outputs(mask(model, plan), batch)[name]) < 1e-5
    errors = [float((outputs(small, batch)[name] - dense[name]).square().sum()) for small in (fitted, plain)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("case", CASES)
def test_activations(case: str) -> None:
    model = make(case)
    batch = data(model)
    scores = criteria.activation(model, batch)
    twice = criteria.activation(model, [{name: value[:12] for name, value in batch.items()}] * 2)
    assert scores.settings["images"] == twice.settings["images"] == 24
    assert float(scores["layer 1 mlp"].min()) > 0
    plan = PruningPlan.from_scores(model, scores, ratio=0.4, round_to=1)
    assert len(plan.layers[0].mlp) < plan.source.layers[0].mlp


def test_padding_does_not_count() -> None:
    """Packed patches give what the same images without padding give, whatever is in the padding."""
    model = make("Siglip2VisionModel")
    batch = data(model, 2)
    whole, padded = ({name: value[i : i + 1] for name, value in batch.items()} for i in (0, 1))
    assert int(padded["pixel_attention_mask"].sum()) == 2
    short = {"pixel_values": padded["pixel_values"][:, :2], "spatial_shapes": padded["spatial_shapes"]}
    noisy = {**batch, "pixel_values": batch["pixel_values"].clone()}
    noisy["pixel_values"][1, 2:] = 100.0
    expected = criteria.activation(model, [whole, short])
    for given in (batch, noisy):
        scores = criteria.activation(model, given)
        assert all(torch.allclose(scores[name], expected[name], rtol=1e-4) for name in expected)


def test_masks_are_the_same_in_every_pass() -> None:
    """Those of ViT-MAE come with the batches, and are the processor's where it gives them."""
    model = make("ViTMAEModel")
    family = PruningPlan.dense(model).source.family
    batches = ImageBatches(images(5), 3, form=family.form(model.config))
    first, second = list(batches), list(batches)
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(first, second, strict=True))
    own = feed(model, images(2))
    (batch,) = ImageBatches(own, 3, form=family.form(model.config))
    assert torch.equal(batch["noise"], own["noise"])


def test_crops_of_a_bigger_model() -> None:
    """(examples, crops, channels, height, width), as LLaVA-NeXT's processor makes them; padding is left out."""
    model, inputs = llava_next(-1)
    padded = torch.cat([inputs["pixel_values"], torch.zeros_like(inputs["pixel_values"][:, :1])], 1)
    examples = [{"pixel_values": padded[i % 2], "input_ids": inputs["input_ids"][i % 2]} for i in range(8)]
    flat = inputs["pixel_values"].flatten(0, 1).repeat(4, 1, 1, 1)
    tower = model.model.vision_tower
    scores, alone = OneShotScores.measure(model, examples, part="vision"), OneShotScores.measure(tower, flat)
    sums = {name: tensor for name, tensor in scores.tensors.items() if not name.endswith("_seen")}
    assert all(torch.allclose(t, alone.tensors[n], rtol=1e-3, atol=1e-6) for n, t in sums.items())
    plan = PruningPlan.random(model, 0.4)
    small, expected = prune(model, plan, calibration=examples), prune(model, plan, calibration=flat)
    ours, theirs, plain = (outputs(one, inputs)["logits"] for one in (small, expected, prune(model, plan)))
    assert relative_error(ours, theirs) < 1e-2 < relative_error(plain, theirs)
    activations = criteria.activation(model, examples, part="vision")
    assert torch.allclose(activations["layer 0 mlp"], criteria.activation(tower, flat)["layer 0 mlp"], rtol=1e-4)
    with pytest.raises(InvalidDataError, match="all pixel values are zero"):
        criteria.activation(model, [{"pixel_values": torch.zeros(2, 3, 3, 16, 16)}], part="vision")


def test_what_has_another_number_of_axes_is_refused() -> None:
    for case, pixels in (
        ("ViTModel", images(2)[0]),
        ("VideoMAEModel", images(2)),
        ("Siglip2VisionModel", images(2)[0]),
    ):
        with pytest.raises(InvalidDataError):
            OneShotScores.measure(make(case), pixels)
    with pytest.raises(UnsupportedModelError, match="reads frames of videos"):
        extract_features(make("VideoMAEModel"), images(2))
    with pytest.raises(UnsupportedModelError, match="reads text"):
        criteria.activation(COMPOSITES["CLIP"]()[0], images(2), part="text")
