"""A saved model whose layers stay on the disk: for towers that do not fit into memory, or not twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointMismatchError
from ..spec.architecture import Architecture
from ..utils.modes import on_meta


def load_streamed(
    model_class: type[PreTrainedModel],
    folder: str | Path,
    *,
    copies: str | Path,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """``model_class.from_pretrained`` with the ``device_map`` that leaves the layers, and nothing else, on the disk.

    ``prune``, ``OneShotScores.measure``, ``criteria.magnitude`` and ``compensate_plan`` read its layers one at a time.
    It runs too, and reads all of them each time.

    Args:
        model_class: stock or pruned, of a registered family; its layers are those of the whole model.
        folder: safetensors, sharded or not, or a Hub id.
        copies: folder for the tensors that transformers splits or joins when it loads them (DINOv2's SwiGLU);
            has to stay as long as the model is used.
        device: that computes, and gets what lies outside of the layers.
        kwargs: as of ``from_pretrained``.

    Returns:
        The model in evaluation mode.

    Raises:
        UnsupportedModelError: no family is registered for the class.
        CheckpointMismatchError: a file of weights is damaged, or lacks tensors of a layer.
        OSError: a file is missing.
    """
    config = kwargs.pop("config", None)
    if config is None:
        config = model_class.config_class.from_pretrained(folder)  # type: ignore[union-attr]
    with on_meta():
        skeleton = model_class(config)
    architecture = Architecture.of(skeleton)
    root = architecture.family.encoder_path(skeleton)
    lists = [root + path for path in architecture.layer_lists()]
    places = {name: "disk" if name in lists else str(device) for name in _beside(skeleton, lists)}
    kwargs |= {"config": config, "device_map": places, "offload_folder": str(copies), "output_loading_info": True}
    made: Any = model_class
    try:
        model, info = made.from_pretrained(folder, **kwargs)
    except SafetensorError as error:
        raise CheckpointMismatchError(
            f"a file of weights in {folder} is damaged or cut short ({error}): fetch it again"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if name.startswith(tuple(f"{path}." for path in lists)))
    if missing:
        raise CheckpointMismatchError(
            f"the files of {folder} lack {len(missing)} tensors of its layers (first: {missing[0]}): fetch them again"
        )
    return model.eval()


def _beside(module: nn.Module, paths: list[str], prefix: str = "") -> Iterator[str]:
    """The paths, and names of all that is not inside of them: of modules as a whole, where they have none inside."""
    for name in (*module._parameters, *module._buffers):
        yield prefix + name
    for name, child in module.named_children():
        path = prefix + name
        if path not in paths and any(one.startswith(f"{path}.") for one in paths):
            yield from _beside(child, paths, f"{path}.")
        else:
            yield path
