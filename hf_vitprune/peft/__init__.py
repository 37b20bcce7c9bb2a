"""PEFT adapters on pruned models: sliced with the base, merged into it, or refused; never silently wrong."""

from .kinds.convpass import ConvpassConfig
from .kinds.repadapter import RepAdapterConfig
from .old_names import load_old_adapter, translate_peft_config
from .prune import prune_peft
from .save import save_pruned_peft
from .seal import pruned_adapter_config
from .shared import share_backbone
from .types import register_peft_types

__all__ = [
    "ConvpassConfig",
    "RepAdapterConfig",
    "load_old_adapter",
    "prune_peft",
    "pruned_adapter_config",
    "register_peft_types",
    "save_pruned_peft",
    "share_backbone",
    "translate_peft_config",
]
