"""The way to the Hub, and to a card, for what stands below ``publish``, which says what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_uploads: list[Callable[..., Any]] = []
_cards: list[Callable[..., bool]] = []


def register_upload(function: Callable[..., Any]) -> None:
    """Make :func:`upload` call ``function``; ``import hf_vitprune`` does it."""
    _uploads[:] = [function]


def upload(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """Push a model; see ``hf_vitprune.push_to_hub`` for the arguments, the result and the errors."""
    return _uploads[0](model, repo_id, **kwargs)


def register_card(function: Callable[..., bool]) -> None:
    """Make :func:`write_card` call ``function``; ``import hf_vitprune`` does it."""
    _cards[:] = [function]


def write_card(trainer: Any, **kwargs: Any) -> bool:
    """Write the card of a Trainer's pruned model, or keep the one that is there.

    Returns:
        Whether it did; False: the model is not pruned, and its card is the Trainer's business.
    """
    return _cards[0](trainer, **kwargs)
