"""Exact resume: which names and which parts of a state dict are understood, accepted or refused."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_vitprune.errors import ResumeError, VitPruneError
from hf_vitprune.training.resume import convert_state_dict, enable_exact_resume
from resume_runs import FAMILIES, PLAIN, disturbed, restored


@pytest.mark.parametrize("name", ["vit", "dinov2-swiglu"])
def test_own_names_and_mixed_names(name, tmp_path):
    model = FAMILIES[name]()
    own = model.state_dict()
    assert convert_state_dict(model, own).keys() == own.keys()
    model.save_pretrained(tmp_path)
    legacy = load_file(tmp_path / "model.safetensors")
    assert legacy.keys() != own.keys()
    mixed = {k: v for k, v in legacy.items() if ".0." in k} | {k: v for k, v in own.items() if ".0." not in k}
    for incoming in (own, legacy, mixed):
        given = dict(incoming)
        again = disturbed(model)
        enable_exact_resume(again)
        again.load_state_dict(incoming, strict=True)
        assert restored(again, model) == len(own)
        assert incoming.keys() == given.keys()  # the caller's dict is left alone


def test_a_tensor_with_no_place_keeps_the_name_it_came_with():
    model = FAMILIES["vit"]()
    strange = "vit.encoder.layer.7.attention.output.dense.bias"
    result = convert_state_dict(model, {**model.state_dict(), strange: torch.zeros(32)})
    assert result.keys() == {*model.state_dict(), strange}


def test_the_same_tensor_under_two_names_is_refused(tmp_path):
    model = FAMILIES["vit"]()
    model.save_pretrained(tmp_path)
    both = {**load_file(tmp_path / "model.safetensors"), **model.state_dict()}
    enable_exact_resume(model)
    with pytest.raises(ResumeError, match="twice"):
        model.load_state_dict(both, strict=False)


def test_names_that_a_key_mapping_changed(tmp_path):
    model = FAMILIES["vit"]()
    model.save_pretrained(tmp_path / "a")
    weights = {name.replace("vit.", "old."): t for name, t in load_file(tmp_path / "a" / "model.safetensors").items()}
    loaded = ViTForImageClassification.from_pretrained(
        None, config=model.config, state_dict=weights, key_mapping={r"^old\.": "vit."}
    )
    assert restored(loaded, model) == len(model.state_dict())
    loaded.save_pretrained(tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert any(name.startswith("old.") for name in written)
    again = disturbed(loaded)
    enable_exact_resume(again)
    again.load_state_dict(written, strict=True)
    assert restored(again, model) == len(model.state_dict())


def test_peft_base_weights_under_legacy_names(tmp_path):
    """A wrapper may save the base inside a PeftModel with `save_pretrained`; that goes through the conversions."""
    model = get_peft_model(FAMILIES["vit"](), LoraConfig(target_modules=["q_proj"]))
    inner = model.get_base_model()
    inner.save_pretrained(tmp_path, state_dict=inner.state_dict())
    legacy = load_file(tmp_path / "model.safetensors")
    assert any("attention.query.base_layer" in k for k in legacy)
    again = disturbed(model)
    enable_exact_resume(again.get_base_model())
    again.load_state_dict({f"base_model.model.{k}": v for k, v in legacy.items()}, strict=True)
    assert restored(again, model) == len(model.state_dict())
    # without the adapter's own tensors, nothing is missing that the check should care about
    base = {f"base_model.model.{k}": v for k, v in legacy.items() if "lora_" not in k}
    again.load_state_dict(base, strict=False)
    again(pixel_values=torch.randn(1, 3, 16, 16))


def test_a_partial_restore_of_the_layers_is_an_error(tmp_path):
    model = disturbed(FAMILIES["vit"]())
    enable_exact_resume(model)
    before = copy.deepcopy(model)
    foreign = {k.replace("vit.layers", "vit.blocks"): v for k, v in FAMILIES["vit"]().state_dict().items()}
    with pytest.raises(ResumeError, match=r"0 of the 32 .* Not understood: vit.blocks.0"):
        model.load_state_dict(foreign, strict=False)
    part = {k.replace("fc1", "dense_in"): v for k, v in FAMILIES["vit"]().state_dict().items()}
    with pytest.raises(ResumeError, match=r"28 of the 32 .* Missing: vit.layers.0.mlp.fc1.bias"):
        model.load_state_dict(part, strict=False)
    assert restored(model, before) == len(before.state_dict())  # refused before anything was copied
    assert issubclass(ResumeError, VitPruneError) and issubclass(ResumeError, RuntimeError)


def test_a_checkpoint_of_fewer_layers_is_an_error():
    model = FAMILIES["vit"]()
    enable_exact_resume(model)
    shallow = {k: v for k, v in FAMILIES["vit"]().state_dict().items() if "layers.1" not in k}
    model.load_state_dict(shallow, strict=False)
    with pytest.raises(ResumeError, match="16 tensors are missing"):
        model(torch.randn(1, 3, 16, 16))
    model.load_state_dict(FAMILIES["vit"]().state_dict())  # a whole checkpoint settles it
    model(torch.randn(1, 3, 16, 16))


def test_loading_a_head_alone_is_legitimate():
    model = FAMILIES["vit"]()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))  # numbers in its names, but no layers
    enable_exact_resume(model)
    head = {f"classifier.{k}": torch.zeros_like(v) for k, v in model.classifier.state_dict().items()}
    model.load_state_dict(head, strict=False)
    assert model(torch.randn(1, 3, 16, 16)).logits.abs().max() == 0
    # and so is everything but the head, as for a new task
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    assert model.load_state_dict(body, strict=False).unexpected_keys == []
    model(torch.randn(1, 3, 16, 16))


def test_sizes_that_differ_are_still_an_error(tmp_path):
    model = FAMILIES["vit"]()
    enable_exact_resume(model)
    ViTForImageClassification(ViTConfig(**{**PLAIN, "intermediate_size": 40}, num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_it_is_registered_once(tmp_path):
    model = FAMILIES["vit"]()
    model.save_pretrained(tmp_path)
    legacy = load_file(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(legacy, strict=True)
    enable_exact_resume(model)
    enable_exact_resume(model)
    assert len(model._load_state_dict_pre_hooks) == 1
    model.load_state_dict(legacy, strict=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_a_hook_of_their_own(duplicate, tmp_path):
    model = FAMILIES["vit"]()
    enable_exact_resume(model)
    twin = duplicate(model)
    enable_exact_resume(twin)
    assert len(twin._load_state_dict_pre_hooks) == 1
    other = FAMILIES["vit"]()
    other.save_pretrained(tmp_path)
    untouched = copy.deepcopy(model)
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert restored(twin, other) == len(other.state_dict())
    assert restored(model, untouched) == len(other.state_dict())


def test_a_conversion_that_fails_says_for_which_tensor(tmp_path):
    model = FAMILIES["dinov2-swiglu"]()
    model.save_pretrained(tmp_path)
    legacy = load_file(tmp_path / "model.safetensors")
    name = next(k for k in legacy if k.endswith("mlp.weights_in.bias"))
    enable_exact_resume(model)
    with pytest.raises(ResumeError, match="gate_proj.bias"):
        model.load_state_dict({**legacy, name: torch.tensor(1.0)}, strict=False)
