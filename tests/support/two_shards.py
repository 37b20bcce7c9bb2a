"""Trainings of a model that FSDP2 shards over two processes; started by test_sharded.py with torch.distributed.run."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig, LlavaForConditionalGeneration, ViTForImageClassification

from hf_vitprune import DistillationConfig, NViTConfig, SLSConfig, SPViTConfig, VTPConfig, get_pruning_model
from hf_vitprune.utils.sharding import is_sharded, reshard
from pruning_runs import SMALL_GROUPS, Images, Patterns, arguments, state_of, trainer
from tiny_composites import IMAGE_TOKEN

#: name of a run -> method's config, settings of the Trainer
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vtp": (VTPConfig(target=0.6, sparsity_weight=0.05, gate_learning_rate=0.3, round_to=4), {"max_grad_norm": 0.5}),
    "nvit": (NViTConfig(target=0.5, group_sizes=SMALL_GROUPS, interval=1), {"max_grad_norm": 0.5}),
    "distilled": (
        VTPConfig(target=0.6, gate_learning_rate=0.3, round_to=4),
        {"distillation": DistillationConfig("soft", weight=0.5, temperature=2.0)},
    ),
    "features": (
        VTPConfig(target=0.6, gate_learning_rate=0.3, round_to=4),
        {"distillation": DistillationConfig("features")},
    ),
    "vtp-lora": (VTPConfig(target=0.6, gate_learning_rate=0.3, round_to=4), {}),
    "nvit-lora": (NViTConfig(target=0.5, group_sizes=SMALL_GROUPS, interval=1), {}),
    "spvit": (SPViTConfig(target=0.6, gate_learning_rate=0.6, patience=0, round_to=4), {}),
    "sls": (SLSConfig(alpha=0.5, iterations=250, perplexity=3.0), {}),
    # the vision tower of a LLaVA, which learns from the next word
    "vtp-llava": (VTPConfig(target=0.6, sparsity_weight=0.05, gate_learning_rate=0.3, round_to=4), {}),
    "nvit-llava": (NViTConfig(target=0.5, group_sizes=SMALL_GROUPS, interval=1), {"max_grad_norm": 0.5}),
}


def in_llava(name: str) -> bool:
    return name.endswith("-llava")


#: runs with LoRA on frozen weights
ADAPTERS = ("vtp-lora", "nvit-lora", "sls")
#: in single precision, AdamW would make steps of a gradient's noise
SINGLE_PRECISION = {"adam_epsilon": 1e-4}

#: ways in which every process has the tiny weights whole
WHOLE = ("zero1", "zero2", "zero-default3")
_STAGE3 = (
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
)  # fmt: skip


def zero(way: str, **changes: Any) -> dict[str, Any]:
    """A config of DeepSpeed; nothing stays whole in ``zero3`` that is as big as a Linear, all in ``zero-default3``."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    stage, small = int(way[-1]), dict.fromkeys(_STAGE3, 8) if way == "zero3" else {}
    return {"zero_optimization": {"stage": stage, **small}, **dict.fromkeys(sizes, "auto"), **changes}


def loaded(folder: Path, way: str = "", dtype: torch.dtype = torch.float64, dense: str = "dense") -> Any:
    """The dense model, sharded here and there: in two, or (HSDP) in two twice over."""
    copies = {"native": 1, "hsdp": 2}.get(way)
    shards = {} if copies is None else {"distributed_config": DistributedConfig(fsdp_size=2, dp_replicate_size=copies)}
    model_class = LlavaForConditionalGeneration if dense == "llava" else ViTForImageClassification
    return model_class.from_pretrained(folder / dense, dtype=dtype, **shards)


@torch.no_grad()
def teacher(folder: Path, way: str = "", dtype: torch.dtype = torch.float64) -> Any:
    """Another model, of which there is something to learn."""
    model = loaded(folder, way, dtype)
    for parameter in model.parameters():
        parameter.mul_(1.2)
    return model


