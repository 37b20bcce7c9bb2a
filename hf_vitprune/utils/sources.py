"""Where labelled images come from: built-in digits, folders, data sets on the disk or on the Hub; their columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidDataError
from .extras import need
from .images import walk_images

#: name of the data that needs no download: 1797 real handwritten digits that ship with scikit-learn
DIGITS = "digits"
#: what splits are called, the likelier first; those of a row mean the same
TRAIN_NAMES = ("train", "training")
SPLIT_NAMES = (TRAIN_NAMES, ("validation", "val", "valid", "dev"), ("test", "testing", "eval", "evaluation"))
EVAL_NAMES = SPLIT_NAMES[1] + SPLIT_NAMES[2]
#: what columns of data sets with images, and with their classes, are called
IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_METADATA = [f"{depth}metadata.{kind}" for depth in ("", "*/") for kind in ("csv", "jsonl", "parquet")]
_DATA_FILES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar", ".zip")

Files = list[tuple[tuple[str, ...], Path]]  # (folders from the root of the data down to the file, its path)


@dataclass(frozen=True)
class Source:
    """What ``NAME,key=value,...`` says, as in ``uoft-cs/cifar100,label=coarse_label,eval=test``.

    Attributes:
        name: ``"digits"``, a folder, or an id on the Hub.
        train, eval: splits to train on and to evaluate on; found by default.
        image, label: columns; found by default.
        config: of a data set that has several.
    """

    name: str
    train: str | None = None
    eval: str | None = None
    image: str | None = None
    label: str | None = None
    config: str | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """A folder whose own name has commas is meant as it is.

        Raises:
            InvalidDataError: unknown keys, or one given twice.
        """
        name, *settings = [text] if Path(text).exists() else re.split(r",(?=\w+=)", text)
        pairs = [setting.split("=", 1) for setting in settings]
        known = [field.name for field in fields(cls) if field.name != "name"]
        for key, value in pairs:
            if key not in known or not value or [k for k, _ in pairs].count(key) > 1:
                raise InvalidDataError(
                    f"{text}: after the name come {', '.join(k + '=...' for k in known)}, once each"
                )
        return cls(name, **dict(pairs))

    @property
    def is_built_in(self) -> bool:
        """Whether it is the digits; a folder of that name is meant before them."""
        return self.name == DIGITS and not Path(self.name).is_dir()


def load_parts(source: Source) -> Any:
    """Split -> ``datasets.Dataset``.

    Raises:
        InvalidDataError: there is nothing of that name, or not what it should be.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    if source.is_built_in:
        return built_in_digits()
    name = source.name
    if Path(name).is_dir():
        return _in_folder(Path(name), source.config)
    if Path(name).exists() or name.startswith((".", "/", "~")):
        raise InvalidDataError(f"{name} is no folder; give a folder with one sub-folder of images a class")
    try:
        return load_dataset(name, source.config)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise InvalidDataError(f"{name} is neither a folder here nor a dataset on the Hub: {error}") from error
    except ValueError as error:  # several configs, or none of that name
        raise InvalidDataError(f"{name}: {error} (give it as '{name},config=NAME')") from error


def choose_splits(
    train: str | None, evaluation: str | None, parts: Mapping[str, Any], source: str, training: bool
) -> tuple[str, str | None]:
    """(split to train on, split to evaluate on) that are asked for, by another name for the same too.

    Where nothing is trained, any split says what the classes are for lack of one to train on.

    Raises:
        InvalidDataError: there is no such split, or none to train on.
    """
    found = []
    for asked in (train, evaluation):
        alike = next((names for names in SPLIT_NAMES if asked in names), ())
        found.append(next((name for name in (asked, *alike) if name in parts), None))
        if asked is not None and found[-1] is None:
            raise InvalidDataError(f"{source} has no split {asked!r}; it has {', '.join(parts)}")
    default = [name for name in parts if name.lower() in TRAIN_NAMES]
    if not training:
        default += [*filter(None, found), *(name for name in parts if name.lower() in EVAL_NAMES)]
    if found[0] is None and not default:
        raise InvalidDataError(
            f"{source} has no split 'train'; it has {', '.join(parts)}: name one with '{source},train=SPLIT'"
        )
    return found[0] or default[0], found[1]


def splits_to_evaluate(parts: Mapping[str, Any], train_split: str | None, column: str) -> Iterator[str]:
    """Splits that are called like one to evaluate on, the likelier first; the Hub's tests may come without labels."""
    for known in EVAL_NAMES:
        for name, part in parts.items():
            if name.lower() == known and name != train_split and has_labels(part, column):
                yield name


def built_in_digits() -> dict[str, Any]:
    """scikit-learn's digits, all in one split."""
    need("images", "PIL")
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((image * 15.9375).astype("uint8")) for image in digits.images]  # 0..16 -> 0..255
    labels = digits.target.tolist()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return {"train": Dataset.from_dict({"image": images, "label": labels}, features=features)}


# ---------------------------------------------------------------------- folders
def _in_folder(folder: Path, config: str | None) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = load_from_disk(str(folder))
        return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    if any(True for pattern in _METADATA for _ in folder.glob(pattern)):
        return load_dataset("imagefolder", data_dir=str(folder))
    files: Files = [(path.relative_to(folder).parts[:-1], path) for path in sorted(walk_images(folder))]
    if files:
        splits = {name: _of_classes(part, folder) for name, part in _splits(files).items()}
        names = sorted({label for part in splits.values() for label, _ in part})
        return {split: _dataset(part, names, Dataset) for split, part in splits.items()}
    if any(path.suffix in _DATA_FILES for depth in ("*", "*/*") for path in folder.glob(depth)):
        return load_dataset(str(folder), config)
    raise InvalidDataError(f"there are no images in {folder} nor below it (.png, .jpg and the like)")


