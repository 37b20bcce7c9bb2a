"""The DepGraph baseline against Torch-Pruning itself and its formula, where torch-pruning is installed."""

from __future__ import annotations

import builtins
import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.vit.modeling_vit import ViTAttention

from benchmarks.vtab.depgraph import depgraph_plan
from hf_vitprune import PruningPlan, prune
from hf_vitprune.errors import InvalidPlanError, MissingExtraError
from hf_vitprune.modeling.peft_twin import is_peft
from hf_vitprune.peft import ConvpassConfig
from hf_vitprune.utils.modules import get_wrapped
from tiny import make

ADAPTERS = {
    "none": None,
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    "convpass": ConvpassConfig(r=2, modules_to_save=["classifier"]),
}


def examples(count: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 5} for i in range(count)]


def adapted(name: str = "ViTForImageClassification", adapters: str = "none") -> Any:
    model = make(name)
    if ADAPTERS[adapters] is not None:
        model = get_peft_model(model, copy.deepcopy(ADAPTERS[adapters]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def without_adapters(model: Any) -> Any:
    return model.disable_adapter() if is_peft(model) else nullcontext()


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch_pruning":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match="pip install torch-pruning"):
        depgraph_plan(adapted(), examples(), 0.5)


@pytest.mark.parametrize(("adapters", "embedding"), [*((name, False) for name in ADAPTERS), ("none", True)])
def test_small_model_is_what_torch_pruning_makes(adapters: str, embedding: bool) -> None:
    """Its own physical pruning of the traced model, with the sizes that it leaves put into the attention modules."""
    tp = pytest.importorskip("torch_pruning")
    model = adapted(adapters=adapters)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = depgraph_plan(model, examples(), 0.5, embedding=embedding)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())  # the model is left alone
    assert all(parameter.grad is None for parameter in model.parameters())
    small = prune(model, plan).eval()

    theirs = copy.deepcopy(model).requires_grad_(True)
    base = theirs.get_base_model() if is_peft(theirs) else theirs
    base.set_attn_implementation("eager")
    batch = torch.utils.data.default_collate(examples())
    torch.nn.functional.cross_entropy(theirs(batch["pixel_values"]).logits, batch["labels"]).backward()
    attention = [m for m in base.modules() if isinstance(m, ViTAttention)]
    projections = {id(m): [get_wrapped(m, f"{name}_proj") for name in "qkv"] for m in attention}
    linears = {key: [getattr(m, "base_layer", m) for m in row] for key, row in projections.items()}
    with without_adapters(theirs):
        pruner = tp.pruner.BasePruner(
            theirs,
            {"pixel_values": batch["pixel_values"][:1]},
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=0.5,
            round_to=2,
            num_heads={linear: 4 for row in linears.values() for linear in row},
            ignored_layers=[
                base.classifier,
                *([] if embedding else [base.vit.embeddings.patch_embeddings.projection]),
            ],
            output_transform=lambda outputs: outputs.logits.sum(),
        )
        pruner.step()
    for module in attention:
        module.head_dim = linears[id(module)][0].out_features // 4
        assert module.head_dim == 4 == plan.architecture.layers[0].qk_dim
    assert plan.architecture.hidden_size == base.classifier.in_features == (16 if embedding else 32)
    with torch.no_grad(), without_adapters(theirs), without_adapters(small):
        ours, expected = small(batch["pixel_values"]).logits, theirs(batch["pixel_values"]).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert is_peft(small) == (adapters != "none")


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_what_goes_is_what_taylor_says(ratio: float) -> None:
    pytest.importorskip("torch_pruning")
    model = adapted()
    plan = depgraph_plan(model, examples(), ratio)
    batch = torch.utils.data.default_collate(examples())
    torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()

    def importance(linear: Any, dim: int) -> torch.Tensor:
        return (linear.weight * linear.weight.grad).abs().sum(dim)

    for entry, layer in zip(plan.layers, model.vit.layers, strict=True):
        part = layer.attention
        channels = sum(importance(linear, 1) for linear in (part.q_proj, part.k_proj, part.v_proj))
        channels = (channels + importance(part.o_proj, 0)).view(4, 8).mean(0)
        neurons = importance(layer.mlp.fc1, 1) + importance(layer.mlp.fc2, 0)
        for kept, scores in ((entry.v[0], channels), (entry.qk[3], channels), (entry.mlp, neurons)):
            count = int(len(scores) * (1 - ratio)) // 2 * 2
            assert set(kept) == set(scores.argsort()[-count:].tolist())
    assert plan.info["ratio"] == ratio and plan.architecture.hidden_size == 32


@pytest.mark.parametrize("name", ["DeiTForImageClassification", "Dinov2ForImageClassification"])
def test_other_families(name: str) -> None:
    pytest.importorskip("torch_pruning")
    plan = depgraph_plan(adapted(name), examples(), 0.5)
    assert {len(entry.v[0]) for entry in plan.layers} == {4}
    assert PruningPlan.from_dict(plan.to_dict()) == plan


def test_impossible_ratio() -> None:
    pytest.importorskip("torch_pruning")
    with pytest.raises(InvalidPlanError, match="between 0 and 1"):
        depgraph_plan(adapted(), examples(), 1.0)
