"""Another class for a module, in place: a mixin in front of its own class, so that parameters and hooks stay."""

from __future__ import annotations

from typing import Any

from torch import nn


class InPlaceMixin:
    """Base of mixins for :func:`mix_into`. The classes are made at run time; copies find them by their two parts."""

    mixin_class: type
    #: the module's own class
    stock_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.mixin_class, self.stock_class), self.__dict__


_classes: dict[tuple[type, type], type] = {}


def mixed_class(mixin: type, base: type) -> type:
    """``Pruned<base>``, with ``mixin`` in front of ``base``; one class for each pair."""
    if (mixin, base) not in _classes:
        body = {"__module__": __name__, "mixin_class": mixin, "stock_class": base}
        _classes[mixin, base] = type(f"Pruned{base.__name__}", (mixin, base), body)
    return _classes[mixin, base]


def mix_into(module: nn.Module, mixin: type[InPlaceMixin]) -> None:
    """Put ``mixin`` in front of the module's class: ``isinstance`` with the old one still holds."""
    if not isinstance(module, mixin):
        module.__class__ = mixed_class(mixin, type(module))


def unmix(module: nn.Module, mixin: type[InPlaceMixin]) -> None:
    """Give a module its own class back."""
    if isinstance(module, mixin):
        module.__class__ = module.stock_class


def stock_type(module: nn.Module) -> type:
    """The module's own class, before anything was mixed in front of it, by us or by torch's FSDP2."""
    made: Any = type(module)
    while issubclass(made, InPlaceMixin) or hasattr(made, "_orig_cls_mro_index"):
        ours = issubclass(made, InPlaceMixin)
        made = made.stock_class if ours else made.__mro__[made._orig_cls_mro_index]
    return made


def _empty(mixin: type, base: type) -> Any:
    made = mixed_class(mixin, base)
    return object.__new__(made)
