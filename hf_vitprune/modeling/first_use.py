"""Model classes made when the first config of theirs is: importing 28 stock modeling files takes half a second.

Whoever loads a model has its config first, so that the Auto classes know by then which models there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_waiting: dict[type, Callable[[], None]] = {}
_lock = threading.RLock()


class FirstUseMixin:
    """A config class whose first instance, read, copied or unpickled, has the model classes made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        make_models(cls)
        return super().__new__(cls)


def when_used(config_class: type, make: Callable[[], None]) -> None:
    """Have ``make`` called once, before the first instance of a :class:`FirstUseMixin` is there."""
    _waiting[config_class] = make


def make_models(config_class: type) -> None:
    """Make the model classes of a config class, if they are not there yet."""
    with _lock:  # another thread waits until they are
        if config_class in _waiting:
            _waiting[config_class]()
            _waiting.pop(config_class)


def forget_models(config_class: type) -> None:
    """Undo :func:`when_used`."""
    _waiting.pop(config_class, None)
