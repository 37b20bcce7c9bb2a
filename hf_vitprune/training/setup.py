"""What a pruning training cannot run on, noticed before it runs: each check says what to use instead."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..errors import AdapterError, InvalidConfigError, UnsupportedModelError, UnsupportedUnitError
from ..methods import PruningConfig, method_for
from ..methods.contract import PruningMethod
from ..modeling.peft_twin import check_peft_model, tuner_layers
from ..peft.kinds import kind_of
from ..peft.kinds.convpass import ConvpassLayer
from ..spec.architecture import unwrap
from ..spec.towers import Tower
from ..surgery.composite import check_readers, layers_needed, layers_read
from ..utils.modules import get
from ..utils.processes import distributed, shard
from ..utils.sharding import is_sharded, sharding_of
from .zero import check_zero

logger = logging.get_logger(__name__)

_FSDP1 = (
    "pruning needs whole gradients, and FSDP1 flattens them: use FSDP2 (fsdp_version: 2 in accelerate's config, "
    "fsdp_config={'version': 2} in TrainingArguments, or from_pretrained(distributed_config=DistributedConfig("
    "fsdp_size=N))), or DDP (without fsdp)"
)
_DATA_PARALLEL = (
    "pruning does not work in one process with several GPUs (DataParallel): start one process for each with torchrun, "
    "or show one GPU (CUDA_VISIBLE_DEVICES=0)"
)
_TENSOR_PARALLEL = (
    "the model's tensors are spread over processes by tensor, expert or pipeline parallelism, and units of heads "
    "and neurons with them: load it whole (without tp_plan, tp_size or distributed_config)"
)
_MODELS = {
    "fsdp1": _FSDP1,
    "tensor_parallel": _TENSOR_PARALLEL,
    "DataParallel": _DATA_PARALLEL + ", and wrap model.module",
    "DeepSpeedEngine": (
        "the model is in a DeepSpeed engine already, whose step a method could not look into: wrap engine.module, and "
        "train it with PruningTrainer and TrainingArguments(deepspeed=...)"
    ),
}


# ---------------------------------------------------------------------- how the training is spread over processes
def check_model(model: Any) -> None:
    """Refuse a model whose parameters are neither whole nor sharded by FSDP2 or ZeRO-3, or would not stay so."""
    _check_environment()
    kind = sharding_of(model) if isinstance(model, nn.Module) else None
    if kind == "fsdp2":
        parallel = getattr(getattr(model, "config", None), "distributed_config", None)
        if getattr(parallel, "fsdp_cpu_offload", False):
            raise InvalidConfigError("gates stay on the device: load the model without fsdp_cpu_offload")
    elif kind not in (None, "zero3"):
        raise InvalidConfigError(
            _MODELS.get(kind, f"the model is in a {kind} already: wrap model.module, the Trainer does the rest")
        )


def check_setup(args: TrainingArguments, model: Any) -> None:
    """Refuse arguments without whole gradients, and one model, for every process."""
    _check_environment()
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        check_zero(plugin, model)
    elif sharding_of(model) == "zero3":
        raise InvalidConfigError(
            "the model was cut to pieces by DeepSpeed's ZeRO-3, and these arguments know nothing of it: give them "
            "deepspeed=<the config>"
        )
    if args.fsdp:
        _check_plugin(dict(getattr(args, "fsdp_plugin_args", None) or {}))
    parallel = getattr(args, "parallelism_config", None)
    if any((getattr(parallel, f"{name}_size", 1) or 1) > 1 for name in ("tp", "cp", "sp")):
        raise InvalidConfigError(_TENSOR_PARALLEL)
    if args.n_gpu > 1:
        raise InvalidConfigError(_DATA_PARALLEL)


def _check_environment() -> None:
    """What ``accelerate launch`` says in environment variables alone."""
    if _flag("ACCELERATE_USE_FSDP"):
        # accelerate sets this for a plugin that came with the arguments, too, but no version
        in_use = getattr(AcceleratorState._shared_state.get("fsdp_plugin"), "fsdp_version", 1)
        _check_plugin(
            {
                "fsdp_version": os.environ.get("FSDP_VERSION") or in_use,
                "cpu_offload": _flag("FSDP_OFFLOAD_PARAMS"),
                "cpu_ram_efficient_loading": _flag("FSDP_CPU_RAM_EFFICIENT_LOADING"),
            }
        )
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        raise InvalidConfigError("pruning does not work under Megatron-LM: use accelerate launch without it")
    if _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = [os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in ("TP", "CP", "SP")]
        if any(size not in ("", "1") for size in sizes):
            raise InvalidConfigError(_TENSOR_PARALLEL)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _check_plugin(settings: dict[str, Any]) -> None:
    if int(settings.get("fsdp_version", 1)) != 2:
        raise InvalidConfigError(_FSDP1)
    if settings.get("cpu_offload"):
        raise InvalidConfigError("gates stay on the device: leave fsdp_offload_params (cpu_offload) out")
    if settings.get("cpu_ram_efficient_loading"):
        raise InvalidConfigError(
            "accelerate's loading by the first process alone takes no buffers and no parameters that are not sharded, "
            "and masks and gates are such: set fsdp_cpu_ram_efficient_loading: false, or load the model sharded "
            "(from_pretrained(distributed_config=DistributedConfig(fsdp_size=N)))"
        )


def check_trainer(args: TrainingArguments, model: Any, ours: bool) -> None:
    """Refuse a sharded model without a PruningTrainer (``ours``), or with a method that cannot do its work on it."""
    zero = getattr(args, "deepspeed_plugin", None) is not None
    if not zero and not is_sharded(model.parameters()):
        return
    if not zero:
        model.method.check_sharded("fsdp2")
    if not ours:
        raise InvalidConfigError(
            "a plain Trainer would let DeepSpeed step before the method has seen a gradient: use PruningTrainer"
            if zero
            else "under FSDP2 a plain Trainer would shard the gates, or save checkpoints of one process's part: use "
            "PruningTrainer"
        )


def check_agreement(model: Any) -> None:
    """Refuse, on every process, other models or settings on some of them."""
    if not distributed():
        return
    texts: list[Any] = [None] * shard()[1]
    torch.distributed.all_gather_object(texts, bytes(model.get_extra_state().tolist()).decode())
    first, *others = map(json.loads, texts)
    for rank, settings in enumerate(others, 1):
        differing = [f"{key} is {old} and {new}" for key, old, new in differences(first, settings)]
        if differing:
            raise InvalidConfigError(
                f"the processes disagree about what is pruned: of the first and of process {rank}, "
                f"{'; '.join(differing)}. Give all of them the same model and settings"
            )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, what it is in one, in the other) where two records differ."""
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def check_teacher(model: Any) -> None:
    """Refuse a PruningModel that cannot be copied, to be its own teacher."""
    check_given_teacher(model)
    if is_sharded(model.parameters()):
        raise InvalidConfigError(
            "a sharded model is not copied to be its own teacher: give teacher=<the same model, loaded a second time "
            "with the same distributed_config>"
        )


