"""Reader of the copies of VTAB-1k on the Hub, through ``datasets``. Columns and splits are found by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils.sources import IMAGE_COLUMNS, LABEL_COLUMNS, find_column

from .images import Images
from .tasks import TEST, TRAIN, TRAIN_ALL, VALIDATION, Task

MIRRORS = ("fw407/vtab-1k_{}", "bramtoula/vtab_{}")
_SPLIT_NAMES = {
    TRAIN: (TRAIN, "train"),
    VALIDATION: (VALIDATION, "validation", "val"),
    TRAIN_ALL: (TRAIN_ALL,),
    TEST: (TEST,),
}


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
    for repository in repositories(task):
        if (cache / repo_folder_name(repo_id=repository, repo_type="dataset") / "snapshots").is_dir():
            return repository
    return None


def read_hub(task: Task) -> tuple[dict[str, Images], str]:
    """(splits, repository) of the first mirror that has the task; one that is in the cache comes before others.

    Raises:
        InvalidDataError: no mirror has it, or the Hub is not reached; or one has it, without the columns or splits
            expected.
    """
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
    found = {}
    for split, names in _SPLIT_NAMES.items():
        name = next((name for name in names if name in parts), None)
        if name is not None:
            found[split] = _images(parts[name], f"{repository}, split {name}", task)
    missing = [split for split in (TRAIN, VALIDATION, TEST) if split not in found]
    if missing:
        raise InvalidDataError(f"{repository} has no split for {', '.join(missing)}; it has {', '.join(parts)}")
    return found


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
