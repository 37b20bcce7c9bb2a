"""PEFT models over the tiny ones, one config a kind of adapter, with random adapter weights (PEFT starts at zero)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.configs import lineage_of
from tiny import assert_same, relative_error, run, total_loss

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
INWARD = ("fc2", "down_proj", "o_proj")


def targets(model: nn.Module) -> list[str]:
    """Every Linear of the layers."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS and ".head." not in name
    ]


#: kind -> config for a model; the first eight are sliced
CONFIGS: dict[str, Callable[[nn.Module], peft.PeftConfig]] = {
    "lora": lambda m: peft.LoraConfig(r=3, target_modules=targets(m), modules_to_save=["classifier"]),
    "rslora": lambda m: peft.LoraConfig(r=3, target_modules=targets(m), use_rslora=True, lora_bias=True),
    "dora": lambda m: peft.LoraConfig(r=3, target_modules=targets(m), use_dora=True),
    "adalora": lambda m: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=targets(m)
    ),
    "ia3": lambda m: peft.IA3Config(
        target_modules=targets(m), feedforward_modules=[n for n in targets(m) if n.endswith(INWARD)]
    ),
    "loha": lambda m: peft.LoHaConfig(r=3, target_modules=targets(m)),
    "hira": lambda m: peft.HiraConfig(r=3, target_modules=targets(m)),
    "vera": lambda m: peft.VeraConfig(r=3, target_modules=targets(m)),
    "lokr": lambda m: peft.LoKrConfig(r=3, target_modules=targets(m)),
    "oft": lambda m: peft.OFTConfig(oft_block_size=4, target_modules=targets(m)),
    "boft": lambda m: peft.BOFTConfig(boft_block_size=4, target_modules=targets(m)),
    "hra": lambda m: peft.HRAConfig(r=4, target_modules=targets(m)),
    "fourierft": lambda m: peft.FourierFTConfig(n_frequency=20, scaling=50.0, target_modules=targets(m)),
    "c3a": lambda m: peft.C3AConfig(block_size=8, target_modules=targets(m)),
    "randlora": lambda m: peft.RandLoraConfig(r=3, target_modules=targets(m)),
    "shira": lambda m: peft.ShiraConfig(r=3, target_modules=targets(m)),
    "vblora": lambda m: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=targets(m)),
    "repadapter": lambda m: RepAdapterConfig(r=4),
    "convpass": lambda m: ConvpassConfig(r=4),
}
SLICED = list(CONFIGS)[:8]
#: what cannot be sliced, and is LoRA of a small rank
CONVERTED = ("lokr", "vblora")


def randomize(model: nn.Module, seed: int = 3) -> Any:
    """Random values for everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            factor = any(part in name for part in ("magnitude", "ia3", "boft_s"))
            parameter.data = parameter.data * (1 + noise) if factor else noise
    return model


def adapted(model: PreTrainedModel, kind: str | peft.PeftConfig, seed: int = 3) -> Any:
    """A PeftModel in eval mode."""
    config = CONFIGS[kind](model) if isinstance(kind, str) else kind
    return randomize(peft.get_peft_model(model, config), seed).eval()


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def base_info(model: Any) -> dict[str, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return lineage_of(inner.config)


def check(model: Any, plan: PruningPlan, merged: int = 0, trains: bool = True) -> Any:
    """Prune; compare with the masked model; the original is untouched, and the adapters still train."""
    before, flags = state_of(model), {n: p.requires_grad for n, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    small = prune(model, plan, allow_unchanged=True)
    assert torch.equal(random_state, torch.get_rng_state())
    assert relative_error(run(small)["logits"], run(mask(model, plan))["logits"]) < 1e-5
    assert_same(state_of(model), before)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert sum(map(len, base_info(small).get("merged_adapters", {}).values())) == merged
    assert Architecture.of(small) == plan.architecture
    trained = {name: p for name, p in small.named_parameters() if p.requires_grad}
    if trained and trains:
        total_loss(small).backward()
        assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    return small