def _splits(files: Files) -> dict[str, Files]:
    """The files of every split; one split ``train`` where no folder is called like one.

    A folder called ``train`` that has images in it and no folders, beside others, is a class.
    """
    files = _unwrapped(files)
    parts: dict[str, Files] = {}
    for folders, path in files:
        parts.setdefault(folders[0] if folders else "", []).append((folders[1:], path))
    named = {name for name in parts if name.lower() in (*TRAIN_NAMES, *EVAL_NAMES)}
    holding = {name for name in named if all(folders for folders, _ in parts[name])}
    if not holding or (holding != set(parts) and not any(name.lower() in TRAIN_NAMES for name in holding)):
        return {"train": files}
    return {name: _unwrapped(parts[name]) for name in parts if name in holding}


def _unwrapped(files: Files) -> Files:
    """Without the folders that hold nothing but one other folder."""
    while all(len(folders) > 1 for folders, _ in files) and len({folders[0] for folders, _ in files}) == 1:
        files = [(folders[1:], path) for folders, path in files]
    return files


def _of_classes(files: Files, folder: Path) -> list[tuple[str, Path]]:
    """(class, path) of every image: its class is the uppermost folder, whatever folders are in there."""
    loose = [path for folders, path in files if not folders]
    if len(loose) == len(files):
        raise InvalidDataError(
            f"{folder} has images and no labels: put them into a sub-folder a class, or list file_name and label in a "
            "metadata.csv (the command line prunes without labels by --images)"
        )
    if loose:
        raise InvalidDataError(
            f"{len(loose)} images of {folder} lie outside of the folders of its classes ({loose[0]}): move them"
        )
    return [(folders[0], path) for folders, path in files]


def _dataset(part: Iterable[tuple[str, Path]], names: list[str], kind: Any) -> Any:
    from datasets import ClassLabel, Features, Image

    place = {name: number for number, name in enumerate(names)}
    rows = [(str(path), place[label]) for label, path in part]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return kind.from_dict({"image": [path for path, _ in rows], "label": [n for _, n in rows]}, features=features)


# ---------------------------------------------------------------------- columns
def find_column(
    dataset: Any, known: tuple[str, ...], kind: str, source: str, asked: str | None = None, by_type: bool = True
) -> str:
    """The column that is asked for; else the first of the known names that there is, or the only one of its type.

    ``kind`` is "image" or "label"; ``by_type``: look for the only column of images, or of numbered classes, too.

    Raises:
        InvalidDataError: it has no such column, or one of another type.
    """
    from datasets import ClassLabel, Image, Value

    own = Image if kind == "image" else ClassLabel
    of_type = [name for name, feature in dataset.features.items() if isinstance(feature, own)]
    named = [name for name in ((asked,) if asked else known) if name in dataset.column_names]
    found = named or (of_type if by_type and not asked and len(of_type) == 1 else [])
    if not found:
        wanted = f"column {asked!r}" if asked else f"{kind} column (one of {', '.join(known)})"
        cure = f": name one with '{source},{kind}=COLUMN'" if by_type else ""
        raise InvalidDataError(f"{source} has no {wanted}; its columns are {', '.join(dataset.column_names)}{cure}")
    feature = dataset.features[found[0]]
    if not isinstance(feature, own if kind == "image" else (own, Value)):
        held = getattr(feature, "dtype", None) or feature
        what = "no images" if kind == "image" else "no class an image"
        raise InvalidDataError(f"column {found[0]!r} of {source} holds {what} but {held}")
    return found[0]


def file_paths(dataset: Any, column: str) -> list[Path]:
    """The files that a column of images names, where it does not hold the images themselves; none is read."""
    import pyarrow.compute as pc

    stored = dataset.with_format("arrow")[column][:] if len(dataset) else None
    if stored is None or not pc.any(pc.is_null(pc.struct_field(stored, "bytes"))).as_py():
        return []
    paths = pc.filter(pc.struct_field(stored, "path"), pc.is_null(pc.struct_field(stored, "bytes")))
    return [Path(path) for path in paths.to_pylist()]


def has_labels(dataset: Any, column: str) -> bool:
    """Whether there is a label in a column, which may be absent, empty or full of -1."""
    return column in dataset.column_names and any(label not in (None, -1) for label in dataset[column])


def class_names(dataset: Any, column: str) -> list[str]:
    """Names of the classes of a column of labels: its own, or its values in their order."""
    from datasets import ClassLabel

    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    names = {str(value) for value in dataset.unique(column) if value is not None}
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def with_class_numbers(dataset: Any, column: str, names: Sequence[str], where: str) -> Any:
    """The data with labels that are places in ``names``; errors call it ``where``.

    Raises:
        InvalidDataError: images without a label, with several, or of a class that is not in ``names``.
    """
    from datasets import ClassLabel

    feature = dataset.features[column]
    own = feature.names if isinstance(feature, ClassLabel) else None
    labels = list(dataset[column])
    without = sum(label is None or (own is not None and label < 0) or label == -1 for label in labels)
    if without:
        raise InvalidDataError(f"{without} of the {len(labels)} images of {where} have no label (column {column!r})")
    if own == list(names):
        return dataset
    place = {name: number for number, name in enumerate(names)}
    words = [str(label) if own is None else own[label] for label in labels]
    unknown = sorted({word for word in words if word not in place})
    if unknown:
        raise InvalidDataError(f"{where} has classes that the training images do not have: {', '.join(unknown[:5])}")
    numbers = [place[word] for word in words]
    return dataset.remove_columns(column).add_column(column, numbers, feature=ClassLabel(names=list(names)))
