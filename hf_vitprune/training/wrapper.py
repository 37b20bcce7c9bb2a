"""What a PruningModel is as a module around another: its ``forward``, and the state dict that its checkpoints are."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ResumeError
from ..losses.task import is_classifier
from ..methods.base import RETIRED
from ..utils.sharding import spread_state
from .setup import differences


# ---------------------------------------------------------------------- forward
def signature_of(base: Any) -> inspect.Signature:
    """What the transformers model takes, without ``self``; a classifier takes labels in any case."""
    signature = inspect.signature(base.forward)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if is_classifier(base) and "labels" not in signature.parameters:  # DeiT's two-headed one
        labels = inspect.Parameter("labels", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        at = next((i for i, p in enumerate(parameters) if p.kind > labels.kind), len(parameters))
        parameters.insert(at, labels)
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


def takes_loss_kwargs(base: Any) -> bool:
    """Whether a Trainer would give ``num_items_in_batch`` to this model, and leave the scaling of its loss alone."""
    stated = getattr(base, "accepts_loss_kwargs", None)
    kinds = {p.kind for p in inspect.signature(base.forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds if stated is None else bool(stated)


def class_with(cls: type, signature: inspect.Signature) -> type:
    """The class under the same name, its ``forward`` with this signature.

    The Trainer reads names of labels off the class, and columns to keep off the instance: the class has to be one for
    every kind of wrapped model.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[me, *signature.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = cls.__dict__["run"].__doc__
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})


# ---------------------------------------------------------------------- checkpoints
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
        ours |= {key: str(value) for key, value in RETIRED.items() if key in theirs and key not in ours}
        rows = [f"{key} was {old} and is {new}" for key, old, new in differences(theirs, ours)]
        if rows:
            raise ResumeError(
                f"the checkpoint is of another pruning run: {'; '.join(rows)}. Use the same model and settings, or "
                "start anew"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Called by ``load_state_dict``, before the parts inside are loaded: refuses what would restore only some."""
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
