"""A smaller tower in the place of a model's own: everything else of the model is shared with it, not copied."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError, UnsupportedModelError, UnsupportedUnitError
from ..families.base import pair
from ..modeling.hosts import host_class
from ..modeling.outer import Outer, find_outer, mask_norm, norm_width, shapes_of
from ..modeling.whole_config import become_host_, config_with
from ..plan.plan import PruningPlan
from ..spec.towers import Tower
from ..utils.modes import on_meta
from ..utils.modules import follow_sizes, get, owner, put, set_tensor
from .cuts import Cut, side_by_side
from .transplant import resized_copy


def with_tower(
    model: Any,
    tower: Tower,
    small: Any,
    width: int,
    kept: Sequence[int] | None,
    feature_layers: dict[str, Any] | None = None,
) -> Any:
    """A model with the smaller tower ``small``, and its config set to that.

    Args:
        model: the whole, or a torch module of the user's; it is left as it is, and shares all tensors with the result
            but those of the tower and of what reads a narrowed tower.
        width: of the tower's residual stream.
        kept: its channels that stay; None: all.
        feature_layers: fields of the model's config that say which layers' outputs it reads, as they are now.
    """
    config = None
    if isinstance(model, PreTrainedModel):
        config = config_with(model.config, get(model, tower.path).config, small.config)
        vars(config).update(feature_layers or {})
    outer = Outer() if kept is None else _readers(model, tower, config, width, len(kept))
    paths = [tower.path, *(name.rpartition(".")[0] for name in outer.axes), *outer.norms]
    whole, copied = path_copy(model, paths)
    put(whole, tower.path, small)
    for module in copied:
        if config is not None and module.__dict__.get("config") is model.config:
            module.config = config
    for name, axes in outer.axes.items():
        module, leaf = owner(whole, name)
        tensor: Any = module._parameters.get(leaf, module._buffers.get(leaf))
        copies = {axis: side_by_side(torch.tensor(kept), width, tensor.shape[axis]) for axis in axes}
        set_tensor(whole, name, Cut(name, copies).take(tensor.detach()))
        follow_sizes(module)
    become_host_(whole, small)
    _check_loads_again(whole, tower)
    return whole


def with_masked_tower(model: Any, tower: Tower, masked: Any, small_config: Any, plan: PruningPlan) -> Any:
    """A model with a full-size tower that computes what the small one does; norms that read it run over what stays."""
    norms: list[str] = []
    width, kept = plan.source.hidden_size, plan.embedding
    if kept is not None:
        config = None
        if isinstance(model, PreTrainedModel):
            config = config_with(model.config, get(model, tower.path).config, small_config)
        norms = _readers(model, tower, config, width, len(kept)).norms
    whole, _ = path_copy(model, [tower.path, *norms])
    put(whole, tower.path, masked)
    for path in norms:
        norm, channels = get(whole, path), torch.tensor(kept, device=next(masked.parameters()).device)
        mask_norm(norm, side_by_side(channels, width, norm_width(norm) or width))
    return whole


# ---------------------------------------------------------------------- copies that share
def path_copy(model: nn.Module, paths: Iterable[str]) -> tuple[Any, list[nn.Module]]:
    """A copy of a model that shares every module with it but those on the way to some paths; and those modules.

    Tensors are shared. Refused where a module on the way has a forward of its own (of accelerate's device map).
    """
    made = _shallow(model, "")
    copied = {id(made): made}
    for path in paths:
        module = made
        for name in path.split(".") if path else ():
            child: Any = module._modules[name]
            if id(child) not in copied:
                child = _shallow(child, path)
                copied[id(child)] = module._modules[name] = child
            module = child
    return made, list(copied.values())


def _shallow(module: nn.Module, path: str) -> Any:
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"{path or 'the model'} is dispatched over devices (device_map, or another forward in its place): load "
            "the model without device_map to prune it"
        )
    made = copy.copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, (dict, set)):
            made.__dict__[name] = copy.copy(value)
    return made


# ---------------------------------------------------------------------- readers of a narrowed tower
#: what making or running a model of sizes that its code did not think of may raise
_FAILS = (TypeError, ValueError, RuntimeError, AttributeError)


def _readers(model: Any, tower: Tower, config: Any, width: int, kept: int) -> Outer:
    if config is None:
        raise UnsupportedUnitError(
            f"what reads the tower of a {type(model).__name__} is not known, and it is no transformers model: leave "
            "the unit 'embedding' out (units=...)"
        )
    try:
        with on_meta():
            wide, narrow = type(model)(model.config), _as_host(type(model), config)
            if _runs(wide, tower):
                _run(narrow, tower)  # some models state the width of their tower a second time
    except _FAILS as error:
        raise UnsupportedUnitError(
            f"what reads the tower of a {type(model).__name__} cannot be found, as no other one can be made from its "
            f"config ({error}): leave the unit 'embedding' out (units=...)"
        ) from error
    return find_outer(model, wide, narrow, (f"{tower.path}.",), width, kept, whole=False)


def _as_host(model_class: Any, config: Any) -> Any:
    """A model of the class from a config whose tower may be a pruned one."""
    made = host_class(model_class) or model_class
    if made is not model_class:
        config = copy.copy(config)
        config.__class__ = made.config_class
    return made(config)


def _runs(model: Any, tower: Tower) -> bool:
    """Whether a model on the meta device runs on an image, and two words where it takes any."""
    try:
        _run(model, tower)
    except _FAILS:
        return False
    return True


def _run(model: Any, tower: Tower) -> None:
    config = get(model, tower.path).config
    taken = inspect.signature(model.forward).parameters
    words = {name: torch.zeros(1, 2, dtype=torch.long) for name in ("input_ids", "decoder_input_ids") if name in taken}
    images = torch.empty(1, config.num_channels, *pair(config.image_size), dtype=model.dtype)
    model.eval()(pixel_values=images, **words)


# ---------------------------------------------------------------------- loading again
def check_host(model: Any, tower: Tower) -> None:
    """Refuse a model that could not be loaded again with a pruned tower, before any work; no memory is used."""
    module = get(model, tower.path)
    dense = PruningPlan.dense(module)
    plan = dense.with_layers(replace(entry, mlp=entry.mlp[:1]) for entry in dense.layers)
    with_tower(model, tower, resized_copy(module, plan), dense.source.hidden_size, None)


def check_readers(model: Any, tower: Tower) -> None:
    """Refuse a model around a tower whose residual stream cannot be narrowed, before any work."""
    module = get(model, tower.path)
    dense = PruningPlan.dense(module)
    width = dense.source.hidden_size
    small = resized_copy(module, replace(dense, embedding=tuple(range(width // 2))))
    _readers(model, tower, config_with(model.config, module.config, small.config), width, width // 2)


def _check_loads_again(whole: Any, tower: Tower) -> None:
    """Make the model that loading makes, without weights, and compare."""
    if not type(whole).__module__.startswith("transformers.") and host_class(type(whole)) is None:
        return  # written by a user, whose own code makes it again
    try:
        with on_meta():
            config = type(whole.config).from_dict(whole.config.to_dict())  # as it is read from a file
            loaded = shapes_of(type(whole)(config))
        differing = [n for n, shape in shapes_of(whole).items() if n in loaded and loaded[n] != shape]
        differing += sorted(n for n in loaded.keys() ^ shapes_of(whole).keys() if n.startswith(f"{tower.path}."))
        problem = f"of other tensors (first: {differing[0]})" if differing else ""
    except _FAILS as error:
        problem = f"not at all ({error})"
    if problem:
        raise UnsupportedModelError(
            f"{type(whole).__name__} makes its tower itself, and would load this one {problem}: keep to shapes that a "
            "stock class can hold (whole layers, or the same sizes in all layers and q/k as v), or prune the tower by "
            f"itself (model.get_submodule({tower.path!r}))"
        )


# ---------------------------------------------------------------------- layers that are read by their number
#: field of a model's config that names hidden states of its vision tower (0 is the embedding; negative ones count from
#: the end)
_FEATURES = "vision_feature_layer"


def _states_read(model: Any, tower: Tower, layers: int) -> list[int]:
    """Numbers of the hidden states that a model reads of a tower, counted from the embedding; none, where the last."""
    value = getattr(getattr(model, "config", None), _FEATURES, None)
    if value is None or "vision" not in tower.part:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v if v >= 0 else layers + 1 + v for v in values]


def layers_read(model: Any, tower: Tower, layers: int) -> int:
    """How many of a tower's first layers are needed for what the model reads of it."""
    return max(_states_read(model, tower, layers), default=layers)


def layers_needed(model: Any, tower: Tower, layers: int) -> tuple[int, str]:
    """How many of a tower's first layers have to stay for what the model reads of it, and who reads the last of them.

    One layer, where the model reads no layer by its number.
    """
    states = _states_read(model, tower, layers)
    return max([1, *states]), f"the model reads their outputs (config.{_FEATURES})" if states else "it has only one"


def kept_feature_layers(model: Any, tower: Tower, plan: PruningPlan) -> dict[str, Any]:
    """Config fields that name hidden states, with the numbers that these have after pruning; all have to stay."""
    layers, kept = len(plan.source.layers), [entry.index for entry in plan.layers]
    states = _states_read(model, tower, layers)
    if len(kept) == layers or not states:
        return {}
    lost = [state - 1 for state in states if state and state - 1 not in kept]
    if lost:
        raise InvalidPlanError(
            f"the plan removes layer {lost[0]} of the tower, whose output the model reads (config.{_FEATURES}): keep "
            f"it, or set config.{_FEATURES} to another one first"
        )
    old = getattr(model.config, _FEATURES)
    many = isinstance(old, (list, tuple))
    new = [kept.index(state - 1) + 1 if state else 0 for state in states]
    signed = [n - (len(kept) + 1) if o < 0 else n for n, o in zip(new, old if many else [old], strict=True)]
    return {_FEATURES: signed if many else signed[0]}
