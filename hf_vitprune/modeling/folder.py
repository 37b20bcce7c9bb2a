"""What folders of pruned models say to those who load them without this library, and adapters that lie in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

#: what config.json has in the place of the residual width: stock configs refuse it, and quote it
NOT_STOCK = (
    "pruned with hf_vitprune: import hf_vitprune before loading, and load with an Auto class or a Pruned class; stock "
    "classes cannot hold this shape"
)
#: the same where a file of code is beside it
PORTABLE = (
    "pruned with hf_vitprune: load with an Auto class and trust_remote_code=True, or import hf_vitprune before "
    "loading; stock classes cannot hold this shape"
)
#: the module that ``auto_map`` names
STUB_MODULE = "modeling_hf_vitprune"
#: what that holds in folders that are not portable
STUB = '''"""Loads a vision transformer pruned with hf_vitprune; needs `pip install hf_vitprune`."""

from hf_vitprune.modeling import {imports}

__all__ = [{exports}]
'''


#: folder inside of one with an adapter that holds the pruned model it needs: each of both is checked when it is read
BASE_FOLDER = "base"
_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def adapter_beside(path: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What ``load_adapter`` needs to find an adapter over ``base/``; None where there is none.

    ``path`` and ``settings``: as ``from_pretrained`` takes them.
    """
    where = {name: settings[name] for name in _HUB if settings.get(name) is not None}
    file = None if path is None else find_adapter_config_file(path, **where)
    if file is None:
        return None
    record = json.loads(Path(file).read_text(encoding="utf-8")).get("pruning")
    return where if isinstance(record, dict) and record.get("base") == BASE_FOLDER else None


def without_other_adapter(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the adapter that an Auto class has found above the ``subfolder`` that is asked for."""
    other = settings.get("subfolder") and (settings.get("adapter_kwargs") or {}).get("_adapter_model_path")
    return {name: value for name, value in settings.items() if name != "adapter_kwargs"} if other else settings


def of_base(settings: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The settings with which the base in such a folder is read, without its adapter."""
    folder = "/".join(filter(None, [where.get("subfolder"), BASE_FOLDER]))
    own = {name: value for name, value in settings.items() if name not in ("adapter_kwargs", "adapter_name")}
    return {**own, "subfolder": folder}
