"""From an architecture to a config, and to an untrained model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InvalidArchitectureError
from ..spec.architecture import Architecture, write_record
from ..spec.configs import stock_config
from .registry import class_for_task, pruned_config_class


def config_for(
    architecture: Architecture, config: PreTrainedConfig | None = None, info: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """The Pruned<X>Config of an architecture.

    Args:
        architecture: the shape.
        config: config of the model it is made from, for labels and whatever else users keep there; the
            architecture's own dense config by default.
        info: how the shape was found; kept in the record, outside its fingerprint.
    """
    architecture.validated()
    base = architecture.config if config is None else config
    fields = base.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "pruning_config", "pruning_info"):
        fields.pop(name, None)
    family = architecture.family
    if fields.pop("stage_names", None):
        fields.pop("out_indices", None)  # they follow from out_features, and these from the depth
    made = pruned_config_class(type(architecture.config))(**fields)
    family.resize_config(made, architecture.hidden_size, len(architecture.layers), architecture.depths)
    made.pruning_config = write_record(architecture, info)
    made._attn_implementation = base._attn_implementation
    return made


def build(base_config: PreTrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """An untrained pruned model: ``Pruned<X>ForImageClassification`` (or the architecture's own task class).

    Args:
        base_config: stock config; gives labels, image size, dropout. Its family must be the architecture's.
        architecture: the shape.

    Raises:
        InvalidArchitectureError: the two are of different families, or the shape is impossible.
    """
    stock = stock_config(base_config)
    if stock.model_type != architecture.model_type:
        raise InvalidArchitectureError(
            f"the config is of {stock.model_type!r}, the architecture of {architecture.model_type!r}"
        )
    config = config_for(architecture, stock)
    return class_for_task(architecture.family, architecture.task)(config)
