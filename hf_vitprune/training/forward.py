"""The wrapped model's ``forward``: a PruningModel takes what it takes, and says so in its signature."""

from __future__ import annotations

import inspect
from typing import Any

from ..losses.task import is_classifier


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
