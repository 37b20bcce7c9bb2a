"""Adapters on a tower and on the rest of a bigger model: those of the tower are pruned with it, the others stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_vitprune.errors import AdapterError, UnsupportedUnitError
from hf_vitprune.modeling.peft_twin import merged_twin, tuner_layers
from hf_vitprune.peft import prune_peft, save_pruned_peft
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.surgery.masked import mask_plain
from tiny import relative_error
from tiny_adapters import CONFIGS, randomize

PART = "model.vision_tower"
BOTH = ["q_proj", "v_proj", "fc1", "gate_proj"]  # fc1 is in the tower only, gate_proj in the language model
UNITS = ["heads", "qk", "v", "mlp"]


def llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, image_size=16, patch_size=8, intermediate_size=48
    )
    text = LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_hidden_layers=3, intermediate_size=40, vocab_size=50, pad_token_id=0
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 49, 49, 49, 49, 5, 6]])
    return model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).logits


def adapted(config: Any) -> Any:
    return randomize(get_peft_model(llava(), config)).eval()


def masked(model: Any, plan: PruningPlan) -> Any:
    """Merged, and full-size with the plan's units silenced."""
    whole = merged_twin(model, PART)
    tower = whole.get_submodule(PART)
    return copy.deepcopy(whole, {id(tower): mask_plain(tower, plan)})


def plan_of(units: list[str]) -> PruningPlan:
    tower = llava().get_submodule(PART)
    if units == ["layers"]:
        return PruningPlan.dense(tower).keep_layers([0, 2])  # the model reads the last one
    return PruningPlan.random(tower, 0.4, units)


TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": BOTH},
    "the tower": {"target_modules": r".*vision_tower.*\.(q_proj|fc2)"},
    "the language model": {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
    "layers": {"target_modules": BOTH, "layers_to_transform": [1, 2]},
    "ranks": {"target_modules": BOTH, "rank_pattern": {r".*language_model.*q_proj": 5, "fc1": 2}},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["linear_1", "lm_head", "post_layernorm"]},
    "DoRA": {"target_modules": [*BOTH, "fc2", "out_proj"], "use_dora": True},
    "embedding of words": {"target_modules": ["embed_tokens", "fc1"]},
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("units", [UNITS, ["layers"]], ids=["narrow", "shallow"])
def test_the_tower_is_pruned_and_the_rest_stays(name: str, units: list[str]) -> None:
    model = adapted(LoraConfig(r=3, **TARGETS[name]))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = {n for n, p in model.named_parameters() if p.requires_grad and PART not in n}
    plan = plan_of(units)
    small = prune_peft(model, plan, part=PART)
    assert relative_error(logits(small), logits(masked(model, plan))) < 1e-5
    assert relative_error(logits(small), logits(model)) > 1e-3
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    outside = {key: tensor for key, tensor in before.items() if f".{PART}." not in key}
    after = {key: tensor for key, tensor in small.state_dict().items() if f".{PART}." not in key}
    assert after.keys() == outside.keys()
    assert all(torch.equal(after[key], outside[key]) for key in after)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad and PART not in n} for m in (model, small)]
    assert trained[0] == trained[1] == flags
    words = "base_model.model.model.language_model.layers.0.mlp.down_proj.weight"
    assert small.state_dict()[words].data_ptr() == model.state_dict()[words].data_ptr()  # shared, not copied


@pytest.mark.parametrize(("kind", "becomes"), [("ia3", "IA3"), ("vera", "LORA"), ("c3a", "C3A")])
def test_kinds(kind: str, becomes: str) -> None:
    """IA3 is sliced, VeRA becomes LoRA everywhere, C3A is merged where the tower is narrowed and stays elsewhere."""
    model = adapted(CONFIGS[kind](llava()))
    plan = plan_of(UNITS)
    small = prune_peft(model, plan, part=PART)
    assert relative_error(logits(small), logits(masked(model, plan))) < 1e-5
    assert small.peft_type == f"VITPRUNE_{becomes}"
    layers = tuner_layers(small.get_base_model())
    assert any(PART in name for name in layers) == (kind != "c3a")
    assert any("language_model" in name for name in layers)


def test_several_adapters() -> None:
    model = adapted(LoraConfig(r=3, target_modules=BOTH))
    model.add_adapter("words", LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    plan = plan_of(UNITS)
    small = prune_peft(model, plan, part=PART)
    for name in ("words", "default"):
        for each in (model, small):
            each.set_adapter(name)
        assert relative_error(logits(small), logits(masked(model, plan))) < 1e-5


def test_saved_and_refused(tmp_path: Path) -> None:
    small = prune_peft(adapted(LoraConfig(r=3, target_modules=BOTH)), plan_of(UNITS), part=PART)
    assert save_pruned_peft(small, tmp_path) == tmp_path / "base"
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path)).eval()), logits(small))
    other = llava()
    expected = logits(other)
    with pytest.raises(AdapterError, match="pruned base model"):
        PeftModel.from_pretrained(other, str(tmp_path))
    with pytest.raises(AdapterError, match="has nothing there"):
        PeftModel.from_pretrained(llava().get_submodule(PART), str(tmp_path))
    assert torch.equal(logits(other), expected)


def test_a_narrower_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedUnitError, match="reads that"):
        prune_peft(adapted(LoraConfig(r=3, target_modules=BOTH)), plan_of(["embedding"]), part=PART)


@pytest.mark.parametrize("units", [["mlp"], ["qk"]], ids=["stock tower", "pruned tower"])
def test_an_adapter_put_on_a_model_with_a_pruned_tower_is_for_that_model(units: list[str], tmp_path: Path) -> None:
    """Also one of the language model alone, whose sizes are the same in the dense model."""
    prune(llava(), PruningPlan.magnitude(llava(), 0.5, units=units)).save_pretrained(tmp_path / "base")
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    model = randomize(get_peft_model(small, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="pruned base model that was saved with it"):
        PeftModel.from_pretrained(llava(), str(tmp_path / "adapter"))
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert relative_error(logits(again), logits(model)) < 1e-6
    get_peft_model(llava(), config).save_pretrained(tmp_path / "dense")
    assert '"LORA"' in (tmp_path / "dense" / "adapter_config.json").read_text()
