"""One backbone for many tasks: every adapter, when active, computes what it computes when loaded alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification

from hf_vitprune import prune, truncate
from hf_vitprune.errors import AdapterError
from hf_vitprune.peft import ConvpassConfig, share_backbone
from hf_vitprune.plan.plan import PruningPlan
from tiny import CLASSIFIERS, assert_same, images, make, run
from tiny_adapters import CONFIGS, adapted, randomize

VIT = "ViTForImageClassification"
FAMILIES = [case for case in CLASSIFIERS if "swiglu" not in case]


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModelForImageClassification.from_pretrained(path, **kwargs).eval()


def task(folder: Path, name: str, depth: int, config: Any, labels: int = 5) -> dict[str, torch.Tensor]:
    """Train (well, draw) and save one task's adapter and classifier on the dense model; its outputs."""
    names = {i: f"{name} {i}" for i in range(labels)}
    base = load(folder / "dense", id2label=names, ignore_mismatched_sizes=True)
    model = randomize(get_peft_model(base, config), seed=len(name) + depth).eval()
    small = prune(model, PruningPlan.dense(model).keep_layers(range(depth)), allow_unchanged=True)
    small.save_pretrained(str(folder / name))
    return run(small, output_hidden_states=True)


def loaded(folder: Path, names: list[str], how: str) -> Any:
    base = share_backbone(load(folder / "dense"))
    if how == "transformers":
        for name in names:
            base.load_adapter(str(folder / name), name)
        return base.eval()
    model = PeftModel.from_pretrained(base, str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), name)
    return model.eval()


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (VIT, "peft"),
        ("SwinForImageClassification", "transformers"),
        *(pytest.param(case, how, marks=pytest.mark.slow) for case in FAMILIES for how in ("peft", "transformers")),
    ],
)
def test_every_family(case: str, how: str, tmp_path: Path) -> None:
    make(case, num_labels=5).save_pretrained(tmp_path / "dense")
    layers = len(PruningPlan.dense(make(case)).layers)
    depths = {"deep": layers, "middle": layers - 1, "flat": layers - 2}
    config = {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}
    alone = {
        name: task(tmp_path, name, depth, LoraConfig(r=2 + i, **config), labels=4 + i)
        for i, (name, depth) in enumerate(depths.items())
    }
    model = loaded(tmp_path, list(depths), how)
    for name in (*depths, *reversed(depths)):
        model.set_adapter(name)
        assert_same(run(model, output_hidden_states=True), alone[name])
        inner = model if how == "transformers" else model.get_base_model()
        assert inner.config.id2label[0] == f"{name} 0" and inner.config.num_labels == len(alone[name]["logits"][0])


