"""Columns of data sets: which has the images, which the labels, and labels as class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidDataError

#: what columns of data sets with images, and with their classes, are called
IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


def find_column(
    dataset: Any, known: tuple[str, ...], kind: str, source: str, asked: str | None = None, by_type: bool = True
) -> str:
    """The column that is asked for; else the first of the known names that there is, or the only one of its type.

    Args:
        dataset, source: ``datasets.Dataset``, and what errors call it.
        kind: ``"image"`` or ``"label"``.
        by_type: look for the only column of images, or of numbered classes, too.

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
