"""Labelled images as people have them: folders of many shapes, odd files, columns and splits of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils import data
from hf_vitprune.utils.data import LabelledImages, load_images
from hf_vitprune.utils.images import image_files, open_image
from hf_vitprune.utils.sources import Source, built_in_digits
from image_folders import image_folder

SMALL = ViTImageProcessorPil(size={"height": 4, "width": 4}, do_normalize=False)


def paint(path: Path, count: int = 4, shade: int = 100) -> None:
    path.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (6, 6), (shade, shade, shade)).save(path / f"{i}.png")


def sizes(images: LabelledImages) -> tuple[dict[str, int], dict[str, int]]:
    """Images a class, to train and to evaluate on."""
    counts = (Counter(part[images.label_column]) for part in (images.train, images.evaluation))
    train, evaluation = ({images.label_names[i]: n for i, n in sorted(c.items())} for c in counts)
    return train, evaluation


# ---------------------------------------------------------------------- shapes of folders
@pytest.mark.parametrize(
    ("folders", "train", "evaluation"),
    [
        (["cat", "dog"], {"cat": 3, "dog": 3}, {"cat": 1, "dog": 1}),
        (["pets/cat", "pets/dog"], {"cat": 3, "dog": 3}, {"cat": 1, "dog": 1}),  # a folder around all
        (["a/b/train/cat", "a/b/train/dog"], {"cat": 3, "dog": 3}, {"cat": 1, "dog": 1}),
        (["train/cat", "train/dog", "val/cat", "val/dog"], {"cat": 4, "dog": 4}, {"cat": 4, "dog": 4}),
        (["Training/x/cat", "Training/x/dog", "test/dog"], {"cat": 4, "dog": 4}, {"dog": 4}),
        (["train/cat", "train/dog", "test/cat", "valid/dog"], {"cat": 4, "dog": 4}, {"dog": 4}),
        (["cat/images/more", "dog/images"], {"cat": 3, "dog": 3}, {"cat": 1, "dog": 1}),  # folders in a class
        (["train", "car", "bus"], {"bus": 3, "car": 3, "train": 3}, {"bus": 1, "car": 1, "train": 1}),  # vehicles
        (["train/cat", "train/dog", "raw/old"], {"cat": 3, "dog": 3}, {"cat": 1, "dog": 1}),
    ],
)
def test_folders(folders: list[str], train: dict[str, int], evaluation: dict[str, int], tmp_path: Path) -> None:
    for name in folders:
        paint(tmp_path / name)
    (tmp_path / "cat" if (tmp_path / "cat").exists() else tmp_path / "empty").mkdir(exist_ok=True)
    (tmp_path / folders[0] / ".DS_Store").touch()
    (tmp_path / folders[0] / "._0.png").write_bytes(b"what macOS leaves")
    (tmp_path / folders[0] / "notes.txt").touch()
    images = load_images(str(tmp_path))
    assert sizes(images) == (train, evaluation) and images.label_names == sorted({*train, *evaluation})


def test_links_are_followed_and_files_called_like_splits_are_images(tmp_path: Path) -> None:
    image_folder(tmp_path / "far", classes=("cat", "dog"), count=3)
    (tmp_path / "far" / "cat" / "0.png").rename(tmp_path / "far" / "cat" / "test 0.png")
    (tmp_path / "near").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "near" / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far" / "dog" / "back").symlink_to(tmp_path / "near")  # round and round
    assert len(image_files(tmp_path / "near")) == 6
    (tmp_path / "far" / "dog" / "back").unlink()
    assert sum(sizes(load_images(str(tmp_path / "near")))[0].values()) == 4


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"cat": 4}, r"are of one class \(cat\)"),
        ({"train/cat": 4}, r"are of one class \(cat\)"),
        ({"train/cat": 4, "val/cat": 2}, r"are of one class \(cat\)"),
        ({"cat": 4, "dog": 1, "emu": 1}, r"2 of the 3 classes .* have one image \(dog, emu\)"),
        ({"train/cat": 4, "train/dog": 4, "val/emu": 1}, "images to evaluate on and none to train on: emu"),
        ({"val/cat": 4, "test/cat": 4}, "has no split 'train'; it has test, val: name one with"),
        ({"": 3}, "has images and no labels"),
        ({"train": 3}, r"are of one class \(train\)"),
        ({"cat": 4, "dog": 4, "": 2}, r"2 images of .* lie outside of the folders of its classes \(.*0\.png\)"),
        ({"cat": 0, "dog": 0}, "there are no images in"),
    ],
)
def test_the_true_cause(folders: dict[str, int], message: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, count in folders.items():
        paint(root / name, count) if name else [Image.new("L", (4, 4)).save(root / f"{i}.png") for i in range(count)]
    with pytest.raises(InvalidDataError, match=message):
        load_images(str(root))


def test_few_images_are_enough_for_one_of_each_class_to_evaluate_on(tmp_path: Path) -> None:
    for name in "abcde":
        paint(tmp_path / name, 2)
    assert sizes(load_images(str(tmp_path))) == (dict.fromkeys("abcde", 1), dict.fromkeys("abcde", 1))


def test_a_class_with_one_image_to_train_on_will_do_where_others_evaluate(tmp_path: Path) -> None:
    for name, count in (("train/cat", 1), ("train/dog", 3), ("val/cat", 2)):
        paint(tmp_path / name, count)
    assert sizes(load_images(str(tmp_path))) == ({"cat": 1, "dog": 3}, {"cat": 2})


def test_what_is_evaluated_without_a_training(tmp_path: Path) -> None:
    """What `prune --data` held out of one split; all of a folder that is called like an evaluation split."""
    for name, count in (("cat", 1), ("dog", 3)):
        paint(tmp_path / "val" / name, count)
        paint(tmp_path / "pets" / name, 5 * count)
        paint(tmp_path / "both" / "test" / name, count)
        paint(tmp_path / "both" / "dev" / name, 2 * count)
    pets = str(tmp_path / "pets")
    assert load_images(pets, training=False).evaluation["image"] == load_images(pets).evaluation["image"]
    assert sizes(load_images(pets, training=False))[1] == {"cat": 1, "dog": 3}
    assert sizes(load_images(f"{pets},eval=train", training=False))[1] == {"cat": 5, "dog": 15}
    assert sizes(load_images(str(tmp_path / "val"), training=False))[1] == {"cat": 1, "dog": 3}
    assert sizes(load_images(str(tmp_path / "both"), training=False))[1] == {"cat": 2, "dog": 6}
    assert sizes(load_images(f"{tmp_path / 'both'},eval=test", training=False))[1] == {"cat": 1, "dog": 3}
    assert len(load_images("digits", training=False).evaluation) == 360
    with pytest.raises(InvalidDataError, match=r"one image \(cat\).*'.*val,eval=train'"):
        load_images(str(tmp_path / "val"))


# ---------------------------------------------------------------------- damaged and unusual files
def test_damaged_files_are_named_before_anything_is_trained(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for kind in ("jpg", "png", "webp", "gif", "bmp"):
            Image.fromarray(noise).save(tmp_path / name / f"whole.{kind}")
    whole = (tmp_path / "cat" / "whole.jpg").read_bytes()
    (tmp_path / "cat" / "more.jpg").write_bytes(whole + b"what some cameras put behind the image" * 9)
    assert sum(map(len, (load_images(str(tmp_path)).train, load_images(str(tmp_path)).evaluation))) == 11
    (tmp_path / "cat" / "empty.png").touch()
    (tmp_path / "cat" / "text.jpg").write_text("no image")
    (tmp_path / "dog" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    for kind in ("png", "webp", "bmp"):
        content = (tmp_path / "dog" / f"whole.{kind}").read_bytes()
        (tmp_path / "dog" / f"half.{kind}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidDataError) as error:
        load_images(str(tmp_path))
    message = str(error.value)
    assert "6 of the 17 images" in message and "Mend them or take them out" in message
    assert "empty.png (an empty file)" in message and "text.jpg (not an image)" in message
    assert "half.jpg (" in message and "half.png (" in message


def test_damage_where_nobody_looks_and_in_a_list_of_files(tmp_path: Path) -> None:
    for split in ("train", "val"):
        image_folder(tmp_path / "a" / split, count=2)
    (tmp_path / "a" / "train" / "cat" / "empty.png").touch()
    assert len(load_images(str(tmp_path / "a"), training=False).evaluation) == 4
    with pytest.raises(InvalidDataError, match="1 of the 9 images"):
        load_images(str(tmp_path / "a"))
    paint(tmp_path / "b", 4)
    (tmp_path / "b" / "2.png").write_text("no image")
    rows = ["file_name,label", *(f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(4))]
    (tmp_path / "b" / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(InvalidDataError, match=r"1 of the 4 images.*2\.png \(not an image\)"):
        load_images(str(tmp_path / "b"))


def test_damage_that_only_reading_shows_is_named_too(tmp_path: Path) -> None:
    image_folder(tmp_path, count=2)
    images = load_images(str(tmp_path))
    path = Path(images.train.cast_column("image", ImageFeature(decode=False))[0]["image"]["path"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(InvalidDataError, match=rf"{path.name} cannot be read as an image"):
        images.processed(SMALL)[0][0]


def shades(path: Path) -> np.ndarray:
    return np.asarray(open_image(path))


def test_every_kind_of_image_has_its_own_pixels(tmp_path: Path) -> None:
    """As transformers' load_image reads it; of 16 bits, which that makes white, the upper eight."""
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    upright = np.stack([grey, grey[::-1], np.full_like(grey, 40)], axis=-1)
    rgb, folder = Image.fromarray(upright), tmp_path / "cat"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.rotate(90).save(folder / "exif.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.tiff")
    Image.fromarray(np.stack([grey, grey], -1)).save(folder / "la.png")
    Image.fromarray(grey).convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.convert("CMYK").save(folder / "cmyk.tiff")
    first, second = (Image.fromarray(np.full((8, 8), shade, np.uint8)) for shade in (10, 200))
    first.save(folder / "moving.gif", save_all=True, append_images=[second])
    Image.fromarray(grey).convert("1").save(folder / "two.png")
    expected = {"exif.png": upright, "rgba.png": upright, "cmyk.tiff": upright}
    expected |= {name: np.stack([grey] * 3, -1) for name in ("sixteen.png", "sixteen.tiff", "la.png", "palette.png")}
    expected["moving.gif"] = np.full((8, 8, 3), 10)
    expected["two.png"] = np.stack([np.asarray(Image.fromarray(grey).convert("1"))] * 3, -1) * 255
    for name, pixels in expected.items():
        assert np.abs(shades(folder / name).astype(int) - pixels).max() <= 1, name
    paint(tmp_path / "dog")
    train, evaluation = load_images(str(tmp_path)).processed(ViTImageProcessorPil(do_resize=False, do_normalize=False))
    seen = 0
    for part in (train, evaluation):
        raw = part.dataset.cast_column("image", ImageFeature(decode=False))
        for i in range(len(part)):
            name = Path(raw[i]["image"]["path"]).name
            if name in expected:
                seen += 1
                pixels = part[i]["pixel_values"].permute(1, 2, 0) * 255
                torch.testing.assert_close(pixels, torch.tensor(shades(folder / name)).float(), atol=1e-3, rtol=0)
    assert seen == len(expected)


