"""Is a checkpoint whole? PEFT passes over adapter tensors that are not there, or have no place, and loads the rest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..errors import CheckpointMismatchError

#: PEFT does not save these in every layer: they follow from others or from a seed, or all layers share them
_NOT_SAVED = (".ranknum.", ".vera_A", ".vera_B", ".vblora_vector_bank")


def check_adapters_whole(model: Any, prefix: str, given: Collection[str]) -> None:
    """Refuse a part of an adapter: what is missing would keep its fresh, random weights.

    Args:
        model: the transformers model, with adapters in its layers.
        prefix: of its names among ``given``.
        given: names of the tensors that are being loaded.

    Raises:
        CheckpointMismatchError: naming the first tensor that is missing, or that has no place.
    """
    first: dict[int, str] = {}  # a tensor that is shared is saved under one of its names
    alike = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    for adapter in getattr(model, "peft_config", {}):
        there = {name for name in given if name.startswith(prefix) and _belongs(name, adapter)}
        if not there:
            continue  # a checkpoint of something else
        known = {prefix + name: prefix + same for name, same in alike.items() if _belongs(name, adapter)}
        loaded = {known.get(name, name) for name in there}
        missing = {same for name, same in known.items() if same not in loaded}
        for what, wrong in (("lacks", missing), ("also holds", there - known.keys())):
            wrong = {name for name in wrong if not any(one in name for one in _NOT_SAVED)}
            if wrong:
                raise CheckpointMismatchError(
                    f"the checkpoint {what} {len(wrong)} tensors of the adapter {adapter!r} (first: "
                    f"{sorted(wrong)[0]}): it is damaged, or of another adapter; fetch it again"
                )


def _belongs(name: str, adapter: str) -> bool:
    return f".{adapter}." in name or name.endswith(f".{adapter}")
