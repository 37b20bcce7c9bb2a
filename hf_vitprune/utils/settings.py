"""Checks that the classes of settings share; all of them raise ``InvalidConfigError``, naming the setting."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..errors import InvalidConfigError


def check_open_interval(name: str, value: Any) -> None:
    """Refuse what is not a number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InvalidConfigError(f"{name} must lie strictly between 0 and 1, not {value!r}")


def check_number(name: str, value: Any, highest: float = math.inf) -> None:
    """Refuse what is not a finite number of 0 to ``highest``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not 0 <= value <= highest:
        limit = "not negative" if math.isinf(highest) else f"between 0 and {highest:g}"
        raise InvalidConfigError(f"{name} is a number, {limit}; got {value!r}")


def check_positive(name: str, value: Any, highest: float = math.inf) -> None:
    """Refuse what is not a finite number over 0, up to ``highest``."""
    check_number(name, value, highest)
    if value == 0:
        raise InvalidConfigError(f"{name} must be positive, not 0")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise InvalidConfigError(f"{name} is a whole number of at least {least}, not {value!r}")


def check_counts(settings: Any, *names: str, optional: bool = False) -> None:
    """:func:`check_count` of several settings, from 1 on; None passes where they are ``optional``."""
    for name in names:
        if not optional or getattr(settings, name) is not None:
            check_count(name, getattr(settings, name))


def check_image_size(value: Any) -> None:
    """Refuse what is neither a number of pixels nor (height, width), nor None, which is the config's size."""
    if value is None:
        return
    sides = value if isinstance(value, (list, tuple)) else (value,) * 2
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise InvalidConfigError(f"image_size is a number of pixels or (height, width), not {value!r}")


def check_flags(settings: Any, *names: str) -> None:
    """Refuse what is not True or False."""
    for name in names:
        if not isinstance(getattr(settings, name), bool):
            raise InvalidConfigError(f"{name} is True or False, not {getattr(settings, name)!r}")


def check_one_of(settings: Any, name: str, known: Collection[str]) -> None:
    """Refuse what is not among the ``known``."""
    if getattr(settings, name) not in known:
        raise InvalidConfigError(f"{name} is one of {', '.join(known)}, not {getattr(settings, name)!r}")


def choice_of(settings: Any, name: str, known: Collection[str]) -> tuple[str, ...]:
    """The setting as a tuple; refuse what is not a list of some of the ``known``, each once."""
    value = getattr(settings, name)
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not names or any(one not in known for one in names) or len(set(names)) < len(names):
        raise InvalidConfigError(f"{name} is a non-empty choice of {', '.join(known)}, not {value!r}")
    return names
