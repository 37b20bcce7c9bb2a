"""The way to the Hub, and to a card, for what stands below ``publish``, which says what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_registered: dict[str, Callable[..., Any]] = {}


def register(what: str, function: Callable[..., Any]) -> None:
    """Make :func:`upload` ("upload") or :func:`write_card` ("card") call ``function``; ``import hf_vitprune`` does."""
    _registered[what] = function


def upload(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """Push a model; see ``hf_vitprune.push_to_hub`` for the arguments, the result and the errors."""
    return _registered["upload"](model, repo_id, **kwargs)


def write_card(trainer: Any, **kwargs: Any) -> bool:
    """Write the card of a Trainer's pruned model, or keep the one that is there; False: it is not pruned."""
    return _registered["card"](trainer, **kwargs)
