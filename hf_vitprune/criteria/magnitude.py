"""Magnitude: the size of a unit's weights."""

from __future__ import annotations

from typing import Any

from ..utils.offload import StateDict, check_weights
from .scores import UnitScores, UnitSums, model_to_score


def magnitude(model: Any, part: str | None = None) -> UnitScores:
    """L2 norm of the weights of every unit: rows that compute it and columns that read it (Li et al., 1608.08710).

    Matrices and convolutions inside the layers count, each once; biases, norms and what lies outside do not.

    Args:
        model: stock or pruned transformers model, or a PeftModel over one (its active adapters count).
        part: which tower of a bigger model (see :func:`hf_vitprune.towers`); its only one by default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        AdapterError: an adapter cannot be merged.
        ScoresError: a weight is not finite.
    """
    base, architecture, paths = model_to_score(model, part)
    check_weights(model, "scoring")
    weights, state = dict(base.named_parameters()), StateDict(base)
    squares = UnitSums(architecture, paths, weights)
    for name in weights:
        weight = weights[name]
        if weight.ndim > 1 and name.endswith(".weight") and squares.layer_of(name) is not None:
            squares.add(name, state[name].detach().double().square())
    return UnitScores(architecture, {name: values.sqrt() for name, values in squares.sums.items()}, "magnitude")
