"""A tower inside a bigger model: pruned alone, and put back; whatever else there is stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UnsupportedUnitError
from ..surgery.composite import become_host_
from ..surgery.cuts import Cut


def under(part: str, name: str) -> str:
    """The name in the whole model of what is called ``name`` in the tower at ``part`` ("": the model itself)."""
    return f"{part}.{name}" if part else name


def cuts_with_tower(whole: Any, cuts: Mapping[str, Cut], part: str) -> dict[str, Cut]:
    """Cuts of the tensors of a tower, as those of all tensors of the model that it is in."""
    inside = {under(part, name): Cut(under(part, cut.source), cut.index, cut.scale) for name, cut in cuts.items()}
    prefix = under(part, "")
    return inside | {name: Cut(name) for name in whole.state_dict() if not name.startswith(prefix)}


def with_tower(whole: Any, small: Any, part: str) -> Any:
    """A copy of a model with another tower, and with that tower's config in its own.

    Args:
        whole: the model; untouched.
        small: the pruned tower.
        part: path of the tower. "": ``small`` is the whole model.

    Raises:
        UnsupportedUnitError: the tower's width has changed, which the modules that read its output do not know of.
    """
    if not part:
        return small
    tower = whole.get_submodule(part)
    if small.config.hidden_size != tower.config.hidden_size or small._built_as.hidden_size != tower.config.hidden_size:
        raise UnsupportedUnitError(
            f"the plan narrows the embedding of {part}, and the model around it reads that; leave 'embedding' out of "
            "its units"
        )
    made = copy.deepcopy(whole, {id(tower): small, id(tower.config): small.config})
    _replace_config(made.config, tower.config, small.config)
    become_host_(made, small)
    return made


def _replace_config(config: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Some models give their towers a copy of the config that they hold themselves."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            if type(value) is type(old) and value.to_dict() == old.to_dict():
                setattr(config, name, new)
            elif value is not new:
                _replace_config(value, old, new)
