"""Kinds of adapters: how they are sliced, absorb new weights, become LoRA, or are refused."""

from . import convpass, repadapter, stock  # noqa: F401
from .kind import AdapterKind as AdapterKind
from .kind import kind_named as kind_named
from .kind import kind_of as kind_of