def test_pixels_of_no_stated_range_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path, count=2)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "cat" / "depth.tiff")
    with pytest.raises(InvalidDataError, match=r"depth\.tiff \(its pixels are 32-bit numbers"):
        load_images(str(tmp_path))


# ---------------------------------------------------------------------- columns, splits, other data
def test_a_source_with_settings() -> None:
    assert Source.parse("me/pets") == Source("me/pets")
    text = "me/pets,label=kind,image=photo,train=a,eval=b,config=c"
    assert Source.parse(text) == Source("me/pets", "a", "b", "photo", "kind", "c")
    assert Source.parse("cats, and dogs,label=x") == Source("cats, and dogs", label="x")
    for wrong in ("me/pets,colour=red", "me/pets,label=a,label=b", "me/pets,label="):
        with pytest.raises(InvalidDataError, match="train=..., eval=..., image=..., label=..., config=..., once each"):
            Source.parse(wrong)


def test_a_folder_with_commas_is_itself(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets,label=x")
    assert load_images(str(tmp_path / "pets,label=x")).label_names == ["cat", "dog"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set on the disk with columns and splits of its own: two kinds of labels, one of them words."""
    pixels = [Image.new("RGB", (4, 4), (10 * i, 0, 0)) for i in range(12)]
    rows = {"photo": pixels, "fine": [i % 3 for i in range(12)], "coarse": ["b" if i < 6 else "a" for i in range(12)]}
    columns = {"photo": ImageFeature(), "fine": ClassLabel(names=["x", "y", "z"]), "coarse": Value("string")}
    first = Dataset.from_dict(rows, features=Features(columns))
    other = columns | {"fine": ClassLabel(names=["z", "y", "x"])}  # the same classes, numbered otherwise
    second = Dataset.from_dict(rows | {"fine": [2 - i % 3 for i in range(12)]}, features=Features(other))
    hidden = Dataset.from_dict(rows | {"fine": [-1] * 12}, features=Features(columns))
    folder = tmp_path_factory.mktemp("saved") / "set"
    DatasetDict({"one": first, "two": second, "hidden": hidden}).save_to_disk(str(folder))
    return folder


def test_columns_and_splits(saved: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"no split 'train'; it has one, two, hidden: name one with '.*,train="):
        load_images(str(saved))
    images = load_images(f"{saved},train=one,eval=two")  # the only images, the only numbered classes
    assert (images.image_column, images.label_column) == ("photo", "fine") and images.label_names == ["x", "y", "z"]
    assert images.train["fine"][:4] == images.evaluation["fine"][:4] == [0, 1, 2, 0]
    words = load_images(f"{saved},train=one,eval=two,label=coarse,image=photo")
    assert words.label_names == ["a", "b"] and words.evaluation["coarse"][4:8] == [1, 1, 0, 0]
    same = load_images(str(saved), train_split="one", eval_split="two", label_column="coarse")
    assert same.evaluation["coarse"] == words.evaluation["coarse"]
    assert [
        round(float(x["pixel_values"][0, 0, 0]) * 255) for x in (words.processed(SMALL)[1][i] for i in (1, 7))
    ] == [
        10,
        70,
    ]
    for settings, message in (
        ("train=one,label=kind", r"no column 'kind'; its columns are photo, fine, coarse: name one with '.*,label="),
        ("train=one,image=coarse", "column 'coarse' of .* holds no images but string"),
        ("train=three", "no split 'three'; it has one, two, hidden"),
        ("train=one,eval=hidden", r"12 of the 12 images of split 'hidden' of .* have no label \(column 'fine'\)"),
        ("train=one,label=photo", "holds no class an image but PIL.Image.Image"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            load_images(f"{saved},{settings}")


def test_a_test_split_without_labels_is_passed_over(tmp_path: Path) -> None:
    digits = built_in_digits()["train"].select(range(200))
    hidden = digits.select(range(20)).remove_columns("label").add_column("label", [-1] * 20, feature=Value("int64"))
    parts = {"test": hidden.cast(digits.features), "train": digits}
    images = load_images("digits", parts=parts)
    assert (len(images.train), len(images.evaluation)) == (160, 40)
    with pytest.raises(InvalidDataError, match=r"20 of the 20 images of split 'test' of digits have no label"):
        load_images("digits,eval=test", parts=parts)


def test_parquet_files_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in_digits()["train"].select(range(30)).to_parquet(tmp_path / "train.parquet")
    images = load_images(str(tmp_path))
    assert len(images.train) + len(images.evaluation) == 30 and images.label_names == [str(i) for i in range(10)]


def test_the_hub_is_asked_for_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None) -> dict:
        asked.append((name, config))
        if config is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['full', 'half']")
        return built_in_digits()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InvalidDataError, match=r"\['full', 'half'\] \(give it as 'me/digits,config=NAME'\)"):
        load_images("me/digits")
    assert len(load_images("me/digits,config=full").train) == 1437
    assert asked == [("me/digits", None), ("me/digits", "full")] and data.DIGITS == "digits"
