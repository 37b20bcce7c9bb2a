"""Models that are no plain transformers models (wrapped, compiled, quantized, without weights): named, with a cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTForImageClassification

from hf_vitprune import (
    Architecture,
    LatencyTable,
    OneShotScores,
    PruningPlan,
    VTPConfig,
    build,
    count,
    criteria,
    get_pruning_model,
    mask,
    prune,
    push_to_hub,
    revit,
    select_layers,
    towers,
    truncate,
)
from hf_vitprune.errors import UnsupportedModelError, VitPruneError
from tiny import images, make
from tiny_composites import COMPOSITES

VIT = "ViTForImageClassification"
PIXELS = images(4)
LABELLED = [{"pixel_values": PIXELS, "labels": torch.arange(4)}]


def compiled_layer() -> Any:
    model = make(VIT)
    model.vit.layers[1] = torch.compile(model.vit.layers[1])
    return model


def integers() -> Any:
    """As bitsandbytes holds them: a subclass of Linear, its weight in whole numbers, packed."""
    model = make(VIT)
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    fc1 = model.vit.layers[0].mlp.fc1
    fc1.__class__ = kind
    fc1.weight = nn.Parameter(torch.zeros(fc1.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    return model


def flagged() -> Any:
    model = make(VIT)
    model.is_quantized = True
    return model


def tower_in_integers() -> Any:
    host = COMPOSITES["LLaVA"]()[0]
    layer = host.model.vision_tower.encoder.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return host


def by_torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = make(VIT)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def without_weights() -> Any:
    with torch.device("meta"):
        return ViTForImageClassification(make(VIT).config)


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "DataParallel": (lambda: nn.DataParallel(make(VIT)), r"DataParallel.*model\.module"),
    "torch.compile": (lambda: torch.compile(make(VIT)), r"model\._orig_mod\), and compile the result"),
    "a compiled layer": (compiled_layer, r"vit.layers.1 is compiled: put back its _orig_mod"),
    "jit": (lambda: torch.jit.trace(make(VIT), PIXELS, strict=False), "pass what torch.jit.trace was given"),
    "an exported graph": (
        lambda: torch.export.export(make(VIT), (PIXELS,)).module(),
        "pass the model that the graph was made of",
    ),
    "bitsandbytes": (
        integers,
        r"mlp.fc1 is quantized \(a bitsandbytes.* in uint8\): prune the model in full precision",
    ),
    "a quantizer of transformers": (flagged, "the model is quantized: prune it in full precision"),
    "quantize_dynamic": (
        lambda: torch.ao.quantization.quantize_dynamic(make(VIT), {nn.Linear}, dtype=torch.qint8),
        r"q_proj is quantized \(a torch.ao.*\): prune the model in full precision, then quantize the small one",
    ),
    "torchao": (by_torchao, r"is quantized \(a torch.nn.modules.linear.Linear.*then quantize the small one"),
    "a quantized tower": (tower_in_integers, "mlp.fc1 is quantized .* in int8.*: prune the model in full precision"),
}
DOORS: dict[str, Callable[[Any], Any]] = {
    "get_pruning_model": lambda m: get_pruning_model(m, VTPConfig(target=0.6, round_to=4)),
    "prune": lambda m: prune(m, PruningPlan.random(make(VIT), 0.4)),
    "mask": lambda m: mask(m, PruningPlan.random(make(VIT), 0.4)),
    "truncate": lambda m: truncate(m, 2),
    "PruningPlan.dense": PruningPlan.dense,
    "PruningPlan.random": lambda m: PruningPlan.random(m, 0.4),
    "PruningPlan.magnitude": lambda m: PruningPlan.magnitude(m, 0.4),
    "count": count,
    "criteria.magnitude": criteria.magnitude,
    "criteria.activation": lambda m: criteria.activation(m, PIXELS),
    "criteria.taylor": lambda m: criteria.taylor(m, LABELLED, loss=lambda model, batch: model(PIXELS).logits.sum()),
    "criteria.random": lambda m: criteria.random(m, 0),
    "OneShotScores": lambda m: OneShotScores.measure(m, PIXELS),
    "LatencyTable": lambda m: LatencyTable.measure(m, batch_size=1, rounds=1, progress=False),
    "select_layers": lambda m: select_layers(m, LABELLED),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_in_the_way_is_named_at_every_door(kind: str) -> None:
    make_model, words = KINDS[kind]
    model = make_model()
    for name, door in DOORS.items():
        with pytest.raises(VitPruneError, match=words):
            print(name, door(model))


NO_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "not a NoneType"),
    "a name": (lambda: "google/vit-base", r"not its name: .*AutoModel.from_pretrained\('google/vit-base'\)"),
    "a class": (lambda: ViTForImageClassification, "not the class ViTFor.*: pass what ViTFor"),
    "a PEFT class": (lambda: PeftModel, "not the class PeftModel: pass what PeftModel.from_pretrained returns"),
    "a config": (lambda: make(VIT).config, "not a ViTConfig: load the model"),
    "a Trainer": (lambda: Trainer(make(VIT), TrainingArguments(use_cpu=True)), r"not a Trainer: pass its \.model"),
    "weights": (lambda: make(VIT).state_dict(), "not a OrderedDict"),
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_is_named_at_every_door(kind: str) -> None:
    make_thing, words = NO_MODELS[kind]
    thing = make_thing()
    doors = DOORS | {"towers": towers, "push_to_hub": lambda m: push_to_hub(m, "somebody/something")}
    del doors["select_layers"]  # takes features, too, and lists what it takes
    if kind == "a config":
        del doors["LatencyTable"]  # measures what a config describes
    for door in doors.values():
        with pytest.raises(UnsupportedModelError, match=f"a model is asked for, {words}"):
            door(thing)


def test_what_is_no_config_is_named() -> None:
    model = make(VIT)
    architecture = Architecture.of(model)
    for build_from in (lambda c: build(c, architecture), revit, lambda c: Architecture.from_layers(c, [])):
        with pytest.raises(UnsupportedModelError, match=r"a config is asked for, not a ViTFor.*: pass its \.config"):
            build_from(model)
        with pytest.raises(UnsupportedModelError, match="a config is asked for, not a str"):
            build_from("google/vit-base")


def test_without_weights() -> None:
    """What reads none works: sizes, counts, plans by chance."""
    model = without_weights()
    assert count(model) == count(make(VIT)) and not PruningPlan.random(model, 0.4).removes_nothing
    for name in DOORS.keys() - {"PruningPlan.dense", "PruningPlan.random", "count", "criteria.random", "LatencyTable"}:
        with pytest.raises(VitPruneError, match=r"are on the meta device .*load it with from_pretrained"):
            print(name, DOORS[name](model))
    with pytest.raises(VitPruneError, match="nothing runs on the meta device: say where to measure"):
        DOORS["LatencyTable"](model)


def test_compiled_in_place_is_no_wrapper() -> None:
    """``model.compile()`` leaves the modules where they are."""
    model = make(VIT)
    model.compile()
    plan = PruningPlan.random(model, 0.4)
    assert count(prune(model, plan)) == count(prune(make(VIT), plan))


def test_other_labels_say_what_transformers_says(tmp_path: Any) -> None:
    model = make(VIT)
    prune(model, PruningPlan.random(model, 0.4), stock=False).save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "dense")
    for folder, words in (
        ("dense", "ignore_mismatched_sizes"),
        ("small", "ignore_mismatched_sizes=True, .* a new head"),
    ):
        with pytest.raises(RuntimeError, match=words):
            AutoModelForImageClassification.from_pretrained(tmp_path / folder, num_labels=7)
        settings = {"num_labels": 7, "ignore_mismatched_sizes": True}
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / folder, **settings)
        assert loaded.classifier.weight.shape[0] == 7
