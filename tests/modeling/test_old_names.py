"""Recipes and adapters of transformers 4: names translated, and said so; the outputs are those of then."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.core_model_loading import revert_weight_conversion

from hf_vitprune import PruningPlan, prune, truncate
from hf_vitprune.errors import AdapterError
from hf_vitprune.modeling.peft_twin import tuner_layers
from hf_vitprune.peft import load_old_adapter, translate_peft_config
from hf_vitprune.peft.old_names import old_names
from tiny import assert_same, make, run
from tiny_adapters import adapted

VIT = "ViTForImageClassification"
RENAMED = [
    VIT,
    "DeiTForImageClassification",
    "SwinForImageClassification",
    "Dinov2ForImageClassification",
    "BeitForImageClassification",
]


def name_in_checkpoints(model: Any, name: str) -> str:
    """The module's name in files that transformers writes, which are those of transformers 4."""
    written = revert_weight_conversion(model, {f"{name}.weight": model.get_submodule(name).weight})
    return next(iter(written)).removesuffix(".weight")


#: what the parts of a layer were called in transformers 4
ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
MLP = {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
GATED = {"mlp.gate_proj": "mlp.weights_in", "mlp.up_proj": "mlp.weights_in", "mlp.down_proj": "mlp.weights_out"}
SWIN = {new: old.replace("attention.attention", "attention.self") for new, old in ATTENTION.items()}
#: class -> (layers today, layers then, parts of a layer)
THEN: dict[str, tuple[str, str, dict[str, str]]] = {
    VIT: ("vit.layers", "vit.encoder.layer", ATTENTION | MLP),
    "ViTModel": ("layers", "encoder.layer", ATTENTION | MLP),
    "DeiTForImageClassification": ("deit.layers", "deit.encoder.layer", ATTENTION | MLP),
    "ViTMSNForImageClassification": ("vit.layers", "vit.encoder.layer", ATTENTION | MLP),
    "IJepaForImageClassification": ("ijepa.layers", "ijepa.encoder.layer", ATTENTION | MLP),
    "BeitForImageClassification": ("beit.layers", "beit.encoder.layer", ATTENTION | MLP),
    "SwinForImageClassification": ("swin.encoder.layers", "swin.encoder.layers", SWIN | MLP),
    "Dinov2ForImageClassification": ("dinov2.encoder.layer", "dinov2.encoder.layer", ATTENTION),
    "Dinov2ForImageClassification-swiglu": ("dinov2.encoder.layer", "dinov2.encoder.layer", ATTENTION | GATED),
    "CLIPForImageClassification": ("vision_model.encoder.layers", "vision_model.encoder.layers", {}),
}


def check_names(model: Any, case: str) -> None:
    now, then, parts = THEN[case]
    table = old_names(model)
    for name in (name for name, module in model.named_modules() if isinstance(module, nn.Linear)):
        found = re.fullmatch(rf"{re.escape(now)}\.(\d+(?:\.blocks\.\d+)?)\.(.+)", name)
        assert table[name] == (f"{then}.{found[1]}.{parts.get(found[2], found[2])}" if found else name)


@pytest.mark.parametrize("case", THEN)
def test_names_are_those_of_then(case: str) -> None:
    model = make(case)
    check_names(model, case)

    class Own(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Own
    check_names(model, case)


def test_names_follow_from_the_model_and_not_from_the_file_it_was_loaded_from(tmp_path: Path) -> None:
    make("ViTModel").save_pretrained(tmp_path / "base")
    check_names(AutoModelForImageClassification.from_pretrained(tmp_path / "base"), VIT)
    small = prune(make(VIT), PruningPlan.random(make(VIT), 0.4, ["heads"]), stock=False)
    small.save_pretrained(tmp_path / "small")
    check_names(AutoModelForImageClassification.from_pretrained(tmp_path / "small"), VIT)


def to_transformers_4(folder: Path, model: Any, targets: Any) -> None:
    """Rewrite a saved adapter as transformers 4 and the PEFT of its time would have saved it."""
    file = folder / "adapter_model.safetensors"
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    renamed = {}
    for key, tensor in load_file(file).items():
        old = key
        for name in linears:
            if key.startswith(f"base_model.model.{name}."):
                old = key.replace(name, name_in_checkpoints(model, name))
        renamed[old] = tensor
    save_file(renamed, file, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = targets
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "lora") for case in RENAMED), *((case, "ia3") for case in RENAMED[1:3]), (VIT, "dora")]
)
def test_old_adapters(case: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mlp = ["fc1", "fc2"] if "Dinov2" in case else ["intermediate.dense", "output.dense"]
    config: Any = LoraConfig(
        r=3, target_modules=["q_proj", "v_proj", "o_proj", "fc1", "fc2"], modules_to_save=["classifier"]
    )
    config.use_dora = kind == "dora"
    if kind == "ia3":
        config = peft.IA3Config(
            target_modules=["q_proj", "o_proj", "fc1", "fc2"], feedforward_modules=["o_proj", "fc1", "fc2"]
        )
    model = adapted(make(case), config)
    expected = run(model)
    model.save_pretrained(str(tmp_path))
    old = ["query", *(["value"] if kind != "ia3" else []), "attention.output.dense", *mlp]
    to_transformers_4(tmp_path, make(case), old)
    if kind == "ia3":
        record = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**record, "feedforward_modules": old[1:]}))
    # as it is, PEFT refuses it; or, where one name has stayed the same, adapts that part alone, with no word
    if "Dinov2" in case:
        stock = PeftModel.from_pretrained(make(case), str(tmp_path))
        assert {name.rpartition(".")[2] for name in tuner_layers(stock.get_base_model())} == {"fc1", "fc2"}
    else:
        with pytest.raises(ValueError, match="[Tt]arget"):
            PeftModel.from_pretrained(make(case), str(tmp_path))
    with caplog.at_level(logging.WARNING):
        loaded = load_old_adapter(make(case), tmp_path).eval()
    assert "names of transformers 4" in caplog.text and "'query'" in caplog.text and "q_proj" in caplog.text
    assert_same(run(loaded), expected)
    layers = len(tuner_layers(model.get_base_model())) // 5
    if "Swin" not in case and kind == "lora":
        assert_same(run(truncate(loaded, layers - 1)), run(truncate(model, layers - 1)))
    # saved again, it has today's names
    loaded.save_pretrained(str(tmp_path / "new"))
    assert_same(run(PeftModel.from_pretrained(make(case), str(tmp_path / "new")).eval()), expected)
    caplog.clear()
    assert_same(run(load_old_adapter(make(case), tmp_path / "new").eval()), expected)
    assert not caplog.text


