"""Models and environments that are spread over processes, noticed where a PruningModel is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

from hf_vitprune import (
    NViTConfig,
    OneShotScores,
    PruningCallback,
    PruningPlan,
    PruningTrainer,
    SLSConfig,
    VTPConfig,
    get_pruning_model,
    prune,
)
from hf_vitprune.errors import InvalidConfigError, UnsupportedModelError
from hf_vitprune.training.setup import check_teacher
from hf_vitprune.training.zero import check_zero
from hf_vitprune.utils.sharding import sharding_of
from pruning_runs import SMALL_GROUPS, VIT, gated, nvit, spvit
from tiny import images, make

CONFIG = VTPConfig(pruning_ratio=0.4)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ARGUMENTS = {
    "activation_checkpointing": False, "activation_checkpointing_kwargs": None, "deepspeed": None,
    "deepspeed_plugin": None, "fsdp": None, "n_gpu": 1,
}  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def begin(model: Any, **changes: Any) -> None:
    args = SimpleNamespace(**{**ARGUMENTS, **changes})
    PruningCallback().on_train_begin(args, SimpleNamespace(max_steps=1), None, model=model)


def refused(model: Any, message: str) -> None:
    """As it is, and where a PruningModel was made before."""
    with pytest.raises(InvalidConfigError, match=message):
        get_pruning_model(model, CONFIG)
    late = gated()
    late.model = model
    with pytest.raises(InvalidConfigError, match=message):
        begin(late)


def test_whole_models_pass() -> None:
    assert sharding_of(make(VIT)) is None
    begin(gated())


def test_fsdp1(alone: Any) -> None:
    model = make(VIT)
    model.vit.layers[0] = FullyShardedDataParallel(model.vit.layers[0], device_id=torch.device("cpu"))
    assert sharding_of(model) == "fsdp1"
    refused(model, "FSDP1.*fsdp_version: 2")


def test_fsdp2(alone: Any) -> None:
    """Sharded models are taken; a plain Trainer would not know what to do with them."""
    model = make(VIT)
    for layer in model.vit.layers:
        fully_shard(layer, mesh=alone)
    assert sharding_of(model) == "fsdp2"
    pruning_model = get_pruning_model(model, CONFIG)
    with pytest.raises(InvalidConfigError, match="use PruningTrainer"):
        begin(pruning_model)
    with pytest.raises(InvalidConfigError, match="teacher=<the same model"):
        check_teacher(pruning_model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NViTConfig(target=0.5, group_sizes=SMALL_GROUPS, criterion="magnitude"), "criterion='magnitude'"),
        (NViTConfig(target=0.5, group_sizes=SMALL_GROUPS, snapshots=(0.7,), snapshot_folder="."), "snapshots"),
    ],
)
def test_methods_that_need_whole_weights(alone: Any, config: Any, message: str) -> None:
    model = make(VIT)
    fully_shard(model, mesh=alone)
    with pytest.raises(InvalidConfigError, match=message):
        begin(get_pruning_model(model, config))


def test_pruning_without_training_needs_a_whole_model(alone: Any) -> None:
    plan = PruningPlan.random(make(VIT), 0.4)
    model = make(VIT)
    fully_shard(model, mesh=alone)
    for wrong in (lambda: prune(model, plan), lambda: OneShotScores.measure(model, images(2))):
        with pytest.raises(UnsupportedModelError, match="load it whole on every process"):
            wrong()


def test_tensor_parallel(alone: Any) -> None:
    model = make(VIT)
    linear = model.vit.layers[0].mlp.fc1
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, alone))
    assert sharding_of(model) == "tensor_parallel"
    refused(model, "load it whole")


def test_zero3_without_its_arguments() -> None:
    model = gated()
    weight = model.model.classifier.weight
    weight.ds_id, weight.ds_numel = 0, weight.numel()
    assert sharding_of(model.model) == "zero3"
    with pytest.raises(InvalidConfigError, match="ZeRO-3.*deepspeed=<the config>"):
        begin(model)
    for check in (lambda: check_teacher(model), lambda: PruningTrainer(gated(), teacher=model.model)):
        with pytest.raises(InvalidConfigError, match="before TrainingArguments"):
            check()


def zero(stage: int = 2, **settings: Any) -> Any:
    optimisation = {"stage": stage, **settings.pop("zero_optimization", {})}
    return SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({"zero_optimization": optimisation, **settings}))


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (zero(stage=0), "stage 0.*is DDP"),
        (zero(optimizer={"type": "AdamW"}), "leave 'optimizer' out"),
        (zero(scheduler={"type": "WarmupLR"}), "leave 'scheduler' out"),
        (zero(3, zero_optimization={"offload_param": {"device": "cpu"}}), "leave offload_param"),
        (zero(zero_optimization={"offload_optimizer": {"device": "nvme"}}), "leave offload_optimizer"),
        (zero(3, zero_optimization={"zero_hpz_partition_size": 4}), "zero_hpz_partition_size=4"),
        (zero(fp16={"enabled": True}), "use bf16"),
        (zero(tensor_parallel={"autotp_size": 2}), "autotp_size"),
    ],
)
def test_zero_is_refused_by_setting(plugin: Any, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        check_zero(plugin, gated())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_by_method(stage: int) -> None:
    plugin = zero(stage, bf16={"enabled": "auto"})
    check_zero(plugin, gated())
    check_zero(plugin, nvit())
    with pytest.raises(InvalidConfigError, match="SPViT.*FSDP2 or DDP"):
        check_zero(plugin, spvit())
    layers = get_pruning_model(make(VIT), SLSConfig())
    if stage < 3:
        check_zero(plugin, layers)
        check_zero(plugin, nvit(criterion="magnitude"))
        return
    with pytest.raises(InvalidConfigError, match="SLS.*use stage 2, or FSDP2"):
        check_zero(plugin, layers)
    with pytest.raises(InvalidConfigError, match="criterion='magnitude'"):
        check_zero(plugin, nvit(criterion="magnitude"))


def test_a_plain_trainer_under_zero() -> None:
    with pytest.raises(InvalidConfigError, match="use PruningTrainer"):
        begin(gated(), deepspeed_plugin=zero())


class DeepSpeedEngine(nn.Module):
    __module__ = "deepspeed.runtime.engine"


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (lambda model: nn.DataParallel(model), "DataParallel.*model.module"),
        (lambda model: DeepSpeedEngine(), "DeepSpeed.*engine.module"),
    ],
)
def test_wrapped_models(wrapped: Any, message: str) -> None:
    refused(wrapped(make(VIT)), message)


def test_ddp(alone: Any) -> None:
    refused(nn.parallel.DistributedDataParallel(make(VIT)), "in a DistributedDataParallel.*model.module")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1.*fsdp_version: 2"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "FSDP1.*fsdp_version: 2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "leave fsdp_offload_params"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor, expert"),
    ],
)
def test_what_only_the_environment_says(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gated()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidConfigError, match=message):
        get_pruning_model(make(VIT), CONFIG)
    with pytest.raises(InvalidConfigError, match=message):
        begin(model)


def test_fsdp2_of_the_launcher_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    begin(get_pruning_model(make(VIT), CONFIG))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed_plugin": zero(stage=0)}, "stage 0.*is DDP"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "FSDP1.*fsdp_version: 2"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2, "cpu_offload": True}}, "leave fsdp_offload_params"),
        ({"parallelism_config": SimpleNamespace(tp_size=2)}, "tensor, expert"),
        ({"n_gpu": 2}, "DataParallel.*torchrun"),
    ],
)
def test_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        begin(gated(), **changes)
