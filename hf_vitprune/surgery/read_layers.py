"""Which layers of its tower a bigger model reads by their number."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidPlanError
from ..plan.plan import PruningPlan
from ..spec.towers import Tower

#: config fields that name hidden states of the vision tower (0 is the embedding; negative ones count from the end)
_FEATURE_FIELDS = ("vision_feature_layer",)


def _read_states(model: Any, layers: int) -> dict[str, list[int]]:
    """Field -> numbers of the hidden states that it names, counted from the embedding."""
    found = {}
    for field in _FEATURE_FIELDS:
        value = getattr(getattr(model, "config", None), field, None)
        if value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            found[field] = [v if v >= 0 else layers + 1 + v for v in values]
    return found


def layers_read(model: Any, tower: Tower, layers: int) -> int:
    """How many of a tower's first layers are needed for what the model reads of it."""
    states = [state for numbers in _read_states(model, layers).values() for state in numbers]
    return max(states) if states and "vision" in tower.part else layers


def layers_needed(model: Any, tower: Tower, layers: int) -> tuple[int, str]:
    """How many of a tower's first layers have to stay for what the model reads of it, and who reads the last of them.

    One layer, where the model reads no layer by its number.
    """
    states = _read_states(model, layers) if "vision" in tower.part else {}
    if not states:
        return 1, "it has only one"
    field = max(states, key=lambda name: max(states[name]))
    return max(1, *states[field]), f"the model reads their outputs (config.{field})"


def kept_feature_layers(model: Any, tower: Tower, plan: PruningPlan) -> dict[str, Any]:
    """Config fields that name hidden states, with the numbers that these have after pruning.

    Raises:
        InvalidPlanError: the plan removes a layer whose output the model reads.
    """
    layers, kept = len(plan.source.layers), [entry.index for entry in plan.layers]
    if len(kept) == layers or "vision" not in tower.part:
        return {}
    changed: dict[str, Any] = {}
    for field, states in _read_states(model, layers).items():
        lost = [state - 1 for state in states if state and state - 1 not in kept]
        if lost:
            raise InvalidPlanError(
                f"the plan removes layer {lost[0]} of the tower, whose output the model reads (config.{field}): keep "
                f"it, or set config.{field} to another one first"
            )
        old = getattr(model.config, field)
        numbers = old if isinstance(old, (list, tuple)) else [old]
        new = [kept.index(state - 1) + 1 if state else 0 for state in states]
        signed = [n - (len(kept) + 1) if o < 0 else n for n, o in zip(new, numbers, strict=True)]
        changed[field] = signed if isinstance(old, (list, tuple)) else signed[0]
    return changed
