"""Exports that make up for what a decision took away: for every method, from images given or those of the training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_vitprune import (
    Architecture,
    Compensation,
    NViTConfig,
    PruningCallback,
    PruningModel,
    PruningPlan,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    get_pruning_model,
)
from hf_vitprune.compensate.moments import Moments
from hf_vitprune.errors import AdapterError, InvalidConfigError, InvalidDataError
from hf_vitprune.publish.card import model_card
from hf_vitprune.spec.configs import lineage_of
from memory import live_bytes, only_new_objects
from pruning_runs import SMALL_GROUPS, VIT, Patterns, gated, lora_model, nvit, scatter_scores, state_of, trainer
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run

SWIN = "SwinForImageClassification"
CONFIGS: dict[str, Callable[[str], Any]] = {
    "VTP": lambda case: VTPConfig(pruning_ratio=0.4, round_to=4),
    "VTP uneven": lambda case: VTPConfig(pruning_ratio=0.4, round_to=2, uneven=True),
    "VTP binarize": lambda case: VTPConfig(pruning_ratio=0.4, round_to=4, binarize=True),
    "NViT": lambda case: NViTConfig(target=0.6, group_sizes=SMALL_GROUPS, eta=1.0),
    "Truncation": lambda case: TruncationConfig(layers=4 if case == SWIN else 2),
}
PAIRS = [(case, "VTP") for case in CLASSIFIERS] + [(VIT, method) for method in list(CONFIGS)[1:]]
PAIRS += [(SWIN, "NViT"), (SWIN, "Truncation")]


def pixels(count: int = 48, seed: int = 1) -> torch.Tensor:
    return images(count, seed=seed).double()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def logits(model: Any) -> torch.Tensor:
    return run(model.eval(), pixels(16, 3).to(next(model.parameters()).dtype))["logits"]


def record(small: Any) -> dict[str, Any]:
    """What the export says of its compensation."""
    base = small.get_base_model() if hasattr(small, "get_base_model") else small
    return lineage_of(base.config).get("compensation", {})


@pytest.mark.parametrize(("case", "method"), PAIRS)
def test_a_compensated_export_is_closer_to_what_was_trained(case: str, method: str) -> None:
    model = scatter_scores(get_pruning_model(make(case).double(), CONFIGS[method](case)))
    trained, before = logits(model), state_of(model.model)
    plain, small = model.export(), model.export(calibration=pixels())
    assert relative_error(logits(plain), logits(model)) < 1e-10 and not record(plain)
    assert Architecture.of(small) == Architecture.of(plain) == model.plan().architecture
    assert distance(logits(small), trained) < distance(logits(plain), trained)
    assert record(small)["images"] == 48 and record(small)["fits"]
    assert '"images": 48' in (card := str(model_card(small))) and "before" not in card.split("images")[-1]
    assert_same(state_of(model.model), before)
    same = model.export(calibration=pixels(), compensate=False)
    assert_same(dict(same.state_dict()), dict(plain.state_dict()))


def test_what_scores_scale_is_followed_scores_and_all() -> None:
    """With every channel that is cut a copy of one that stays, under scores that differ: nothing is lost."""
    model = scatter_scores(get_pruning_model(make(VIT).double(), VTPConfig(pruning_ratio=0.5, points=["mlp_hidden"])))
    for i, layer in enumerate(model.model.vit.layers):
        for tensor in (layer.mlp.fc1.weight.data, layer.mlp.fc1.bias.data):
            tensor[24:] = tensor[:24]
        score = model.method.gates[f"layer{i}_mlp_hidden"].score.data
        score[24:] = score[24:].abs() * 0.1
        score[:24] = score[:24].abs() + 1
    trained = logits(model)
    assert distance(logits(model.export()), trained) > 1e-2
    assert distance(logits(model.export(calibration=pixels())), trained) < 1e-4


# ---------------------------------------------------------------------- the training set serves
@pytest.mark.parametrize("how", ["default", "PruningTrainer off", "export off", "plain Trainer", "parts"])
def test_after_a_training(how: str, tmp_path: Path) -> None:
    model = scatter_scores(gated())
    choice = {"PruningTrainer off": {"compensate": False}, "parts": {"compensate": ("mlp",)}}.get(how, {})
    plain: dict[str, Any] = {"kind": Trainer, "callbacks": [PruningCallback()]} if how == "plain Trainer" else {}
    trainer(model, tmp_path, max_steps=1, train_dataset=Patterns(140), **choice, **plain).train()
    small = model.export(**({"compensate": "none"} if how == "export off" else {}))
    if how in ("default", "plain Trainer", "parts"):
        # 128 by default, whoever trained; who gives settings of their own gets those
        assert record(small)["images"] == (140 if how == "parts" else 128)
        assert record(small)["parts"] == (["mlp"] if how == "parts" else list(Compensation().parts))
        assert relative_error(logits(small), logits(model)) > 1e-3
        assert_same(dict(model.export().state_dict()), dict(small.state_dict()))
    else:
        assert not record(small)
        assert relative_error(logits(small), logits(model)) < 1e-5


def test_a_model_tuned_after_the_decision_is_what_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = scatter_scores(gated())
    trainer(model, tmp_path, max_steps=1, train_dataset=Patterns()).train()
    again = trainer(model, tmp_path, max_steps=1, train_dataset=Patterns())
    again.train()
    small = model.export()
    assert "trained on without" in record(small)["skipped"]
    assert relative_error(logits(small), logits(model)) < 1e-5
    asked = model.export(calibration=images(8))
    assert_same(dict(asked.state_dict()), dict(small.state_dict()))

    loop = scatter_scores(gated())
    loop.decide()
    assert "images" in record(loop.export(calibration=images(8)))
    loop.train()(pixel_values=images(2), labels=torch.tensor([0, 1])).loss.backward()
    assert "skipped" in record(loop.export(calibration=images(8)))


def test_nvit_has_tuned_what_it_keeps(tmp_path: Path) -> None:
    """Nothing is made up for after a whole training; what a short one cuts at its end is."""
    model = nvit(target=0.7)
    trainer(model, tmp_path, max_steps=4, train_dataset=Patterns()).train()
    assert model.method.reached and "has tuned what stays" in model.method.reference()
    small = model.export()
    assert "weights are zero by now" in record(small)["skipped"]
    assert relative_error(logits(small), logits(model)) < 1e-5

    late = nvit(target=0.5, groups_per_step=1, interval=1, eta=0)
    late.train()
    late.method.scores.updates = 1
    late.method.scores.window.uniform_(generator=torch.Generator().manual_seed(0))
    late.method._prune(late.model, _one_group(), 1)
    before = logits(late)
    late.method.scores.updates = 1
    late.decide()
    reference = late.method.reference()
    assert isinstance(reference, PruningPlan) and not reference.removes_nothing
    plain, compensated = late.export(), late.export(calibration=images(48, seed=1))
    assert distance(logits(compensated), before) < distance(logits(plain), before)


def _one_group() -> Any:
    from hf_vitprune.methods.nvit.config import Schedule

    return Schedule.of(nvit(target=0.5, groups_per_step=1, interval=1).pruning_config, 10)


def test_spvit_is_without_what_its_gates_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What went at once to reach the target is made up for; so is the architecture on weights from before."""
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.logger.warning", lambda _: None)
    over, under = (get_pruning_model(make(VIT), SPViTConfig(target=t, round_to=1)).double().eval() for t in (0.6, 0.9))
    for model, lowest in ((over, 0.1), (under, -0.4)):
        generator = torch.Generator().manual_seed(2)
        for gates in model.method.gates.values():
            gates.score.data = torch.rand(gates.score.shape, generator=generator).double() + lowest
    trained = logits(over)
    plain, small = over.export(), over.export(calibration=pixels())
    assert distance(logits(small), trained) < distance(logits(plain), trained)
    assert Architecture.of(small) == Architecture.of(plain) and record(small)["fits"]

    small = under.export(calibration=pixels())
    assert "switched gates off" in record(small)["skipped"]
    assert relative_error(logits(small), logits(under)) < 1e-10
    before = make(VIT, seed=4).double()
    plain, small = under.export(weights=before), under.export(weights=before, calibration=pixels())
    assert {layer.mixer for layer in Architecture.of(small).layers} & {"conv3x3", "conv1x1"}
    assert distance(logits(small), logits(before)) < distance(logits(plain), logits(before))


