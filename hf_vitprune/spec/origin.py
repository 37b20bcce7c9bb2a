"""The dense model that a small one was made from, as far as its config remembers it."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from ..families import family_of
from .architecture import Architecture, unwrap
from .configs import lineage_of, stock_config
from .towers import Tower, find_tower, towers


def dense_of(config: PreTrainedConfig, task: str = "ForImageClassification") -> Architecture:
    """The dense architecture behind a model; that of the config itself where nothing was pruned.

    A pruned config's record holds the dense sizes; a stock config of a pruned shape has them as plain data.

    Args:
        config: stock or pruned.
        task: of the model, as in ``Architecture.task``.

    Raises:
        InvalidArchitectureError: what the config remembers describes no model.
    """
    base = copy.deepcopy(stock_config(config))
    sizes = lineage_of(config).get("dense")
    target = family_of(base).sizes_config(base)
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        if size is None:  # a field that the dense config did not have
            vars(target).pop(name, None)
        else:
            setattr(target, name, size)
    return Architecture.dense(base, task)


def is_pruned(config: PreTrainedConfig) -> bool:
    """Whether a config is that of a Pruned class, or of a stock model that pruning made."""
    return getattr(config, "pruning_config", None) is not None or bool(lineage_of(config))


def pruned_tower(model: Any, part: str | None = None) -> Tower:
    """The tower of a part; by default the only one, or the only pruned one.

    Raises:
        UnsupportedModelError: as :func:`find_tower`.
    """
    found = towers(model).values() if part is None else ()
    pruned = [tower for tower in found if is_pruned(unwrap(model).get_submodule(tower.path).config)]
    return pruned[0] if len(pruned) == 1 else find_tower(model, part)
