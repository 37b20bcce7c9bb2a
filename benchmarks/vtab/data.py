"""A task's images, from wherever they are: drawn, bundled, in a folder, or in a copy on the Hub.

A folder has the layout that the field distributes: a list file a split, ``<root>/<task>/train800.txt``, with a line an
image, ``images/train800val200/000000.jpg 7``: the path from the task's folder, white space, the class number. Of the
Hub's copies, columns and splits are found by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image, UnidentifiedImageError

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils import data
from hf_vitprune.utils.sources import IMAGE_COLUMNS, LABEL_COLUMNS, built_in_digits, find_column

from .dsprites import LABELS, read_dsprites
from .images import Images, joined
from .tasks import DIGITS, SPLITS, TEST, TRAIN, TRAIN_ALL, VALIDATION, Task

#: where a task is read from: the first that has it, or one that is asked for
SOURCES = ("auto", "folder", "local", "hub")
NEEDED = (TRAIN, VALIDATION, TEST)
MIRRORS = ("fw407/vtab-1k_{}", "bramtoula/vtab_{}")
_SPLIT_NAMES = {
    TRAIN: (TRAIN, "train"),
    VALIDATION: (VALIDATION, "validation", "val"),
    TRAIN_ALL: (TRAIN_ALL,),
    TEST: (TEST,),
}


@dataclass(frozen=True)
class TaskData:
    """The images of one task, split by split, and where they were read from.

    ``title``: what numbers on them are reported as: the task's name, or what stands in for it. ``deviations``: splits
    that have not the published number of images, as text.
    """

    task: Task
    splits: dict[str, Images]
    source: str
    title: str
    deviations: tuple[str, ...] = ()


def load_task(task: Task, root: Path, source: str = "auto", *, any_size: bool = False) -> TaskData:
    """Find and read a task.

    Args:
        root: folder with a folder a task.
        source: ``folder``; ``local`` (what needs no download: digits, and dSprites drawn anew); ``hub``; or ``auto``,
            the first of these that has it.
        any_size: take splits that have not the published number of images; reports then say so.
    """
    if source not in SOURCES:
        raise InvalidDataError(f"source is one of {', '.join(SOURCES)}, not {source!r}")
    title = task.name
    folder = find_folder(root, task) if source in ("auto", "folder") else None
    if folder is not None:
        splits, where = read_folder(folder, task), str(folder)
    elif source in ("auto", "local") and task.name in LABELS:
        splits, where, title = read_dsprites(task.name), "drawn from its factors", LABELS[task.name][0]
    elif source in ("auto", "local") and task == DIGITS:
        splits, where = read_digits(), "scikit-learn"
    elif source in ("auto", "hub") and task != DIGITS:
        try:
            splits, repository = read_hub(task)
        except InvalidDataError as error:
            if cached_repository(task) is not None:
                raise
            raise InvalidDataError(f"{error}. {how_to_get(task, root)}") from error
        where = f"{repository} on the Hub"
    else:
        raise InvalidDataError(f"{task.name} is not here as {source}. {how_to_get(task, root)}")
    splits.setdefault(TRAIN_ALL, joined(splits[TRAIN], splits[VALIDATION]))
    deviations = tuple(
        f"{split} has {len(images)} images instead of {task.images(split)}"
        for split, images in splits.items()
        if len(images) != task.images(split)
    )
    if deviations and not any_size:
        raise InvalidDataError(
            f"{task.name} from {where}: {', '.join(deviations)}. Results on it would not be VTAB-1k's; any_size "
            "(--any-size) takes it nevertheless"
        )
    return TaskData(task, splits, where, title, deviations)


def how_to_get(task: Task, root: Path) -> str:
    """What to download, and where to put it."""
    if task == DIGITS:
        return "It comes with scikit-learn: use source auto or local"
    lists = ", ".join(f"{split}.txt" for split in NEEDED)
    return (
        f"Put the task's folder of the VTAB-1k archive that PEFT papers distribute at {root / task.name} ({lists} and "
        f"the images that they name), or download a copy from the Hub: hf download --repo-type dataset "
        f"{repositories(task)[0]}"
    )


def availability(task: Task, root: Path) -> tuple[str | None, str]:
    """(where the task would be read from without a download, or None; a remark), from a glance at the disk."""
    folder = find_folder(root, task)
    if folder is not None:
        missing = _missing_lists(folder)
        return (None, f"{folder} has no {missing}") if missing else ("folder", str(folder))
    if task.name in LABELS:
        return "local", LABELS[task.name][0]
    if task == DIGITS:
        return "local", "scikit-learn's digits, no part of VTAB-1k"
    repository = cached_repository(task)
    return ("hub", f"{repository}, in the cache") if repository is not None else (None, how_to_get(task, root))


def read_digits() -> dict[str, Images]:
    """scikit-learn's digits as train800, val200 and test; the split is always the same, the classes evenly spread."""
    everything = DIGITS.test_images + 1000
    loaded = data.load_images(data.DIGITS, eval_share=DIGITS.test_images / everything, seed=0, parts=built_in_digits())
    parts = loaded.train.train_test_split(test_size=200, seed=0, stratify_by_column=loaded.label_column)

    def images(dataset: Any) -> Images:
        labels = np.asarray(dataset[loaded.label_column][:], dtype=np.int64)
        return Images(labels, ColumnReader(dataset, loaded.image_column))

    return {TRAIN: images(parts["train"]), VALIDATION: images(parts["test"]), TEST: images(loaded.evaluation)}


