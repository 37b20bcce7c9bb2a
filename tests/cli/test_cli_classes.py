"""``hf-vitprune prune --data``: the classes of the data and the model's are the same ones."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
    set_seed,
)

from command_line import call, printed
from hf_vitprune.utils.data import load_images
from hf_vitprune.utils.sources import built_in_digits
from hf_vitprune_cli import workflow
from hf_vitprune_cli.classifier import load_classifier
from tiny import images, make

COLOURS = {"red": 0, "green": 1, "blue": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "plot_kept", lambda *_: None)
    monkeypatch.setattr(workflow, "measure_speed", partial(workflow.measure_speed, rounds=1))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images a class, of one colour each."""
    root, noise = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, channel in COLOURS.items():
        (root / name).mkdir()
        for i in range(30):
            image = noise.integers(0, 90, (16, 16, 3)).astype("uint8")
            image[..., channel] += 150
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def classifier(folder: Path, colours: Path, *names: str) -> Path:
    """One that was trained on the colours, with classes in this order."""
    set_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=len(names)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    files = [(path, number) for number, name in enumerate(COLOURS) for path in (colours / name).iterdir()]
    pixels = processor([Image.open(path) for path, _ in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([number for _, number in files])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.eval()(pixel_values=pixels).logits.argmax(-1) == labels).all()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    return classifier(tmp_path_factory.mktemp("model"), colours, "Red", "green", "blue")


OPTIONS = ("--steps", 12, "--target", 0.7, "--train", "labels,batch_size=16", "--round-to", 1)


def seen(model: Path, colours: Path) -> dict[str, str]:
    """Colour -> what a pipeline calls most of its images."""
    classify = pipeline("image-classification", model=str(model), device="cpu")
    found = {}
    for name in COLOURS:
        answers = [classify(str(path))[0]["label"] for path in sorted((colours / name).iterdir())[:9]]
        found[name] = max(answers, key=answers.count)
    return found


def test_a_model_keeps_its_names_and_what_they_mean(named: Path, colours: Path, tmp_path: Path) -> None:
    """Its classes are red, green, blue, and the folder's blue, green, red."""
    text = printed("prune", named, tmp_path / "out", "--data", f"{colours},label=label", *OPTIONS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert colours.name in card and "label=label" not in card and str(colours) not in card
    assert "matched by name" in text and "'red' = 'Red'" in text and "chance" not in text
    assert "100.0%" in text.split("dense")[1].splitlines()[0]
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label[0] == "Red"
    assert seen(tmp_path / "out", colours) == {"red": "Red", "green": "green", "blue": "blue"}


def test_other_names_are_refused_before_training(named: Path, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "data")
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "pink")
    line = call("prune", named, tmp_path / "out", "--data", tmp_path / "data").stderr.splitlines()[-1]
    assert "Only in the data: 'pink'. Only in the model: 'Red'" in line and "--new-head" in line
    assert not (tmp_path / "out").exists()


def test_columns_and_splits_are_named_in_one_argument(named: Path, colours: Path, tmp_path: Path) -> None:
    line = call("prune", named, tmp_path / "out", "--data", f"{colours},label=kind").stderr.splitlines()[-1]
    assert "has no column 'kind'; its columns are image, label: name one with" in line
    line = call("prune", named, tmp_path / "out", "--data", f"{colours},eval=test").stderr.splitlines()[-1]
    assert "has no split 'test'; it has train" in line and not (tmp_path / "out").exists()


def test_a_model_without_names_takes_those_of_the_data_and_is_told_at_chance(colours: Path, tmp_path: Path) -> None:
    """The folders' order is another than the one that it was trained in, which only its accuracy can show."""
    model = classifier(tmp_path / "model", colours, "LABEL_0", "LABEL_1", "LABEL_2")
    text = printed("prune", model, tmp_path / "out", "--data", colours, *OPTIONS)
    assert "LABEL_0 = 'blue', LABEL_1 = 'green', LABEL_2 = 'red'" in text
    assert "warning: the dense model is right on 33.3% of 18 evaluation images, no better than chance" in text
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert small.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_a_new_head_is_new_where_the_old_one_would_fit(named: Path, colours: Path) -> None:
    images = load_images(str(colours))
    old = ViTForImageClassification.from_pretrained(named)
    set_seed(1)
    kept, matched = load_classifier(str(named), images)
    assert torch.equal(kept.classifier.weight, old.classifier.weight) and matched.match is not None
    assert matched.match.numbers == (2, 1, 0) and matched.processed(None)[0].labels == [
        2 - number for number in images.train["label"]
    ]
    new, same = load_classifier(str(named), images, new_head=True)
    assert same.match is None and new.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert not torch.isclose(new.classifier.weight, old.classifier.weight).any()
    assert new.classifier.weight.std() < 0.03 and not new.classifier.bias.any()  # as transformers starts it
    assert torch.equal(new.vit.layernorm.weight, old.vit.layernorm.weight)


def test_both_heads_are_new(colours: Path, tmp_path: Path) -> None:
    old = DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=3))
    old.save_pretrained(tmp_path)
    new, _ = load_classifier(str(tmp_path), load_images(str(colours)), new_head=True)
    for name in ("cls_classifier", "distillation_classifier"):
        assert not torch.isclose(getattr(new, name).weight, getattr(old, name).weight).any(), name


def test_a_folder_called_digits_wins(
    named: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_images("digits").label_names == [str(i) for i in range(10)]
    (tmp_path / "digits").symlink_to(colours)
    assert load_images("digits").label_names == ["blue", "green", "red"]
    assert (
        len(load_images("digits", parts=built_in_digits()).label_names) == 10
    )  # what the demo takes, wherever it runs


@pytest.mark.parametrize("case", ["DeiTForImageClassificationWithTeacher", "ViTForImageClassification"])
def test_the_accuracy_before_pruning(case: str) -> None:
    """DeiT's two heads take no labels, and are as right as the mean of their logits is."""
    model = make(case).eval()
    pixels = images(12)
    with torch.no_grad():
        best = model(pixels).logits.argmax(1).tolist()
    labels = [*best[:9], *((label + 1) % model.config.num_labels for label in best[9:])]
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    assert workflow.evaluate(model, rows) == 0.75
