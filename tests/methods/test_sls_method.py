"""SLS on models: features by hooks in one pass, and the way from training to a truncated export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_vitprune import PruningCallback, PruningModel, SLSConfig, get_pruning_model, select_layers, truncate
from hf_vitprune.errors import InvalidConfigError, InvalidDataError, InvalidPlanError
from hf_vitprune.methods.depth import fewest_layers
from hf_vitprune.methods.sls import extract_features
from hf_vitprune.spec.configs import lineage_of
from pruning_runs import VIT, Patterns, lora_model, state_of, trainer
from tiny import CLASSIFIERS, LABELS, SIZE, assert_same, images, make, relative_error, run

QUICK: dict[str, Any] = {"iterations": 250, "perplexity": 3.0}


def recorded(model: Any, pixels: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Pooled hidden states of every layer, as transformers records them."""
    with torch.no_grad():
        output = model(pixel_values=pixels, output_hidden_states=True)
    return [pool(state) for state in output.hidden_states[1:]]


# ---------------------------------------------------------------------- features
@pytest.mark.parametrize("case", [c for c in CLASSIFIERS if not c.startswith("Swin")])
def test_features_are_the_raw_block_outputs(case: str) -> None:
    model, data = make(case), Patterns()
    pool = (lambda t: t.mean(1)) if case.startswith(("Siglip", "IJepa")) else (lambda t: t[:, 0])
    features, labels = extract_features(model, data, SLSConfig(batch_size=7))
    pixels = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    assert list(features) == [1, 2, 3] and labels.tolist() == [i % LABELS for i in range(20)]
    for ours, theirs in zip(features.values(), recorded(model, pixels, pool), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_swin_features_are_means_after_patch_merging() -> None:
    model, data = make("SwinForImageClassification"), Patterns(6)  # stages of 2 and 3
    features, _ = extract_features(model, data)
    assert [tuple(f.shape) for f in features.values()] == [(6, 16), (6, 32), (6, 32), (6, 32), (6, 32)]
    pixels = torch.stack([data[i]["pixel_values"] for i in range(6)])
    stages = recorded(model, pixels, lambda t: t.mean(1))
    torch.testing.assert_close(features[2], stages[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[5], stages[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["stock", "peft", "wrapped"])
def test_one_pass_in_eval_mode_and_back(kind: str) -> None:
    model: Any = lora_model() if kind == "peft" else make(VIT, hidden_dropout_prob=0.5)
    if kind == "wrapped":
        model = get_pruning_model(model, SLSConfig())
    inner = model.get_base_model() if kind != "stock" else model
    model.train()
    inner.vit.layers[1].eval()  # some users freeze a part in this way
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    calls: list[int] = []
    handle = inner.vit.layers[0].register_forward_hook(lambda *_: calls.append(1))
    first, _ = extract_features(model, Patterns(), SLSConfig(batch_size=8))
    assert len(calls) == 3 and {n: m.training for n, m in model.named_modules()} == modes
    handle.remove()
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    again, _ = extract_features(model, Patterns(), SLSConfig(batch_size=8))
    assert all(torch.equal(first[number], again[number]) for number in first)


def test_half_precision_models_are_read_in_float32() -> None:
    model = make(VIT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = extract_features(model, Patterns())
    expected, _ = extract_features(make(VIT).bfloat16().float(), Patterns())
    assert all(torch.equal(features[number], expected[number]) for number in expected)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"labels": -100}, "negative class"),
        ({"labels": torch.zeros(5)}, "one class number an image"),
        ({"labels": 0.5}, "one class number an image"),
        ({"labels": None}, "no labels"),
        ({"pixel_values": torch.full((3, SIZE, SIZE), -1e38)}, "layer 1 are not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(row: dict[str, Any], words: str) -> None:
    model = make(VIT)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(InvalidDataError, match=words):
        select_layers(model, Patterns(**row), SLSConfig(**QUICK))
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


# ---------------------------------------------------------------------- which depths there are
def test_fewest_layers() -> None:
    assert fewest_layers(make(VIT)) == 1
    swin = make("SwinForImageClassification", depths=[1, 2, 3, 2], num_heads=[2, 4, 4, 4], image_size=32)
    assert [fewest_layers(swin, stages) for stages in (None, 1, 2, 3, 4, 9)] == [1, 7, 4, 2, 1, 1]
    assert fewest_layers(make("Dinov2Backbone", out_features=["stage1", "stage2"])) == 2
    assert fewest_layers(make("SwinBackbone")) == 3


@pytest.mark.parametrize(
    ("case", "changes"),
    [("Dinov2Backbone", {}), (VIT, {"num_hidden_layers": 1}), ("SwinBackbone", {"depths": [3, 1]})],
)
def test_a_model_that_can_lose_no_layer_is_refused(case: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="none can go"):
        get_pruning_model(make(case, **changes), SLSConfig())


@pytest.mark.parametrize(("stages", "floor"), [(1, 3), (2, 1)])
def test_swin_loses_layers_of_its_last_stages(stages: int, floor: int) -> None:
    model = make("SwinForImageClassification")  # stages of 2 and 3
    made = select_layers(model, Patterns(), SLSConfig(alpha=0.01, stages=stages, **QUICK))
    assert made.kept_layers == floor and list(made.scores) == list(range(5, floor - 1, -1))
    gated = get_pruning_model(make("SwinForImageClassification"), SLSConfig(alpha=0.01, stages=stages, **QUICK))
    gated.decide(Patterns())
    with torch.no_grad():
        expected = gated.eval()(images(2)).logits
    small = gated.export()
    assert small.config.depths == ([2, 1] if stages == 1 else [1, 0])
    assert relative_error(run(small, images(2))["logits"], expected) < 1e-5


# ---------------------------------------------------------------------- the way from training to the export
def sls(model: Any = None, **settings: Any) -> PruningModel:
    return get_pruning_model(make(VIT) if model is None else model, SLSConfig(**{**QUICK, "alpha": 0.01, **settings}))


@pytest.mark.parametrize("kind", ["PruningTrainer", "Trainer"])
def test_training_ends_in_a_decision(kind: str, tmp_path: Path) -> None:
    model = sls(lora_model())
    plain = {"kind": Trainer, "callbacks": [PruningCallback()]} if kind == "Trainer" else {}
    run_of = trainer(model, tmp_path, train_dataset=Patterns(), learning_rate=1e-3, **plain)
    run_of.train()
    made = model.method.selection
    assert made == select_layers(model.unload(), Patterns(), model.pruning_config)
    assert made.kept_layers == 1 and list(made.scores) == [3, 2, 1]
    last = run_of.state.log_history[-1]
    assert last["kept_layers"] == 1 and last["score_layer_3"] == made.scores[3] and last["threshold"] == made.threshold

    small = model.export()
    assert type(small) is type(model.model)
    assert len(small.get_base_model().vit.layers) == small.get_base_model().config.num_hidden_layers == 1
    assert_same(run(small.eval()), run(truncate(model.model, 1).eval()))
    info = lineage_of(small.get_base_model().config)
    assert info["method"] == "SLS" and info["alpha"] == 0.01 and info["reason"] == made.reason
    assert info["scores"] == {str(number): score for number, score in made.scores.items()}
    assert "target_metric" not in info


def test_the_decision_is_in_the_checkpoint() -> None:
    model = sls(alpha=0.9)
    model.decide(Patterns(noise=2.0))
    other = sls(alpha=0.9)
    other.load_state_dict(state_of(model))
    assert other.method.selection == model.method.selection and other.plan() == model.plan()
    other.decide()  # final, with or without images
    assert other.half().method.selection == model.method.selection
    undecided = sls()
    with pytest.raises(InvalidPlanError, match="not decided"):
        undecided.method.choose()
    with pytest.raises(InvalidDataError, match=r"decide\(images=<training set>\)"):
        undecided.plan()


def test_keeping_everything_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    model = sls(alpha=0.3)
    model.decide(Patterns(pixel_values=torch.ones(3, SIZE, SIZE)))  # twenty times the same image
    assert model.plan().removes_nothing and "not positive" in caplog.text
    small = model.export()
    assert relative_error(run(small)["logits"], run(model.model)["logits"]) == 0
    assert "not positive" in lineage_of(small.config)["reason"]


def test_removed_layers_are_skipped_in_training_too(tmp_path: Path) -> None:
    """Tuned through the wrapper, with masks: what is exported is what was tuned; removed layers do not move."""
    model = sls()
    model.decide(Patterns())
    before = state_of(model)
    trainer(model, tmp_path, train_dataset=Patterns(), learning_rate=0.1).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("layers.0." in name for name in moved) and not any("layers.1." in name for name in moved)
    assert relative_error(run(model.eval())["logits"], run(model.export())["logits"]) < 1e-6
