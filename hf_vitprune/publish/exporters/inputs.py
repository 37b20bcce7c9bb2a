"""What a model takes, as an example that a graph is traced with and checked on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim

from ...errors import UnsupportedModelError
from ...families import family_of
from ...spec.architecture import Architecture
from ...spec.towers import stands_alone, towers

Size = tuple[int, int]


def example_inputs(model: Any, batch: int, size: Size | None = None, seed: int = 0) -> dict[str, Any]:
    """Random inputs for a batch of images, and as many captions for a dual encoder.

    Args:
        model: a model of a family, or a bigger one.
        size: (height, width) in pixels; None: what the config says.

    Raises:
        UnsupportedModelError: the model generates text.
        InvalidConfigError: the model takes images of one size, and this is another one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = [_one(model, size) for _ in range(batch)]
    made = {name: value for name, value in rows[0].items() if value is not None}
    made |= {name: torch.cat([row[name] for row in rows]) for name, _ in _tensors(made)}
    return {**made, **(_captions(model, batch) if is_dual_encoder(model) else {})}


def varying_axes(inputs: Mapping[str, Any], sizes: int, to: str, most: int) -> dict[str, Any]:
    """Which axes may vary: that of the batch, and height and width where several ``sizes`` are asked for.

    ExecuTorch plans its memory for the largest batch, ``most``.
    """
    axes: dict[str, Any] = dict.fromkeys(inputs)
    for name, value in _tensors(inputs):
        if to == "executorch":
            axes[name] = {0: Dim(_batch_word(name), min=1, max=most)}
            continue
        axes[name] = {0: Dim.DYNAMIC}
        if sizes > 1 and name == "pixel_values":
            axes[name] |= {value.ndim - 2: Dim.DYNAMIC, value.ndim - 1: Dim.DYNAMIC}
    return axes


def axis_names(inputs: Mapping[str, Any], axes: Mapping[str, Any] | None = None) -> dict[str, list[int | str]]:
    """Name of an input -> its shape, with words for what may vary (by :func:`varying_axes`)."""
    named = {}
    for name, value in _tensors(inputs):
        shape: list[int | str] = list(value.shape)
        for axis, word in zip(
            sorted(axes[name] if axes else ()), (_batch_word(name), "height", "width"), strict=False
        ):
            shape[axis] = word
        named[name] = shape
    return named


def _tensors(inputs: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in inputs.items() if isinstance(value, torch.Tensor)]


def _batch_word(name: str) -> str:
    return "texts" if name in ("input_ids", "attention_mask") else "batch"


def own_size(model: Any) -> Size:
    """(height, width) that the config says.

    Raises:
        UnsupportedModelError: there is no encoder of images in the model.
    """
    return tuple(_vision(model)["pixel_values"].shape[-2:])


def is_dual_encoder(model: Any) -> bool:
    """Whether a model compares images with texts, and takes both at once."""
    taken = inspect.signature(model.forward).parameters.keys()
    return {"input_ids", "pixel_values"} <= taken and hasattr(model, "get_text_features") and not _generates(model)


def _generates(model: Any) -> bool:
    return getattr(model, "can_generate", bool)() or "decoder_input_ids" in inspect.signature(model.forward).parameters


def _one(model: Any, size: Size | None) -> dict[str, Any]:
    if stands_alone(model):
        family = family_of(model)
        return family.inputs(model.config, size, task=Architecture.of(model).task)
    if _generates(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} generates text, step by step: export its tower by itself (part="
            f"{next(iter(towers(model)), 'vision')!r}, --part), or the steps by transformers.exporters"
        )
    return _vision(model, size)


def _vision(model: Any, size: Size | None = None) -> dict[str, Any]:
    """What the encoder of images in a model takes."""
    found = {} if stands_alone(model) else towers(model)
    for module in [model.get_submodule(tower.path) for tower in found.values()] or [model]:
        family = family_of(module)
        taken = family.inputs(module.config, size, task=Architecture.of(module).task) if family.part != "text" else {}
        if "pixel_values" in taken:
            return taken
    raise UnsupportedModelError(f"{type(model).__name__} holds no encoder of images")


def _captions(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """Words and an end, in as many tokens as the text encoder has places: tokenizers pad to that."""
    config = getattr(model.config, "text_config", None) or model.text_model.config
    places = config.max_position_embeddings
    lengths = torch.arange(batch) % max(1, places - 2) + 2
    ids = torch.full((batch, places), config.pad_token_id or 0)
    for row, length in enumerate(lengths.tolist()):
        words = torch.randint(3, config.vocab_size - 2, (length - 1,), generator=torch.Generator().manual_seed(row))
        ids[row, : length - 1] = words
        ids[row, length - 1] = config.eos_token_id if config.eos_token_id is not None else config.vocab_size - 1
    mask = (torch.arange(places) < lengths[:, None]).long()
    # SigLIP was trained on captions of one length, and has no mask for shorter ones
    siglip = "siglip" in model.config.model_type
    return {"input_ids": ids, **({} if siglip else {"attention_mask": mask})}
