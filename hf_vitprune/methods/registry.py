"""The pruning methods by name and by the class of their config: the only list of them."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

from ..errors import InvalidConfigError
from .base import PruningConfig
from .contract import PruningMethod

#: entry points of packages with methods of their own: name of the method -> a module that registers it
ENTRY_POINTS = "hf_vitprune.methods"

_METHODS: dict[type[PruningConfig], type[PruningMethod]] = {}


def register_method(config_class: type[PruningConfig], method_class: type[PruningMethod]) -> None:
    """Make a method known everywhere: to ``get_pruning_model``, ``hf-vitprune prune --method``, demo and examples.

    Its name is the config class's, in lower case and without ``Config``. A package that brings a method names the
    module with this call as an entry point of the group ``hf_vitprune.methods``; the command line then finds it.

    Args:
        config_class: the settings, a dataclass over :class:`PruningConfig`.
        method_class: what decides, a class over :class:`PruningMethod`.

    Raises:
        InvalidConfigError: they are not such classes, or another method has the name.
    """
    for given, base in ((config_class, PruningConfig), (method_class, PruningMethod)):
        if not inspect.isclass(given) or not issubclass(given, base) or given is base:
            raise InvalidConfigError(f"expected a class over {base.__name__}, got {given!r}")
    name = _name_of(config_class)
    taken = _by_name().get(name)
    if taken is not None:
        home = f"{taken.__module__}.{taken.__qualname__}"
        if home != f"{config_class.__module__}.{config_class.__qualname__}":
            raise InvalidConfigError(f"the name {name!r} is taken by {home}: rename {config_class.__qualname__}")
        del _METHODS[taken]  # a notebook's cell that runs again
    _METHODS[config_class] = method_class


def method_names() -> tuple[str, ...]:
    """Names of the methods that take a target, those of installed packages included."""
    own = [name for name, config_class in _by_name().items() if config_class.takes_target]
    return tuple(dict.fromkeys([*own, *sorted(entry_points(group=ENTRY_POINTS).names)]))


def config_class_of(name: str) -> type[PruningConfig]:
    """Settings of the method of this name.

    Raises:
        InvalidConfigError: there is no such method.
    """
    if name not in _by_name():
        for found in entry_points(group=ENTRY_POINTS, name=name):
            found.load()
    if name not in _by_name():
        raise InvalidConfigError(f"unknown method {name!r}; one of {', '.join(method_names())}")
    return _by_name()[name]


def method_for(config: PruningConfig) -> type[PruningMethod]:
    """The method that a config belongs to.

    Raises:
        InvalidConfigError: it is no config of a registered method.
    """
    if type(config) not in _METHODS:
        known = ", ".join(sorted(c.__name__ for c in _METHODS))
        raise InvalidConfigError(f"{type(config).__name__} is no pruning config; known: {known}")
    return _METHODS[type(config)]


def _name_of(config_class: type[PruningConfig]) -> str:
    """``vtp`` for ``VTPConfig``."""
    return config_class.__name__.removesuffix("Config").lower()


def _by_name() -> dict[str, type[PruningConfig]]:
    return {_name_of(config_class): config_class for config_class in _METHODS}
