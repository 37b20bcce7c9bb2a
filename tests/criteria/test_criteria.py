"""Criteria: every score against a computation of its own, adapters merged, the model left alone, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPModel

from hf_vitprune import PruningPlan, criteria
from hf_vitprune.criteria import UnitScores
from hf_vitprune.criteria.scores import batches_of
from hf_vitprune.errors import InvalidDataError, MissingLabelsError, ScoresError, UnsupportedModelError
from hf_vitprune.modeling.structure import layer_paths
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.units import unit_sets, unit_table
from hf_vitprune.utils.batches import ImageBatches
from tiny import CLASSIFIERS, LABELS, hybrid, images, make

VIT = "ViTForImageClassification"


def labelled(count: int = 6) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": x, "labels": torch.tensor(i % LABELS)} for i, x in enumerate(images(count))]


def all_criteria(model: Any) -> dict[str, UnitScores]:
    return {
        "magnitude": criteria.magnitude(model),
        "taylor": criteria.taylor(model, labelled()),
        "activation": criteria.activation(model, images()),
        "random": criteria.random(model, seed=1),
    }


@pytest.mark.parametrize("case", [*CLASSIFIERS, "hybrid"])
def test_every_set_of_every_family_is_scored(case: str) -> None:
    model = hybrid(VIT) if case == "hybrid" else make(case)
    for name, scores in all_criteria(model).items():
        assert {n: len(s) for n, s in scores.items()} == {
            n: one.size for n, one in unit_sets(scores.architecture).items()
        }
        assert scores.criterion == name and scores.architecture == Architecture.of(model)
        assert all((values > 0).all() for values in scores.values()), name


@pytest.mark.parametrize("case", [VIT, "SwinForImageClassification", "Dinov2ForImageClassification-swiglu"])
def test_taylor_is_weight_times_gradient_of_all_that_goes_with_a_unit(case: str) -> None:
    model = make(case)
    model.requires_grad_(False)
    model.get_submodule(layer_paths(model, Architecture.of(model))[0].q).weight.requires_grad_(True)
    needed = [p.requires_grad for p in model.parameters()]
    model.train()
    scores = criteria.taylor(model, labelled(4))
    assert model.training and [p.requires_grad for p in model.parameters()] == needed
    assert all(p.grad is None for p in model.parameters())

    model.eval().requires_grad_(True)
    batch = labelled(4)
    pixels, labels = (torch.stack([row[name] for row in batch]) for name in ("pixel_values", "labels"))
    nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
    products = {name: (p * p.grad).abs().detach() for name, p in model.named_parameters() if p.grad is not None}
    paths = layer_paths(model, scores.architecture)
    for name, axes in unit_table(scores.architecture, paths, set(products)).items():
        size = len(scores[name])
        for unit in (0, size - 1):
            own = sum(products[a.tensor].index_select(a.axis, a.places([unit], size)).sum() for a in axes)
            assert scores[name][unit].item() == pytest.approx(own.item(), rel=1e-4)
    for i, path in enumerate(paths):
        own = sum(values.sum() for name, values in products.items() if name.startswith(f"{path.layer}."))
        assert scores["layers"][i].item() == pytest.approx(own.item(), rel=1e-4)


def test_taylor_is_averaged_over_images_and_takes_any_loss() -> None:
    model = make(VIT)
    rows = labelled(4)
    parts = [criteria.taylor(model, rows[:3]), criteria.taylor(model, rows[3:])]
    both = criteria.taylor(model, ImageBatches(rows, batch_size=3))
    assert both.settings == {"images": 4, "batches": 2}
    for name, values in both.items():
        torch.testing.assert_close(values, (3 * parts[0][name] + parts[1][name]) / 4)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return model(pixel_values=batch["pixel_values"]).last_hidden_state.square().mean()

    base = make("ViTModel")
    with pytest.raises(UnsupportedModelError, match="pass loss="):
        criteria.taylor(base, images())
    assert criteria.taylor(base, images(), loss)["layer 0 mlp"].sum() > 0
    with pytest.raises(MissingLabelsError, match="labelled images"):
        criteria.taylor(model, images())


def test_batches_come_in_many_forms() -> None:
    rows = labelled(5)
    pixels, labels = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
    halves = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(3), slice(3, 5))]
    forms: list[Any] = [
        halves,
        iter(halves),
        [tuple(batch.values()) for batch in halves],
        ImageBatches(rows, 3),
        DataLoader(rows, 3, shuffle=True),  # type: ignore[arg-type]
        DataLoader(TensorDataset(pixels, labels), 3),
    ]
    for form in forms:
        given = list(batches_of(form))
        assert [len(batch["pixel_values"]) for batch in given] == [3, 2]
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in given]), pixels)
        assert torch.equal(torch.cat([batch["labels"] for batch in given]), labels)
    assert [len(batch["pixel_values"]) for batch in batches_of(pixels)] == [5]
    assert [len(batch["labels"]) for batch in batches_of({"pixel_values": pixels, "labels": labels})] == [5]
    for bad in (
        [],
        iter([]),
        iter([1]),
        "images",
        iter([{"images": pixels}]),
        None,
        iter([{"pixel_values": pixels[0]}]),
    ):
        with pytest.raises(InvalidDataError):
            list(batches_of(bad))


def test_activation_is_the_mean_magnitude_of_what_a_unit_puts_out() -> None:
    model = make(VIT)
    layer = model.vit.layers[1]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].abs().mean((0, 1))}))
        for name, module in (("heads", layer.attention.o_proj), ("mlp", layer.mlp.fc2))
    ] + [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out.abs().mean((0, 1))}))
        for name, module in (("q", layer.attention.q_proj), ("k", layer.attention.k_proj))
    ]
    with torch.no_grad():
        model(pixel_values=images(5))
    for handle in handles:
        handle.remove()
    model.train()
    scores = criteria.activation(model, images(5))
    assert model.training and not any(module._forward_hooks for module in model.modules())
    expected = {
        "mlp": seen["mlp"],
        "heads": seen["heads"].view(4, 8).mean(1),
        "v": seen["heads"].view(4, 8).mean(0),
        "qk": (seen["q"] * seen["k"]).view(4, 8).mean(0),
    }
    for unit, values in expected.items():
        torch.testing.assert_close(scores[f"layer 1 {unit}"].float(), values)


def test_activation_finds_what_does_nothing() -> None:
    model = make(VIT)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.vit.layers[2].attention.o_proj, name).zero_()
            getattr(model.vit.layers[2].mlp.fc2, name).zero_()
            for norm in (n for layer in model.vit.layers for n in (layer.layernorm_before, layer.layernorm_after)):
                getattr(norm, name)[3] = 0
    scores = criteria.activation(model, images())
    assert scores["layers"].argmin() == 2 and scores["layers"][2] == 0
    assert scores["embedding"].argmin() == 3 and scores["embedding"][3] == 0


def test_adapters_are_merged_and_stay() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(make(VIT), LoraConfig(r=2, target_modules=["q_proj", "fc2"], init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    scored = all_criteria(adapted)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}
    merged = all_criteria(adapted.merge_and_unload())
    plain = all_criteria(make(VIT))
    for name in scored:
        for part, values in scored[name].items():
            torch.testing.assert_close(values, merged[name][part], rtol=1e-4, atol=1e-6)
        if name != "random":
            assert not torch.allclose(scored[name]["layer 0 mlp"], plain[name]["layer 0 mlp"])


def test_towers_of_bigger_models_are_scored() -> None:
    model = CLIPModel(make("CLIPForImageClassification").config).eval()
    texts = torch.randint(3, 40, (2, 5))
    batch = {"pixel_values": images(2), "input_ids": texts, "attention_mask": torch.ones_like(texts)}

    def contrast(whole: Any, batch: Any) -> torch.Tensor:
        return whole(**batch, return_loss=True).loss

    vision = {
        "magnitude": criteria.magnitude(model, part="vision"),
        "activation": criteria.activation(model, images(2), part="vision"),
        "taylor": criteria.taylor(model, [batch], contrast, part="vision"),
        "random": criteria.random(model, part="vision"),
    }
    alone = criteria.magnitude(model.vision_model)
    assert all(torch.equal(alone[name], vision["magnitude"][name]) for name in alone)
    contrast(model, batch).backward()
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight
    products = (weight * weight.grad).abs().sum(1)
    assert vision["taylor"]["layer 0 mlp"].sum() > products.sum() > 0
    for scores in vision.values():
        plan = PruningPlan.from_scores(model, scores, ratio=0.5, units=["mlp"], part="vision")
        assert plan.part == "vision" and len(plan.layers[0].mlp) < 48


# ---------------------------------------------------------------------- the object
def test_scores_come_back_from_files_and_json(tmp_path: Path) -> None:
    scores = criteria.taylor(make("SwinForImageClassification"), labelled())
    scores.save(tmp_path / "scores.safetensors")
    for again in (
        UnitScores.load(tmp_path / "scores.safetensors"),
        UnitScores.from_dict(json.loads(json.dumps(scores.to_dict()))),
    ):
        assert list(again) == list(scores) and all(torch.equal(again[name], scores[name]) for name in scores)
        assert (again.criterion, again.settings, again.architecture) == (
            scores.criterion,
            scores.settings,
            scores.architecture,
        )


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    record = criteria.random(make(VIT)).to_dict()
    criteria.random(make(VIT)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ScoresError, match="no file of unit scores"):
        UnitScores.load(path)
    with pytest.raises(FileNotFoundError):
        UnitScores.load(tmp_path / "nothing")
    for change in ({"version": 2}, {"architecture": None}, {"scores": {"layers": "high"}}, {"scores": None}):
        with pytest.raises(ValueError):
            UnitScores.from_dict({**record, **change})


def test_scores_that_are_not_of_the_model() -> None:
    architecture = Architecture.of(make(VIT))
    for scores, message in (
        ({"layer 3 heads": torch.ones(4)}, "no set 'layer 3 heads'"),
        ({"layer 0 heads": torch.ones(5)}, "4 units"),
        ({"layer 0 heads": torch.ones(4, 1)}, "4 units"),
        ({"layer 0 heads": torch.tensor([1, 2, torch.nan, torch.inf])}, "2 scores are not finite"),
    ):
        with pytest.raises(ScoresError, match=message):
            UnitScores(architecture, scores)
    broken = make(VIT)
    with torch.no_grad():
        broken.vit.layers[1].mlp.fc1.weight[0, 0] = torch.nan
    for score in (
        criteria.magnitude,
        lambda m: criteria.taylor(m, labelled()),
        lambda m: criteria.activation(m, images()),
    ):
        with pytest.raises(ScoresError, match="not finite"):
            score(broken)
    with pytest.raises(InvalidDataError):
        criteria.activation(make(VIT), [])
