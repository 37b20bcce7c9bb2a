"""VTAB-1k: the tasks, where their images come from, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from PIL import Image
from transformers import ViTImageProcessorPil

from benchmarks.vtab import data as reading
from benchmarks.vtab import dsprites
from benchmarks.vtab.data import availability, load_task, read_list
from benchmarks.vtab.images import Checkpoint, Examples, Images, Literature, joined
from benchmarks.vtab.tasks import DIGITS, VTAB, find_task, find_tasks
from hf_vitprune.errors import InvalidDataError
from vtab_data import SIZES, sample, write_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for this file, and no sets that this machine may have from the Hub."""
    folder = tmp_path_factory.getbasetemp() / "vtab-cache"
    monkeypatch.setattr(dsprites, "cached_assets_path", lambda *_, **__: folder)
    monkeypatch.setattr(reading.constants, "HF_HUB_CACHE", str(folder / "hub"))


# ---------------------------------------------------------------------- tasks
def test_the_nineteen() -> None:
    counts = {group: sum(task.group == group for task in VTAB) for group in ("natural", "specialized", "structured")}
    assert counts == {"natural": 7, "specialized": 4, "structured": 8}
    assert sum(task.classes for task in VTAB) == 940
    assert sum(task.test_images for task in VTAB) == 387904


def test_tasks_by_alias_group_and_all() -> None:
    assert find_task("cifar100") == find_task("cifar")
    assert [t.name for t in find_tasks(["specialized", "eurosat", "digits"])][-2:] == [
        "diabetic_retinopathy",
        "digits",
    ]
    assert find_tasks(["all"]) == list(VTAB)
    with pytest.raises(InvalidDataError, match=r"'dsprite_loc' \(did you mean dsprites_loc\?\); there are cifar, "):
        find_task("dsprite_loc")


# ---------------------------------------------------------------------- dSprites
def test_the_split_is_vtabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsprites, "cached_assets_path", lambda *_, **__: tmp_path)
    dsprites.vtab_order.cache_clear()
    order = dsprites.vtab_order()
    assert order[:5].tolist() == [16399, 634903, 206287, 470425, 352707]
    assert order[589824:589827].tolist() == [220697, 85843, 84902]
    assert np.array_equal(np.bincount(order), np.ones(737280))
    kept = tmp_path / "dsprites_order.npy"
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    made = []
    monkeypatch.setattr(dsprites, "_computed_order", lambda: made.append(1) or order)
    swapped = kept.read_bytes()[:-8] + kept.read_bytes()[-4:] + kept.read_bytes()[-8:-4]
    for content, times in ((kept.read_bytes(), 0), (kept.read_bytes()[:1000], 1), (b"", 2), (swapped, 3)):
        kept.write_bytes(content)  # a damaged copy is not believed
        dsprites.vtab_order.cache_clear()
        assert np.array_equal(dsprites.vtab_order(), order)
        assert len(made) == times
    monkeypatch.setattr(dsprites, "_computed_order", lambda: order[::-1])
    kept.unlink()
    dsprites.vtab_order.cache_clear()
    with pytest.raises(InvalidDataError, match="does not come out"):
        dsprites.vtab_order()


def _drawn_by_matplotlib(index: int) -> np.ndarray:
    """The image again, forwards: the outline is scaled, turned and moved, and matplotlib says what is inside."""
    shape, scale, orientation, x, y = np.unravel_index(index, (3, 6, 40, 32, 32))
    if shape == 0:
        outline = 9.6 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == 1:
        angles = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
        outline = np.stack([12.76 * np.cos(angles), 7.22 * np.sin(angles)], 1)
    else:
        degrees, radii = np.array(list(dsprites._HEART.items())).T
        right = np.stack([radii * np.cos(np.radians(degrees)), -radii * np.sin(np.radians(degrees))], 1)
        outline = np.concatenate([right, right[::-1] * (-1, 1)])
    theta = 2 * np.pi * orientation / 39
    turn = np.array([[np.cos(theta), np.sin(theta)], [-np.sin(theta), np.cos(theta)]])
    outline = (0.5 + 0.1 * scale) * outline @ turn.T + (16 + 32 * x / 31, 16 + 32 * y / 31)
    rows, columns = np.mgrid[:64, :64] + 0.5
    inside = Polygon(outline).contains_points(np.stack([columns.ravel(), rows.ravel()], 1))
    return inside.reshape(64, 64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, dsprites.COUNT - 1))
