"""Truncated PEFT models: exact, small on disk, loaded in one call, and stock models once merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

from hf_vitprune.errors import AdapterError, CheckpointMismatchError
from hf_vitprune.modeling.native import to_native
from hf_vitprune.modeling.peft_twin import tuner_layers
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune, truncate
from hf_vitprune.spec.architecture import Architecture
from processes import run_python
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, reset_weights, run
from tiny_adapters import CONFIGS, adapted

VIT = "ViTForImageClassification"
#: kinds that the issue of layer-wise pruning names, and those of our own
NAMED = ("lora", "rslora", "dora", "adalora", "ia3", "vera", "loha", "repadapter", "convpass")


def skipping(model: Any, k: int) -> Any:
    """A copy of the full PEFT model that runs its first ``k`` layers, all else as it was."""
    copied = copy.deepcopy(model)
    base = copied.get_base_model()
    architecture = Architecture.of(base)
    prefix = architecture.family.encoder_path(base)
    names = architecture.layer_names()
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        kept = [base.get_submodule(prefix + name) for name in names[:k] if name.rpartition(".")[0] == path]
        parent, _, leaf = (prefix + path).rpartition(".")
        setattr(base.get_submodule(parent), leaf, nn.ModuleList(kept))
    return copied


def with_head(model: nn.Module, kind: str) -> peft.PeftConfig:
    config = CONFIGS[kind](model)
    config.modules_to_save = ["classifier"]  # type: ignore[attr-defined]
    return config


@pytest.mark.parametrize("kind", CONFIGS)
@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(case=st.sampled_from(CLASSIFIERS), left=st.floats(0, 0.99))
def test_truncated_equals_skipped(kind: str, case: str, left: float) -> None:
    if kind == "convpass" and "Swin" in case:
        return
    stock = make(case)
    architecture = Architecture.of(stock)
    lowest = 1 if architecture.depths is None else 1 + sum(architecture.depths[:-1])
    k = lowest + int(left * (len(architecture.layers) - lowest))
    model = adapted(stock, with_head(stock, kind))
    small = truncate(model, k)
    assert_same(run(small, output_hidden_states=True), run(skipping(model, k), output_hidden_states=True))
    assert len(Architecture.of(small).layers) == k
    # nothing of the removed layers is left, and the head is the trained one
    gone = [f".{name}." for name in architecture.layer_names()[k:]]
    assert not [name for name in small.state_dict() if any(part in name for part in gone)]
    heads = [m.get_base_model().classifier.modules_to_save["default"].weight for m in (model, small)]
    assert torch.equal(*heads) and heads[0] is not heads[1]
    before = {n for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in gone)}
    assert {n for n, p in small.named_parameters() if p.requires_grad} == before


def pretrained(folder: Path, case: str = VIT, labels: int = 7) -> Path:
    """A checkpoint of other labels than the task's."""
    make(case, num_labels=labels).save_pretrained(folder / "dense")
    return folder / "dense"


def for_task(path: Path, **names: Any) -> Any:
    labels = {i: f"species {i}" for i in range(5)}
    model = AutoModelForImageClassification.from_pretrained(path, id2label=labels, ignore_mismatched_sizes=True)
    reset_weights(model.classifier, 4)
    return model


@pytest.mark.parametrize("kind", [k for k in NAMED if k not in ("rslora", "dora", "loha")])
def test_what_is_on_disk(kind: str, tmp_path: Path) -> None:
    base = for_task(pretrained(tmp_path))
    model = adapted(base, with_head(base, kind))
    backbone = (tmp_path / "dense" / "model.safetensors").stat().st_size
    sizes = {}
    for k in (1, 2):
        small = truncate(model, k)
        small.save_pretrained(str(tmp_path / f"to{k}"))
        files = {f.name for f in (tmp_path / f"to{k}").iterdir()}
        assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
        tensors = load_file(tmp_path / f"to{k}" / "adapter_model.safetensors")
        layers = {name.split("layers.")[1].split(".")[0] for name in tensors if "layers." in name}
        assert layers == {str(i) for i in range(k)}
        assert {name for name in tensors if "classifier" in name} == {
            f"base_model.model.classifier.{n}" for n in ("weight", "bias")
        }
        record = json.loads((tmp_path / f"to{k}" / "adapter_config.json").read_text())["pruning"]
        assert record["kept_layers"] == list(range(k)) and record["labels"]["4"] == "species 4"
        sizes[k] = sum(t.numel() for name, t in tensors.items() if "layers." in name)
    if kind != "vera":  # shares its matrices
        assert sizes[2] == 2 * sizes[1]
    assert sum(t.numel() * 4 for t in tensors.values()) < backbone


