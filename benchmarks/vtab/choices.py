"""The ways to prune, as a sweep names them: ``sls``, ``truncate:k=6``, ``depgraph:ratio=0.5``, ..."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_vitprune.errors import InvalidConfigError

from .depgraph import torch_pruning

#: option that follows what SLS decides for the same adapted model
SLS = "sls"
RANDOM = "random"
#: methods of this library that learn what to prune
LEARNED = ("vtp", "nvit", "spvit")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def _share_or_sls(text: str) -> Any:
    return SLS if text == SLS else _share(text)


def _depth(text: str) -> Any:
    if text in (SLS, RANDOM):
        return text
    value = int(text)
    if value < 1:
        raise ValueError
    return value


#: choice -> option -> (how it is read, what it may be); an option that is left out is not there, or its default
_OPTIONS: dict[str, dict[str, tuple[Callable[[str], Any], str]]] = {
    "none": {},
    "sls": {"alpha": (_share, "a number between 0 and 1")},
    "truncate": {"k": (_depth, f"a number of layers, {RANDOM} or {SLS}")},
    "depgraph": {"ratio": (_share_or_sls, f"a number between 0 and 1, or {SLS}")},
    **{name: {"target": (_share_or_sls, f"a number between 0 and 1, or {SLS}")} for name in LEARNED},
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "truncate": {"k": SLS},
    "depgraph": {"ratio": SLS},
    **{name: {"target": SLS} for name in LEARNED},
}
PRUNINGS = tuple(_OPTIONS)


@dataclass(frozen=True)
class Choice:
    """One way to prune.

    Attributes:
        name: one of ``PRUNINGS``.
        options: of it; defaults filled in, except SLS's alpha, which is the sweep's.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From ``name`` or ``name:option=value``.

        Raises:
            InvalidConfigError: there is no such choice or option, or its value is impossible.
        """
        name, _, rest = text.partition(":")
        if name not in _OPTIONS:
            raise InvalidConfigError(f"there is no pruning {name!r}; there are {', '.join(PRUNINGS)}")
        known, options = _OPTIONS[name], dict(_DEFAULTS.get(name, {}))
        for part in rest.split(",") if rest else []:
            key, _, value = part.partition("=")
            if key not in known:
                raise InvalidConfigError(f"{name} has no option {key!r}; it has {', '.join(known) or 'none'}")
            read, what = known[key]
            try:
                options[key] = read(value)
            except ValueError:
                raise InvalidConfigError(f"{key} of {name} is {what}, not {value!r}") from None
        return cls(name, options)

    @property
    def label(self) -> str:
        """The text that :meth:`parse` reads, in one spelling."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.name}:{options}" if options else self.name

    def check_available(self) -> None:
        """Say at once what this installation cannot do.

        Raises:
            MissingExtraError: DepGraph without Torch-Pruning.
        """
        if self.name == "depgraph":
            torch_pruning()
