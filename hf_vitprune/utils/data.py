"""Labelled images for the command line, the demo and the examples: built-in digits, a folder, or a Hub dataset."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import InvalidDataError
from .classes import ClassMatch, match_classes

#: name of the data that needs no download: 1797 real handwritten digits that ship with scikit-learn
DIGITS = "digits"
IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass
class LabelledImages:
    """Training and evaluation images with class numbers.

    Attributes:
        train, evaluation: ``datasets.Dataset`` with an image and a label column.
        label_names: class number -> name.
        image_column, label_column: their names.
        source: what was loaded.
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
        columns = self.image_column, self.label_column
        parts = self.train, self.evaluation
        numbers = None if self.match is None else self.match.numbers
        return tuple(ProcessedImages(part, processor, *columns, cache, numbers=numbers) for part in parts)  # type: ignore[return-value]

    def aligned_to(self, config: Any, *, every: bool = True, model: str = "the model") -> LabelledImages:
        """The same images, with the class numbers of a classifier that has the same classes in an order of its own.

        Args:
            config: of the classifier; its ``id2label`` stays as it is.
            every, model: as :func:`~hf_vitprune.utils.classes.match_classes`.

        Raises:
            InvalidDataError: their classes differ.
        """
        match = match_classes(self.label_names, config.id2label, every=every, model=model)
        return replace(self, match=match)

    def at_most(self, train: int | None = None, evaluation: int | None = None, seed: int = 0) -> LabelledImages:
        """So many images of each part, drawn at random, with the classes' shares kept; None: all."""
        parts = {"train": train, "evaluation": evaluation}
        return replace(self, **{name: self._drawn(getattr(self, name), limit, seed) for name, limit in parts.items()})

    def _drawn(self, part: Any, limit: int | None, seed: int) -> Any:
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
        """Only the images of these classes, which become 0, 1, ... in the order given.

        Raises:
            InvalidDataError: there is no such class, or one is named twice.
        """
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


