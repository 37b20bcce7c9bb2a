"""Adapters that PEFT's own calls put on a pruned model: saved, they load onto that model and no other."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_vitprune.errors import AdapterError
from hf_vitprune.peft import pruned_adapter_config, save_pruned_peft
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune, truncate
from plans import uneven
from tiny import LABELS, assert_same, images, make, relative_error, run
from tiny_adapters import adapted, randomize

VIT = "ViTForImageClassification"
CUTS = {
    "fewer layers": lambda plan: uneven(plan.keep_layers([0, 2])),
    "narrow MLP": lambda plan: uneven(PruningPlan.random(make(VIT), 0.4, ["mlp"])),
}


def small_in(folder: Path, cut: str = "narrow MLP") -> Any:
    """A pruned model, saved and loaded."""
    small = prune(make(VIT), CUTS[cut](PruningPlan.dense(make(VIT))), stock=False)
    small.save_pretrained(folder / "base")
    return load(folder)


def load(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder / "base").eval()


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=3, **{"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], **fields})


def rows() -> list[dict[str, Any]]:
    pixels = images()
    return [{"pixel_values": pixels[i % len(pixels)], "labels": i % LABELS} for i in range(8)]


def type_in(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("cut", CUTS)
def test_refused_by_the_dense_model_and_exact_on_its_own(cut: str, tmp_path: Path) -> None:
    config = lora()
    model = randomize(get_peft_model(small_in(tmp_path, cut), config)).eval()
    second = lora(target_modules=["fc1"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.save_pretrained(tmp_path / "adapter")
    for own in (config, second):  # they serve for other models
        assert type(own) is LoraConfig and own.peft_type == "LORA"
    for folder in (tmp_path / "adapter", tmp_path / "adapter" / "second"):
        assert type_in(folder) == "VITPRUNE_LORA"
        other = make(VIT)
        before = run(other)
        with pytest.raises(AdapterError, match="pruned base model that was saved with it"):
            PeftModel.from_pretrained(other, str(folder))
        with pytest.raises(AdapterError, match="pruned base model that was saved with it"):
            other.load_adapter(str(folder))
        assert_same(run(other), before)
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    again.load_adapter(str(tmp_path / "adapter" / "second"), "second")
    for name in ("default", "second"):
        for each in (model, again):
            each.set_adapter(name)
        assert_same(run(again), run(model))
    alone = PeftModel.from_pretrained(load(tmp_path), str(tmp_path / "adapter")).eval()
    assert_same(run(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").eval()), run(alone))


@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3", "lokr", "vera", "repadapter", "convpass"])
def test_kinds(kind: str, tmp_path: Path) -> None:
    model = adapted(small_in(tmp_path), kind)
    model.save_pretrained(tmp_path / "adapter")
    assert type_in(tmp_path / "adapter").startswith("VITPRUNE_")
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(make(VIT), str(tmp_path / "adapter"))
    assert_same(run(PeftModel.from_pretrained(load(tmp_path), str(tmp_path / "adapter")).eval()), run(model))


def test_an_adapter_without_a_target(tmp_path: Path) -> None:
    """Only the classifier is trained: every shape fits the dense model."""
    model = randomize(get_peft_model(small_in(tmp_path), lora(target_modules=["classifier"], modules_to_save=None)))
    model.eval().save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(make(VIT), str(tmp_path / "adapter"))
    assert_same(run(AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()), run(model))


def test_adapters_of_transformers(tmp_path: Path) -> None:
    model = small_in(tmp_path)
    model.add_adapter(lora(modules_to_save=None))
    randomize(model).eval().save_pretrained(tmp_path / "adapter")
    assert type_in(tmp_path / "adapter") == "VITPRUNE_LORA"
    with pytest.raises(AdapterError):
        make(VIT).load_adapter(str(tmp_path / "adapter"))
    again = load(tmp_path)
    again.load_adapter(str(tmp_path / "adapter"))
    assert_same(run(again.eval()), run(model))


def test_trained_and_saved_by_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[]
    )
    model = get_peft_model(small_in(tmp_path), lora())
    trainer = Trainer(model, args, train_dataset=Dataset.from_list(rows()).with_format("torch"))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert_same(run(AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()), run(model.eval()))
    resumed = get_peft_model(load(tmp_path), lora())
    Trainer(resumed, args, train_dataset=Dataset.from_list(rows()).with_format("torch")).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
    )
    assert_same(run(resumed.eval()), run(model.eval()))


def test_pruned_and_merged_further(tmp_path: Path) -> None:
    model = randomize(get_peft_model(small_in(tmp_path), lora())).eval()
    plan = PruningPlan.random(model, 0.3)
    again = prune(model, plan, stock=False)
    assert relative_error(run(again)["logits"], run(mask(model, plan))["logits"]) < 1e-5
    expected = run(model)["logits"]
    plain = model.merge_and_unload()
    assert relative_error(run(plain)["logits"], expected) < 1e-5 and not hasattr(plain, "peft_config")
    assert relative_error(run(get_peft_model(plain, lora()))["logits"], expected) < 1e-5


def test_a_stock_library_does_not_know_the_type(tmp_path: Path) -> None:
    get_peft_model(small_in(tmp_path), lora()).save_pretrained(tmp_path / "adapter")
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path / 'adapter')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "VITPRUNE_LORA" in done.stderr


@pytest.mark.parametrize(
    "way", ["as pruned", "copied", "truncated, loaded", "loaded", "add_adapter", "trained", "made elsewhere"]
)
def test_adapters_of_a_pruned_model_of_a_stock_class(way: str, tmp_path: Path) -> None:
    narrow = PruningPlan.magnitude(make(VIT), 0.5, units=["mlp"])
    small = truncate(make(VIT), 2) if "truncated" in way else prune(make(VIT), narrow)
    small.save_pretrained(tmp_path / "base")
    assert type(small) is type(make(VIT))
    small = small if way == "as pruned" else copy.deepcopy(small) if way == "copied" else load(tmp_path)
    if way == "add_adapter":
        config = lora(modules_to_save=None)
        small.add_adapter(config)
        model = randomize(small)
    else:
        config = lora()
        model = randomize(get_peft_model(small, config))
    if way == "trained":
        args = TrainingArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=[])
        Trainer(model, args, train_dataset=Dataset.from_list(rows()).with_format("torch")).train()
    if way == "made elsewhere":  # as in a process without this library; loaded here, and saved again
        small._state_dict_pre_hooks.clear()
        model.save_pretrained(tmp_path / "adapter")
        assert type_in(tmp_path / "adapter") == "LORA"
        model = PeftModel.from_pretrained(load(tmp_path), str(tmp_path / "adapter"))
    model.eval().save_pretrained(tmp_path / "adapter")
    assert type_in(tmp_path / "adapter") == "VITPRUNE_LORA"
    assert type(config) is LoraConfig  # it serves for other models
    with pytest.raises(AdapterError, match="pruned base model that was saved with it"):
        PeftModel.from_pretrained(make(VIT), str(tmp_path / "adapter"))
    with pytest.raises(AdapterError, match="pruned base model that was saved with it"):
        make(VIT).load_adapter(str(tmp_path / "adapter"))
    for again in (
        PeftModel.from_pretrained(load(tmp_path), str(tmp_path / "adapter")),
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),
    ):
        assert_same(run(again.eval()), run(model))


@pytest.mark.parametrize("known", [True, False])
def test_configs_of_further_adapters_stay_the_caller_s(known: bool, tmp_path: Path) -> None:
    small = prune(make(VIT), PruningPlan.magnitude(make(VIT), 0.5, units=["mlp"]))
    configs = {name: lora() for name in ("default", "second", "third")}
    model = get_peft_model(small, configs["default"])
    if not known:  # the adapters were put on before this library was imported
        small._state_dict_pre_hooks.clear()
        model.base_model.peft_config = small.peft_config = dict(configs)
    for name in list(configs)[1:]:
        model.peft_config.pop(name, None)
        model.add_adapter(name, configs[name])
    save_pruned_peft(model, tmp_path / "adapter")
    for name, config in configs.items():
        assert type(config) is LoraConfig and config.peft_type == "LORA"
        assert type_in(tmp_path / "adapter" / ("" if name == "default" else name)) == "VITPRUNE_LORA"
    dense = get_peft_model(make(VIT), configs["second"])
    dense.save_pretrained(tmp_path / "dense")
    assert type_in(tmp_path / "dense") == "LORA"


def test_adapters_of_dense_models_stay_stock(tmp_path: Path) -> None:
    get_peft_model(make(VIT), lora()).save_pretrained(tmp_path / "adapter")
    assert type_in(tmp_path / "adapter") == "LORA"


def test_the_documented_call(tmp_path: Path) -> None:
    small = small_in(tmp_path)
    model = randomize(get_peft_model(small, pruned_adapter_config(small, lora()))).eval()
    assert model.peft_type == "VITPRUNE_LORA"
    model.add_adapter("second", pruned_adapter_config(small, lora()))
    assert save_pruned_peft(model, tmp_path / "adapter") == tmp_path / "adapter" / "base"
    assert_same(run(AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()), run(model))
    with pytest.raises(AdapterError, match="not pruned"):
        pruned_adapter_config(make(VIT), lora())
