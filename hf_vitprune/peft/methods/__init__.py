"""PEFT methods that PEFT does not have: Convpass and RepAdapter, used like its own once this package is imported."""

from .convpass import ConvpassConfig, ConvpassModel
from .registry import add_peft_method
from .repadapter import RepAdapterConfig, RepAdapterModel

add_peft_method("CONVPASS", ConvpassConfig, ConvpassModel)
add_peft_method("REPADAPTER", RepAdapterConfig, RepAdapterModel)

__all__ = ["ConvpassConfig", "RepAdapterConfig"]
