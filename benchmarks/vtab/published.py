"""Settings of the runs that SLS's authors published on VTAB-1k (arXiv 2407.14330), where they are not our defaults.

Adapter scales and initialisations are chosen task by task there, as in the adapters' papers; the training drops paths
and the last incomplete batch, clips nothing, and its cosine ends at 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples import recipe as recipes
from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig

from .settings import Recipe

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
ADAPTERS: dict[str, Any] = {"convpass": ConvpassConfig, "repadapter": RepAdapterConfig}


def published_recipe(recipe: Recipe) -> Recipe:
    """With the training's settings of the published runs."""
    return replace(recipe, drop_path=0.1, clipping=0.0, drop_last=True, lowest_rate=1e-5)


def published_adapter(peft: str, task: str, rank: int, head: str) -> Any:
    """Config of an adapter as the recipe has it for the task; None for other adaptations, which have no settings.

    Raises:
        InvalidConfigError: the task is not one of the nineteen.
    """
    if peft not in ADAPTERS:
        return None
    recipe = recipes.Recipe.load(FOLDER, f"sls-{peft}").for_task(task)
    return ADAPTERS[peft](**{**recipe.arguments["adapter_config"], "r": rank, "modules_to_save": [head]})