class ProcessedImages(torch.utils.data.Dataset):
    """Examples ``{"pixel_values": (channels, height, width), "labels": class number}`` through an image processor.

    Args:
        dataset: ``datasets.Dataset`` with the two columns.
        processor: a transformers image processor.
        image_column, label_column: their names.
        cache: process every image once and keep the tensors in memory.
        augment: applied to each (height, width, 3) PIL image before the processor.
        numbers: class number in the column -> class number given; None: the same.
    """

    def __init__(
        self,
        dataset: Any,
        processor: Any,
        image_column: str,
        label_column: str,
        cache: bool = False,
        augment: Callable[[Any], Any] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.dataset, self.processor, self.augment, self.numbers = dataset, processor, augment, numbers
        self.image_column, self.label_column = image_column, label_column
        self.cache: dict[int, dict[str, Any]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> list[int]:
        """Class numbers of all images; none of them is read."""
        own = [int(label) for label in self.dataset[self.label_column]]
        return own if self.numbers is None else [self.numbers[label] for label in own]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        row = self.dataset[index]
        image = row[self.image_column].convert("RGB")
        if self.augment is not None:
            image = self.augment(image)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        label = int(row[self.label_column])
        example = {"pixel_values": pixels, "labels": label if self.numbers is None else self.numbers[label]}
        if self.cache is not None:
            self.cache[index] = example
        return example


def load_images(
    source: str,
    *,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_share: float = 0.2,
    seed: int = 0,
) -> LabelledImages:
    """Load ``"digits"``, a folder with one sub-folder a class, or a dataset of the Hub.

    Args:
        source: which one.
        train_split: its training split.
        eval_split: its evaluation split; by default ``validation`` or ``test`` where it has one, else a stratified
            share of the training images.
        eval_share: that share, in (0, 1).
        seed: of the split.

    Raises:
        InvalidDataError: no such folder, no image or label column, no such split.
    """
    parts = _loaded(source) if source != DIGITS or Path(source).is_dir() else _digits()
    if train_split not in parts:
        raise InvalidDataError(f"{source} has no split {train_split!r}; it has {', '.join(parts)}")
    train = parts[train_split]
    image_column = find_column(train, IMAGE_COLUMNS, "image", source)
    label_column = find_column(train, LABEL_COLUMNS, "label", source)
    if eval_split is None:
        eval_split = next((name for name in ("validation", "val", "test") if name in parts), None)
    elif eval_split not in parts:
        raise InvalidDataError(f"{source} has no split {eval_split!r}; it has {', '.join(parts)}")
    train = _with_class_labels(train, label_column)
    names = list(train.features[label_column].names)
    if eval_split is None:
        halves = train.train_test_split(test_size=eval_share, seed=seed, stratify_by_column=label_column)
        train, evaluation = halves["train"], halves["test"]
    else:
        evaluation = parts[eval_split]
        if label_column not in evaluation.column_names:
            raise InvalidDataError(f"split {eval_split!r} of {source} has no labels")
        evaluation = evaluation.cast_column(label_column, train.features[label_column])
    return LabelledImages(train, evaluation, names, image_column, label_column, source)


def read_folder(folder: str | Path, processor: Any, limit: int | None = None, seed: int = 0) -> torch.Tensor:
    """Unlabelled images of a folder, through an image processor.

    Args:
        folder: with image files in it, or in sub-folders of any depth.
        processor: a transformers image processor.
        limit: this many of them, drawn at random; None or more than there are: all.
        seed: of the draw.

    Returns:
        (images, channels, height, width), in the order of their paths.

    Raises:
        InvalidDataError: there is no such folder, no image in it, or one that cannot be read.
    """
    files = image_files(folder, limit, seed)
    pixels = [_read(path, processor) for path in tqdm(files, "reading images", delay=3, leave=False)]
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        raise InvalidDataError(
            f"the image processor gives images of {len(sizes)} sizes ({', '.join(map(str, sorted(sizes)[:3]))}): have "
            "it resize and crop them to one"
        )
    return torch.stack(pixels)


def image_files(folder: str | Path, limit: int | None = None, seed: int = 0) -> list[Path]:
    """Paths of the images of a folder, in their order; arguments and errors as :func:`read_folder`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidDataError(f"{folder} is no folder; give a folder with image files")
    known = _image_suffixes()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
    if not files:
        raise InvalidDataError(f"there are no images in {folder} nor below it (.png, .jpg and the like)")
    if limit is not None and limit < len(files):
        files = sorted(random.Random(seed).sample(files, limit))
    return files


def open_image(path: Path) -> Any:
    """An image file as a PIL image in RGB, turned as its EXIF data says.

    Raises:
        InvalidDataError: it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidDataError(f"{path} cannot be read as an image: {error}. Mend it or take it out") from error


def _image_suffixes() -> set[str]:
    try:
        from PIL import Image
    except ImportError as error:
        raise InvalidDataError("images need Pillow: pip install 'hf_vitprune[vision]'") from error
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - {".pdf", ".mpg"}


def _read(path: Path, processor: Any) -> torch.Tensor:
    image = open_image(path)
    try:
        pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    except ValueError as error:
        raise InvalidDataError(f"the image processor cannot take {path}: {error}. Mend it or take it out") from error
    return pixels


def _digits() -> dict[str, Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise InvalidDataError("images need Pillow: pip install 'hf_vitprune[vision]'") from error
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((image * 15.9375).astype("uint8")) for image in digits.images]  # 0..16 -> 0..255
    labels = digits.target.tolist()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return {"train": Dataset.from_dict({"image": images, "label": labels}, features=features)}


def _loaded(source: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    if Path(source).is_dir():
        return load_dataset("imagefolder", data_dir=source)
    if Path(source).exists() or source.startswith((".", "/")):
        raise InvalidDataError(f"{source} is no folder; give a folder with one sub-folder of images a class")
    try:
        return load_dataset(source)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise InvalidDataError(f"{source} is neither a folder here nor a dataset on the Hub: {error}") from error


def find_column(dataset: Any, known: tuple[str, ...], kind: str, source: str) -> str:
    """The first of the known names that the dataset has.

    Raises:
        InvalidDataError: it has none of them.
    """
    for name in known:
        if name in dataset.column_names:
            return name
    raise InvalidDataError(
        f"{source} has no {kind} column (one of {', '.join(known)}); its columns are {', '.join(dataset.column_names)}"
    )


def _with_class_labels(dataset: Any, column: str) -> Any:
    from datasets import ClassLabel, Value

    if isinstance(dataset.features[column], ClassLabel):
        return dataset
    names = list(map(str, dataset.unique(column)))
    if not all(name.isdecimal() for name in names):
        return dataset.class_encode_column(column)
    # class_encode_column sorts numbers as words: 0, 1, 10, 2
    return dataset.cast_column(column, Value("string")).cast_column(column, ClassLabel(names=sorted(names, key=int)))