def test_shapes_are_where_their_factors_say(index: int) -> None:
    ours = dsprites.render(np.array([index]))[0]
    assert set(np.unique(ours)) == {0, 255}
    assert np.count_nonzero((ours > 0) != _drawn_by_matplotlib(index)) <= 2  # pixels whose centre is on the outline


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, dsprites.COUNT - 1), min_size=1, max_size=8))
def test_labels_and_batches(numbers: list[int]) -> None:
    indices = np.array(numbers)
    location, orientation = (dsprites.labelled(indices, name) for name in ("dsprites_loc", "dsprites_ori"))
    assert location.labels.tolist() == [i // 32 % 32 // 2 for i in numbers]
    assert orientation.labels.tolist() == [int(i // 1024 % 40 / 2.5) for i in numbers]
    image = np.asarray(location.read(len(numbers) - 1))
    assert image.shape == (64, 64, 3) and np.array_equal(image[..., 2], dsprites.render(indices)[-1])


def test_a_full_turn_looks_like_none_but_is_another_class() -> None:
    pair = np.array([7 * 1024 * 40, 7 * 1024 * 40 + 39 * 1024])
    first, last = dsprites.render(pair)
    assert np.array_equal(first, last)
    assert dsprites.labelled(pair, "dsprites_ori").labels.tolist() == [0, 15]


def test_pretraining_images_are_in_no_split() -> None:
    used = {
        int(i) for images in dsprites.read_dsprites("dsprites_loc").values() for i in np.asarray(images.read.indices)
    }
    assert len(used) == 800 + 200 + 73728
    assert not used & set(dsprites.unused_by_vtab(200_000).tolist())
    with pytest.raises(InvalidDataError, match="589024 are outside"):
        dsprites.unused_by_vtab(600_000)


# ---------------------------------------------------------------------- folders
@pytest.mark.parametrize(("name", "suffix"), [("kitti", ".jpg"), ("kitti_dist", ".png")])
def test_a_folder_in_the_fields_layout(tmp_path: Path, name: str, suffix: str) -> None:
    write_task(tmp_path / name, suffix=suffix)
    with pytest.raises(InvalidDataError, match="train800 has 6 images instead of 800, .*--any-size"):
        load_task(find_task("kitti"), tmp_path)
    data = load_task(find_task("kitti"), tmp_path, any_size=True)
    assert {split: len(images) for split, images in data.splits.items()} == {**SIZES, "train800val200": 9}
    assert data.title == "kitti" and data.source == str(tmp_path / name) and len(data.deviations) == 4
    assert data.splits["test"].labels.tolist() == [0, 1, 2, 3, 0]
    both = data.splits["train800val200"]
    assert both.labels.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    exact = np.asarray(both.read(7)) == np.asarray(Image.open(tmp_path / name / f"images/val200/000001{suffix}"))
    assert exact.all()


def test_a_list_of_its_own_for_all_training_images(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "kitti")
    (folder / "train800val200.txt").write_text("images/val200/000000.jpg 3\n")
    data = load_task(find_task("kitti"), tmp_path, any_size=True)
    assert data.splits["train800val200"].labels.tolist() == [3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000009.jpg 1", "test.txt, line 4: there is no image .*images/test/000009.jpg"),
        ("images/test/000001.jpg 4", "test.txt, line 4: class 4 is out of range, classes are 0 to 3"),
        ("images/test/000001.jpg -1", "line 4: class -1 is out of range"),
        ("images/test/000001.jpg", "line 4: a path and a class number are expected"),
        ("images/test/000001.jpg cat", "line 4: 'cat' is no class number"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = write_task(tmp_path / "kitti")
    (folder / "test.txt").write_text(f"images/test/000000.jpg 0\n\nimages/test/000001.jpg 1\n{line}\n")
    with pytest.raises(InvalidDataError, match=message):
        load_task(find_task("kitti"), tmp_path, any_size=True)


def test_white_space_in_lists(tmp_path: Path) -> None:
    sample(0, 0).save(tmp_path / "an image.png")
    (tmp_path / "list.txt").write_text("an image.jpg\t 3 \r\n   \n an image.png 0")
    images = read_list(tmp_path / "list.txt", 4)
    assert images.labels.tolist() == [3, 0] and images.read(0).size == (14, 12)
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(InvalidDataError, match="lists no images"):
        read_list(tmp_path / "list.txt", 4)


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("text")
    (tmp_path / "list.txt").write_text("a.jpg 0")
    with pytest.raises(InvalidDataError, match=r"a\.jpg is no image"):
        read_list(tmp_path / "list.txt", 4).read(0)


def test_an_incomplete_folder(tmp_path: Path) -> None:
    (write_task(tmp_path / "kitti") / "test.txt").unlink()
    with pytest.raises(InvalidDataError, match=r"has no test\.txt"):
        load_task(find_task("kitti"), tmp_path)
    assert availability(find_task("kitti"), tmp_path)[0] is None


# ---------------------------------------------------------------------- the Hub
def _hub_copy(images: str, labels: str, splits: dict[str, int], classes: int = 4) -> datasets.DatasetDict:
    features = datasets.Features({images: datasets.Image(), labels: datasets.Value("int64")})
    parts = {}
    for number, (split, size) in enumerate(splits.items()):
        rows = [{images: sample(i % classes, 100 * number + i, 2), labels: i % classes} for i in range(size)]
        parts[split] = datasets.Dataset.from_list(rows, features=features)
    return datasets.DatasetDict(parts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Repository -> what ``load_dataset`` gives for it; the names that were asked for are under ``asked``."""
    repositories: dict[str, Any] = {"asked": []}

    def load_dataset(name: str) -> Any:
        repositories["asked"].append(name)
        if name not in repositories:
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed.")
        return repositories[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return repositories


def test_mirrors_with_their_own_columns_and_splits(tmp_path: Path, asked: dict[str, Any]) -> None:
    sizes = [800, 200, 711]
    asked["bramtoula/vtab_kitti"] = _hub_copy("image", "label", dict(zip(SIZES, sizes, strict=True)))
    data = load_task(find_task("kitti"), tmp_path)
    assert asked["asked"][:2] == ["fw407/vtab-1k_kitti", "fw407/vtab-1k_kitti_dist"]
    assert data.source == "bramtoula/vtab_kitti on the Hub" and not data.deviations
    assert len(data.splits["train800val200"]) == 1000
    names = ("train", "validation", "test")
    asked["fw407/vtab-1k_kitti_distance"] = _hub_copy("img", "label", dict(zip(names, sizes, strict=True)))
    data = load_task(find_task("kitti"), tmp_path)
    assert data.source == "fw407/vtab-1k_kitti_distance on the Hub"
    assert data.splits["test"].labels.tolist() == [i % 4 for i in range(711)]
    assert np.array_equal(np.asarray(data.splits["val200"].read(9)), np.asarray(sample(1, 109, 2)))


def test_a_cached_mirror_comes_first(tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--bramtoula--vtab_eurosat" / "snapshots").mkdir(parents=True)
    assert availability(find_task("eurosat"), tmp_path) == ("hub", "bramtoula/vtab_eurosat, in the cache")
    with pytest.raises(InvalidDataError):
        load_task(find_task("eurosat"), tmp_path)
    assert asked["asked"][0] == "bramtoula/vtab_eurosat"


@pytest.mark.parametrize(
    ("columns", "splits", "classes", "message"),
    [
        (("image", "y"), ("train", "validation", "test"), 4, "split train has no label column"),
        (("x", "label"), ("train", "validation", "test"), 4, "split train has no image column"),
        (("img", "label"), ("train", "test"), 4, "no split for val200; it has train, test"),
        (("img", "label"), ("train", "validation", "test"), 7, "split train, row 4: class 4 is out of range"),
    ],
)
def test_a_mirror_of_something_else(
    asked: dict[str, Any], tmp_path: Path, columns: tuple[str, str], splits: tuple[str], classes: int, message: str
) -> None:
    asked["fw407/vtab-1k_kitti"] = _hub_copy(*columns, dict.fromkeys(splits, 8), classes=classes)
    with pytest.raises(InvalidDataError, match=f"fw407/vtab-1k_kitti.* {message}"):
        load_task(find_task("kitti"), tmp_path)


def test_what_is_nowhere_says_how_to_get_it(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cure = rf"at {tmp_path}/svhn \(train800.txt, .*hf download --repo-type dataset fw407/vtab-1k_svhn"
    with pytest.raises(InvalidDataError, match=f"in none of fw407/vtab-1k_svhn, bramtoula.*{cure}"):
        load_task(find_task("svhn"), tmp_path)

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InvalidDataError, match=f"Couldn't reach 'fw407/vtab-1k_svhn'.*{cure}"):
        load_task(find_task("svhn"), tmp_path)
    for source in ("folder", "local"):
        with pytest.raises(InvalidDataError, match=f"svhn is not here as {source}.*{cure}"):
            load_task(find_task("svhn"), tmp_path, source)
    assert availability(find_task("svhn"), tmp_path)[0] is None


# ---------------------------------------------------------------------- what needs no download
def test_stand_ins_do_not_bear_a_vtab_name(tmp_path: Path) -> None:
    data = load_task(find_task("dsprites_loc"), tmp_path)
    assert data.title == "dSprites (re-rendered) location" and not data.deviations
    write_task(tmp_path / "dsprites_loc")  # the real thing, if it is there
    assert load_task(find_task("dsprites_loc"), tmp_path, any_size=True).title == "dsprites_loc"
    assert load_task(find_task("dsprites_loc"), tmp_path, "local").title == "dSprites (re-rendered) location"


def test_digits_have_the_sizes_of_a_vtab_task(tmp_path: Path) -> None:
    data = load_task(DIGITS, tmp_path)
    assert {split: len(images) for split, images in data.splits.items()} == {
        "train800": 800,
        "val200": 200,
        "test": 797,
        "train800val200": 1000,
    }
    assert np.bincount(data.splits["val200"].labels).min() >= 18
    seen = {np.asarray(images.read(i)).tobytes() for images in data.splits.values() for i in range(len(images))}
    assert len(seen) == 1797  # every image is in one split (and they all differ)
    with pytest.raises(InvalidDataError, match="comes with scikit-learn"):
        load_task(DIGITS, tmp_path, "hub")


# ---------------------------------------------------------------------- images and tensors
def numbered(count: int, start: int = 0) -> Images:
    return Images(np.arange(start, start + count), lambda i: start + i)


def test_sets_of_images_are_put_together() -> None:
    both = joined(numbered(3), numbered(2, 10))
    assert [both.read(i) for i in range(len(both))] == both.labels.tolist() == [0, 1, 2, 10, 11]
    assert [both.select([4, 0]).read(i) for i in range(2)] == [11, 0]
    subset = numbered(50).fixed_subset(10)
    assert len(set(subset.labels.tolist())) == 10 and sorted(subset.labels) == subset.labels.tolist()
    assert np.array_equal(subset.labels, numbered(50).fixed_subset(10).labels)
    assert len(numbered(50).fixed_subset(None)) == len(numbered(50).fixed_subset(60)) == 50


def test_the_literatures_preprocessing() -> None:
    images = Images(np.array([3]), lambda i: sample(2, 5))
    example = Examples(images, Literature(16))[0]
    resized = np.asarray(sample(2, 5).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (resized / 255 - mean[:, None, None]) / std[:, None, None]
    assert example["labels"] == 3 and np.abs(example["pixel_values"].numpy() - expected).max() < 1e-6
    assert Examples(images, Literature())[0]["pixel_values"].shape == (3, 224, 224)


def test_the_checkpoints_preprocessing() -> None:
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    images = Images(np.array([0]), lambda i: sample(2, 5))
    example = Examples(images, Checkpoint(processor))[0]
    assert example["pixel_values"].equal(processor(images=sample(2, 5), return_tensors="pt")["pixel_values"][0])


def test_images_are_read_once_where_they_are_kept() -> None:
    reads: list[int] = []
    images = Images(np.array([0, 1]), lambda i: reads.append(i) or sample(i, i))  # type: ignore[func-returns-value]
    kept, again = Examples(images, Literature(8), keep=True), Examples(images, Literature(8))
    for examples in (kept, again):
        assert examples[1]["pixel_values"].equal(examples[1]["pixel_values"])
    assert reads == [1, 1, 1]
    assert len(list(kept)) == 2  # iteration ends
