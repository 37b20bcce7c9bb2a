"""The classes of labelled images, found among those of a classifier by their names."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InvalidDataError

#: how many names an error or a note lists
SHOWN = 5
_PLACEHOLDER = re.compile(r"LABEL_\d+")
_NUMBER = re.compile(r"0|[1-9]\d*")
_SYNSET = re.compile(r"n\d{8}")
#: some of ImageNet-1k's classes: place among its 1000 sorted synsets, the synset, a name
_IMAGENET = (
    (0, "n01440764", "tench"),
    (207, "n02099601", "golden retriever"),
    (281, "n02123045", "tabby"),
    (388, "n02510455", "giant panda"),
    (817, "n04285008", "sports car"),
    (999, "n15075141", "toilet tissue"),
)


@dataclass(frozen=True)
class ClassMatch:
    """Where the classes of the data are among the model's.

    Attributes:
        numbers: class number in the data -> class number in the model.
        how: in one line, what was taken for the same class; empty where the names are equal and in the same order.
        named: whether the model's classes have names (no LABEL_0, LABEL_1, ...).
    """

    numbers: tuple[int, ...]
    how: str
    named: bool = True


def match_classes(
    names: Sequence[str], id2label: Mapping[int, str], *, every: bool = True, model: str = "the model"
) -> ClassMatch:
    """Find every class of the data among the model's, by its name.

    In this order: equal names; names that differ in case, underscores, hyphens and spaces only; one of several names
    between commas (``"tench, Tinca tinca"``) or a synset (``n01440764``) in common. What would fit two, fits none.
    Where the data's names are all numbers and the model's are not, they are the model's class numbers. The 1000
    synsets of ImageNet-1k fit a model with its classes in their usual order. A model without names (LABEL_0, ...)
    and with as many classes is taken to have the data's order.

    Args:
        names: of the data's classes, by number.
        id2label: of the model's config.
        every: the data has images of every class of the model, as training needs; False: some will do.

    Raises:
        InvalidDataError: classes of the data that the model does not have, or that fit several; with ``every``,
            classes of the model that the data does not have.
    """
    labels = [str(id2label[number]) for number in sorted(id2label)]
    if list(names) == labels:
        return ClassMatch(tuple(range(len(labels))), "")
    named = not all(map(_PLACEHOLDER.fullmatch, labels))
    found = _by_number(names, labels, every) or (_as_imagenet if named else _in_order)(names, labels)
    if found is not None:
        return ClassMatch(*found, named=named)
    numbers, loose, doubtful = _by_name(names, labels)
    unknown = [name for name, number in zip(names, numbers, strict=True) if number is None]
    absent = [label for number, label in enumerate(labels) if number not in numbers]
    if unknown or (every and absent):
        head = f"{model} has {len(labels)} classes and the data {len(names)}"
        raise InvalidDataError(_refusal(head, unknown, absent, doubtful, every))
    matched = tuple(number for number in numbers if number is not None)
    how = f"classes matched by name, in {model}'s own order" if matched != tuple(range(len(labels))) else ""
    if len(matched) < len(labels):
        how += f"; {len(absent)} of its {len(labels)} classes have no images: {_some(absent)}"
    if loose:
        pairs = (f"{name!r} = {label!r}" for name, label in loose)
        how += f"{'; ' if how else ''}taken for the same class: {_some(pairs, len(loose))}"
    return ClassMatch(matched, how)


def chance_note(accuracy: float, labels: Sequence[int], what: str = "the dense model") -> str | None:
    """One line on a classifier that cannot be told from one that always names the most common class.

    None where its ``accuracy`` on images of these ``labels`` is better by more than two standard deviations, or over
    half of the way to 1.
    """
    chance = max(Counter(labels).values()) / len(labels)
    if accuracy > chance + min(2 * math.sqrt(chance * (1 - chance) / len(labels)), (1 - chance) / 2):
        return None
    return (
        f"warning: {what} is right on {accuracy:.1%} of {len(labels)} evaluation images, no better than chance "
        f"({chance:.1%} are of one class). Was it trained on these classes, in this order, with this processor?"
    )


# ---------------------------------------------------------------------- the ways to match
def _by_number(names: Sequence[str], labels: Sequence[str], every: bool) -> tuple[tuple[int, ...], str] | None:
    """Data whose classes are only numbered: they are the model's numbers, where all of them are."""
    if not all(map(_NUMBER.fullmatch, names)) or any(map(_NUMBER.fullmatch, labels)):
        return None
    numbers = tuple(map(int, names))
    if max(numbers) >= len(labels) or (every and len(numbers) < len(labels)):
        return None
    first = f"0 = {labels[0]!r}, 1 = {labels[1]!r}" if len(labels) > 1 else f"0 = {labels[0]!r}"
    return numbers, f"the data's classes are numbers, taken for the model's ({first}, ...)"


