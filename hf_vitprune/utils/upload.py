"""The way to the Hub for what stands below ``publish``, which says what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_uploads: list[Callable[..., Any]] = []


def register_upload(function: Callable[..., Any]) -> None:
    """Make :func:`upload` call ``function``; ``import hf_vitprune`` does it."""
    _uploads[:] = [function]


def upload(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """Push a model; see ``hf_vitprune.push_to_hub`` for the arguments, the result and the errors."""
    return _uploads[0](model, repo_id, **kwargs)
