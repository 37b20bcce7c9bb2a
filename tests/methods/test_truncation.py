"""Truncation: a number of layers, a cost, or an accuracy says how many stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune import PruningCallback, TruncationConfig, count, get_pruning_model, truncate
from hf_vitprune.errors import InvalidConfigError, InvalidDataError, UnreachableTargetError
from hf_vitprune.methods.truncation import losses_by_layer
from hf_vitprune.spec.configs import lineage_of
from hf_vitprune.utils.batches import ImageBatches
from pruning_runs import VIT, Patterns, lora_model, state_of, trainer
from tiny import LABELS, assert_same, images, make, run

SWIN = "SwinForImageClassification"


@pytest.mark.parametrize(
    ("case", "layers"), [(VIT, 1), (VIT, 2), (SWIN, 1), (SWIN, 3), ("SiglipForImageClassification", 2)]
)
def test_a_number_of_layers(case: str, layers: int) -> None:
    model = make(case)
    wrapped = get_pruning_model(model, TruncationConfig(layers=layers)).eval()
    small = wrapped.export()
    assert_same(run(small), run(truncate(model, layers)))
    info = lineage_of(small.config)
    assert info["method"] == "Truncation" and info["layers"] == layers
    assert not {"max_drop", "target", "gate_learning_rate"} & set(info)


@pytest.mark.parametrize(("case", "layers"), [(VIT, 0), (VIT, 3), (SWIN, 0), (SWIN, 5), ("Dinov2Backbone", 2)])
def test_an_impossible_number_is_refused_before_training(case: str, layers: int) -> None:
    with pytest.raises(InvalidConfigError, match="layers"):
        get_pruning_model(make(case), TruncationConfig(layers=layers))


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_a_target_keeps_as_many_layers_as_fit(metric: str) -> None:
    model = make(VIT, num_hidden_layers=6)
    ratios = {k: getattr(count(truncate(model, k)), metric) / getattr(count(model), metric) for k in range(1, 6)}
    for target in (0.3, 0.5, 0.9):
        wrapped = get_pruning_model(model, TruncationConfig(target=target, target_metric=metric))
        assert len(wrapped.plan().layers) == max(k for k, ratio in ratios.items() if ratio <= target)
    with pytest.raises(UnreachableTargetError):
        get_pruning_model(model, TruncationConfig(target=0.05, target_metric=metric))


# ---------------------------------------------------------------------- by accuracy
def labelled_by(model: Any, share: float) -> list[dict[str, Any]]:
    """Images with the classes that a model says; of the others, another class."""
    data = [Patterns(noise=3.0)[i] for i in range(20)]
    with torch.no_grad():
        said = model(pixel_values=torch.stack([row["pixel_values"] for row in data])).logits.argmax(-1).tolist()
    wrong = [(label + 1) % LABELS for label in said]
    return [{**row, "labels": said[i] if i < 20 * share else wrong[i]} for i, row in enumerate(data)]


def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        said = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits.argmax(-1)
    return float((said == torch.tensor([row["labels"] for row in rows])).float().mean())


@pytest.mark.parametrize(
    ("kind", "max_drop"), [("vit", 0.0), ("vit", 0.3), ("vit", 0.6), ("vit", 1.0), ("swin", 0.5), ("lora", 0.5)]
)
def test_validation_goes_down_until_it_costs_too_much(kind: str, max_drop: float) -> None:
    model: Any = lora_model() if kind == "lora" else make(VIT if kind == "vit" else SWIN)
    model.eval()
    rows = labelled_by(model, share=0.9)
    total = 5 if kind == "swin" else 3
    by_hand = {total: accuracy(model, rows)}
    kept = total
    for k in range(total - 1, 0, -1):
        by_hand[k] = accuracy(truncate(model, k), rows)
        if by_hand[total] - by_hand[k] > max_drop + 1e-6:
            break
        kept = k
    wrapped = get_pruning_model(model, TruncationConfig(layers="validation", max_drop=max_drop, batch_size=7))
    before = state_of(model)
    wrapped.decide(rows)
    assert wrapped.method.found == pytest.approx(by_hand, abs=1e-6)
    assert len(wrapped.plan().layers) == kept
    assert_same(model.state_dict(), before)
    assert wrapped.plan().info["accuracies"] == {str(k): wrapped.method.found[k] for k in by_hand}


def test_the_callback_decides_by_images_of_its_own(tmp_path: Path) -> None:
    config = TruncationConfig(layers="validation", max_drop=1.0)
    model = get_pruning_model(make(VIT), config)
    with pytest.raises(InvalidConfigError, match=r"PruningCallback\(images="):
        trainer(model, tmp_path, train_dataset=Patterns()).train()
    run_of = trainer(model, tmp_path, train_dataset=Patterns(), callbacks=[PruningCallback(Patterns(10))])
    run_of.train()
    assert len(model.plan().layers) == 1 and list(model.method.found) == [3, 2, 1]
    assert run_of.state.log_history[-1]["accuracy_2_layers"] == model.method.found[2]


def test_training_images_are_no_validation(tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), TruncationConfig(layers="validation"))
    model.training_images = Patterns()
    with pytest.raises(InvalidDataError, match="<evaluation set>"):
        model.export()
    with pytest.raises(InvalidDataError, match="no labels"):
        model.decide(torch.randn(2, 3, 16, 16))
    with pytest.raises(InvalidDataError, match="no image has a class"):
        model.decide(Patterns(labels=-100))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give either"), ({"layers": 2, "target": 0.5}, "both"), ({"layers": "half"}, "or 'features'"),
        ({"layers": 2.0}, "whole number"), ({"layers": True}, "whole number"), ({"target": 1.5}, "target"),
        ({"layers": 2, "max_drop": 2}, "max_drop"),
        ({"layers": 2, "gate_learning_rate": 0.1}, "no gates"), ({"layers": 2, "batch_size": 0}, "batch_size"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfigError, match=words):
        TruncationConfig(**settings)


def test_validation_needs_a_classifier() -> None:
    with pytest.raises(InvalidConfigError, match="classifies no images"):
        get_pruning_model(make("ViTModel"), TruncationConfig(layers="validation"))


# ---------------------------------------------------------------------- by features, without labels
def test_losses_by_layer_are_what_a_linear_map_cannot_regain() -> None:
    """Of a model whose last layer adds nothing, the output is that of the layer below, but for the norm."""
    model = make("Dinov2Model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".2.layer_scale" in name:
                parameter.zero_()
    found = losses_by_layer(model, ImageBatches(images(64)), batch_size=16)
    assert sorted(found) == [1, 2, 3] and found[3] == 0
    assert found[2] < 0.03 < 0.06 < found[1]


@pytest.mark.parametrize("case", ["ViTModel", "SwinModel", VIT])
def test_as_few_layers_as_the_features_allow(case: str) -> None:
    for drop, kept in ((2.0, "fewest"), (0.0, "all")):
        model = get_pruning_model(make(case), TruncationConfig(layers="features", max_drop=min(drop, 1.0)))
        model.decide(images=images(8))
        total = len(model.method.architecture.layers)
        losses = model.method.found
        expected = total if kept == "all" else min(n for n, loss in losses.items() if loss <= 1.0)
        assert len(model.plan().layers) == expected
        assert model.plan().info["feature_losses"].keys() == {str(n) for n in losses}


def test_features_need_images_to_fit_and_to_judge() -> None:
    model = get_pruning_model(make("ViTModel"), TruncationConfig(layers="features"))
    assert model.pruning_config.max_drop == 0.05
    with pytest.raises(InvalidDataError, match="evaluation set"):
        model.decide()
    with pytest.raises(InvalidDataError, match="two at least"):
        model.decide(images=images(1))