# ---------------------------------------------------------------------- folders
@dataclass(frozen=True)
class FileReader:
    """Position -> image, read from a file."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Any:
        try:
            with Image.open(self.paths[index]) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            raise InvalidDataError(f"{self.paths[index]} is no image that Pillow can read") from error


def find_folder(root: Path, task: Task) -> Path | None:
    """The task's folder under ``root``, by any of its names, if there is one with list files."""
    folders = (root / name for name in task.names)
    return next((f for f in folders if any((f / f"{split}.txt").is_file() for split in SPLITS)), None)


def _missing_lists(folder: Path) -> str:
    return ", ".join(f"{split}.txt" for split in NEEDED if not (folder / f"{split}.txt").is_file())


def read_folder(folder: Path, task: Task) -> dict[str, Images]:
    """All splits of a task; ``train800val200`` only where it has a list of its own."""
    missing = _missing_lists(folder)
    if missing:
        raise InvalidDataError(f"{folder} has no {missing}: the folder of {task.name} is not complete")
    lists = {split: folder / f"{split}.txt" for split in SPLITS}
    return {split: read_list(path, task.classes) for split, path in lists.items() if path.is_file()}


def read_list(path: Path, classes: int) -> Images:
    """The images of one list file, named from its folder; labels lie in 0..classes-1."""
    paths, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        words = line.rsplit(maxsplit=1)  # the path may hold white space itself
        if len(words) < 2:
            raise InvalidDataError(f"{where}: a path and a class number are expected, not {line.strip()!r}")
        labels.append(_label(words[1], classes, where))
        named = path.parent / words[0].strip()
        image = next((one for one in (named, named.with_suffix(".png")) if one.is_file()), None)  # saved as either
        if image is None:
            raise InvalidDataError(f"{where}: there is no image {named}")
        paths.append(image)
    if not paths:
        raise InvalidDataError(f"{path} lists no images")
    return Images(np.asarray(labels, dtype=np.int64), FileReader(tuple(paths)))


def _label(text: str, classes: int, where: str) -> int:
    try:
        label = int(text)
    except ValueError:
        raise InvalidDataError(f"{where}: {text!r} is no class number; a line is '<path> <number>'") from None
    if not 0 <= label < classes:
        raise InvalidDataError(f"{where}: class {label} is out of range, classes are 0 to {classes - 1}")
    return label


# ---------------------------------------------------------------------- the Hub
@dataclass(frozen=True)
class ColumnReader:
    """Position -> image, from a column of a dataset."""

    dataset: Any
    column: str

    def __call__(self, index: int) -> Any:
        return self.dataset[index][self.column].convert("RGB")


def repositories(task: Task) -> list[str]:
    """Where a task may be on the Hub, the likeliest first."""
    return [mirror.format(name) for mirror in MIRRORS for name in task.names]


def cached_repository(task: Task) -> str | None:
    """The first of :func:`repositories` that has been downloaded to this machine's cache."""
    cache = Path(constants.HF_HUB_CACHE)
    names = {
        repository: repo_folder_name(repo_id=repository, repo_type="dataset") for repository in repositories(task)
    }
    return next((repository for repository, name in names.items() if (cache / name / "snapshots").is_dir()), None)


def read_hub(task: Task) -> tuple[dict[str, Images], str]:
    """(splits, repository) of the first mirror that has the task; one that is in the cache comes before others."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    cached, known = cached_repository(task), repositories(task)
    for repository in known if cached is None else [cached, *(name for name in known if name != cached)]:
        try:
            parts = load_dataset(repository)
        except DatasetNotFoundError:
            continue
        except ConnectionError as error:
            raise InvalidDataError(f"{repository} could not be loaded from the Hub: {error}") from error
        return _splits(parts, repository, task), repository
    raise InvalidDataError(f"{task.name} is in none of {', '.join(known)} on the Hub")


def _splits(parts: Any, repository: str, task: Task) -> dict[str, Images]:
    found = {split: next((name for name in names if name in parts), None) for split, names in _SPLIT_NAMES.items()}
    missing = [split for split in NEEDED if found[split] is None]
    if missing:
        raise InvalidDataError(f"{repository} has no split for {', '.join(missing)}; it has {', '.join(parts)}")
    return {
        split: _images(parts[name], f"{repository}, split {name}", task)
        for split, name in found.items()
        if name is not None
    }


def _images(dataset: Any, where: str, task: Task) -> Images:
    column = find_column(dataset, IMAGE_COLUMNS, "image", where, by_type=False)
    labels = np.asarray(dataset[find_column(dataset, LABEL_COLUMNS, "label", where, by_type=False)][:])
    if labels.dtype.kind not in "iu":
        raise InvalidDataError(f"{where}: labels are {labels.dtype}, not class numbers")
    wrong = np.flatnonzero((labels < 0) | (labels >= task.classes))
    if len(wrong):
        row, last = wrong[0], task.classes - 1
        raise InvalidDataError(f"{where}, row {row}: class {labels[row]} is out of range, classes are 0 to {last}")
    return Images(labels.astype(np.int64), ColumnReader(dataset, column))
