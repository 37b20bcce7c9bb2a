"""What the example scripts make of people's data and models, before they train."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from example_data import DataArguments
from hf_vitprune.errors import InvalidDataError
from hf_vitprune_cli.digits import tiny_vit
from image_folders import image_folder
from processes import ROOT

NAMES = ["emu", "cat", "dog"]


@pytest.fixture(scope="module")
def script() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "run_image_classification_pruning.py")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of emu, cat, dog (in this order), and folders of images."""
    root = tmp_path_factory.mktemp("place")
    tiny_vit(NAMES).save_pretrained(root / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "model")
    image_folder(root / "same", classes=("cat", "dog", "emu"), count=20)
    image_folder(root / "others", classes=("ant", "bee", "cat"), count=3)
    image_folder(root / "fewer", classes=("cat", "dog"), count=3)
    return root


def load(script: Any, place: Path, data: str, **more: Any) -> tuple[Any, Any]:
    images = DataArguments(dataset=str(place / data)).load(seed=0)
    model, _, images = script.load_model(script.ModelArguments(str(place / "model"), **more), images)
    return model, images


def test_a_model_keeps_its_classes(script: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, images = load(script, place, "same")
    assert [model.config.id2label[i] for i in range(3)] == NAMES and "matched by name" in capsys.readouterr().out
    train, _ = images.processed(None)
    assert train.labels == [(1, 2, 0)[number] for number in images.train["label"]]
    old = AutoModelForImageClassification.from_pretrained(place / "model")
    assert torch.equal(model.classifier.weight, old.classifier.weight)


def test_other_classes_are_refused_or_get_a_new_head(script: Any, place: Path) -> None:
    old = AutoModelForImageClassification.from_pretrained(place / "model")
    with pytest.raises(InvalidDataError, match="Only in the data: 'ant', 'bee'.*--new-head"):
        load(script, place, "others")
    model, images = load(script, place, "others", new_head=True)
    assert model.config.id2label[0] == "ant" and images.match is None
    assert not torch.isclose(model.classifier.weight, old.classifier.weight).any()
    model, images = load(script, place, "fewer")  # of another number: new without being asked
    assert model.config.id2label == {0: "cat", 1: "dog"} and images.match is None


def test_the_adapters_of_sls_come_with_a_new_head(place: Path) -> None:
    sls = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "run_sls_peft.py")))
    images = DataArguments(dataset=str(place / "same")).load(seed=0)
    model = sls.adapted(str(place / "model"), sls.ModelArguments(), images)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    old = AutoModelForImageClassification.from_pretrained(place / "model").classifier.weight
    assert not torch.isclose(model.classifier.original_module.weight, old).any()


def test_samples_are_of_all_classes_and_columns_are_named(place: Path) -> None:
    """The folder is sorted by class: its first nine images are cats."""
    arguments = DataArguments(dataset=str(place / "same"), max_train_samples=9, max_eval_samples=6)
    images = arguments.drawn(arguments.load(seed=0), seed=0)
    assert sorted(images.train["label"]) == [0] * 3 + [1] * 3 + [2] * 3
    assert sorted(images.evaluation["label"]) == [0, 0, 1, 1, 2, 2]
    assert images.train["image"] == arguments.drawn(arguments.load(seed=0), seed=0).train["image"]
    assert DataArguments(dataset="me/pets,label=kind").name == "me/pets"
    for changes in ({"label_column": "kind"}, {"image_column": "kind"}):
        with pytest.raises(InvalidDataError, match="has no column 'kind'; its columns are image, label"):
            DataArguments(dataset=str(place / "same"), **changes).load(seed=0)
    assert DataArguments().in_memory and not arguments.in_memory
