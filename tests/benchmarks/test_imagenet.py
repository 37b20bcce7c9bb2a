"""Evaluation on a folder of ImageNet's layout, here a synthetic one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

from benchmarks.imagenet import EvaluationImages, ImageFolder, accuracies, main, processor_for
from hf_vitprune import PruningPlan, prune
from hf_vitprune.errors import InvalidDataError

SIDE, CLASSES = 28, 7


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``val``: seven classes of images of different sizes, in files of different kinds."""
    place = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for number in range(CLASSES):
        folder = place / "val" / f"n{number:08d}"
        folder.mkdir(parents=True)
        for i in range(2 + number % 3):
            height, width = generator.integers(30, 70, 2)
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert("L" if i == 1 else "RGB")
            image.save(folder / f"{i}.{'JPEG' if i else 'png'}")
        (folder / "notes.txt").write_text("no image")
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=SIDE, patch_size=7, intermediate_size=48, num_labels=CLASSES, **sizes)
    config.initializer_range = 0.5
    ViTForImageClassification(config).save_pretrained(place / "model")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(place / "model")
    return place


def loaded(place: Path) -> tuple[Any, ImageFolder]:
    model = AutoModelForImageClassification.from_pretrained(place / "model")
    return model, ImageFolder(place / "val", processor_for(model, str(place / "model")))


def test_images_are_resized_and_cropped() -> None:
    """By hand with Pillow: the shorter side to 32 for a crop of 28, bicubic, its middle; (x / 255 - .5) / .5."""
    config = ViTConfig(image_size=SIDE)
    model = type("Model", (), {"config": config})
    own = ViTImageProcessorPil()
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.imagenet.AutoImageProcessor.from_pretrained", lambda path: own)
        pixels = processor_for(model, "")(images=picture, return_tensors="pt")["pixel_values"][0]
    resized = picture.resize((51, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[2:30, 11:39].transpose(2, 0, 1) / 255
    mean, std = (np.array(values)[:, None, None] for values in (own.image_mean, own.image_std))
    assert pixels.shape == (3, SIDE, SIDE)
    np.testing.assert_allclose(pixels.numpy(), (expected - mean) / std, atol=1e-5)


def test_accuracies_by_hand_whatever_the_batch_and_the_order(place: Path) -> None:
    model, dataset = loaded(place)
    assert len(dataset) == sum(2 + number % 3 for number in range(CLASSES))
    ranks = []
    for pixels, label in (dataset[i] for i in range(len(dataset))):
        logits = model.eval()(pixels[None]).logits[0]
        ranks.append(int((logits > logits[label]).sum()))
    expected = {
        "images": len(dataset),
        "top1": sum(rank < 1 for rank in ranks) / len(ranks),
        "top5": sum(rank < 5 for rank in ranks) / len(ranks),
    }
    assert 0 < expected["top1"] < expected["top5"] < 1
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for batch_size in (1, 4, len(dataset)):
        assert accuracies(model.train(), dataset, batch_size) == expected
        assert accuracies(model, dataset, batch_size, order=order) == expected


def test_command_on_a_pruned_model(place: Path, tmp_path: Path) -> None:
    model, dataset = loaded(place)
    small = prune(model, PruningPlan.random(model, 0.3, round_to=2))
    small.save_pretrained(tmp_path / "small")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "small")
    import typer

    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(tmp_path / "small"), str(place / "val"), "--workers", "0"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == accuracies(small, dataset)


def test_some_classes_and_other_data(place: Path, tmp_path: Path) -> None:
    """The classes that a file names, in its order; and the images of a data set that is no folder."""
    model, dataset = loaded(place)
    names = ["n00000004", "n00000001", *dataset.classes[5:], "n00000000", "n00000002", "n00000003"]
    (tmp_path / "classes.txt").write_text("\n".join(names[:3]) + "\n")
    some = ImageFolder(place / "val", dataset.processor, names[:3])
    # classes of 3, 3 and 4 images, in the order of the file
    assert [(path.parent.name, label) for path, label in some.files] == [
        *[("n00000004", 0)] * 3, *[("n00000001", 1)] * 3, *[("n00000005", 2)] * 4,
    ]  # fmt: skip
    turned = accuracies(model, ImageFolder(place / "val", dataset.processor, names))
    assert turned != accuracies(model, dataset) and turned["images"] == len(dataset)
    ten = ViTForImageClassification(
        type(model.config)(**{**model.config.to_dict(), "num_labels": 10, "id2label": None})
    )
    digits = EvaluationImages("digits", dataset.processor)
    order = range(12)
    result = accuracies(ten, digits, order=list(order))
    ranks = []
    for pixels, label in (digits[i] for i in order):
        logits = ten.eval()(pixels[None]).logits[0]
        ranks.append(int((logits > logits[label]).sum()))
    assert result == {"images": 12, "top1": sum(r < 1 for r in ranks) / 12, "top5": sum(r < 5 for r in ranks) / 12}


def test_what_it_refuses(place: Path, tmp_path: Path) -> None:
    model, dataset = loaded(place)
    with pytest.raises(InvalidDataError, match="is no folder"):
        ImageFolder(tmp_path / "none", None)
    with pytest.raises(InvalidDataError, match="no images in sub-folders"):
        ImageFolder(tmp_path, None)
    for names, message in ((["n00000000", "n1"], "lacks 1, n1 among them"), (["n00000000"] * 2, "one of them twice")):
        with pytest.raises(InvalidDataError, match=message):
            ImageFolder(place / "val", None, names)
    dataset.classes.pop()
    with pytest.raises(InvalidDataError, match="7 classes and the data 6"):
        accuracies(model, dataset)