def test_an_old_adapter_in_a_subfolder(tmp_path: Path) -> None:
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["q_proj", "fc1"]))
    model.save_pretrained(str(tmp_path / "own"))
    to_transformers_4(tmp_path / "own", make(VIT), ["query", "intermediate.dense"])
    assert_same(run(load_old_adapter(make(VIT), tmp_path, subfolder="own").eval()), run(model))


def test_through_transformers(tmp_path: Path) -> None:
    """Which renames the tensors by itself, given the right config."""
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["q_proj", "fc2"], modules_to_save=["classifier"]))
    model.save_pretrained(str(tmp_path))
    to_transformers_4(tmp_path, make(VIT), ["query", "output.dense"])
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**record, "target_modules": r".*(query|layer\.\d+\.output\.dense)"})
    )
    base = make(VIT)
    base.load_adapter(
        str(tmp_path), peft_config=translate_peft_config(PeftConfig.from_pretrained(str(tmp_path)), base)
    )
    assert_same(run(base.eval()), run(model))


#: a recipe of then -> the modules it adapted, by their names of today ("0": of the first layer only)
RECIPES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "query and value": ({"target_modules": ["query", "value"]}, {"attention.q_proj", "attention.v_proj"}),
    "every dense": ({"target_modules": ["dense"]}, {"attention.o_proj", "mlp.fc1", "mlp.fc2"}),
    "output.dense is two": ({"target_modules": ["output.dense"]}, {"attention.o_proj", "mlp.fc2"}),
    "intermediate": ({"target_modules": ["intermediate.dense", "key"]}, {"attention.k_proj", "mlp.fc1"}),
    "attention only": ({"target_modules": ["attention.output.dense"]}, {"attention.o_proj"}),
    "a pattern": ({"target_modules": r".*attention\.(query|value)"}, {"attention.q_proj", "attention.v_proj"}),
    "one layer": ({"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"}, {"0.q_proj"}),
    "whole name": ({"target_modules": ["vit.encoder.layer.0.attention.attention.query"]}, {"0.q_proj"}),
    "excluded": (
        {"target_modules": ["dense"], "exclude_modules": ["attention.output.dense"]},
        {"mlp.fc1", "mlp.fc2"},
    ),
    "both ways": (
        {"target_modules": ["query", "value", "q_proj", "v_proj"]},
        {"attention.q_proj", "attention.v_proj"},
    ),
    "of today": ({"target_modules": ["q_proj", "fc1"]}, {"attention.q_proj", "mlp.fc1"}),
    "everything": (
        {"target_modules": "all-linear"},
        {f"attention.{x}_proj" for x in "qkvo"} | {"mlp.fc1", "mlp.fc2"},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    fields, expected = RECIPES[name]
    config = LoraConfig(r=2, task_type=None, **fields)
    before = config.to_dict()
    translated = translate_peft_config(config, make(VIT))
    assert config.to_dict() == before
    found = set(tuner_layers(get_peft_model(make(VIT), translated).get_base_model()))
    if any(part.startswith("0.") for part in expected):
        assert found == {"vit.layers.0.attention.q_proj"}
    else:
        assert found - {"classifier"} == {f"vit.layers.{i}.{part}" for i in range(3) for part in expected}


def test_patterns_and_whole_modules() -> None:
    config = LoraConfig(
        r=2,
        target_modules=["query", "output.dense"],
        rank_pattern={"attention.query": 4, "layer.1.output.dense": 3},
        alpha_pattern={"layer.2.attention.attention.query": 16},
        modules_to_save=["layer.1.intermediate.dense", "layernorm_after", "classifier"],
    )
    base = get_peft_model(make(VIT), translate_peft_config(config, make(VIT))).get_base_model()
    ranks = {name: layer.r["default"] for name, layer in tuner_layers(base).items()}  # type: ignore[attr-defined]
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {4}
    assert ranks["vit.layers.1.mlp.fc2"] == 3 and ranks["vit.layers.1.attention.o_proj"] == 2
    assert ranks["vit.layers.0.mlp.fc2"] == 2
    assert base.vit.layers[2].attention.q_proj.scaling["default"] == 4
    assert "default" in base.vit.layers[1].mlp.fc1.modules_to_save
    assert not hasattr(base.vit.layers[0].mlp.fc1, "modules_to_save")
    assert "default" in base.vit.layers[0].layernorm_after.modules_to_save


def test_dinov2_gate_and_value_were_one() -> None:
    model = make("Dinov2ForImageClassification-swiglu")
    config = translate_peft_config(LoraConfig(target_modules=["weights_in", "weights_out"]), model)
    assert config.target_modules == {"gate_proj", "up_proj", "down_proj"}


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"neither .* q_proj, k_proj, v_proj, o_proj, fc1, fc2, classifier"):
        translate_peft_config(LoraConfig(target_modules=["qkv"]), make(VIT))
    model = adapted(make(VIT), LoraConfig(r=3, target_modules=["q_proj", "fc1"]))
    model.save_pretrained(str(tmp_path / "vit"))
    to_transformers_4(tmp_path / "vit", make(VIT), ["query", "intermediate.dense"])
    for other in ("SwinForImageClassification", "CLIPForImageClassification"):
        with pytest.raises(AdapterError, match="target_modules|found no place"):
            load_old_adapter(make(other), tmp_path / "vit")
    with pytest.raises(AdapterError, match=r"[24] of its tensors found no place"):
        load_old_adapter(make(VIT, num_hidden_layers=2), tmp_path / "vit")
    swiglu = "Dinov2ForImageClassification-swiglu"
    model = adapted(make(swiglu), LoraConfig(r=3, target_modules=["up_proj"]))
    model.save_pretrained(str(tmp_path / "dino"))
    file = tmp_path / "dino" / "adapter_model.safetensors"
    save_file({k.replace("up_proj", "weights_in"): t for k, t in load_file(file).items()}, file, {"format": "pt"})
    record = json.loads((tmp_path / "dino" / "adapter_config.json").read_text())
    (tmp_path / "dino" / "adapter_config.json").write_text(json.dumps({**record, "target_modules": ["weights_in"]}))
    with pytest.raises(AdapterError, match="gate_proj and .*up_proj today"):
        load_old_adapter(make(swiglu), tmp_path / "dino")