@pytest.mark.parametrize("method", ["VTP", "SPViT"])
def test_what_is_followed_is_no_second_copy(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live tensors whenever sums are done: what the gated model computes is made of its weights, layer by layer."""
    sizes = {"num_hidden_layers": 16, "hidden_size": 64, "intermediate_size": 96, "image_size": 16}
    configs = {"VTP": VTPConfig(target=0.5), "SPViT": SPViTConfig(target=0.5, enforce_target=True)}
    total: Callable[..., Any] = Moments.total
    peaks = []

    def counted(self: Moments, *args: Any, **options: Any) -> Any:
        peaks.append(live_bytes() - before)
        return total(self, *args, **options)

    with only_new_objects():
        model = get_pruning_model(make(VIT, **sizes), configs[method])
        if method == "VTP":
            scatter_scores(model)
        else:
            generator = torch.Generator().manual_seed(2)
            for gates in model.method.gates.values():
                gates.score.data = torch.rand(gates.score.shape, generator=generator) + 0.1
        dense = sum(p.nbytes for p in model.get_base_model().parameters())
        plan, seen = model.plan(), images(4, 16)
        before = live_bytes()
        monkeypatch.setattr(Moments, "total", counted)
        small = model.export(calibration=seen)
        share = sum(p.nbytes for p in small.parameters()) / dense
    assert plan.architecture == Architecture.of(small) and record(small)["fits"] and len(peaks) > 16
    # beside what is left: two layers of 16, hidden states and sums
    assert share / 2 < max(peaks) / dense < share + 0.3


# ---------------------------------------------------------------------- adapters
def test_adapters_stay_and_the_base_is_compensated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scatter_scores(get_pruning_model(lora_model(dropout=False), VTPConfig(pruning_ratio=0.4, round_to=4)))
    seen = torch.stack([Patterns(140)[i]["pixel_values"] for i in range(16)])
    trained = run(model.eval(), seen)["logits"]
    trainer(model, tmp_path, max_steps=1, learning_rate=0.0, train_dataset=Patterns(140)).train()
    plain, small = model.export(compensate=False), model.export()
    assert type(small) is type(model.model) and record(small)["images"] == 128
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    assert names == [name for name, p in small.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in names)
    assert distance(run(small.eval(), seen)["logits"], trained) < distance(run(plain.eval(), seen)["logits"], trained)
    assert relative_error(logits(plain), logits(model)) < 1e-5


def test_adapters_that_would_end_are_left_alone_unless_asked(tmp_path: Path) -> None:
    """The backbone under a truncated model, which other tasks share; adapters that are not active."""
    model = get_pruning_model(lora_model(), TruncationConfig(layers=2))
    trainer(model, tmp_path, max_steps=1, train_dataset=Patterns()).train()
    small = model.export()
    assert not record(small) and relative_error(logits(small), logits(model)) < 1e-5
    with pytest.raises(AdapterError, match="which other tasks share"):
        model.export(calibration=images(8))

    two = lora_model(dropout=False)
    two.add_adapter("other", two.peft_config["default"])
    model = scatter_scores(get_pruning_model(two, VTPConfig(pruning_ratio=0.4, round_to=4)))
    trainer(model, tmp_path, max_steps=1, train_dataset=Patterns()).train()
    assert "other as well" in record(model.export())["skipped"]
    with pytest.raises(AdapterError, match=r"delete_adapter\(\)"):
        model.export(calibration=images(8))


# ---------------------------------------------------------------------- images
class Augmented(Patterns):
    """Other pixels at every look, from all three sources of random numbers."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = super().__getitem__(i)
        return {**row, "pixel_values": row["pixel_values"] + torch.randn(()) + random.random() + np.random.rand()}


def test_augmented_images_are_drawn_alike_and_disturb_nothing() -> None:
    model = scatter_scores(gated())
    first = model.export(calibration=Augmented())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    second = model.export(calibration=Augmented())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert_same(dict(first.state_dict()), dict(second.state_dict()))


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    model: PruningModel = scatter_scores(gated())
    with pytest.raises(InvalidConfigError, match="needs images"):
        model.export(compensate=("mlp",))
    with pytest.raises(InvalidConfigError, match="needs images"):
        model.export(compensate=True, weights=make(VIT))
    with pytest.raises(InvalidConfigError, match="compensate is"):
        trainer(model, tmp_path, compensate="some")
    with pytest.raises(InvalidDataError, match="empty"):
        model.export(calibration=[])
    with pytest.raises(InvalidDataError, match="does not take"):
        model.export(calibration=images(4, size=24))
