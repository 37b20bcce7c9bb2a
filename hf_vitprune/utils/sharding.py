"""How the parameters of a model are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def sharding_of(model: nn.Module) -> str | None:
    """What has spread a model over processes, or put it into a wrapper.

    Returns:
        ``fsdp2`` (torch's ``fully_shard``), ``fsdp1``, ``zero3`` (DeepSpeed), ``tensor_parallel`` (tensors spread by
        something else than FSDP2), the name of a class that wraps the model; None for a whole model.
    """
    modules = list(model.modules())
    for module in modules:
        kind = type(module)
        if isinstance(module, _WRAPPERS) or kind.__module__.startswith("deepspeed."):
            return kind.__name__
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        return "fsdp1"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "zero3"
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    parallel = getattr(getattr(model, "config", None), "distributed_config", None)
    others = [getattr(parallel, f"{name}_size", None) or 1 for name in ("tp", "ep", "pp")]
    fully = any(isinstance(module, FSDPModule) for module in modules)
    return "fsdp2" if fully and max(others) == 1 and len(meshes) == 1 else "tensor_parallel"


def is_sharded(tensors: Iterable[Any]) -> bool:
    """Whether a process holds only its part of one of the tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts; of one that is spread, every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
