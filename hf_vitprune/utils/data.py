"""Labelled images for the command line, the demo and the examples: built-in digits, a folder, or a Hub dataset."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidDataError
from .classes import ClassMatch, match_classes
from .examples import Processed
from .images import check_images
from .images import read_folder as read_folder
from .settings import check_count, check_open_interval
from .sources import DIGITS as DIGITS
from .sources import (
    EVAL_NAMES,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Source,
    choose_splits,
    class_names,
    file_paths,
    find_column,
    load_parts,
    splits_to_evaluate,
    with_class_numbers,
)  # fmt: skip


@dataclass
class LabelledImages:
    """Training and evaluation images with class numbers.

    Attributes:
        train, evaluation: ``datasets.Dataset`` with an image and a label column.
        label_names: class number -> name.
        match: where the classes are among a model's, whose numbers the ``processed`` images have; None: their own.
    """

    train: Any
    evaluation: Any
    label_names: list[str]
    image_column: str
    label_column: str
    source: str
    match: ClassMatch | None = None

    def processed(self, processor: Any, cache: bool = False) -> tuple[ProcessedImages, ProcessedImages]:
        """(training, evaluation) sets of tensors; ``cache`` keeps them all in memory."""
        numbers = None if self.match is None else self.match.numbers
        rest = processor, self.image_column, self.label_column, cache, numbers
        return ProcessedImages(self.train, *rest), ProcessedImages(self.evaluation, *rest)

    @property
    def one_line(self) -> str:
        """How many images there are, of which classes."""
        names = ", ".join(self.label_names[:5]) + ", ..." * (len(self.label_names) > 5)
        number = f"{len(self.train)} training and {len(self.evaluation)} evaluation images"
        return f"{self.source}: {number} of {len(self.label_names)} classes ({names})"

    def aligned_to(self, config: Any, *, every: bool = True, model: str = "the model") -> LabelledImages:
        """The same images, with the class numbers of a classifier, by its config; see :func:`match_classes`."""
        match = match_classes(self.label_names, config.id2label, every=every, model=model)
        return replace(self, match=match)

    def at_most(self, train: int | None = None, evaluation: int | None = None, seed: int = 0) -> LabelledImages:
        """So many images of each part, drawn at random, with the classes' shares kept; None: all."""
        parts = {"train": train, "evaluation": evaluation}
        return replace(self, **{name: self._drawn(getattr(self, name), limit, seed) for name, limit in parts.items()})

    def _drawn(self, part: Any, limit: int | None, seed: int) -> Any:
        if limit is not None:
            check_count("the number of images", limit)
        if limit is None or limit >= len(part):
            return part
        labels = list(part[self.label_column])
        order = list(range(len(labels)))
        random.Random(seed).shuffle(order)
        size, seen, draw = Counter(labels), Counter[int](), random.Random(seed)
        place: dict[int, float] = {}
        for i in order:  # the images of every class at even distances from 0 to 1: any beginning has its share of each
            place[i] = (seen[labels[i]] + draw.random()) / size[labels[i]]
            seen[labels[i]] += 1
        return part.select(sorted(sorted(order, key=place.__getitem__)[:limit]))

    def of_classes(self, names: Sequence[str]) -> LabelledImages:
        """Only the images of these classes, which become 0, 1, ... in the order given; each is named once."""
        unknown = [name for name in names if name not in self.label_names]
        if unknown or not names or len(set(names)) < len(names):
            what = f"has no class {unknown[0]!r}" if unknown else "is asked for no class, or for one twice"
            raise InvalidDataError(f"{self.source} {what}; its classes are {', '.join(self.label_names[:5])}, ...")
        number = {self.label_names.index(name): place for place, name in enumerate(names)}
        train, evaluation = (self._renumbered(part, number, names) for part in (self.train, self.evaluation))
        return replace(self, train=train, evaluation=evaluation, label_names=list(names))

    def _renumbered(self, part: Any, number: dict[int, int], names: Sequence[str]) -> Any:
        from datasets import ClassLabel

        labels = part[self.label_column]
        kept = [i for i, label in enumerate(labels) if label in number]
        chosen = part.select(kept).remove_columns(self.label_column)
        chosen = chosen.add_column(self.label_column, [number[labels[i]] for i in kept])
        return chosen.cast_column(self.label_column, ClassLabel(names=list(names)))


