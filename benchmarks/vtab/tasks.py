"""The nineteen tasks of VTAB-1k, and what is run beside them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from hf_vitprune.errors import InvalidDataError

GROUPS = ("natural", "specialized", "structured")
#: tasks of this group are no part of VTAB-1k: they have no share in its means
EXTRA = "extra"
TRAIN, VALIDATION, TRAIN_ALL, TEST = "train800", "val200", "train800val200", "test"
SPLITS = (TRAIN, VALIDATION, TRAIN_ALL, TEST)


@dataclass(frozen=True)
class Task:
    """One classification task, by the name of its folder in the layout that the field distributes, and other names."""

    name: str
    group: str
    classes: int
    test_images: int
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases

    def images(self, split: str) -> int:
        """Images that a split of this task has."""
        return {TRAIN: 800, VALIDATION: 200, TRAIN_ALL: 1000, TEST: self.test_images}[split]


VTAB = (
    Task("cifar", "natural", 100, 10000, ("cifar100",)),
    Task("caltech101", "natural", 102, 6084),
    Task("dtd", "natural", 47, 1880),
    Task("oxford_flowers102", "natural", 102, 6149, ("flowers102",)),
    Task("oxford_iiit_pet", "natural", 37, 3669, ("oxford_pet", "pets")),
    Task("svhn", "natural", 10, 26032),
    Task("sun397", "natural", 397, 21750),
    Task("patch_camelyon", "specialized", 2, 32768),
    Task("eurosat", "specialized", 10, 5400),
    Task("resisc45", "specialized", 45, 6300),
    Task("diabetic_retinopathy", "specialized", 5, 42670, ("retinopathy",)),
    Task("clevr_count", "structured", 8, 15000),
    Task("clevr_dist", "structured", 6, 15000, ("clevr_distance",)),
    Task("dmlab", "structured", 6, 22735),
    Task("kitti", "structured", 4, 711, ("kitti_dist", "kitti_distance")),
    Task("dsprites_loc", "structured", 16, 73728, ("dsprites_location",)),
    Task("dsprites_ori", "structured", 16, 73728, ("dsprites_orientation",)),
    Task("smallnorb_azi", "structured", 18, 12150, ("smallnorb_azimuth",)),
    Task("smallnorb_ele", "structured", 9, 12150, ("smallnorb_elevation",)),
)
#: scikit-learn's digits: real, and always there
DIGITS = Task("digits", EXTRA, 10, 797)
TASKS = {task.name: task for task in (*VTAB, DIGITS)}


def find_task(name: str) -> Task:
    """A task by its name or another one that it goes by."""
    by_name = {alias: task for task in TASKS.values() for alias in task.names}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InvalidDataError(f"there is no task {name!r}{hint}; there are {', '.join(TASKS)}")
    return by_name[name]


def find_tasks(names: Iterable[str]) -> list[Task]:
    """Tasks by name, group, or ``all`` (the nineteen of VTAB-1k), each once, in the order asked for."""
    found: dict[str, Task] = {}
    for name in names:
        if name == "all" or name in GROUPS:
            chosen = [task for task in VTAB if name in ("all", task.group)]
        else:
            chosen = [find_task(name)]
        found |= {task.name: task for task in chosen}
    return list(found.values())
