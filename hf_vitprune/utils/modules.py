"""Modules and tensors of a model, by dotted path."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def get(model: nn.Module, path: str) -> Any:
    """The module at a path, ``""`` for the model itself."""
    return model.get_submodule(path)


def get_wrapped(model: nn.Module, path: str) -> nn.Module:
    """The module of that name before PEFT wrapped the parts it is in; itself with its wrapper, if it has one.

    Raises:
        AttributeError: there is none.
    """
    module = model
    for name in path.split(".") if path else ():
        while name not in module._modules and "base_layer" in module._modules:
            module = get(module, "base_layer")
        module = get(module, name)
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """The module under PEFT's wrappers."""
    while "base_layer" in module._modules:
        module = module.get_submodule("base_layer")
    return module


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, in the place of what is there."""
    parent, _, name = path.rpartition(".")
    children = model.get_submodule(parent)._modules
    old = children.get(name)
    if old is not None:
        module.train(old.training)
    children[name] = module


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers by name, shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or buffer by another tensor; a parameter stays one, trained as before."""
    module, leaf = owner(model, name)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        trained = bool(old is not None and old.requires_grad and tensor.is_floating_point())
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=trained)
    else:
        module._buffers[leaf] = tensor


def resize_tensor(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a parameter or buffer another shape: an empty one, on its device, in its dtype."""
    module, leaf = owner(model, name)
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        set_tensor(model, name, tensor.new_empty(shape))
        follow_sizes(module)


def follow_sizes(module: nn.Module) -> None:
    """Set the sizes that a torch module states to those of its tensors."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.ConvTranspose2d):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


#: what accelerate's ``dispatch_model`` puts into the module that it is given; forwards go into all of them
_DISPATCHED = ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def forget_dispatch(module: nn.Module) -> None:
    """Take the hook of a device map out of a module, in place; not out of what is inside."""
    if "_hf_hook" not in module.__dict__:
        return
    for name in ("_hf_hook", *_DISPATCHED):
        module.__dict__.pop(name, None)
    own = module.__dict__.pop("_old_forward", None)
    module.__dict__.pop("forward", None)
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        module.__dict__["forward"] = own  # somebody's, from before


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """``copy.deepcopy`` in less than half of the time: it goes long ways about the dozen empty tables of a module."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for table in module.__dict__.values():
            if type(table) in (dict, OrderedDict, set) and not table:
                memo.setdefault(id(table), type(table)())
    return copy.deepcopy(model, memo)


def meta_copy(model: nn.Module, replaced: dict[int, Any] | None = None) -> Any:
    """A deep copy with modules, attributes and hooks, whose parameters and saved buffers are on the meta device.

    Buffers that are not saved keep their values; hooks of device maps are not copied. ``replaced``: id of an object
    (a config) -> what the copy has in its place.
    """
    memo: dict[int, Any] = dict(replaced or {})
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            memo[id(module.__dict__["_hf_hook"])] = None  # it may hold the weights
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                empty = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                memo.setdefault(id(buffer), torch.empty_like(buffer, device="meta"))
    keep_alive = list(memo.values())  # ids of what is replaced stay taken while the copy is made
    made = deep_copy(model, memo)
    del keep_alive
    for module in made.modules():
        forget_dispatch(module)
    return made
