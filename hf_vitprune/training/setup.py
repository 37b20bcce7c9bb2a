"""What a pruning training cannot run on, noticed before it runs."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..errors import InvalidConfigError
from ..utils.sharding import sharding_of

#: what DeepSpeed does to the calls that pruning needs
_DEEPSPEED = (
    "pruning does not work under DeepSpeed, whose engine owns the gradients and steps inside of backward(): leave "
    "deepspeed out and use DDP (torchrun, or accelerate launch without deepspeed)"
)
_FSDP = (
    "pruning needs whole gradients on every process, and FSDP shards them: leave fsdp out and use DDP (torchrun, or "
    "accelerate launch without fsdp)"
)
_DATA_PARALLEL = (
    "pruning does not work in one process with several GPUs (DataParallel): start one process for each with torchrun, "
    "or show one GPU (CUDA_VISIBLE_DEVICES=0)"
)
_MODELS = {
    "fsdp1": _FSDP,
    "fsdp2": _FSDP,
    "zero3": _DEEPSPEED + ", or load the model without DeepSpeed's ZeRO-3",
    "tensor_parallel": (
        "the model's tensors are spread over processes by tensor, expert or pipeline parallelism, and units of heads "
        "and neurons with them: load it whole (without tp_plan, tp_size or distributed_config)"
    ),
    "DataParallel": _DATA_PARALLEL + ", and wrap model.module",
    "DeepSpeedEngine": _DEEPSPEED + ", and wrap engine.module",
}


def check_model(model: Any) -> None:
    """A model whose parameters are whole, and an environment in which they stay so.

    Raises:
        InvalidConfigError: naming what to use instead.
    """
    _check_environment()
    kind = sharding_of(model) if isinstance(model, nn.Module) else None
    if kind is not None:
        raise InvalidConfigError(
            _MODELS.get(kind, f"the model is in a {kind} already: wrap model.module, the Trainer does the rest")
        )


def check_setup(args: TrainingArguments) -> None:
    """Gates need whole gradients on every process, and one model for each.

    Raises:
        InvalidConfigError: naming what to use instead.
    """
    _check_environment()
    if args.deepspeed or getattr(args, "deepspeed_plugin", None) is not None:
        raise InvalidConfigError(_DEEPSPEED)
    if args.fsdp:
        raise InvalidConfigError(_FSDP)
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and any((getattr(parallel, f"{name}_size", 1) or 1) > 1 for name in ("tp", "cp", "sp")):
        raise InvalidConfigError(_MODELS["tensor_parallel"])
    if args.n_gpu > 1:
        raise InvalidConfigError(_DATA_PARALLEL)


def _check_environment() -> None:
    """What ``accelerate launch`` says in environment variables alone."""
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        raise InvalidConfigError(_DEEPSPEED)
    if _flag("ACCELERATE_USE_FSDP"):
        raise InvalidConfigError(_FSDP)
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        raise InvalidConfigError("pruning does not work under Megatron-LM: use accelerate launch without it")
    if _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = [os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in ("TP", "CP", "SP")]
        if any(size not in ("", "1") for size in sizes):
            raise InvalidConfigError(_MODELS["tensor_parallel"])


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
