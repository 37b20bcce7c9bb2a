"""Names of adapter types that PEFT does not have."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.utils import register_peft_method


def add_peft_method(name: str, config_class: Any, tuner_class: Any) -> None:
    """Make an adapter type known to PEFT under ``name`` (capitals); nothing happens where it is known already."""
    if name in PeftType._value2member_map_:
        return
    add_member(name)
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=tuner_class, prefix=tuner_class.prefix)


def add_member(value: str) -> None:
    """PEFT's registry is open to new methods, but the enumeration of their names is closed: extend it."""
    member: Any = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    PeftType._member_map_[value] = member
    PeftType._member_names_.append(value)
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