def _in_order(names: Sequence[str], labels: Sequence[str]) -> tuple[tuple[int, ...], str] | None:
    if len(names) != len(labels) or any(map(_PLACEHOLDER.fullmatch, names)):
        return None
    pairs = (f"{label} = {name!r}" for name, label in zip(names, labels, strict=True))
    how = f"the model's classes have no names and are taken in the data's order: {_some(pairs, len(names))}"
    return tuple(range(len(names))), how


def _as_imagenet(names: Sequence[str], labels: Sequence[str]) -> tuple[tuple[int, ...], str] | None:
    if len(set(names)) != 1000 or len(labels) != 1000 or not all(map(_SYNSET.fullmatch, names)):
        return None
    order = sorted(names)
    if not all(order[place] == synset and name in _keys(labels[place]) for place, synset, name in _IMAGENET):
        return None
    place = {synset: number for number, synset in enumerate(order)}
    return tuple(place[name] for name in names), "the data's classes are ImageNet-1k's synsets, in their usual order"


def _by_name(
    names: Sequence[str], labels: Sequence[str]
) -> tuple[list[int | None], list[tuple[str, str]], dict[str, str]]:
    """(number in the model of every class or None, pairs that are not equal, class -> why it is none of several)."""
    numbers: list[int | None] = [None] * len(names)
    loose: list[tuple[str, str]] = []
    doubtful: dict[str, str] = {}
    ways: tuple[Callable[[str], set[str]], ...] = (lambda name: {name}, lambda name: {_plain(name)}, _keys)
    for way in ways:
        having: dict[str, set[int]] = {}
        for number, label in enumerate(labels):
            for key in way(label) if number not in numbers else ():
                having.setdefault(key, set()).add(number)
        open_ = [i for i, number in enumerate(numbers) if number is None and names[i] not in doubtful]
        fits = {i: set().union(*(having.get(key, set()) for key in way(names[i]))) for i in open_}
        wanted = Counter(number for found in fits.values() for number in found)
        for i, found in fits.items():
            if len(found) == 1 and wanted[min(found)] == 1:
                numbers[i] = min(found)
                if names[i] != labels[min(found)]:
                    loose.append((names[i], labels[min(found)]))
            elif found:
                rivals = [f", as {names[j]!r} could" for j, others in fits.items() if j != i and others & found]
                several = " or ".join(repr(labels[number]) for number in sorted(found)[:SHOWN])
                doubtful[names[i]] = f"{names[i]!r} could be {several}" + "".join(rivals[:1])
    return numbers, loose, doubtful


def _plain(name: str) -> str:
    """Without what differs between a folder and a label of the same class."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _keys(name: str) -> set[str]:
    """All that a class is called."""
    parts = [_plain(part) for part in name.split(",")]
    synset = _SYNSET.match(parts[0])
    if synset:
        parts += [synset.group(), parts[0][synset.end() :].strip()]
    return {part for part in parts if part}


# ---------------------------------------------------------------------- words
def _refusal(head: str, unknown: list[str], absent: list[str], doubtful: dict[str, str], every: bool) -> str:
    text = f"{head}, and they differ."
    if unknown:
        text += f" Only in the data: {_some(map(repr, unknown), len(unknown))}."
    if absent:
        text += f" Only in the model: {_some(map(repr, absent), len(absent))}."
    for reason in list(doubtful.values())[:1]:
        text += f" {reason}."
    text += " Rename the data's classes (folders) or the model's (id2label in its config.json) so that they agree"
    return text + (", or train a new classifier for the data's: --new-head" if every else "")


def _some(words: Iterable[str], total: int | None = None) -> str:
    listed = list(words)
    rest = (len(listed) if total is None else total) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
