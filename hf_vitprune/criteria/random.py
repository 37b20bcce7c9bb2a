"""Random: the baseline of every criterion."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..spec.architecture import Architecture
from ..spec.units import UnitSet, check_units, unit_sets
from ..utils.settings import check_count
from .scores import UnitScores


def random(model: Any, seed: int = 0, units: Collection[str] | None = None, part: str | None = None) -> UnitScores:
    """Uniform draws from [0, 1), the same for the same seed and architecture.

    Args:
        model: a model, or its Architecture: weights are not looked at.
        seed: of the draw.
        units: draw for these units only (``heads``, ``qk``, ``v``, ``mlp``, ``embedding``, ``layers``); None: all.
        part: which tower of a bigger model (see :func:`hf_vitprune.towers`); its only one by default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        UnsupportedUnitError: the family has not got one of the units.
        InvalidConfigError: the seed is no whole number.
    """
    check_count("seed", seed, least=0)
    architecture = Architecture.given(model, part)
    if units is not None:
        check_units(architecture, units)
    generator = torch.Generator().manual_seed(seed)

    def draw(one: UnitSet) -> torch.Tensor:
        parts = (architecture.depths or (one.size,)) if one.unit == "layers" else (one.size,)
        return torch.cat([torch.rand(size, generator=generator) for size in parts])

    chosen = [one for one in unit_sets(architecture).values() if units is None or one.unit in units]
    return UnitScores(architecture, {one.name: draw(one) for one in chosen}, "random", {"seed": seed})
