"""Labelled images: the built-in digits, folders, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from datasets import concatenate_datasets
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.utils.data import DIGITS, load_images
from hf_vitprune.utils.images import image_files, open_image, read_folder
from image_folders import image_folder


def test_digits_are_the_real_ones_and_split_by_class():
    images = load_images(DIGITS)
    assert len(images.train) + len(images.evaluation) == 1797
    assert images.label_names == [str(i) for i in range(10)]
    counts = np.bincount(images.evaluation["label"], minlength=10)
    assert counts.min() >= 34 and counts.sum() == 360
    first = np.asarray(images.train[0]["image"])
    assert first.shape == (8, 8) and first.max() == 255


def test_the_split_follows_the_seed():
    same = load_images(DIGITS, seed=1).evaluation["label"]
    assert same == load_images(DIGITS, seed=1).evaluation["label"]
    assert same != load_images(DIGITS, seed=2).evaluation["label"]


def test_a_folder_of_images_becomes_tensors(tmp_path):
    images = load_images(str(image_folder(tmp_path / "pets")), eval_share=0.5)
    assert images.label_names == ["cat", "dog"]
    train, evaluation = images.processed(ViTImageProcessorPil(size={"height": 16, "width": 16}), cache=True)
    assert len(train) == len(evaluation) == 6
    example = train[0]
    assert example["pixel_values"].shape == (3, 16, 16) and example["labels"] in (0, 1)
    assert train[0] is example  # kept


def test_augmentation_comes_before_the_processor(tmp_path):
    images = load_images(str(image_folder(tmp_path / "pets")), eval_share=0.5)
    train, _ = images.processed(ViTImageProcessorPil(size={"height": 16, "width": 16}))
    plain = train[0]["pixel_values"]
    train.augment = lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert (train[0]["pixel_values"] - plain.flip(-1)).abs().max() < 0.02


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(InvalidDataError, match="no folder"):
        load_images(source)


def test_unknown_splits_are_listed():
    with pytest.raises(InvalidDataError, match="has no split 'val'; it has train"):
        load_images(DIGITS, eval_split="val")
    with pytest.raises(InvalidDataError, match="has no split 'old'"):
        load_images(DIGITS, train_split="old")
    assert len(load_images(DIGITS, train_split="training").train) == 1437  # another word for the same


def test_a_folder_without_classes_has_no_labels(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(InvalidDataError, match="has images and no labels"):
        load_images(str(tmp_path))


def test_some_classes_of_all():
    images = load_images(DIGITS)
    some = images.of_classes(["7", "2"])
    assert some.label_names == ["7", "2"] and set(some.train["label"]) == {0, 1}
    counts = [images.train["label"].count(number) for number in (7, 2)]
    assert [some.train["label"].count(number) for number in (0, 1)] == counts
    assert some.evaluation.features["label"].names == ["7", "2"]
    first = images.train["label"].index(7)
    expected = np.asarray(images.train[first]["image"])
    assert np.array_equal(np.asarray(some.train[some.train["label"].index(0)]["image"]), expected)
    for names, message in (
        (["7", "x"], "no class 'x'; its classes are 0, 1"),
        ([], "no class"),
        (["7", "7"], "twice"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            images.of_classes(names)


def test_folder_images_are_turned_as_their_camera_says(tmp_path):
    upright = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored image has to be turned by 90 degrees to the right
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert image_files(tmp_path) == [tmp_path / "turned.png"]
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.asarray(upright))


def test_a_part_of_the_images_has_all_classes_in_their_shares():
    """The digits of a folder come sorted by class; the first 40 are of one class."""
    images = load_images(DIGITS)
    images.train = images.train.sort("label")
    some = images.at_most(train=40, evaluation=20, seed=3)
    assert np.bincount(some.train["label"]).tolist() == [4] * 10 and len(some.evaluation) == 20
    assert np.bincount(some.evaluation["label"], minlength=10).min() >= 1
    assert images.at_most(train=40, seed=3).train["image"] == some.train["image"]
    assert images.at_most(train=40, seed=4).train["image"] != some.train["image"]
    assert images.at_most(train=5000).train is images.train
    rare = images.train.filter(lambda row: row["label"] == 1).select(range(8))
    images.train = concatenate_datasets([images.train.filter(lambda row: row["label"] == 0).select(range(24)), rare])
    images.train = images.train.cast(images.evaluation.features)
    for limit in (4, 8, 16):
        drawn = images.at_most(train=limit).train["label"]
        assert abs(drawn.count(1) - limit / 4) <= 1


def test_numbered_classes_stay_in_the_order_of_their_numbers(tmp_path):
    numbers = [3, 10, 2, 11, 0, 1, 4, 5, 6, 7, 8, 9] * 2
    rows = ["file_name,label"]
    for i, number in enumerate(numbers):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{number}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    images = load_images(str(tmp_path), eval_share=0.5)
    assert images.label_names == [str(i) for i in range(12)]
    assert [row["image"].getpixel((0, 0))[0] for row in images.train] == images.train["label"]


@pytest.mark.parametrize("bad", [0, -1])
def test_impossible_numbers_are_named(bad: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match=f"limit is a number of images of at least 1, not {bad}"):
        read_folder(image_folder(tmp_path / "pets"), None, bad)
    with pytest.raises(InvalidConfigError, match=f"the number of images is a whole number of at least 1, not {bad}"):
        load_images(DIGITS).at_most(bad)
    with pytest.raises(InvalidConfigError, match="eval_share must lie strictly between 0 and 1"):
        load_images(DIGITS, eval_share=bad)