@pytest.mark.parametrize(
    "kind",
    ["adalora", "convpass", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS if kind != "vblora")],
)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    alone = {f"to{depth}": task(tmp_path, f"to{depth}", depth, CONFIGS[kind](make(VIT))) for depth in (1, 2)}
    for how in ("peft", "transformers"):
        if kind in ("vera", "randlora") and how == "transformers":
            continue  # matrices that layers share: PEFT has them in a PeftModel only
        model = loaded(tmp_path, list(alone), how)
        for name in (*alone, *alone):
            model.set_adapter(name)
            assert_same(run(model, output_hidden_states=True), alone[name])


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    depths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    order=st.permutations(range(4)),
    how=st.sampled_from(["peft", "transformers"]),
)
def test_any_depths_in_any_order(depths: list[int], order: list[int], how: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("shared")
    make(VIT, num_hidden_layers=6).save_pretrained(folder / "dense")
    names = [f"task{'x' * i}" for i in range(len(depths))]
    targets = (["q_proj"], ["fc2", "v_proj"], ["k_proj"], ["fc1"])
    alone = {
        name: task(folder, name, depth, LoraConfig(r=2, target_modules=target, modules_to_save=["classifier"]), 3 + i)
        for i, (name, depth, target) in enumerate(zip(names, depths, targets, strict=False))
    }
    model = loaded(folder, names, how)
    for i in order:
        if i < len(names):
            model.set_adapter(names[i])
            assert_same(run(model, output_hidden_states=True), alone[names[i]])


def test_the_tasks_of_one_batch_agree(tmp_path: Path) -> None:
    make(VIT, num_labels=5).save_pretrained(tmp_path / "dense")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    alone = {name: task(tmp_path, name, depth, config) for name, depth in (("flat", 1), ("deep", 2))}
    model = loaded(tmp_path, ["flat", "deep"], "peft")
    pixels = images()
    with torch.no_grad():
        for name in ("flat", "deep"):  # whichever is active
            out = model(pixel_values=pixels, adapter_names=[name] * len(pixels))
            assert torch.allclose(out.logits, alone[name]["logits"], atol=1e-6)
        for other in ("deep", "__base__"):
            with pytest.raises(AdapterError, match="in one batch"):
                model(pixel_values=pixels, adapter_names=["flat"] + [other] * (len(pixels) - 1))


def test_the_backbone_is_there_once_and_unharmed(tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    alone = {name: task(tmp_path, name, depth, config) for name, depth in (("one", 1), ("two", 2))}
    model = loaded(tmp_path, ["one", "two"], "peft")
    dense = load(tmp_path / "dense")
    backbone = {n for n, _ in model.named_parameters() if "lora_" not in n and "modules_to_save" not in n}
    assert len(backbone) == len(list(dense.parameters()))
    # adapters sit in the layers that their task kept, and are saved as they came
    assert not any("layers.2" in name for name, _ in model.named_parameters() if "lora_" in name)
    model.save_pretrained(str(tmp_path / "again"))
    for name in alone:
        assert_same(run(load(tmp_path / "again" / name)), run(load(tmp_path / name)))
    # copies switch on their own
    copied = copy.deepcopy(model)
    copied.set_adapter("two")
    model.set_adapter("one")
    for each, name in ((copied, "two"), (model, "one"), (copied, "two")):
        assert_same(run(each, output_hidden_states=True), alone[name])
    # without adapters, it is the dense model
    with model.disable_adapter():
        assert_same(run(model, output_hidden_states=True), run(dense, output_hidden_states=True))
    assert_same(run(model, output_hidden_states=True), alone["one"])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert_same(run(model, output_hidden_states=True), alone["two"])
    base = model.unload()
    base.classifier = dense.classifier  # PEFT leaves the adapter's
    assert_same(run(base), run(dense))
    base.save_pretrained(tmp_path / "unharmed")
    assert_same(load(tmp_path / "unharmed").state_dict(), dense.state_dict())


def test_training_on_a_shared_backbone(tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    other = task(tmp_path, "other", 2, config, labels=3)
    task(tmp_path, "mine", 1, config, labels=4)
    base = share_backbone(load(tmp_path / "dense"))
    model = PeftModel.from_pretrained(base, str(tmp_path / "other"), adapter_name="other")
    model.load_adapter(str(tmp_path / "mine"), "mine", is_trainable=True)
    model.set_adapter("mine")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(pixel_values=images(), labels=torch.tensor([3, 0])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.set_adapter("other")
    assert_same(run(model, output_hidden_states=True), other)


def test_refused(tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    for name, depth in (("one", 1), ("two", 2)):
        task(tmp_path, name, depth, config)
    # without it: the second depth is refused, and the first stays right
    model = PeftModel.from_pretrained(load(tmp_path / "dense"), str(tmp_path / "two"))
    before = run(model)
    injected = load(tmp_path / "dense")
    injected.load_adapter(str(tmp_path / "two"))
    for each, arguments in ((model, ("one",)), (injected, ("one",))):
        with pytest.raises(AdapterError, match="share_backbone"):
            each.load_adapter(str(tmp_path / "one"), *arguments)
        assert_same(run(each), before)
    # not a backbone to share
    for bad in (truncate(make(VIT), 2), model.get_base_model(), model, torch.nn.Linear(2, 2)):
        with pytest.raises(AdapterError):
            share_backbone(bad)
    # what a shared one cannot do
    model = loaded(tmp_path, ["one", "two"], "peft")
    for call in (model.merge_and_unload, model.merge_adapter, lambda: truncate(model, 1)):
        with pytest.raises(AdapterError, match="base of its own|base model of its own"):
            call()
    model.set_adapter("one")
    with pytest.raises(AdapterError, match="whole model"):
        model.get_base_model().vit(images())
    with pytest.raises(ValueError, match="size"):
        run(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(AdapterError, match="whole model"):  # also after a run that failed
        model.get_base_model().vit(images())
    for name, depth in (("bare1", 1), ("bare2", 2)):
        task(tmp_path, name, depth, LoraConfig(r=2, target_modules=["q_proj"]))
    bare = loaded(tmp_path, ["bare1", "bare2"], "peft")
    bare.base_model.set_adapter(["bare1", "bare2"])
    with pytest.raises(AdapterError, match="active together"):
        run(bare)
    # layers that are not the first ones
    gap = prune(adapted(load(tmp_path / "dense"), config), PruningPlan.dense(make(VIT)).keep_layers([0, 2]))
    gap.save_pretrained(str(tmp_path / "gap"))
    with pytest.raises(AdapterError, match=r"keeps layers \[0, 2\]"):
        model.load_adapter(str(tmp_path / "gap"), "gap")
    narrow = prune(adapted(load(tmp_path / "dense"), config), PruningPlan.random(make(VIT), 0.4, ["mlp"]))
    narrow.save_pretrained(str(tmp_path / "narrow"))
    with pytest.raises(AdapterError, match="load the pruned base"):
        model.load_adapter(str(tmp_path / "narrow"), "narrow")
    with pytest.raises(AdapterError, match="base model is a dense vit of 4 layers"):
        PeftModel.from_pretrained(share_backbone(make(VIT, num_hidden_layers=4)), str(tmp_path / "one"))


def test_kinds_side_by_side(tmp_path: Path) -> None:
    """transformers lets adapters of several kinds into one model; so do shared backbones."""
    make(VIT).save_pretrained(tmp_path / "dense")
    alone = {
        "lora": task(tmp_path, "lora", 2, CONFIGS["lora"](make(VIT))),
        "conv": task(tmp_path, "conv", 1, ConvpassConfig(r=4, modules_to_save=["classifier"])),
    }
    model = loaded(tmp_path, ["lora", "conv"], "transformers")
    for name in (*alone, *alone):
        model.set_adapter(name)
        assert_same(run(model, output_hidden_states=True), alone[name])
