"""Metrics on numbers worked out by hand, ties above all; no script is fetched, and no file is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.evaluation.metrics import (
    FeatureCosine,
    NearestNeighbourAccuracy,
    NeighbourAgreement,
    TopK,
    accuracy_of,
    ranked_classes,
)
from processes import run_python


def test_the_classes_of_an_image_are_ranked_by_their_logits() -> None:
    logits = [[0.1, 3.0, 2.0, -1.0], [5.0, 4.0, 6.0, 7.0]]
    assert ranked_classes(logits, 3).tolist() == [[1, 2, 0], [3, 2, 0]]


def test_of_a_tie_the_lowest_class_wins_whatever_rounding_made_of_it() -> None:
    tied = np.array([[2.0, 7.0, 7.0, 7.0, 1.0]] * 4)
    tied[1, 3] += 7e-6
    tied[2, 2:4] += [7e-6, -7e-6]
    tied[3, 1] -= 3e-5
    assert ranked_classes(tied, 5).tolist() == [[1, 2, 3, 0, 4]] * 4
    assert ranked_classes(np.zeros((2, 3)), 1).tolist() == [[0], [0]]
    assert ranked_classes([[1.0, 1.001]], 1).tolist() == [[1]]  # no tie


def test_top_k() -> None:
    ranks = [[2, 0, 1], [1, 2, 0], [0, 1, 2], [1, 0, 2]]
    assert TopK().compute(predictions=ranks, references=[2, 2, 2, 0]) == {"accuracy": 0.25, "top_3_accuracy": 1.0}
    two = [row[:2] for row in ranks]
    assert TopK().compute(predictions=two, references=[2, 2, 2, 0]) == {"accuracy": 0.25, "top_2_accuracy": 0.75}
    with pytest.raises(InvalidDataError, match="one is -100"):
        TopK().compute(predictions=[[0], [1]], references=[0, -100])


def test_top_1_does_not_depend_on_order_nor_on_batches() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.integers(0, 4, (64, 6)).astype(float), generator.integers(0, 6, 64)
    expected = TopK().compute(predictions=ranked_classes(logits, 1), references=labels)
    order = generator.permutation(64)
    shuffled = logits[order] + generator.uniform(-1e-6, 1e-6, logits.shape)  # what another batch size does to sums
    assert TopK().compute(predictions=ranked_classes(shuffled, 1), references=labels[order]) == expected
    metric = TopK()
    for start in range(0, 64, 5):
        metric.add_batch(
            predictions=ranked_classes(logits[start : start + 5], 1), references=labels[start : start + 5]
        )
    assert metric.compute() == expected


def test_the_metric_of_a_trainer() -> None:
    logits = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    for predictions in (logits, (logits, "hidden states")):
        found = accuracy_of(SimpleNamespace(predictions=predictions, label_ids=np.array([1, 0, 0])))
        assert found == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(InvalidDataError, match="weights or its images are broken"):
        accuracy_of(SimpleNamespace(predictions=logits * np.nan, label_ids=np.array([1, 0, 0])))


def test_cosine_of_features() -> None:
    ours, theirs = [[1.0, 0.0], [3.0, 4.0]], [[2.0, 0.0], [4.0, 3.0]]
    found = FeatureCosine().compute(predictions=ours, references=theirs)
    assert found == {"feature_cosine": pytest.approx(0.98), "lowest_feature_cosine": pytest.approx(0.96)}
    with pytest.raises(InvalidDataError, match="are no numbers"):
        FeatureCosine().compute(predictions=[[np.nan, 1.0]], references=[[1.0, 1.0]])


ANGLES = np.deg2rad([0, 10, 21, 90, 101])
FAN = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).tolist()


def test_the_class_of_the_nearest_images() -> None:
    metric = NearestNeighbourAccuracy()
    assert metric.compute(predictions=FAN, references=[0, 0, 1, 1, 1], k=1) == {
        "1_nearest_neighbour_accuracy": 0.8  # that at 21 degrees is nearest to one of class 0
    }
    found = metric.compute(
        predictions=FAN, references=[0, 0, 1, 1, 1], gallery=[[1, 0], [0, 5]], gallery_labels=[0, 1], k=1
    )
    assert found == {"1_nearest_neighbour_accuracy": 0.8}
    tie = metric.compute(predictions=[[1.0, 0.0]], references=[0], gallery=[[1, 0], [0, 1]], gallery_labels=[1, 0])
    assert tie == {"2_nearest_neighbour_accuracy": 1.0}  # a vote each: the lowest class
    with pytest.raises(InvalidDataError, match="needs another image"):
        metric.compute(predictions=FAN[:1], references=[0])


def test_whether_two_models_find_the_same_images_nearest() -> None:
    other = [FAN[i] for i in (0, 1, 3, 2, 4)]  # the third and the fourth change places
    metric = NeighbourAgreement()
    assert metric.compute(predictions=FAN, references=FAN, k=2) == {"shared_2_neighbours": 1.0}
    # nearest by FAN: 1, 0, 1, 4, 3; by the other: 1, 0, 4, 1, 2
    assert metric.compute(predictions=FAN, references=other, k=1) == {"shared_1_neighbours": 0.4}


@pytest.mark.slow
def test_offline_in_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    code = """
from hf_vitprune.evaluation.metrics import TopK
print(TopK().compute(predictions=[[1], [0]], references=[1, 1]))
"""
    home = tmp_path / "file"
    home.touch()  # no folder can be made below it
    assert "0.5" in run_python(code, HF_EVALUATE_OFFLINE="1", HF_HOME=str(home))


def test_they_are_metrics_of_evaluate() -> None:
    for kind in (TopK, FeatureCosine, NeighbourAgreement, NearestNeighbourAccuracy):
        assert isinstance(kind(), evaluate.Metric) and kind().description
