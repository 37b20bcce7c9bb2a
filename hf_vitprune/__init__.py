"""Structured pruning of Hugging Face vision transformers: smaller, faster, and still loaded by `from_pretrained`."""

from .compensate import Compensation, compensate_plan
from .contrib.convert import convert_spvit_checkpoint
from .contrib.fuse import fuse_bn
from .contrib.retraining import retrain, retraining_arguments
from .contrib.storage import StorageReport, storage_report
from .cost import Cost, count
from .errors import VitPruneError
from .latency.table import LatencyTable
from .losses.distillation import DistillationConfig
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
from .methods.nvit.revit import revit
from .modeling import build
from .modeling.native import to_native
from .peft import load_old_adapter, register_peft_types, share_backbone, translate_peft_config
from .peft.methods import ConvpassConfig, RepAdapterConfig
from .plan.plan import PruningPlan
from .pruning import mask, prune, truncate
from .publish.card import model_card
from .publish.hub import push_to_hub
from .spec.architecture import Architecture
from .training.model import PruningModel, get_pruning_model
from .training.trainer import PruningCallback, PruningTrainer

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
