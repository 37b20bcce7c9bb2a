"""Structured pruning of Hugging Face vision transformers: smaller, faster, and still loaded by `from_pretrained`.

Importing this makes transformers and PEFT know what pruned models need in order to load. The names below are loaded
when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .modeling import registry as _registry  # noqa: F401  configs of pruned models, whose classes come with the first
from .modeling import whole_config as _whole_config  # noqa: F401  and those of models that build their towers themselves
from .peft import register_peft_types as _register_peft_types
from .publish import hub as _hub  # noqa: F401  what push_to_hub of a pruned model does, and the card of a Trainer

if TYPE_CHECKING:
    from . import criteria as criteria
    from .compensate import Compensation as Compensation
    from .contrib.convert import convert_spvit_checkpoint as convert_spvit_checkpoint
    from .cost import Cost as Cost
    from .cost import count as count
    from .errors import VitPruneError as VitPruneError
    from .family_check import register_family as register_family
    from .latency.table import LatencyTable as LatencyTable
    from .losses.distillation import DistillationConfig as DistillationConfig
    from .methods import NViTConfig as NViTConfig
    from .methods import OneShotScores as OneShotScores
    from .methods import SLSConfig as SLSConfig
    from .methods import SPViTConfig as SPViTConfig
    from .methods import TruncationConfig as TruncationConfig
    from .methods import VTPConfig as VTPConfig
    from .methods import register_method as register_method
    from .methods import select_layers as select_layers
    from .methods.nvit.revit import revit as revit
    from .modeling import build as build
    from .plan.plan import PruningPlan as PruningPlan
    from .pruning import mask as mask
    from .pruning import prune as prune
    from .pruning import truncate as truncate
    from .publish.hub import push_to_hub as push_to_hub
    from .spec.architecture import Architecture as Architecture
    from .spec.towers import towers as towers
    from .training.model import PruningModel as PruningModel
    from .training.model import get_pruning_model as get_pruning_model
    from .training.trainer import PruningCallback as PruningCallback
    from .training.trainer import PruningTrainer as PruningTrainer

__version__ = "0.1.0"

#: public name -> module that it comes from, or that it is
_PUBLIC = {
    "Architecture": "spec.architecture",
    "Compensation": "compensate",
    "Cost": "cost",
    "DistillationConfig": "losses.distillation",
    "LatencyTable": "latency.table",
    "NViTConfig": "methods",
    "OneShotScores": "methods",
    "PruningCallback": "training.trainer",
    "PruningModel": "training.model",
    "PruningPlan": "plan.plan",
    "PruningTrainer": "training.trainer",
    "SLSConfig": "methods",
    "SPViTConfig": "methods",
    "TruncationConfig": "methods",
    "VTPConfig": "methods",
    "VitPruneError": "errors",
    "build": "modeling",
    "convert_spvit_checkpoint": "contrib.convert",
    "count": "cost",
    "criteria": "criteria",
    "get_pruning_model": "training.model",
    "mask": "pruning",
    "prune": "pruning",
    "push_to_hub": "publish.hub",
    "register_family": "family_check",
    "register_method": "methods",
    "revit": "methods.nvit.revit",
    "select_layers": "methods",
    "towers": "spec.towers",
    "truncate": "pruning",
}
__all__ = [*_PUBLIC]

_register_peft_types()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_PUBLIC[name]}", __name__)
    value = globals()[name] = module if _PUBLIC[name] == name else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
