"""A narrowed PeftModel in a folder, as anybody saves one: whole, movable, on the Hub, in checkpoints of a Trainer."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)

from hf_vitprune import PruningPlan, PruningTrainer, VTPConfig, get_pruning_model, prune
from hf_vitprune.errors import CheckpointMismatchError, NotFiniteError
from hf_vitprune.peft import save_pruned_peft
from hub_standin import HubStandIn, hub_environment
from processes import ROOT
from pruning_runs import QUIET, Images
from tiny import SIZE, assert_same, make, run
from tiny_adapters import adapted
from tiny_composites import COMPOSITES, outputs

VIT = "ViTForImageClassification"
load = AutoModelForImageClassification.from_pretrained


def narrowed(kind: str = "lora") -> Any:
    model = adapted(make(VIT), kind)
    return prune(model, PruningPlan.random(model, 0.4))


WAYS: dict[str, Callable[[Path], Any]] = {
    "AutoModel": load,
    "AutoModel, subfolder": lambda folder: load(folder.parent, subfolder=folder.name),
    "AutoPeftModel": AutoPeftModel.from_pretrained,
    "PeftModel": lambda folder: PeftModel.from_pretrained(load(folder / "base"), folder),
    "PeftModel, base as a subfolder": lambda folder: PeftModel.from_pretrained(load(folder, subfolder="base"), folder),
    "PeftModel over the folder": lambda folder: PeftModel.from_pretrained(load(folder), folder),
    "PeftModel, subfolder": lambda folder: PeftModel.from_pretrained(
        load(folder.parent, subfolder=f"{folder.name}/base"), folder.parent, subfolder=folder.name
    ),
    "pipeline": lambda folder: pipeline("image-classification", model=str(folder)).model,
}


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_saved_as_any_model_and_moved(kind: str, tmp_path: Path) -> None:
    small = narrowed(kind)
    expected = run(small)
    small.save_pretrained(tmp_path / "here")
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    for way in WAYS.values():
        assert_same(run(way(tmp_path / "there").eval()), expected)


def test_saved_from_what_was_loaded(tmp_path: Path) -> None:
    small = narrowed()
    small.save_pretrained(tmp_path / "a")
    for i, way in enumerate((load, AutoPeftModel.from_pretrained)):
        way(tmp_path / "a").save_pretrained(tmp_path / str(i))
        for again in (load, AutoPeftModel.from_pretrained):
            assert_same(run(again(tmp_path / str(i)).eval()), run(small))
    loaded = AutoPeftModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "a")  # over itself
    assert_same(run(load(tmp_path / "a").eval()), run(small))


def test_copies_are_saved_with_their_own_base(tmp_path: Path) -> None:
    small = narrowed()
    other = copy.deepcopy(small)
    pickle.dumps(other.peft_config["default"])
    with torch.no_grad():
        other.get_base_model().classifier.original_module.weight.add_(1)
        other.get_base_model().vit.layernorm.weight.add_(1)
    small.save_pretrained(tmp_path / "small")
    other.save_pretrained(tmp_path / "other")
    assert_same(run(load(tmp_path / "small").eval()), run(small))
    assert_same(run(load(tmp_path / "other").eval()), run(other))
    assert not torch.equal(run(small)["logits"], run(other)["logits"])


def test_adapters_that_were_put_on_a_small_model(tmp_path: Path) -> None:
    """Of a Pruned class and of a stock one; with PEFT's call and with transformers'."""
    model = make(VIT)
    plan = PruningPlan.magnitude(model, 0.5, units=["mlp"])
    for i, stock in enumerate((False, True)):
        small = prune(model, plan, stock=stock)
        tuned = get_peft_model(small, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
        assert (type(small).__name__ == VIT) is stock
        if stock:
            save_pruned_peft(tuned, tmp_path / f"peft{i}")
        else:
            tuned.save_pretrained(tmp_path / f"peft{i}")
        shutil.move(tmp_path / f"peft{i}", tmp_path / f"moved{i}")
        assert_same(run(load(tmp_path / f"moved{i}").eval()), run(tuned))
        assert_same(run(AutoPeftModel.from_pretrained(tmp_path / f"moved{i}").eval()), run(tuned))
    small = prune(model, plan, stock=False)
    small.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    small.eval().save_pretrained(tmp_path / "injected")
    assert_same(run(load(tmp_path / "injected").eval()), run(small))


def test_several_adapters_share_one_base(tmp_path: Path) -> None:
    model = adapted(make(VIT), "lora")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    small = prune(model, PruningPlan.random(model, 0.4))
    small.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "other" / "base").exists()
    shutil.move(tmp_path / "a", tmp_path / "b")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "b")
    loaded.load_adapter(tmp_path / "b" / "other", "other")
    alone = AutoPeftModel.from_pretrained(tmp_path / "b" / "other").eval()
    for name in ("default", "other"):
        small.set_adapter(name)
        loaded.set_adapter(name)
        assert_same(run(loaded.eval()), run(small.eval()))
    assert_same(run(alone), run(small))


def test_the_base_is_somewhere_else(tmp_path: Path) -> None:
    """Named once, it is not written again: not by later saves, and not by what was loaded."""
    small = narrowed()
    save_pruned_peft(small, tmp_path / "whole")
    base = str(tmp_path / "whole" / "base")
    save_pruned_peft(small, tmp_path / "alone", base=base)
    small.save_pretrained(tmp_path / "again")
    AutoPeftModel.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "loaded")
    for name in ("alone", "again", "loaded"):
        assert not (tmp_path / name / "base").exists()
        assert_same(run(load(tmp_path / name).eval()), run(small))


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    narrowed().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["vit.layernorm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"lacks 1 tensors of the encoder"):
        load(tmp_path)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    small = narrowed()
    next(p for name, p in small.named_parameters() if "lora_B" in name).data[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"1 tensors of the .* are not finite \(.*lora_B.*it is not saved"):
        small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized model"):
        load(tmp_path)


def test_inside_a_bigger_model(tmp_path: Path) -> None:
    host, inputs = COMPOSITES["LLaVA"]()
    lora = LoraConfig(r=2, target_modules=r".*vision_tower.*(q_proj|fc1)", init_lora_weights=False)
    model = get_peft_model(host, lora).eval()
    small = prune(model, PruningPlan.random(model, 0.4, ["heads", "mlp"], part="vision"))
    small.save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    expected = outputs(small, inputs)
    for way in (AutoModelForImageTextToText.from_pretrained, AutoPeftModel.from_pretrained):
        assert_same(outputs(way(tmp_path / "there").eval(), inputs), expected)


# ---------------------------------------------------------------------- trainings
def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 0}
    return TrainingArguments(str(folder), **{**QUIET, "learning_rate": 1e-2, **more, **settings})


@pytest.mark.parametrize("trainer_class", [Trainer, PruningTrainer])
def test_checkpoints_of_a_small_peft_model(trainer_class: Any, tmp_path: Path) -> None:
    narrowed().save_pretrained(tmp_path / "small")

    def trainer(**settings: Any) -> Any:
        model = AutoPeftModel.from_pretrained(tmp_path / "small", is_trainable=True)
        return trainer_class(model, arguments(tmp_path / "run", **settings), train_dataset=Images(16))

    whole = trainer()
    whole.train()
    expected = run(whole.model.eval())
    assert not torch.equal(expected["logits"], run(load(tmp_path / "small").eval())["logits"])
    assert_same(run(load(tmp_path / "run" / "checkpoint-4").eval()), expected)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_same(run(resumed.model.eval()), expected)
    resumed.save_model(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert_same(run(load(tmp_path / "moved").eval()), expected)


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    small = narrowed()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    args = arguments(tmp_path, **settings, metric_for_best_model="eval_loss", learning_rate=1e3)
    labelled = torch.utils.data.Subset(Images(16), [0, 1, 2, 3])
    trainer = PruningTrainer(small, args, train_dataset=Images(16), eval_dataset=labelled)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name != "checkpoint-4"  # such a rate makes it worse
    assert_same(run(trainer.model.eval()), run(load(trainer.state.best_model_checkpoint).eval()))


def test_a_pruning_training_leaves_a_whole_folder(tmp_path: Path) -> None:
    pm = get_pruning_model(adapted(make(VIT), "lora"), VTPConfig(pruning_ratio=0.4, round_to=4))
    trainer = PruningTrainer(pm, arguments(tmp_path / "run", save_strategy="no"), train_dataset=Images(16))
    trainer.train()
    trainer.save_model(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_same(run(load(tmp_path / "there").eval()), run(pm.export()))


# ---------------------------------------------------------------------- the Hub
SCRIPT = """
import json, sys, torch
sys.path[:0] = ["tests/support", "tests/peft"]
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageClassification, pipeline, ViTImageProcessor
from hf_vitprune import push_to_hub
from test_adapters_folder import narrowed
from tiny import run, SIZE
load = AutoModelForImageClassification.from_pretrained
if sys.argv[1] == "push":
    small = narrowed()
    small.push_to_hub("tester/by-peft")
    push_to_hub(small, "tester/by-us", image_processor=ViTImageProcessor(size={"height": SIZE, "width": SIZE}))
    models = [small]
else:
    models = [
        load("tester/by-peft"),
        load("tester/by-us"),
        AutoPeftModel.from_pretrained("tester/by-peft"),
        PeftModel.from_pretrained(load("tester/by-us", subfolder="base"), "tester/by-us"),
        pipeline("image-classification", model="tester/by-us").model,
    ]
print(json.dumps([run(model.eval())["logits"].tolist() for model in models]))
"""


@pytest.mark.slow
def test_the_hub(tmp_path: Path) -> None:
    def process(what: str, env: dict[str, str]) -> Any:
        done = subprocess.run([sys.executable, "-c", SCRIPT, what], env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    with HubStandIn(lfs=True) as hub:
        (expected,) = process("push", hub_environment(hub, tmp_path / "a"))
        for logits in process("pull", hub_environment(hub, tmp_path / "b")):
            assert torch.equal(torch.tensor(logits), torch.tensor(expected))
        for repo in ("tester/by-us", "tester/by-peft"):
            assert json.loads(hub.files(repo)["adapter_config.json"])["base_model_name_or_path"] == repo
