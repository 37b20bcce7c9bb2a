"""Multiply-adds of every block of a model, and where pruning has taken some."""

from __future__ import annotations

from typing import Any

from ..spec.architecture import Architecture
from .closed_form import cost_parts


def block_macs(model: Any, image_size: int | tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """(multiply-adds of the mixer, of the MLP) of every layer, for one image.

    Args:
        model: a model or an Architecture.
        image_size: side, or (height, width), in pixels; the config's by default.
    """
    architecture = model if isinstance(model, Architecture) else Architecture.of(model)
    macs = {part.name: part.macs for part in cost_parts(architecture, image_size)}
    return [(macs[f"layer {i} attention"], macs[f"layer {i} mlp"]) for i in range(len(architecture.layers))]


def removed_macs(model: Any, image_size: int | tuple[int, int] | None = None) -> dict[str, float]:
    """Where the multiply-adds were pruned that the layers of the dense model had.

    Returns:
        ``attention`` and ``mlp``: the fraction of theirs that is gone; ``attention_share``: attention's part of all
        that is gone (0 where nothing is).
    """
    architecture = model if isinstance(model, Architecture) else Architecture.of(model)
    dense = Architecture.dense(architecture.config, architecture.task)
    now, before = (
        [sum(column) for column in zip(*block_macs(which, image_size), strict=True)] for which in (architecture, dense)
    )
    gone = [full - left for full, left in zip(before, now, strict=True)]
    shares = {name: part / full for name, part, full in zip(("attention", "mlp"), gone, before, strict=True)}
    return {**shares, "attention_share": gone[0] / sum(gone) if sum(gone) else 0.0}
