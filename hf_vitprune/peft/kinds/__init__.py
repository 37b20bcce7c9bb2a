"""Kinds of adapters, one file each: how they are sliced, absorb new weights, become LoRA, or are refused."""

from . import adalora, convpass, hira, ia3, loha, lora, repadapter, rotations, vera  # noqa: F401
from .kind import AdapterKind, kind_named, kind_of, register_kind

__all__ = ["AdapterKind", "kind_named", "kind_of", "register_kind"]
