"""A pruned folder into a model that the user's own code makes: whatever the code changed in it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..errors import CheckpointMismatchError, InvalidArchitectureError, UnsupportedModelError
from ..families import PRUNED_PREFIX
from ..modeling import config_for
from ..modeling.custom import CUSTOM
from ..modeling.native import make_stock_
from ..modeling.peft_twin import is_peft
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture, dense_of
from ..spec.configs import is_pruned, lineage_of, task_of
from ..utils.modules import set_tensor
from .cuts import renamed_layers
from .transplant import resized, tie


def load_pruned(model: PreTrainedModel, folder: str | Path) -> Any:
    """The pruned model of a folder, made from the dense one as your code makes it.

    For what no class makes from a config: a head, an activation or a class of one's own.::

        dense = MyViT(config); dense.classifier = my_head()       # as before pruning; its weights do not matter
        small = load_pruned(dense, "my-vit-pruned")

    Args:
        model: the dense model; it stays as it is. Modules, attributes, hooks and frozen parameters of the result are
            its own.
        folder: where the pruned model was saved, of a stock shape or another.

    Returns:
        The small model in evaluation mode, on the model's device, in the folder's dtype: what was saved, bit for bit.

    Raises:
        CheckpointMismatchError: the folder holds no pruned model, or one of another dense model; the first tensor that
            does not fit is named.
        UnsupportedModelError: the model is a PeftModel: load its base, then the adapter.
        UnsupportedUnitError: as in :func:`hf_vitprune.pruning.prune`.
    """
    if is_peft(model):
        raise UnsupportedModelError("load_pruned takes the model without adapters; put them onto what it returns")
    source = Architecture.of(model)
    config = AutoConfig.from_pretrained(folder)
    if not is_pruned(config) or is_pruned(model.config):
        what = "the given model is pruned itself" if is_pruned(model.config) else f"{folder} holds no pruned model"
        raise CheckpointMismatchError(f"{what}: pass the dense model and the folder that its pruned copy was saved in")
    stock = not config.model_type.startswith(PRUNED_PREFIX)
    found = Architecture.from_config(config, task_of(model))
    dense = dense_of(config, task_of(model))
    if dense != source or dense.model_type != source.model_type:
        raise CheckpointMismatchError(
            f"the model in {folder} was made from a {dense.model_type} of {len(dense.layers)} layers and width "
            f"{dense.hidden_size}, and this is a {source.model_type} of {len(source.layers)} layers and width "
            f"{source.hidden_size}"
        )
    architecture = Architecture(source.config, found.layers, found.hidden_size, found.depths, source.task)
    config._attn_implementation = model.config._attn_implementation
    if stock:
        config = config_for(architecture, config, lineage_of(config))
    kept = _kept(config, architecture)
    small = resized(model, source, architecture, kept, config)
    renamed = renamed_layers(layer_paths(model, source), layer_paths(small, architecture), kept)
    if stock:
        make_stock_(small)
    _fill(small, model, folder, renamed)
    return small.eval()


def _kept(config: Any, architecture: Architecture) -> list[int]:
    """Positions in the dense model of the layers that stayed."""
    info = lineage_of(config)
    custom = info.get(CUSTOM)
    kept = custom.get("layers") if isinstance(custom, dict) else info.get("kept_layers")
    if kept is None:  # layers as the class makes them, which are alike
        dense = Architecture.dense(architecture.config)
        names = dense.layer_names()
        kept = [names.index(name) for name in architecture.layer_names()]
    if len(kept) != len(architecture.layers):
        raise InvalidArchitectureError(f"the folder's config names {len(kept)} layers of {len(architecture.layers)}")
    return list(kept)


def _fill(small: Any, model: nn.Module, folder: str | Path, renamed: dict[str, str]) -> None:
    """Load the folder's weights, all of them, as transformers would into a model it had built itself."""
    trained = {name: parameter.requires_grad for name, parameter in small.named_parameters(remove_duplicate=False)}
    kept = {name: b.clone() for name, b in small.named_buffers() if b.device.type != "meta"}  # such are not saved
    given: Any = type("Given", (type(small),), {"__new__": lambda cls, *args, **kwargs: small, "__module__": __name__})
    cure = "make the model as it was when it was pruned, with the same head and modules"
    try:
        _, info = given.from_pretrained(folder, config=small.config, use_safetensors=True, output_loading_info=True)
    except RuntimeError as error:
        raise CheckpointMismatchError(
            f"the weights in {folder} do not fit the given model: {cure}. {error}"
        ) from error
    missing = set(info["missing_keys"])
    missing -= {*tie(small, model, renamed, missing)}  # of those that are one, one is saved
    for where, keys in (("given model", missing), ("folder", set(info["unexpected_keys"]))):
        if keys:
            raise CheckpointMismatchError(f"{len(keys)} tensors (first: {min(keys)}) are in the {where} only: {cure}")
    for name, buffer in kept.items():
        set_tensor(small, name, buffer)
    for name, parameter in small.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])
    small.to(next(model.parameters()).device)