class Captioned(Images):
    """Four places of the image, then words, which are learned."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        words = torch.tensor([IMAGE_TOKEN] * 4 + [1 + i, 5, 2 + i])
        pixels = super().__getitem__(i)["pixel_values"]
        return {"pixel_values": pixels, "input_ids": words, "labels": words.where(words != IMAGE_TOKEN, -100)}


class Unlabelled(Images):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": super().__getitem__(i)["pixel_values"]}


def pruning_model(folder: Path, name: str, way: str = "", dtype: torch.dtype = torch.float64) -> Any:
    model = loaded(folder, way, dtype, "llava" if in_llava(name) else "dense")
    if name in ADAPTERS:
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = get_pruning_model(model, RUNS[name][0])
    if name == "spvit":
        model.method.double()
        # the gates of an update are drawn alike in all of its micro-batches
        model.register_forward_pre_hook(lambda *_: (torch.manual_seed(model.method._step), None)[1])
    return model


def shard_on_cpu(run: Any, name: str) -> None:
    """What accelerate does for ``fsdp_version: 2`` on GPUs; on CPUs it ignores its plugin."""
    state = run.accelerator.state
    layers = ["CLIPEncoderLayer", "LlamaDecoderLayer"] if in_llava(name) else ["ViTLayer"]
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers,
        state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    state.distributed_type = DistributedType.FSDP
    run.is_fsdp_enabled = True


def train(
    model: Any, folder: Path, name: str, processes: int, resume: bool = False, plugin: bool = False, **changes: Any
) -> Any:
    """Three updates of 8 images."""
    dtype = next(p.dtype for n, p in model.named_parameters() if "layers.0" in n)
    # a BatchNorm, and what features are measured by, see one micro-batch: the division counts
    accumulated = 4 // processes if name in ("spvit", "features") else 2
    kinds = {"sls": Patterns, "features": Unlabelled}
    images = (Captioned if in_llava(name) else kinds.get(name, Images))(dtype=dtype)
    settings = {"train_dataset": images, "max_steps": 3, "optim": "adamw_torch",
                "learning_rate": 1e-2, "per_device_train_batch_size": 8 // processes // accumulated,
                "gradient_accumulation_steps": accumulated, **RUNS[name][1], **changes}  # fmt: skip
    run = trainer(model, folder, **settings)
    if plugin:
        shard_on_cpu(run, name)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return run


def share_held(model: Any) -> float:
    """Share of the model's parameters that this process has now, whatever it has in pieces counted with its pieces.

    Adapters do not count: with a model that was loaded sharded they are whole.
    """
    held = total = 0
    parameters: Any = [p for name, p in model.model.named_parameters() if "lora_" not in name]
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            held, total = held + parameter.numel() + parameter.ds_tensor.numel(), total + parameter.ds_numel
        else:
            local = parameter.to_local() if is_sharded([parameter]) else parameter
            held, total = held + local.numel(), total + parameter.numel()
    return held / total


def watched(model: Any) -> list[float]:
    """Filled with :func:`share_held` after every layer's forward pass, once the model is sharded."""
    shares: list[float] = [0.0]

    def watch(*_: Any) -> None:
        if is_sharded(model.model.parameters()):
            shares.append(share_held(model))

    base = model.get_base_model()
    for layer in base.vit.layers if hasattr(base, "vit") else base.model.vision_tower.encoder.layers:
        layer.register_forward_hook(watch)
    return shares


def check_pieces(model: Any, way: str) -> None:
    """Nobody has the model whole, and everybody has the method's tensors."""
    reshard(model)  # what lies outside of the layers stays whole after a forward pass
    if way not in WHOLE:
        assert share_held(model) < 0.6
    assert all(p.numel() == getattr(p, "ds_numel", p.numel()) for p in model.method.parameters())
    assert not any(isinstance(t, DTensor) for t in (*model.method.parameters(), *model.method.buffers()))


def sharded_run(out: Path, name: str, way: str) -> None:
    """Trained through and, where checkpoints are sharded, resumed after two steps; what is left on every process."""
    results = []
    parts = ("through",) if way in ("native", "hsdp") else ("through", "resumed")
    for part in parts:
        folder = out / f"{name}.{way}"
        changes = {"save_strategy": "steps"} if len(parts) > 1 and part == "through" else {}
        if way.startswith("zero"):
            changes |= {"deepspeed": zero(way), **SINGLE_PRECISION}
        if way == "zero-default3":
            changes |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
        # what the arguments say decides how from_pretrained loads
        alive = arguments(folder, **{k: v for k, v in changes.items() if k == "deepspeed"})
        dtype = torch.float32 if way.startswith("zero") else torch.float64
        model = pruning_model(out, name, way, dtype)
        if "distillation" in RUNS[name][1]:
            changes["teacher"] = teacher(out, way, dtype)
        del alive
        shares = watched(model)
        run = train(
            model,
            folder,
            name,
            torch.distributed.get_world_size(),
            resume=part == "resumed",
            plugin=way == "plugin",
            **changes,
        )
        # nor had anybody ever; words lie outside of layers
        assert way in WHOLE or max(shares) < (0.9 if in_llava(name) else 0.75), max(shares)
        check_pieces(model, way)
        run.save_model(str(out / f"{name}.{way}.{part}"))
        small = model.export(compensate=False)
        assert (small is None) == (run.args.process_index > 0 and way not in ("zero1", "zero2"))
        results.append({"plan": model.plan().to_dict()["layers"], "gates": state_of(model.method)})
        if small is not None and run.args.process_index == 0:
            save_file(state_of(small), out / f"{name}.{way}.{part}.safetensors")
    rank = os.environ["RANK"]
    for part, result in zip(parts, results, strict=True):
        (out / f"{name}.{way}.{part}.{rank}.json").write_text(json.dumps(result["plan"]))
        save_file(result["gates"], out / f"{name}.{way}.{part}.gates.{rank}.safetensors")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    if "zero" in "".join(sys.argv[2:]):
        import deepspeed

        deepspeed.init_distributed("gloo")  # as TrainingArguments do on GPUs
    for argument in sys.argv[2:]:
        name, way = argument.split(":")
        sharded_run(out, name, way)
    gc.collect()  # trainers refer to themselves, and so keep the process group and its threads alive
    torch.distributed.destroy_process_group()