@pytest.mark.parametrize("kind", ["lora", "adalora", "vera", "repadapter"])
def test_loaded_in_one_call(kind: str, tmp_path: Path) -> None:
    """Also where the checkpoint is of another data set: the adapter brings its classifier and labels."""
    base = for_task(pretrained(tmp_path))
    small = truncate(adapted(base, with_head(base, kind)), 2)
    small.save_pretrained(str(tmp_path / "adapter"))
    expected = run(small, output_hidden_states=True)
    folder = str(tmp_path / "adapter")

    def injected() -> Any:
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
        model.load_adapter(folder)
        return model

    ways = {
        "peft": lambda: PeftModel.from_pretrained(
            AutoModelForImageClassification.from_pretrained(tmp_path / "dense"), folder
        ),
        "auto peft": lambda: AutoPeftModel.from_pretrained(folder),
        "injected": injected,
        "transformers": lambda: AutoModelForImageClassification.from_pretrained(folder),
    }
    for name, way in ways.items():
        if kind == "vera" and name in ("injected", "transformers"):
            continue  # PEFT injects it into a PeftModel only
        loaded = way().eval()
        assert_same(run(loaded, output_hidden_states=True), expected)
        assert loaded.config.id2label[4] == "species 4" and loaded.config.num_hidden_layers == 2


def test_adalora_that_has_dropped_ranks(tmp_path: Path) -> None:
    """Its tensors have other sizes than its config says; every way to load knows."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=6, tinit=1, tfinal=2, deltaT=1, target_modules=["q_proj", "fc1"]
    )
    config.modules_to_save = ["classifier"]
    model = peft.get_peft_model(for_task(pretrained(tmp_path)), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):
        optimizer.zero_grad()
        model(pixel_values=images(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    ranks = {name: sum(kept) for name, kept in config.rank_pattern.items()}
    assert min(ranks.values()) < 4 and sum(ranks.values()) < 24
    small = truncate(model.eval(), 2)
    assert relative_error(run(small)["logits"], run(skipping(model, 2))["logits"]) < 1e-6
    small.save_pretrained(str(tmp_path / "adapter"))
    injected = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    injected.load_adapter(str(tmp_path / "adapter"))
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    for loaded in (
        PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")),
        injected,
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),
    ):
        assert_same(run(loaded.eval()), run(small))
        assert {layer.lora_A["default"].shape[0] for layer in tuner_layers(loaded).values()} <= set(ranks.values())  # type: ignore[attr-defined]


def test_other_bases_are_refused(tmp_path: Path) -> None:
    """Of another depth, width or kind; the error names what is needed and what is there."""
    base = for_task(pretrained(tmp_path))
    truncate(adapted(base, with_head(base, "lora")), 2).save_pretrained(str(tmp_path / "adapter"))
    needed = r"a pruned vit of 2 layers and width 32 .* and the base model is a "
    others = {
        "dense vit of 4 layers and width 32": make(VIT, num_hidden_layers=4),
        "pruned vit of 1 layers and width 32": truncate(make(VIT), 1, stock=False),
        "pruned vit of 1 layers and width 32 ": truncate(make(VIT), 1),
        "dense vit of 3 layers and width 64": make(VIT, hidden_size=64),
        "dense deit of 3 layers and width 32": make("DeiTForImageClassification"),
        "pruned vit of 3 layers and width 19": prune(make(VIT), PruningPlan.random(make(VIT), 0.4, ["embedding"])),
    }
    for found, other in others.items():
        found = found.strip()
        for load in (
            lambda other=other: PeftModel.from_pretrained(other, str(tmp_path / "adapter")),
            lambda other=other: other.load_adapter(str(tmp_path / "adapter")),
        ):
            with pytest.raises(AdapterError, match=needed + found):
                load()


@pytest.mark.parametrize("case", [VIT, "SwinForImageClassification"])
def test_stock_adapters_of_deeper_models_are_refused(case: str, tmp_path: Path) -> None:
    """PEFT and transformers would load the part of them that fits, and pass over the rest."""
    adapted(make(case), "lora").save_pretrained(str(tmp_path / "adapter"))
    layers = len(Architecture.of(make(case)).layers)
    small = truncate(make(case), layers - 1, stock=False)
    expected = run(small)
    with pytest.raises(CheckpointMismatchError, match=f"has {layers - 1} layers: .* deeper model"):
        small.load_adapter(str(tmp_path / "adapter"))
    assert_same(run(small), expected)
    with pytest.raises(CheckpointMismatchError, match="deeper model"):
        PeftModel.from_pretrained(small, str(tmp_path / "adapter"))
    with pytest.raises(CheckpointMismatchError, match="deeper model"):
        truncate(make(case), layers - 1, stock=False).load_state_dict(make(case).state_dict(), strict=False)
    # those of its own depth load
    own = adapted(truncate(make(case), layers - 1, stock=False), LoraConfig(r=2, target_modules=["q_proj"]))
    own.save_pretrained(str(tmp_path / "own"))
    again = truncate(make(case), layers - 1, stock=False)
    again.load_adapter(str(tmp_path / "own"))
    assert_same(run(again.eval()), run(own))


def test_labels_without_a_classifier_are_refused(tmp_path: Path) -> None:
    base = for_task(pretrained(tmp_path))
    truncate(adapted(base, LoraConfig(r=2, target_modules=["q_proj"])), 2).save_pretrained(str(tmp_path / "adapter"))
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    before = run(fresh)
    with pytest.raises(AdapterError, match=r"for 5 labels and the base model has 7"):
        PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert_same(run(fresh), before)
    PeftModel.from_pretrained(for_task(tmp_path / "dense"), str(tmp_path / "adapter"))


#: every way to load an adapter, before this package is imported and after; what it says
LOADS = """
import sys, torch
folder = sys.argv[1]
images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification as Auto
def expected(name):
    return load_file(f"{folder}/{name}.safetensors")["logits"]
