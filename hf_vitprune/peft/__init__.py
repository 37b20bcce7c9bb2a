"""PEFT adapters on pruned models: sliced with the base, merged into it, or refused; never silently wrong."""

from .kinds.convpass import ConvpassConfig as ConvpassConfig
from .kinds.repadapter import RepAdapterConfig as RepAdapterConfig
from .old_names import load_old_adapter as load_old_adapter
from .old_names import translate_peft_config as translate_peft_config
from .prune import prune_peft as prune_peft
from .seal import pruned_adapter_config as pruned_adapter_config
from .seal import save_pruned_peft as save_pruned_peft
from .shared import share_backbone as share_backbone
from .types import register_peft_types as register_peft_types
