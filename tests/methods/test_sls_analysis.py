"""analyse_layers: every layer's score, probe and map, and how the two go together."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from hf_vitprune import SLSConfig, select_layers
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.methods.sls import analyse_layers, analysis
from hf_vitprune.methods.sls.scoring import map_score

QUICK = SLSConfig(iterations=250, perplexity=10.0)
LABELS = torch.arange(48) % 3


def layers(*apart: float, seed: int = 0, classes: torch.Tensor = LABELS) -> list[torch.Tensor]:
    """Features whose classes lie so far apart, a value a layer; the centres are the same for every seed."""
    made = []
    for number, distance in enumerate(apart):
        centres = torch.randn(10, 12, generator=torch.Generator().manual_seed(number))
        noise = torch.randn(len(classes), 12, generator=torch.Generator().manual_seed(100 + 10 * seed + number))
        made.append(distance * centres[classes] + noise)
    return made


def test_every_layer_is_scored_and_the_decision_is_that_of_the_walk() -> None:
    """At all steps of t-SNE: after 250 of them, the order of two maps without classes is that of rounding errors."""
    settled = SLSConfig(perplexity=10.0, alpha=0.8)
    features = layers(0.0, 1.0, 2.5)  # scores of about -0.05, 0.45 and 0.94
    report = analyse_layers(features, LABELS, settled)
    walked = select_layers(features, LABELS, settled)
    assert report.selection == walked and walked.kept_layers == 3 and len(walked.scores) < len(report.scores) == 3
    assert walked.scores.items() <= report.scores.items()  # the layers under the first failure too
    for number, points in report.maps.items():
        assert points.shape == (48, 2) and points.min(0).tolist() == [0, 0] and points.max(0).tolist() == [1, 1]
        assert map_score(points, report.labels) == pytest.approx(report.scores[number], abs=1e-6)
    accuracies = [report.probe_accuracy[number] for number in (1, 2, 3)]
    assert accuracies[0] < 0.6 < accuracies[1] < 0.95 < accuracies[2] and report.correlation == pytest.approx(1)
    record = json.loads(json.dumps(report.to_dict()))
    assert record["selection"]["kept_layers"] == walked.kept_layers and list(record["scores"]) == ["1", "2", "3"]


def test_probes_are_tested_on_other_images_where_there_are_some() -> None:
    """Wrong classes of the other images bring the accuracy down to them alone: nothing is fitted on those."""
    features, others = layers(3.0, 3.0), layers(3.0, 3.0, seed=1)
    right = analyse_layers(features, LABELS, QUICK, others, LABELS)
    wrong = analyse_layers(features, LABELS, QUICK, others, (LABELS + 1) % 3)
    assert right.probe_accuracy == {1: 1.0, 2: 1.0} and wrong.probe_accuracy == {1: 0.0, 2: 0.0}
    assert right.scores == wrong.scores and right.correlation is None  # constant on one side


def test_cross_validation_holds_images_out() -> None:
    """Noise in many channels is learnt by heart, and yet predicts nothing."""
    generator = torch.Generator().manual_seed(3)
    noise, classes = torch.randn(60, 200, generator=generator).numpy(), np.arange(60) % 4
    assert analysis.probe().fit(noise, classes).score(noise, classes) == 1.0
    assert analysis.cross_validated(noise, classes) < 0.6
    assert analysis.cross_validated(np.eye(4)[classes], classes) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 900], 1.0),  # ranks, not values
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 (1 + 1) / (4 x 15)
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float | None) -> None:
    made = analysis.rank_correlation(first, second)
    assert made is None if expected is None else made == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((layers(1.0, 1.0), LABELS, QUICK, layers(1.0), LABELS), InvalidDataError, "features of 2 layers, and"),
        ((layers(1.0), torch.zeros_like(LABELS), QUICK), InvalidDataError, "at least 2 classes"),
        ((layers(1.0), torch.arange(48), QUICK), InvalidDataError, "no class has two; pass probe_features"),
        ((layers(1.0), LABELS[:40], QUICK), InvalidDataError, "48 images, and there are 40 labels"),
    ],
)
def test_what_cannot_be_analysed_is_refused(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        analyse_layers(*arguments)