for name in ("lora", "dora"):
    model = Auto.from_pretrained(f"{folder}/{name}-native").eval()
    with torch.no_grad():
        difference = (model(pixel_values=images).logits - expected(name)).abs().max().item()
    print(type(model).__name__, model.config.num_labels, difference < 1e-5, "peft" in sys.modules)
from peft import AutoPeftModel, PeftModel
def load_all():
    for name in ("adalora", "convpass"):
        dense, adapter = f"{folder}/dense", f"{folder}/{name}"
        def injected():
            model = Auto.from_pretrained(dense)
            model.load_adapter(adapter)
            return model
        for way in (lambda: PeftModel.from_pretrained(Auto.from_pretrained(dense), adapter),
                    lambda: AutoPeftModel.from_pretrained(adapter), injected, lambda: Auto.from_pretrained(adapter)):
            try:
                with torch.no_grad():
                    same = torch.equal(way().eval()(pixel_values=images).logits, expected(name))
                    print("same" if same else "different")
            except KeyError as error:
                print("refused", error)
load_all()
assert "hf_vitprune" not in sys.modules
import hf_vitprune
load_all()
"""


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path: Path) -> None:
    """Adapters: refused without this package, bit for bit with it. Merged models of k layers: stock, and no PEFT."""
    for kind in ("adalora", "convpass", "lora", "dora"):
        base = for_task(pretrained(tmp_path))
        small = truncate(adapted(base, with_head(base, kind)), 2)
        save_file({"logits": run(small)["logits"]}, tmp_path / f"{kind}.safetensors")
        small.save_pretrained(str(tmp_path / kind))
        if kind in ("lora", "dora"):
            native = tmp_path / f"{kind}-native"
            to_native(small.merge_and_unload()).save_pretrained(native)
            config = json.loads((native / "config.json").read_text())
            assert config["num_hidden_layers"] == 2 and "pruning_config" not in config and "auto_map" not in config
            assert not (native / "adapter_config.json").exists()
    refused = [f"refused 'VITPRUNE_{kind}'" for kind in ("ADALORA", "CONVPASS") for _ in range(4)]
    stock = [f"{VIT} 5 True False"] * 2
    assert run_python(LOADS, str(tmp_path)).splitlines() == [*stock, *refused, *["same"] * 8]


@pytest.mark.parametrize(
    ("kind", "case"),
    [*((kind, VIT) for kind in NAMED if kind != "convpass"), *(("lora", case) for case in CLASSIFIERS if case != VIT)],
)
def test_merged(kind: str, case: str) -> None:
    stock = make(case)
    small = truncate(adapted(stock, with_head(stock, kind)), len(Architecture.of(stock).layers) - 1)
    expected = run(small)["logits"]
    merged = to_native(small.merge_and_unload())
    assert type(merged) is type(stock)
    assert relative_error(run(merged)["logits"], expected) < 1e-5
