"""The dense model that a small one was made from, as far as its config remembers it."""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig

from ..families import family_of
from .architecture import Architecture
from .configs import lineage_of, stock_config


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
