"""Images as people hand them over: every form gives the same, and what is not what a model takes is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_vitprune import OneShotScores, PruningPlan, SLSConfig, criteria, prune, select_layers
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.training.recovery import Recovery, recover
from hf_vitprune.utils.batches import ImageBatches
from hf_vitprune.utils.examples import processed
from hf_vitprune.utils.images import read_folder
from tiny import SIZE, assert_same, make

VIT = "ViTForImageClassification"
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
DRAWN = np.random.default_rng(0).integers(0, 255, (8, 20, 20, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(one) for one in DRAWN]
PIXELS = PROCESSOR(images=PICTURES, return_tensors="pt")["pixel_values"]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
EXAMPLES = [{"pixel_values": x, "labels": int(y)} for x, y in zip(PIXELS, LABELS, strict=True)]
COLUMNS = {"pixel_values": PIXELS.tolist(), "labels": LABELS.tolist()}

FORMS: dict[str, Any] = {
    "array": PIXELS.numpy(),
    "array of doubles": PIXELS.double().numpy(),
    "list of tensors": list(PIXELS),
    "list of arrays": [x.numpy() for x in PIXELS],
    "list of tensors, an axis too many": [x[None] for x in PIXELS],
    "list of batches": [PIXELS[:3], PIXELS[3:]],
    "BatchFeature": PROCESSOR(images=PICTURES, return_tensors="pt"),
    "BatchFeature of arrays": PROCESSOR(images=PICTURES, return_tensors="np"),
    "BatchFeature of lists": PROCESSOR(images=PICTURES),
    "list of BatchFeature": [PROCESSOR(images=one, return_tensors="pt") for one in PICTURES],
    "list of unlike batches": [{"pixel_values": PIXELS[:3]}, {"pixel_values": PIXELS[3:]}],
    "list of labelled batches": [{"pixel_values": PIXELS[i : i + 4], "labels": LABELS[i : i + 4]} for i in (0, 4)],
    "examples": EXAMPLES,
    "pairs": list(zip(PIXELS, LABELS.tolist(), strict=True)),
    "loader": DataLoader(EXAMPLES, batch_size=3, shuffle=True),  # type: ignore[arg-type]
    "data set": datasets.Dataset.from_dict(COLUMNS),
    "data set of tensors": datasets.Dataset.from_dict(COLUMNS).with_format("torch"),
}
ROWS = datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS.tolist()}).cast_column("image", datasets.Image())
TAKEN: dict[str, Any] = {
    "pictures": PICTURES,
    "pairs": list(zip(PICTURES, LABELS.tolist(), strict=True)),
    "rows": [{"image": one, "label": int(label)} for one, label in zip(PICTURES, LABELS, strict=True)],
    "data set": ROWS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One that was loaded from where its processor is."""
    folder = tmp_path_factory.mktemp("model")
    make(VIT).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return AutoModelForImageClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, torch.Tensor]:
    return dict(prune(model, PruningPlan.magnitude(model, 0.4, units=["mlp"]), calibration=PIXELS).state_dict())


@pytest.mark.parametrize("form", [*FORMS.values(), *TAKEN.values()], ids=[*FORMS, *(f"taken: {k}" for k in TAKEN)])
def test_every_form_is_the_same_calibration(form: Any, model: Any, expected: dict[str, torch.Tensor]) -> None:
    small = prune(model, PruningPlan.magnitude(model, 0.4, units=["mlp"]), calibration=form)
    assert_same(dict(small.state_dict()), expected)


@pytest.mark.parametrize("form", [TAKEN["data set"], FORMS["list of labelled batches"]], ids=["taken", "batches"])
def test_everything_that_looks_at_images_takes_them(form: Any, model: Any) -> None:
    if form is TAKEN["data set"]:
        assert_same(dict(criteria.taylor(model, form)), dict(criteria.taylor(model, EXAMPLES)))
    activations = criteria.activation(model, PIXELS)
    for name, scores in criteria.activation(model, form).items():
        assert torch.allclose(scores, activations[name])
    sizes = [
        OneShotScores.measure(model, images).plan(0.7, round_to=1).to_dict()["layers"] for images in (PIXELS, form)
    ]
    assert sizes[0] == sizes[1]
    config = SLSConfig(alpha=0.3)
    assert select_layers(model, form, config).scores == select_layers(model, EXAMPLES, config).scores
    small = prune(model, PruningPlan.magnitude(model, 0.4, units=["mlp"]))
    assert recover(small, model, form, Recovery(steps=1, batch_size=4, checks=1)).held_out == 1


def test_pictures_are_turned_and_have_three_channels(model: Any) -> None:
    """As transformers' own pipelines do it: EXIF's orientation, grey and palette images."""
    grey = PICTURES[0].convert("L")
    exif = grey.getexif()
    exif[0x0112] = 6  # the camera was held upright
    grey.info["exif"] = exif.tobytes()
    turned = grey.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    got = processed([grey], model)[0]["pixel_values"]
    assert torch.equal(got, PROCESSOR(images=turned, return_tensors="pt")["pixel_values"][0])


