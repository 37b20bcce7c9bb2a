"""Images that a method cannot decide by are refused when training begins, and the cure that is named works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_vitprune import PruningCallback, PruningTrainer, SLSConfig, TruncationConfig, get_pruning_model
from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.methods.sls import extract_features
from pruning_runs import VIT, Patterns, gated, trainer
from tiny import LABELS, images, make

SLS = SLSConfig(iterations=250, perplexity=3.0)
VALIDATION = TruncationConfig(layers="validation", max_drop=1.0)
ROWS = [Patterns()[i] for i in range(20)]
KINDS = [PruningTrainer, Trainer]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


def refused(run_of: Any, error: type[Exception], words: str) -> None:
    before = {name: tensor.clone() for name, tensor in run_of.model.state_dict().items()}
    with pytest.raises(error, match=words):
        run_of.train()
    assert run_of.state.global_step == 0 and not run_of.model.method.decided
    assert all(torch.equal(tensor, before[name]) for name, tensor in run_of.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_cannot_be_decided_by_and_other_images_can(kind: type[Trainer], tmp_path: Path) -> None:
    run_of = trainer(get_pruning_model(make(VIT), SLS), tmp_path, kind, train_dataset=Stream(),
                     callbacks=[PruningCallback()])  # fmt: skip
    refused(run_of, InvalidConfigError, r"stream.*PruningCallback\(images=")
    model = get_pruning_model(make(VIT), SLS)
    trainer(model, tmp_path, kind, train_dataset=Stream(), callbacks=[PruningCallback(images=ROWS)]).train()
    assert model.method.decided and model.method.selection.scores


@pytest.mark.parametrize("config", [SLS, VALIDATION], ids=["SLS", "validation"])
@pytest.mark.parametrize("labels", [torch.eye(LABELS)[0], torch.full((LABELS,), 0.2)], ids=["several", "mixed"])
def test_labels_that_are_no_classes(config: Any, labels: torch.Tensor, tmp_path: Path) -> None:
    rows = [{**row, "labels": labels} for row in ROWS]
    callback = PruningCallback(images=None if config is SLS else rows)
    kwargs: dict[str, Any] = {"train_dataset": rows}
    model = make(VIT, problem_type="multi_label_classification")
    run_of = trainer(get_pruning_model(model, config), tmp_path, callbacks=[callback], **kwargs)
    refused(run_of, InvalidDataError, r"one class number an image.*PruningCallback\(images=")
    pruning_model = get_pruning_model(make(VIT, problem_type="multi_label_classification"), config)
    trainer(pruning_model, tmp_path, callbacks=[PruningCallback(images=ROWS)], **kwargs).train()
    assert pruning_model.method.decided


@pytest.mark.parametrize("config", [SLS, VALIDATION], ids=["SLS", "validation"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (images(4), "no labels"),
        ([{"pixel_values": image, "labels": 0} for image in images(4, size=32)], "interpolate_pos_encoding"),
        ([{"pixel_values": torch.zeros(1, 16, 16), "labels": 0}], "does not take images"),
        ([], "empty"),
    ],
    ids=["unlabelled", "larger", "grey", "none"],
)
def test_images_of_ones_own_that_do_not_fit(config: Any, given: Any, words: str, tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), config)
    run_of = trainer(model, tmp_path, train_dataset=Patterns(), callbacks=[PruningCallback(images=given)])
    refused(run_of, InvalidDataError, words)


def test_a_look_at_the_images_draws_no_random_number(tmp_path: Path) -> None:
    """Training goes as it would without."""
    states = []
    for given in (None, Patterns()):
        model = get_pruning_model(make(VIT, hidden_dropout_prob=0.1), SLS)
        trainer(model, tmp_path, train_dataset=Patterns(), callbacks=[PruningCallback(images=given)]).train()
        states.append({n: t for n, t in model.model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("parts", [True, ("mlp",)])
def test_compensation_that_was_asked_for_needs_images_that_can_be_read_again(parts: Any, tmp_path: Path) -> None:
    run_of = trainer(gated(), tmp_path, train_dataset=Stream(), compensate=parts)
    refused(run_of, InvalidConfigError, r"stream.*export\(calibration=<images>, compensate=")
    model = gated()
    trainer(model, tmp_path, train_dataset=Stream(), compensate="auto").train()
    small = model.export(calibration=images(8), compensate=parts)
    with torch.no_grad():
        assert small(images(2)).logits.isfinite().all()


def test_images_without_a_class_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "labels": -100} if i % 4 == 3 else row for i, row in enumerate(ROWS)]
    model = make(VIT)
    features, labels = extract_features(model, rows)
    whole, classes = extract_features(model, ROWS)
    kept = torch.arange(20) % 4 != 3
    assert torch.equal(labels, classes[kept]) and "5 of 20 images have no class" in caplog.text
    assert all(torch.equal(features[number], whole[number][kept]) for number in whole)