def check_given_teacher(model: Any) -> None:
    """Refuse a teacher that cannot run outside of the trained model's engine."""
    if isinstance(model, nn.Module) and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise InvalidConfigError(
            "ZeRO-3 has cut the teacher to pieces, and only the trained model's engine puts such together: load "
            "teacher=<the unpruned model> before TrainingArguments(deepspeed=...) are made"
        )


# ---------------------------------------------------------------------- adapters, and towers in bigger models
def check_adapters(model: Any) -> None:
    """Refuse adapters of a kind, or with settings, that cannot be carried over to a pruned model."""
    check_peft_model(model)
    for config in model.peft_config.values():
        kind_of(config).check_config(config)


def check_sliceable(model: Any, method: str, part: str) -> None:
    """Refuse adapters of narrowed layers that can neither be sliced nor merged."""
    for name, layer in tuner_layers(get(unwrap(model), part)).items():
        if isinstance(layer, ConvpassLayer):
            raise AdapterError(
                f"{method} narrows layers, and the Convpass adapter of {name} can neither be sliced nor merged; "
                "remove whole layers (truncate), or use another adapter"
            )


def method_on(model: Any, tower: Tower, config: PruningConfig) -> PruningMethod:
    """The method of a config for a tower; refused if it asks in words for a residual stream that must stay wide."""
    module = get(model, tower.path)
    method = method_for(config)(config, module)
    if not tower.path or not method.narrows or tuner_layers(model):  # with adapters no stream is narrowed at all
        return method
    try:
        check_readers(model, tower)
    except UnsupportedUnitError as error:
        narrower = method.at_full_width()
        if narrower is None:
            raise
        logger.warning(f"{config.method_name} leaves the tower's residual stream as wide as it is: {error}")
        return method_for(narrower)(narrower, module)
    return method


def check_tower(method: PruningMethod, tower: Tower, base: Any, adapted: bool) -> None:
    """Refuse what a method cannot do with a tower of ``base``, which has adapters or not; layers it reads are kept."""
    name, layers = method.config.method_name, len(method.architecture.layers)
    if adapted and method.traits.zeroes_weights:
        raise AdapterError(
            f"{name} sets weights of a tower to zero, which adapters of a bigger model share: merge them first "
            "(model.merge_and_unload()), or use another method"
        )
    method.keep_at_least(*layers_needed(base, tower, layers))
    read = layers_read(base, tower, layers)
    if read < layers and method.traits.decides_by == "gradients":
        raise UnsupportedModelError(
            f"{name} scores by gradients, and layers {read} to {layers - 1} of the tower get none, as "
            f"{type(base).__name__} reads what is below them: drop them first, with "
            "hf_vitprune.truncate(model, 'unused'), which changes no output"
        )
