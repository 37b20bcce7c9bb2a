"""The checkpoints of a PruningModel: its state dict, with a record of what it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ResumeError
from ..utils.sharding import spread_state


class Checkpoints(nn.Module):
    """The state dict of a :class:`PruningModel`; what would restore only a part of it is refused."""

    if TYPE_CHECKING:
        method: Any
        tower: Any
        pruning_config: Any

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As any module's, but every tensor once: safetensors refuses shared ones (VeRA's adapters have some)."""
        state = super().state_dict(*args, **kwargs)
        for name in self._shared():
            state.pop(kwargs.get("prefix", "") + name)
        return state

    def _shared(self) -> dict[str, str]:
        """Name of every tensor that was there before -> the name it was first under."""
        first: dict[int, str] = {}
        tensors = super().state_dict(keep_vars=True)
        return {name: old for name, t in tensors.items() if (old := first.setdefault(id(t), name)) != name}

    def get_extra_state(self) -> torch.Tensor:
        """What the checkpoint is of, as JSON in bytes (a tensor: safetensors holds nothing else)."""
        architecture = self.method.architecture
        record = {k: v for k, v in architecture.to_dict().items() if k != "config"}  # training may set things there
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
        settings = {"model": f"{architecture.model_type} of {len(architecture.layers)} layers ({digest})"}
        if self.tower.path:
            settings["part"] = self.tower.part
        settings |= {key: str(value) for key, value in self.pruning_config.to_dict().items()}
        return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        theirs, ours = (json.loads(bytes(t.tolist())) for t in (state, self.get_extra_state()))
        differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if differing:
            rows = [f"{key} was {theirs.get(key)} and is {ours.get(key)}" for key in differing]
            raise ResumeError(
                f"the checkpoint is of another pruning run: {'; '.join(rows)}. Use the same model and settings, or "
                "start anew"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Called by ``load_state_dict``, before the parts inside are loaded: refuses what would restore only some.

        Raises:
            ResumeError: the checkpoint is of another model, or of another method or settings.
        """
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # compares the settings
        own = {prefix + key for key in self.state_dict()}
        given = {key for key in state_dict if key.startswith(prefix)}
        if own != given:
            raise ResumeError(
                f"this is no checkpoint of the {type(self).__name__}: {_some(own - given)} missing, "
                f"{_some(given - own)} left over. Wrap the same model in the same way as for the run that wrote it"
            )
        spread_state(self, state_dict, prefix)
        for name, first in self._shared().items():
            state_dict[prefix + name] = state_dict[prefix + first]


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names) or ["nothing"]
    return f"{first} and {len(rest)} more" if rest else first
