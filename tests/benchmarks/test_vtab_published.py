"""VTAB-1k with the settings of the published runs: scales and initialisations task by task, and the training's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.vtab import training
from benchmarks.vtab.adapters import FOLDER, adapt
from benchmarks.vtab.settings import Machine, Recipe, Settings
from benchmarks.vtab.tasks import VTAB
from examples.recipe import Recipe as PublishedRun
from hf_vitprune.contrib.retraining import fresh_adapters
from hf_vitprune.errors import InvalidConfigError

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}


def model() -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=4, **SIZES))


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": pixels, "labels": i % 4}


def test_every_task_has_its_scales() -> None:
    scales = {}
    for peft in ("convpass", "repadapter"):
        tasks = PublishedRun.load(FOLDER, f"sls-{peft}").tasks
        assert {task.name for task in VTAB} == tasks.keys()
        for task in tasks:
            config = adapt(model(), peft, rank=2, steps=4, seed=0, published_for=task).peft_config["default"]
            scales[peft, task] = config.scale
            assert peft != "convpass" or config.activation == "quick_gelu"
    assert [scales["convpass", task] for task in ("dsprites_loc", "dtd", "eurosat", "cifar")] == [100, 0.01, 10, 0.1]
    assert [scales["repadapter", task] for task in ("smallnorb_azi", "dtd", "caltech101")] == [10, 1, 5]


def test_the_convolution_starts_as_published() -> None:
    identity = torch.zeros(2, 2, 3, 3)
    identity[:, :, 1, 1] = torch.eye(2)
    for task, drawn in (("kitti", True), ("eurosat", False)):
        adapted = adapt(model(), "convpass", rank=2, steps=4, seed=0, published_for=task)
        for one in (adapted, fresh_adapters(adapted, seed=1)):  # --retraining tfs starts so, too
            weights = [m.weight for n, m in one.named_modules() if "convpass_conv.default" in n]
            assert weights and all(torch.equal(w, identity) != drawn for w in weights)
            # Xavier's bound: sqrt(6 / (18 + 18)), a deviation of 1 / sqrt(18)
            values = torch.stack(weights).detach() if drawn else torch.zeros(1)
            assert values.abs().max() <= (6 / 36) ** 0.5
            assert not drawn or abs(float(values.std()) * 18**0.5 - 1) < 0.15
    plain = adapt(model(), "convpass", rank=2, steps=4, seed=0)
    assert plain.peft_config["default"].scale == 1.0
    assert adapt(model(), "lora", rank=2, steps=4, seed=0, published_for="kitti").peft_config["default"].r == 2
    with pytest.raises(InvalidConfigError, match="nothing is published for 'digits'"):
        adapt(model(), "repadapter", rank=2, steps=4, seed=0, published_for="digits")


def test_the_training_of_the_published_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """20 images in batches of 8 are 2 steps an epoch; validation sees all of its images; rates end at the floor."""
    recipe = Recipe(epochs=2, warmup_epochs=1, learning_rate=1e-2, batch_size=8).published()
    assert recipe == replace(recipe, clipping=0.0, drop_path=0.1, drop_last=True, lowest_rate=1e-5)
    assert recipe.steps(1000) == 2 * 125 and recipe.steps(20) == 4
    seen: dict[str, Any] = {}

    class Watched(training._Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            done = super().train(*args, **kwargs)
            seen["steps"], seen["rate"] = self.state.global_step, self.optimizer.param_groups[0]["lr"]
            seen["clipping"] = self.args.max_grad_norm
            seen["hooks"] = sum(len(m._forward_hooks) for m in self.model.modules())
            seen["samples"] = len(self.predict(Examples(5)).predictions)
            return done

    monkeypatch.setattr(training, "_Trainer", Watched)
    adapted = adapt(model(), "linear", rank=2, steps=4, seed=0)
    trained = training.train(
        adapted, Examples(20), recipe, seed=0, machine=Machine(cpu=True), what="", validation=Examples(5)
    )
    assert seen["steps"] == 4 and seen["samples"] == 5 and seen["clipping"] == 0.0 and seen["hooks"] > 0
    assert seen["rate"] == pytest.approx(1e-5, rel=1e-3)
    assert all(round(5 * accuracy, 6) == round(5 * accuracy) for accuracy in trained.validation)
    assert not any(m._forward_hooks for m in adapted.modules())


def test_settings_travel() -> None:
    settings = Settings(published=True, recipe=Recipe().published())
    assert Settings.from_dict(settings.to_dict()) == settings
    with pytest.raises(InvalidConfigError, match="lowest_rate is under learning_rate"):
        Recipe(lowest_rate=1.0)
