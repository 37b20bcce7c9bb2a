"""A task's images, from wherever they are: drawn, bundled, in a folder, or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_vitprune.errors import InvalidDataError

from .digits import read_digits
from .dsprites import LABELS, read_dsprites
from .folder import find_folder, read_folder
from .hub import cached_repository, read_hub, repositories
from .images import Images, joined
from .tasks import DIGITS, TEST, TRAIN, TRAIN_ALL, VALIDATION, Task

#: where a task is read from: the first that has it, or one that is asked for
SOURCES = ("auto", "folder", "local", "hub")


@dataclass(frozen=True)
class TaskData:
    """The images of one task.

    Attributes:
        task: which one.
        splits: train800, val200, train800val200 and test.
        source: where they were read from.
        title: what numbers on them are reported as: the task's name, or what stands in for it.
        deviations: splits that have not the published number of images, as text; empty where all have.
    """

    task: Task
    splits: dict[str, Images]
    source: str
    title: str
    deviations: tuple[str, ...] = ()


def load_task(task: Task, root: Path, source: str = "auto", *, any_size: bool = False) -> TaskData:
    """Find and read a task.

    Args:
        task: which one.
        root: folder with a folder a task; see ``folder.py``.
        source: ``folder``; ``local`` (what needs no download: digits, and dSprites drawn anew); ``hub``; or ``auto``,
            the first of these that has it.
        any_size: take splits that have not the published number of images; reports then say so.

    Raises:
        InvalidDataError: it is nowhere (the message says what to download and where to put it), or is damaged.
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
        splits, where = _from_hub(task, root)
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


def _from_hub(task: Task, root: Path) -> tuple[dict[str, Images], str]:
    try:
        splits, repository = read_hub(task)
    except InvalidDataError as error:
        if cached_repository(task) is not None:
            raise
        raise InvalidDataError(f"{error}. {how_to_get(task, root)}") from error
    return splits, f"{repository} on the Hub"


def how_to_get(task: Task, root: Path) -> str:
    """What to download, and where to put it."""
    if task == DIGITS:
        return "It comes with scikit-learn: use source auto or local"
    lists = ", ".join(f"{split}.txt" for split in (TRAIN, VALIDATION, TEST))
    return (
        f"Put the task's folder of the VTAB-1k archive that PEFT papers distribute at {root / task.name} ({lists} and "
        f"the images that they name), or download a copy from the Hub: hf download --repo-type dataset "
        f"{repositories(task)[0]}"
    )


def availability(task: Task, root: Path) -> tuple[str | None, str]:
    """(where the task would be read from without a download, or None; a remark), from a glance at the disk."""
    folder = find_folder(root, task)
    if folder is not None:
        missing = [split for split in (TRAIN, VALIDATION, TEST) if not (folder / f"{split}.txt").is_file()]
        if missing:
            return None, f"{folder} has no {', '.join(f'{split}.txt' for split in missing)}"
        return "folder", str(folder)
    if task.name in LABELS:
        return "local", LABELS[task.name][0]
    if task == DIGITS:
        return "local", "scikit-learn's digits, no part of VTAB-1k"
    repository = cached_repository(task)
    if repository is not None:
        return "hub", f"{repository}, in the cache"
    return None, how_to_get(task, root)
