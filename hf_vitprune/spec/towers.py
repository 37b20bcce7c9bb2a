"""Towers: the prunable encoders in a model, alone or inside a bigger one, by the role they play there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..families import Family, family_of, find_family
from .configs import is_pruned
from .live import unwrap

#: last name on the path of a tower -> its role
_ROLES = {
    "vision": ("vision", "image", "visual", "pixel"),
    "text": ("text",),
    "backbone": ("backbone",),
    "encoder": ("encoder",),
}


@dataclass(frozen=True)
class Tower:
    """An encoder that can be pruned."""

    #: its role in the model (``"vision"``, ``"text"``, ``"encoder"``, ``"backbone"``), or its path
    part: str
    #: of its module in the model; ``""`` where the model itself is it
    path: str
    #: ``model_type`` of its family
    family: str
    #: how many it has
    layers: int


def towers(model: Any) -> dict[str, Tower]:
    """Every prunable encoder of a transformers model (or of one in a PeftModel or PruningModel), by its part.

    Raises:
        UnsupportedModelError: it is no model.
    """
    model = unwrap(model)
    if stands_alone(model):
        own = family_of(model)
        return {own.part: Tower(own.part, "", own.model_type, _layers(model, own))}
    found: dict[str, Tower] = {}
    for path, module in model.named_modules():
        family = find_family(module) if path and isinstance(module, PreTrainedModel) else None
        inside = path.startswith(tuple(f"{tower.path}." for tower in found.values()))
        if inside or family is None or _layer_list(module, family) is None:
            continue
        last = path.rpartition(".")[2]
        role = next((role for role, words in _ROLES.items() if any(word in last for word in words)), path)
        part = path if role in found else role
        found[part] = Tower(part, path, family.model_type, _layers(module, family))
    return found


def stands_alone(model: nn.Module) -> bool:
    """Whether the model is an encoder with a head of its own: its config is the encoder's."""
    family = find_family(model)
    return family is not None and _layer_list(model, family) is not None


def find_tower(model: Any, part: str | None = None) -> Tower:
    """The tower of a part (its role, or its path); the only one by default.

    Raises:
        UnsupportedModelError: there is none, there are several and ``part`` names none, or none is that part.
    """
    base = unwrap(model)
    if stands_alone(base) and part is None:
        return next(iter(towers(base).values()))
    found = towers(base)
    name = type(base).__name__
    if not found:
        looked = sorted({m.config.model_type for m in base.modules() if isinstance(m, PreTrainedModel)} - {""})
        if len(looked) < 2:
            family_of(base)  # says what is supported
        raise UnsupportedModelError(
            f"{name} holds no encoder of a registered family; looked at models of type {', '.join(looked)}. Register "
            "your own with hf_vitprune.register_family"
        )
    chosen = [tower for tower in found.values() if part in (tower.part, tower.path)]
    if part is None and len(found) == 1:
        return next(iter(found.values()))
    if len(chosen) != 1:
        listed = ", ".join(f"{tower.part!r} ({tower.family} at {tower.path or 'the top'})" for tower in found.values())
        problem = "holds several towers" if part is None else f"has no part {part!r}"
        raise UnsupportedModelError(f"{name} {problem}: choose one with part=..., of {listed}")
    return chosen[0]


def pruned_tower(model: Any, part: str | None = None) -> Tower:
    """The tower of a part; by default the only one, or the only pruned one; raises as :func:`find_tower`."""
    found = towers(model).values() if part is None else ()
    pruned = [tower for tower in found if is_pruned(unwrap(model).get_submodule(tower.path).config)]
    return pruned[0] if len(pruned) == 1 else find_tower(model, part)


def tower_module(model: Any, part: str | None = None) -> Any:
    """The module of a tower: a transformers model that stands for itself; raises as :func:`find_tower`."""
    base = unwrap(model)
    return base.get_submodule(find_tower(base, part).path)


def _layer_list(model: nn.Module, family: Family) -> Any:
    try:
        return model.get_submodule(family.encoder_path(model) + family.layers)
    except AttributeError:
        return None


def _layers(model: nn.Module, family: Family) -> int:
    return sum(len(getattr(stage, "blocks", [stage])) for stage in _layer_list(model, family))  # Swin's are in stages
