"""How the parameters of a model are spread over processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

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
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    parallel = getattr(getattr(model, "config", None), "distributed_config", None)
    others = [getattr(parallel, f"{name}_size", None) or 1 for name in ("tp", "ep", "pp")]
    fully = any(isinstance(module, FSDPModule) for module in modules)
    return "fsdp2" if fully and max(others) == 1 and len(meshes) == 1 else "tensor_parallel"


def check_whole(model: nn.Module) -> None:
    """Refuse a model that is not on one process.

    Raises:
        UnsupportedModelError: it is spread over several, or in a wrapper.
    """
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
    """Whether a process holds only its part of one of the tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts; of one that is spread, every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """This process's part of a whole tensor, which every process has, where ``pattern`` is spread."""
    if not isinstance(pattern, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def everywhere(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, which every process has, to compute with one that is spread as ``pattern`` is."""
    assert isinstance(pattern, DTensor)
    mesh = pattern.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


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
        if is_sharded([tensor]) and prefix + name in state:
            state[prefix + name] = spread_like(state[prefix + name], tensor)


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
    """A whole copy of a model that FSDP2 has sharded, on the CPU. All processes have to call this.

    Tensors are gathered one by one: no process but the first ever has more than one of them whole.

    Args:
        model: whole ones are copied as well.
        shared: something in it that both are to have.

    Returns:
        The copy, without a trace of FSDP2; None on all but the first process.
    """
    reshard(model)
    copies: dict[int, Any] = {} if shared is None else {id(shared): shared}
    for parameter in model.parameters():
        full = whole(parameter.detach())
        if is_first_process():
            full = full.to("cpu", copy=not isinstance(parameter, DTensor))
            copies[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    if not is_first_process():
        return None
    with _plain(model):
        made = copy.deepcopy(model, copies)
    for buffered in made.modules():
        for name, buffer in buffered._buffers.items():
            if buffer is not None:
                buffered._buffers[name] = buffer.cpu()
    return made


#: what torch and transformers keep in the modules of a sharded model
_TRACES = (
    "_mesh_manager", "_device_mesh", "_is_distributed_loading_by_transformers", "_tp_size", "_fsdp_size",
    "_is_fsdp_managed_module",
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
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
                if name in _TRACES or "composable" in str(name):
                    del module.__dict__[name]
        for held, items in hooks:
            for key, hook in items:
                if _of_torch(hook):
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


def _of_torch(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "func", getattr(hook, "__func__", hook))
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")
