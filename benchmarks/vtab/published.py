"""Settings of the runs that SLS's authors published on VTAB-1k (arXiv 2407.14330), where they are not our defaults.

Adapter scales and initialisations are chosen task by task there, as in the adapters' papers; the training drops paths
and the last incomplete batch, clips nothing, and its cosine ends at 1e-5.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig

from .settings import Recipe

#: task -> scale of either adapter, and whether Convpass's convolution starts as Xavier's draws (else: as the identity)
TASKS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published_settings.json").read_text())


def published_recipe(recipe: Recipe) -> Recipe:
    """With the training's settings of the published runs."""
    return replace(recipe, drop_path=0.1, clipping=0.0, drop_last=True, lowest_rate=1e-5)


def published_adapter(peft: str, task: str, rank: int, head: str) -> Any:
    """Config of an adapter whose scale is published for the task; None for other adaptations, which have none.

    Raises:
        InvalidConfigError: the task is not one of the nineteen.
    """
    if peft not in ("convpass", "repadapter"):
        return None
    if task not in TASKS:
        raise InvalidConfigError(f"nothing is published for {task!r}: --published is for the nineteen of VTAB-1k")
    common: dict[str, Any] = {"r": rank, "scale": TASKS[task][peft], "modules_to_save": [head]}
    return ConvpassConfig(activation="quick_gelu", **common) if peft == "convpass" else RepAdapterConfig(**common)


def initialise_as_published(model: Any, peft: str, task: str) -> None:
    """Draw Convpass's convolutions where the published run does."""
    if peft != "convpass" or not TASKS[task]["xavier"]:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "convpass_conv" in name:
            nn.init.xavier_uniform_(module.weight)