class ProcessedImages(Processed):
    """Examples ``{"pixel_values": (channels, height, width), "labels": class number}`` through an image processor.

    Args:
        dataset: ``datasets.Dataset`` with the two columns.
        processor: a transformers image processor.
        image_column, label_column: their names.
        cache: process every image once and keep the tensors in memory.
        numbers: class number in the column -> class number given; None: the same.
    """

    def __init__(
        self,
        dataset: Any,
        processor: Any,
        image_column: str,
        label_column: str,
        cache: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dataset, processor, image_column, (label_column,))
        self.cache: dict[int, dict[str, Any]] | None = {} if cache else None
        self.numbers = numbers

    @property
    def labels(self) -> list[int]:
        """Class numbers of all images; none of them is read."""
        return [self._number(label) for label in self.dataset[self.label_columns[0]]]

    def _number(self, label: Any) -> int:
        return int(label) if self.numbers is None else self.numbers[int(label)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        example = super().__getitem__(index)
        example["labels"] = self._number(example["labels"])
        if self.cache is not None:
            self.cache[index] = example
        return example


def load_images(
    source: str,
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_share: float = 0.2,
    seed: int = 0,
    training: bool = True,
    parts: Mapping[str, Any] | None = None,
) -> LabelledImages:
    """Load ``"digits"``, a folder with one sub-folder a class, a data set saved to a folder, or one of the Hub.

    A folder may hold a folder a split (``train``, ``val``, ...) with the classes in it, and one folder around all. A
    folder called ``digits`` is meant before the built-in data.

    Args:
        source: which one; also with splits and columns, as :class:`~hf_vitprune.utils.sources.Source` reads it
            (``"uoft-cs/cifar100,label=coarse_label,eval=test"``).
        train_split, eval_split: by default ``train``, and ``validation`` or ``test`` where there is one, else
            a share of every class of the training images (``eval_share``, drawn by ``seed``).
        image_column, label_column: by default found by name, or by type.
        training: False: nothing is trained. Of data in one split, still the share is evaluated that no training has
            seen, but a folder that is called ``val``, ``test`` or the like is, as a whole.
        parts: its splits, where they are loaded already.

    Raises:
        InvalidDataError: no such folder, column or split; images that cannot be read, or have no label; to train:
            fewer than two classes, classes to evaluate that are not trained on, or with one image, of which none can
            be held out.
    """
    check_open_interval("eval_share", eval_share)
    asked = Source.parse(source)
    parts, name = load_parts(asked) if parts is None else parts, asked.name
    label_column = asked.label or label_column
    train_split, eval_split = choose_splits(
        asked.train or train_split, asked.eval or eval_split, parts, name, training
    )
    train = parts[train_split]
    image_column = find_column(train, IMAGE_COLUMNS, "image", name, asked.image or image_column)
    label_column = find_column(train, LABEL_COLUMNS, "label", name, label_column)
    if eval_split is None:
        eval_split = next(splits_to_evaluate(parts, train_split if training else None, label_column), None)
    looked_at = {train_split, eval_split or train_split} if training else {eval_split or train_split}
    check_images([path for split in sorted(looked_at) for path in file_paths(parts[split], image_column)], name)
    names = class_names(train, label_column)
    train = with_class_numbers(train, label_column, names, f"split {train_split!r} of {name}")
    if eval_split is None:
        whole = not training and Path(name).resolve().name.lower() in EVAL_NAMES
        train, evaluation = (train, train) if whole else _held_out(train, label_column, eval_share, seed, name)
    elif label_column not in parts[eval_split].column_names:
        raise InvalidDataError(f"split {eval_split!r} of {name} has no labels")
    else:
        where = f"split {eval_split!r} of {name}"
        evaluation = with_class_numbers(parts[eval_split], label_column, names, where)
    images = LabelledImages(train, evaluation, names, image_column, label_column, name)
    if training:
        _check_classes(images)
    return images


def _held_out(dataset: Any, column: str, share: float, seed: int, source: str) -> tuple[Any, Any]:
    """(training, evaluation) images: of every class the same share."""
    sizes = Counter(dataset[column])
    if len(sizes) == 1:
        return dataset, dataset  # _check_classes says what is wrong
    single = [dataset.features[column].names[number] for number, size in sizes.items() if size == 1]
    if single:
        raise InvalidDataError(
            f"{len(single)} of the {len(sizes)} classes of {source} have one image ({', '.join(single[:5])}), and so "
            f"none to evaluate on: add images or a split 'validation', or evaluate on all: '{source},eval=train'"
        )
    held_out = max(math.ceil(share * len(dataset)), len(sizes))  # one of each at least
    halves = dataset.train_test_split(test_size=held_out, seed=seed, stratify_by_column=column)
    return halves["train"], halves["test"]


def _check_classes(images: LabelledImages) -> None:
    trained, evaluated = (set(part[images.label_column]) for part in (images.train, images.evaluation))
    if len(trained) < 2:
        only = ", ".join(images.label_names[number] for number in trained)
        raise InvalidDataError(
            f"all training images of {images.source} are of one class ({only}), and a classifier tells two apart: a "
            "sub-folder is a class"
        )
    strange = [images.label_names[number] for number in sorted(evaluated - trained)]
    if strange:
        raise InvalidDataError(
            f"{images.source} has classes with images to evaluate on and none to train on: {', '.join(strange[:5])}"
        )
