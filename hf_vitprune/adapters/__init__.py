"""PEFT adapters on pruned models: sliced with the base, merged into it, or refused; never silently wrong."""

from .prune import prune_peft
from .save import save_pruned_peft
from .twin import merged_twin
from .types import register_peft_types

__all__ = ["merged_twin", "prune_peft", "register_peft_types", "save_pruned_peft"]
