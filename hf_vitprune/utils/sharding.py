"""How the parameters of a model are spread over processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..errors import UnsupportedModelError
from .processes import is_first_process

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def sharding_of(model: nn.Module) -> str | None:
    """What has spread a model over processes, or put it into a wrapper.

    Returns:
        ``fsdp2`` (torch's ``fully_shard``), ``fsdp1``, ``zero3`` (DeepSpeed), ``tensor_parallel`` (tensors spread by
        something else than FSDP2), the name of a class that wraps the model; None for a whole model.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # whoever looks next says what it is not
    for module in modules:
        kind = type(module)
        if isinstance(module, _WRAPPERS) or kind.__module__.startswith("deepspeed."):
            return kind.__name__
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        return "fsdp1"
    if not modules:
        return None
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "zero3"
    spread = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    meshes = {parameter.device_mesh for parameter in spread}
    if not meshes:
        return None
    parallel = getattr(getattr(model, "config", None), "distributed_config", None)
    others = [getattr(parallel, f"{name}_size", None) or 1 for name in ("tp", "ep", "pp")]
    rows = all(p.dim == 0 for tensor in spread for p in tensor.placements if isinstance(p, Shard))
    fully = rows and any(isinstance(module, FSDPModule) for module in modules)
    return "fsdp2" if fully and max(others) == 1 and len(meshes) == 1 else "tensor_parallel"


def check_whole(model: nn.Module) -> None:
    """Refuse a model that is spread over several processes, or in a wrapper (UnsupportedModelError)."""
    kind = sharding_of(model)
    if kind in [wrapper.__name__ for wrapper in _WRAPPERS]:
        raise UnsupportedModelError(
            f"the model is wrapped in {kind}: pass model.module (accelerator.unwrap_model(model))"
        )
    if kind is not None:
        raise UnsupportedModelError(
            f"the model is spread over processes, or in a wrapper ({kind}): load it whole on every process (without "
            "distributed_config), or export() the PruningModel that was trained so"
        )


def is_sharded(tensors: Iterable[Any]) -> bool:
    """Whether a process holds only its part of one of the tensors (FSDP2, ZeRO-3)."""
    return any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") for tensor in tensors)


def whole(tensor: Any) -> Tensor:
    """A tensor with all of its parts; of one that is spread, every process has to ask."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not hasattr(tensor, "ds_id"):
        return tensor
    if tensor.numel() == tensor.ds_numel:  # ZeRO-3 leaves small ones whole
        return tensor.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


@torch.no_grad()
def all_finite(parameter: Any) -> bool:
    """Whether no part of a parameter is infinite or no number; of one that is spread, every process has to ask."""
    if not hasattr(parameter, "ds_id"):
        return bool(whole(parameter.isfinite().all()))
    wrong = (~parameter.ds_tensor.isfinite().all()).float()
    torch.distributed.all_reduce(wrong)
    return not wrong.item()


@contextlib.contextmanager
def shaped(model: nn.Module) -> Iterator[None]:
    """Parameters that ZeRO-3 has cut to pieces show their shapes for a while, without values."""
    parameters: Iterable[Any] = model.parameters()
    cut = [(p, p.data) for p in parameters if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    try:
        for parameter, data in cut:
            parameter.data = data.new_zeros(()).expand(parameter.ds_shape)
        yield
    finally:
        for parameter, data in cut:
            parameter.data = data


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in whole tensors on the CPU; empty on all but the first process. All have to call this."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if is_first_process():
            state[name] = full.cpu()
    return state


def spread_state(model: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Every process takes its part of whole tensors that are about to be loaded, in place."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        full = state.get(prefix + name)
        if isinstance(tensor, DTensor) and full is not None and not isinstance(full, DTensor):
            full = full.to(tensor.device)
            state[prefix + name] = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Every process goes back to its part of all parameters: some may be whole after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def whole_root(model: nn.Module) -> Iterator[None]:
    """What lies outside of the layers is whole for a while: for forward passes that begin inside of ``model``."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@torch.no_grad()
def gathered(model: nn.Module, shared: Any = None) -> Any:
    """A whole copy, on the CPU, of a model that may be spread over processes; None on all but the first.

    All processes have to call this. Tensors are gathered one by one: no process but the first ever has more than one
    of them whole. ``shared``: something in the model that both are to have.
    """
    reshard(model)
    copies: dict[int, Any] = {} if shared is None else {id(shared): shared}
    for parameter in model.parameters():
        full = whole(parameter).detach()
        if is_first_process():
            full = full.to("cpu", copy=not is_sharded([parameter]))
            copies[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    if not is_first_process():
        return None
    with unsharded(model):
        made = copy.deepcopy(model, copies)
    for buffered in made.modules():
        for name, buffer in buffered._buffers.items():
            if buffer is not None:
                buffered._buffers[name] = buffer.cpu()
    return made


#: what torch, transformers and DeepSpeed keep in the modules of a sharded model
_TRACES = (
    "_mesh_manager", "_device_mesh", "_is_distributed_loading_by_transformers", "_tp_size", "_fsdp_size",
    "_is_fsdp_managed_module", "_original_parameters", "_external_params", "all_parameters", "pre_bwd_fn",
    "post_bwd_fn", "applied_pre_backward_ref_cnt",
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """The modules of a sharded model as they were before: what they are otherwise refuses to be copied."""
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    # emptied in place: handles of other hooks refer to these very dicts
    hooks = [
        (held, list(held.items())) for _, _, attributes in before for name in _HOOKS for held in [attributes[name]]
    ]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    parallel = {key: vars(config).pop("distributed_config", None) for key, config in configs.items()}
    try:
        for module, kind, attributes in before:
            if isinstance(module, FSDPModule):
                module.__class__ = kind.__mro__[kind._orig_cls_mro_index]  # type: ignore[attr-defined]
            for name in attributes:
                if name in _TRACES or "composable" in str(name) or str(name).startswith("ds_"):
                    del module.__dict__[name]
            if "_original_parameters" in attributes:
                module.__dict__["_parameters"] = dict(attributes["_parameters"])
        for held, items in hooks:
            for key, hook in items:
                if _of_an_engine(hook):
                    del held[key]
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for held, items in hooks:
            held.clear()
            held.update(items)
        for key, config in configs.items():
            if parallel[key] is not None:
                config.distributed_config = parallel[key]


def _of_an_engine(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "func", getattr(hook, "__func__", hook))
    return str(getattr(hook, "__module__", "")).startswith(("torch.distributed", "deepspeed"))