def test_pictures_are_read_as_files_are(model: Any, tmp_path: Path) -> None:
    """Of 16-bit greys the upper bits, which PIL makes white; what has no stated range is named."""
    grey = Image.fromarray((np.arange(400).reshape(20, 20) * 160).astype(np.uint16))
    grey.save(tmp_path / "grey.png")
    assert torch.equal(processed([grey], model)[0]["pixel_values"], read_folder(tmp_path, PROCESSOR)[0])
    words = r"image 1 \(from 0\) cannot be read as an image: its pixels are 32-bit"
    with pytest.raises(InvalidDataError, match=words):
        processed([grey, Image.fromarray(DRAWN[0, :, :, 0].astype(np.float32))], model)[1]


def test_a_broken_file_of_a_data_set_is_named(model: Any, tmp_path: Path) -> None:
    for name in ("whole.png", "broken.png"):
        PICTURES[0].save(tmp_path / name)
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / name) for name in ("whole.png", "broken.png")]})
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    with pytest.raises(InvalidDataError, match=r"broken\.png cannot be read as an image"):
        processed(rows.cast_column("image", datasets.Image()), model)[1]


BAD: dict[str, tuple[Any, str]] = {
    "uint8": (
        torch.from_numpy(DRAWN).permute(0, 3, 1, 2),
        "pixel values are uint8, as in image files: the model's image",
    ),
    "0..255": (torch.rand(4, 3, SIZE, SIZE) * 255, r"pixel values go from .* to 25.*, as in image files"),
    "channels last": (
        torch.randn(4, SIZE, SIZE, 3),
        r"these are \(16, 16, 3\), their channels last: permute\(0, 3, 1, 2\)",
    ),
    "one channel": (torch.randn(4, 1, SIZE, SIZE), r"does not take images of shape \(1, 16, 16\)"),
    "another size": (torch.randn(4, 3, 24, 24), r"does not take images of shape \(3, 24, 24\)"),
    "two sizes": (
        [torch.randn(3, 16, 16), torch.randn(3, 20, 20)],
        r"the first is \(3, 16, 16\) and number 1 \(3, 20",
    ),
    "two sizes of examples": (
        [{"pixel_values": torch.randn(3, s, s)} for s in (16, 20)],
        "cannot be put into one batch .*equal size",
    ),
    "one image": (PIXELS[0], r"is \(images, channels, height, width\), not of shape \(3, 16, 16\)"),
    "files": (["a.png", "b.png"], "an example is a mapping with pixel_values, not str"),
    "nothing": ([None, None], "not NoneType"),
    "splits": (datasets.DatasetDict(train=ROWS), "of several splits of a data set, pass one"),
    "whole numbers": (torch.ones(4, 3, SIZE, SIZE, dtype=torch.int64), "pixel values are int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_model_takes_is_named(name: str, model: Any) -> None:
    images, words = BAD[name]
    plan = PruningPlan.magnitude(model, 0.4, units=["mlp"])
    for refused in (
        lambda: prune(model, plan, calibration=images),
        lambda: OneShotScores.measure(model, images),
        lambda: criteria.activation(model, images),
        lambda: recover(prune(model, plan), model, images, Recovery(steps=1, checks=1)),
    ):
        with pytest.raises(InvalidDataError, match=words):
            refused()


def test_pictures_without_a_processor(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="as they were taken, and the model was not loaded from where its proc"):
        prune(make(VIT), PruningPlan.magnitude(make(VIT), 0.4, units=["mlp"]), calibration=PICTURES)
    make(VIT).save_pretrained(tmp_path)
    alone = AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(InvalidDataError, match="no image processor is beside the model in .*image processor first"):
        OneShotScores.measure(alone, PICTURES)


def test_the_image_that_is_not_finite_is_named(model: Any) -> None:
    """By its place in the data, whatever the batches and the limit."""
    broken = PIXELS.clone()
    broken[6, 1, 2, 3] = torch.nan
    labelled = [{"pixel_values": broken[i : i + 3], "labels": LABELS[i : i + 3]} for i in (0, 3, 6)]
    for refused in (
        lambda: prune(model, PruningPlan.magnitude(model, 0.4, units=["mlp"]), calibration=broken),
        lambda: criteria.activation(model, broken),
        lambda: criteria.taylor(model, labelled),
        lambda: criteria.taylor(model, iter(labelled)),
        lambda: list(ImageBatches(broken, batch_size=4)),
        lambda: list(ImageBatches(broken, batch_size=2, limit=4)),  # images 0, 2, 4, 6
        lambda: list(ImageBatches(broken, batch_size=2, shard=(1, 2))),
    ):
        with pytest.raises(InvalidDataError, match=r"not finite numbers, in image 6 \(from 0\)"):
            refused()
