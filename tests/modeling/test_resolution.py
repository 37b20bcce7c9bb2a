"""Fine-tuning and pruning at another resolution than the config's, with interpolated position embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_vitprune import (
    NViTConfig,
    OneShotScores,
    PruningCallback,
    PruningPlan,
    PruningTrainer,
    SLSConfig,
    TruncationConfig,
    VTPConfig,
    get_pruning_model,
    prune,
)
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.methods.sls import extract_features
from pruning_runs import SMALL_GROUPS
from tiny import LABELS, images, make

VIT = "ViTForImageClassification"
LARGE = 32
PIXELS = images(24, size=LARGE)
ROWS = [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(PIXELS)]
COLUMNS = {"pixel_values": PIXELS, "interpolate_pos_encoding": True}


def collate(rows: list[Any]) -> dict[str, Any]:
    return {**default_data_collator(rows), "interpolate_pos_encoding": True}


def made_for(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The same model with the interpolated position embeddings in its weights, which needs no argument."""
    embeddings = model.get_submodule("vit.embeddings")
    patches = (size // model.config.patch_size) ** 2
    states = torch.zeros(1, 1 + patches, model.config.hidden_size)
    table = embeddings.interpolate_pos_encoding(states, size, size).detach()
    other = make(VIT, image_size=size)
    other.load_state_dict({**model.state_dict(), "vit.embeddings.position_embeddings": table})
    return other


def test_compensation_and_scores_are_those_of_a_model_made_for_the_resolution() -> None:
    model = make(VIT)
    native = made_for(model, LARGE)
    plans = [PruningPlan.magnitude(m, 0.5, units=["heads", "mlp"], round_to=1) for m in (model, native)]
    got, expected = compensate_plan(model, plans[0], COLUMNS), compensate_plan(native, plans[1], PIXELS)
    assert got.weights.keys() == expected.weights.keys() and got.weights
    for name, tensor in got.weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=1e-3, atol=1e-4)
    settings = OneShotSettings(images=16)
    scores = OneShotScores.measure(model, COLUMNS, settings), OneShotScores.measure(native, PIXELS, settings)
    for name, tensor in scores[0].tensors.items():
        torch.testing.assert_close(tensor, scores[1].tensors[name], rtol=1e-3, atol=1e-4)
    features = extract_features(model, {**COLUMNS, "labels": torch.arange(24) % LABELS})[0]
    for number, values in extract_features(native, ROWS)[0].items():
        torch.testing.assert_close(features[number], values, rtol=1e-4, atol=1e-4)


def test_images_alone_are_refused_with_what_is_missing() -> None:
    model = make(VIT)
    plan = PruningPlan.magnitude(model, 0.5, units=["mlp"])
    for call in (
        lambda: prune(model, plan, calibration=PIXELS),
        lambda: OneShotScores.measure(model, PIXELS),
        lambda: extract_features(model, ROWS),
    ):
        with pytest.raises(InvalidDataError, match=r'\(3, 32, 32\).*"interpolate_pos_encoding": True'):
            call()


@pytest.mark.parametrize("trainer_class", [PruningTrainer, Trainer])
@pytest.mark.parametrize(
    "config",
    [
        VTPConfig(target=0.6, image_size=LARGE, round_to=4),
        NViTConfig(target=0.6, image_size=LARGE, group_sizes=SMALL_GROUPS),
        SLSConfig(iterations=250, perplexity=3.0),
        TruncationConfig(layers="validation", max_drop=1.0),
    ],
    ids=["VTP", "NViT", "SLS", "validation"],
)
def test_every_method_trains_decides_and_exports(config: Any, trainer_class: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    held_out = {**COLUMNS, "labels": torch.arange(24) % LABELS}
    callback = PruningCallback(images=held_out if isinstance(config, TruncationConfig) else None)
    trainer = trainer_class(
        model=get_pruning_model(make(VIT), config),
        args=arguments,
        train_dataset=ROWS,
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train()
    small = trainer.model.export(calibration=COLUMNS if not isinstance(config, SLSConfig) else None)
    with torch.no_grad():
        assert small(**COLUMNS).logits.isfinite().all()


def test_a_teacher_gets_what_it_takes(tmp_path: Path) -> None:
    """One of another kind, without position embeddings; and one like the student, which needs the argument."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=LABELS)
    for teacher in (ResNetForImageClassification(config), make(VIT)):
        quiet: dict[str, Any] = {"save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path), max_steps=2, **quiet)
        model = get_pruning_model(make(VIT), VTPConfig(target=0.6, image_size=LARGE, round_to=4))
        trainer = PruningTrainer(
            model=model, args=arguments, train_dataset=ROWS, data_collator=collate, teacher=teacher
        )
        trainer.train()
        assert model.method.decided
