"""Structured pruning of Hugging Face vision transformers: smaller, faster, and still loaded by `from_pretrained`."""

from .adapters import load_old_adapter, register_peft_types, share_backbone, translate_peft_config
from .architecture import Architecture
from .card import model_card
from .compensate import Compensation, compensate_plan
from .convert import convert_spvit_checkpoint
from .cost import Cost, LatencyTable, count
from .distillation import DistillationConfig
from .errors import VitPruneError
from .fuse import fuse_bn
from .hub import push_to_hub
from .methods import (
    LayerSelection,
    NViTConfig,
    OneShotScores,
    OneShotSettings,
    SLSConfig,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    select_layers,
)
from .model import PruningModel, get_pruning_model
from .modeling import build
from .native import to_native
from .peft_methods import ConvpassConfig, RepAdapterConfig
from .plan import PruningPlan
from .retraining import retrain, retraining_arguments
from .revit import revit
from .storage import StorageReport, storage_report
from .surgery import mask, prune, truncate
from .trainer import PruningCallback, PruningTrainer

__version__ = "0.1.0"

register_peft_types()  # adapters of pruned models load once this package is imported, and only then

__all__ = [
    "Architecture",
    "Compensation",
    "ConvpassConfig",
    "Cost",
    "DistillationConfig",
    "LatencyTable",
    "LayerSelection",
    "NViTConfig",
    "OneShotScores",
    "OneShotSettings",
    "PruningCallback",
    "PruningModel",
    "PruningPlan",
    "PruningTrainer",
    "RepAdapterConfig",
    "SLSConfig",
    "SPViTConfig",
    "StorageReport",
    "TruncationConfig",
    "VTPConfig",
    "VitPruneError",
    "build",
    "compensate_plan",
    "convert_spvit_checkpoint",
    "count",
    "fuse_bn",
    "get_pruning_model",
    "load_old_adapter",
    "mask",
    "model_card",
    "prune",
    "push_to_hub",
    "retrain",
    "retraining_arguments",
    "revit",
    "select_layers",
    "share_backbone",
    "storage_report",
    "to_native",
    "translate_peft_config",
    "truncate",
]
