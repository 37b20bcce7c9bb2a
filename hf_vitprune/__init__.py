"""Structured pruning of Hugging Face vision transformers: smaller, faster, and still loaded by `from_pretrained`."""

from .architecture import Architecture
from .cost import Cost, count
from .distillation import DistillationConfig
from .errors import VitPruneError
from .methods import VTPConfig
from .model import PruningModel, get_pruning_model
from .modeling import build
from .plan import PruningPlan
from .surgery import mask, prune, truncate
from .trainer import PruningCallback, PruningTrainer

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Cost",
    "DistillationConfig",
    "PruningCallback",
    "PruningModel",
    "PruningPlan",
    "PruningTrainer",
    "VTPConfig",
    "VitPruneError",
    "build",
    "count",
    "get_pruning_model",
    "mask",
    "prune",
    "truncate",
]
