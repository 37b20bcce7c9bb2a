"""What an adapter computes by, in one number: a damaged adapter_config.json would load as another adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError

#: fields that say where things come from; what is pruned has its own fingerprint
FREE = {
    "auto_mapping", "base_model_name_or_path", "digest", "inference_mode", "peft_type", "peft_version", "pruning",
    "revision",
}  # fmt: skip


def make_digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The digest of an adapter_config.json, with the names of the fields that it covers."""
    names = sorted(fields.keys() - FREE)
    return {"fields": names, "sha256": _number({name: fields[name] for name in names})}


def check_digest(fields: Mapping[str, Any], digest: Any) -> None:
    """Compare fields as they are read with the digest beside them.

    Raises:
        AdapterError: the file was changed or damaged.
    """
    if isinstance(digest, dict) and isinstance(digest.get("fields"), list):
        names = [name for name in digest["fields"] if isinstance(name, str) and name in fields]
        if digest == {"fields": names, "sha256": _number({name: fields[name] for name in names})}:
            return
    raise AdapterError(
        "adapter_config.json is not as it was saved, and would load another adapter than was trained: fetch it again, "
        "or change settings on the loaded config"
    )


def _number(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(fields), sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Without order where PEFT keeps none: sets of names are written as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(item) for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    return value
