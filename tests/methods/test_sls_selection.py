"""select_layers: equal to scikit-learn read off the page, lazy, and clear about what it cannot score."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from hf_vitprune import SLSConfig, select_layers
from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.methods import LayerSelection
from hf_vitprune.methods.sls import scoring, selection
from hf_vitprune.methods.sls.features import given_features

#: quick maps for what does not depend on their quality
QUICK: dict[str, Any] = {"iterations": 250}


def blobs(
    layers: int, images: int, classes: int, spread: list[float], seed: int = 0
) -> tuple[list[Any], torch.Tensor]:
    """Features whose classes lie ``spread`` apart, a value a layer; classes in turn."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    made = []
    for width, apart in zip(range(20, 20 + layers), spread, strict=True):
        centres = torch.randn(classes, width, generator=generator) * apart
        made.append(centres[labels] + torch.randn(images, width, generator=generator))
    return made, labels


@cache
def score_by_hand(layer: bytes, shape: tuple[int, int], labels: tuple[int, ...]) -> float:
    features = np.frombuffer(layer, dtype=np.float32).reshape(shape)
    tsne = TSNE(n_components=2, init="pca", random_state=0, perplexity=min(30, (len(features) - 1) / 3))
    points = tsne.fit_transform(features)
    points = (points - points.min(0)) / (points.max(0) - points.min(0))
    return silhouette_score(points, labels)


def by_hand(features: list[Any], labels: Any, alpha: float) -> tuple[int, dict[int, float]]:
    """The method in plain scikit-learn: (kept layers, scores)."""
    labels, scores = np.asarray(labels), {}
    for number in range(len(features), 0, -1):
        layer = np.asarray(features[number - 1], dtype=np.float32)
        scores[number] = score_by_hand(layer.tobytes(), layer.shape, tuple(labels.tolist()))
        if scores[len(features)] <= 0:
            return len(features), scores
        if scores[number] < alpha * scores[len(features)]:
            return number + 1, scores
    return 1, scores


CASES: dict[str, tuple[list[Any], torch.Tensor]] = {
    "falling": blobs(4, 95, 4, [0.0, 0.1, 1.0, 2.0]),
    "none fails": blobs(3, 40, 3, [2.0, 2.0, 2.0]),
    "noise": blobs(3, 60, 5, [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("case", "alpha"), [("falling", 0.3), ("falling", 0.9), ("none fails", 0.5), ("noise", 0.3)])
def test_equal_to_scikit_learn(case: str, alpha: float) -> None:
    features, labels = CASES[case]
    kept, scores = by_hand(features, labels, alpha)
    made = select_layers(features, labels, SLSConfig(alpha=alpha))
    assert made.kept_layers == kept and list(made.scores) == list(scores)
    assert made.scores == pytest.approx(scores, abs=1e-3)
    if scores[len(features)] > 0:
        assert made.threshold == pytest.approx(alpha * scores[len(features)], abs=1e-3)
    else:
        assert made.threshold is None and kept == len(features) and "not positive" in made.reason


def test_equal_to_scikit_learn_on_digits() -> None:
    """Real images: their pixels, drowned in noise until the digits cannot be told apart."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:150].reshape(-1, 8, 8), labels[:150]
    noise = np.random.default_rng(0).normal(size=images.shape) * 16
    layers = [(images * clear + noise * (1 - clear)).reshape(-1, 64) for clear in (0.2, 1.0)]
    features = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    kept, scores = by_hand(features, labels, 0.3)
    assert kept == 2
    made = select_layers(features, labels)
    assert made.kept_layers == kept and made.scores == pytest.approx(scores, abs=1e-3)


# ---------------------------------------------------------------------- the walk
@pytest.mark.parametrize(
    ("scores", "alpha", "floor", "kept", "looked_at"),
    [
        ([0.9, 0.1, 0.5, 0.6, 0.8], 0.3, 1, 3, 4),  # the first from the top that fails; the first layer is not seen
        ([0.9, 0.1, 0.5, 0.6, 0.8], 0.1, 1, 1, 5),  # nothing fails
        ([0.9, 0.1, 0.5, 0.6, 0.8], 0.9, 1, 5, 2),  # the very next fails: everything stays
        ([0.1, 0.5, 0.5, 0.5, 0.8], 0.3, 1, 2, 5),
        ([0.1, 0.5, 0.5, 0.5, 0.8], 0.3, 2, 2, 4),  # layers under the fewest that may stay are not looked at
        ([0.1, 0.5, 0.5, 0.4, 0.8], 0.5, 1, 2, 5),  # on the threshold is not under it
        ([0.9, 0.9, 0.9, 0.9, 0.0], 0.3, 1, 5, 1),
        ([0.9, 0.9, 0.9, 0.9, -0.1], 0.3, 1, 5, 1),
    ],
)
def test_the_walk(scores: list[float], alpha: float, floor: int, kept: int, looked_at: int) -> None:
    seen: list[int] = []

    def score(number: int) -> float:
        seen.append(number)
        return scores[number - 1]

    made = selection.walk(score, 5, alpha, floor)
    assert made.kept_layers == kept
    assert seen == list(made.scores) == list(range(5, 5 - looked_at, -1))
    assert LayerSelection.of(made.scores, 5, alpha, floor) == made
    assert json.loads(json.dumps(made.to_dict()))["kept_layers"] == kept


def test_keeping_all_layers_for_want_of_a_score_is_said(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = CASES["noise"]
    made = select_layers(features, labels, SLSConfig(**QUICK))
    assert made.kept_layers == 3 and made.threshold is None and list(made.scores) == [3]
    assert "not positive" in made.reason and made.reason in caplog.text


def test_layers_below_the_first_failure_are_never_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = CASES["falling"]
    mapped = []
    plain = scoring.tsne_map
    monkeypatch.setattr(scoring, "tsne_map", lambda f, c: mapped.append(f.shape[1]) or plain(f, c))
    made = select_layers(features, labels, SLSConfig(**QUICK))
    assert mapped == [19 + number for number in made.scores] and len(mapped) < 4


# ---------------------------------------------------------------------- maps and scores
def test_axes_are_stretched_and_flat_ones_are_not() -> None:
    points = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]])
    assert scoring.unit_square(points).tolist() == [[0, 0], [1, 0], [0.5, 0]]
    labels = np.array([0, 0, 1, 1])
    tall = np.array([[0.0, 0.0], [0.0, 100.0], [1.0, 0.0], [1.0, 100.0]])
    assert silhouette_score(tall, labels) < -0.4
    score = scoring.map_score(tall, labels)  # by hand: a = 1, b = (1 + sqrt 2) / 2 on the unit square
    assert score == pytest.approx(1 - 2 / (1 + 2**0.5))


def test_the_only_image_of_a_class_counts_zero() -> None:
    points = np.array([[0.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    pairs = [1 - 0.1 / np.hypot(1, 1), 1 - 0.1 / np.hypot(1, 0.9)]
    assert scoring.map_score(points, np.array([7, 7, 3])) == pytest.approx(sum(pairs) / 3)
    assert scoring.map_score(points, np.array([0, 1, 2])) == 0.0


@pytest.mark.parametrize(("images", "expected"), [(1000, 30), (91, 30), (61, 20), (4, 1)])
def test_perplexity_is_at_most_a_third_of_the_others(images: int, expected: float) -> None:
    assert scoring.effective_perplexity(images, SLSConfig()) == pytest.approx(expected)


@pytest.mark.parametrize("images", [2, 3, 4, 5, 7])
def test_a_handful_of_images(images: int) -> None:
    features, labels = blobs(2, images, 2, [1.0, 1.0])
    assert -1 <= select_layers(features, labels, SLSConfig(**QUICK)).scores[2] <= 1


def test_features_that_are_all_alike_score_zero() -> None:
    features, labels = blobs(2, 30, 3, [1.0, 1.0])
    assert select_layers([features[0], torch.ones(30, 8)], labels).scores == {2: 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"perplexity": 5.0}, {"iterations": 500}, {"max_samples": 40},
    ],
)  # fmt: skip
def test_every_setting_matters_and_is_repeatable(settings: dict[str, Any]) -> None:
    features, labels = blobs(2, 80, 4, [0.5, 0.8])
    plain = select_layers(features, labels, SLSConfig(**QUICK))
    ours = [select_layers(features, labels, SLSConfig(**{**QUICK, **settings})) for _ in range(2)]
    assert ours[0] == ours[1] and ours[0].scores != plain.scores


def test_max_samples_spreads_over_sorted_data() -> None:
    features, labels = blobs(1, 100, 4, [1.0])
    order = labels.argsort(stable=True)
    made, chosen = given_features([features[0][order]], labels[order], SLSConfig(max_samples=20))
    assert torch.bincount(chosen).tolist() == [5, 5, 5, 5] and made[1].shape == (20, 20)


def test_half_precision_and_arrays_are_taken() -> None:
    features, labels = blobs(1, 30, 3, [1.0])
    halves = features[0].half()
    scores = [
        select_layers([given], given_labels, SLSConfig(**QUICK)).scores
        for given, given_labels in (
            (halves, labels),
            (halves.numpy(), labels.tolist()),
            (halves.float(), labels.int()),
        )
    ]
    assert scores[0] == scores[1] == scores[2]


# ---------------------------------------------------------------------- fast
@pytest.mark.parametrize("signal", [0.0, 0.4, 2.0])
def test_estimates_are_near_the_scores(signal: float) -> None:
    """Where classes are mixed, come apart, and lie apart."""
    (features,), labels = blobs(1, 200, 4, [signal])
    features, classes = features.numpy(), labels.numpy()
    exact = scoring.layer_score(features, classes, SLSConfig())
    assert scoring.estimated_score(features, classes, SLSConfig()) == pytest.approx(exact, abs=0.05)


def test_estimates_follow_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PLAIN_STEPS", 40)
    (features,), labels = blobs(1, 90, 4, [0.6])
    features, classes = features.numpy(), labels.numpy()
    plain = scoring.estimated_score(features, classes, SLSConfig())
    assert scoring.estimated_score(features, classes, SLSConfig(perplexity=5.0)) != plain
    assert scoring.estimated_score(np.ones((20, 4)), np.arange(20) % 2, SLSConfig()) == 0


def test_a_map_that_is_clear_early_is_left_at_that(monkeypatch: pytest.MonkeyPatch) -> None:
    (features,), labels = blobs(1, 120, 3, [2.0])
    features, classes = features.numpy(), labels.numpy()
    looks: list[int] = []
    gradient = scoring._Forces.gradient
    monkeypatch.setattr(scoring._Forces, "gradient", lambda *args: looks.append(1) or gradient(*args))
    for enough, steps in ((0.3, 100), (0.999, 500), (None, 500)):
        looks.clear()
        score = scoring.estimated_score(features, classes, SLSConfig(), enough)
        assert len(looks) == steps and (enough is None or (score > enough) == (steps < 500))


def test_the_gradient_is_that_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Kullback and Leibler, between the joint probabilities and Student's kernel; by autograd."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(150, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = torch.rand(150, 150, generator=generator, dtype=torch.float64).fill_diagonal_(0)
    wanted = (wanted + wanted.T) / (2 * wanted.sum())
    kernel = (1 / (1 + (points[:, None] - points).square().sum(-1))).fill_diagonal_(0)
    off = ~torch.eye(150, dtype=torch.bool)
    (wanted[off] * (wanted[off] / (kernel / kernel.sum())[off]).log()).sum().backward()
    monkeypatch.setattr(scoring, "BLOCK", 64)  # the last blocks are smaller
    made = scoring._Forces(wanted.numpy()).gradient(points.detach().numpy(), 1.0)
    np.testing.assert_allclose(made, points.grad.numpy(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("perplexity", "copies"), [(12.0, 1), (26.0, 5)])
def test_affinities_have_the_perplexity(perplexity: float, copies: int) -> None:
    """Of 37 neighbours, and of all."""
    points = np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)
    points[40 : 40 + copies] = points[40]
    joint = scoring.joint_probabilities(points, perplexity)
    assert joint.sum() == pytest.approx(1, abs=1e-5) and np.array_equal(joint, joint.T) and not joint.diagonal().any()
    np.testing.assert_allclose(joint, scoring_joint(points, perplexity), atol=1e-6)


def scoring_joint(points: np.ndarray, perplexity: float) -> np.ndarray:
    """Row by row, the width found by a root finder."""
    rows = []
    for i, point in enumerate(points.astype(float)):
        squares = np.delete(((points.astype(float) - point) ** 2).sum(1), i)
        squares[squares > np.sort(squares)[min(int(3 * perplexity), len(squares) - 1)]] = np.inf  # no neighbours

        def affinities(log_precision: float, squares: np.ndarray = squares) -> np.ndarray:
            values = np.exp(-np.exp(log_precision) * (squares - squares.min()))
            return values / values.sum()

        def excess(log_precision: float, affinities: Any = affinities) -> float:
            p = affinities(log_precision)
            return float(-(p * np.log(np.maximum(p, 1e-300))).sum() - np.log(perplexity))

        rows.append(np.insert(affinities(brentq(excess, -10, 10)), i, 0))
    joint = np.array(rows)
    return (joint + joint.T) / (2 * len(points))


@pytest.mark.parametrize(
    ("scores", "estimates", "kept", "full"),
    [
        ([0.9, 0.9, 0.1, 0.8, 1.0], [0.9, 0.9, 0.15, 0.7, 0.95], 4, [5]),
        # near the threshold, from either side
        ([0.9, 0.9, 0.28, 0.8, 1.0], [0.9, 0.9, 0.35, 0.7, 1.0], 4, [5, 3]),
        ([0.1, 0.9, 0.35, 0.8, 1.0], [0.1, 0.9, 0.25, 0.8, 1.0], 2, [5, 3]),
        ([0.9, 0.9, 0.35, 0.31, 1.0], [0.9, 0.9, 0.2, 0.39, 1.0], 1, [5, 4, 3]),
        # the last layer's estimate is too high, or too low: none is believed
        ([0.9, 0.9, 0.0, 0.8, 0.5], [0.9, 0.9, 0.9, 0.9, 0.9], 4, [5, 4, 3]),
        ([0.9, 0.9, 0.0, 0.8, 0.9], [0.9, 0.9, 0.9, 0.0, 0.5], 4, [5, 4, 3]),
        ([0.9, 0.9, 0.2, 0.8, 0.0], [0.9, 0.9, 0.2, 0.8, 0.8], 5, [5]),
        # where all scores are low, they are as far from certain as anywhere
        ([0.1, 0.1, 0.1, 0.02, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1], 5, [5, 4]),
    ],
)
def test_estimates_decide_where_they_are_far_from_the_threshold(
    scores: list[float], estimates: list[float], kept: int, full: list[int]
) -> None:
    seen: list[int] = []

    def score(number: int) -> float:
        seen.append(number)
        return scores[number - 1]

    screened = scoring.Screened(score, lambda number, _: estimates[number - 1], 5, 0.3, margin=0.12)
    made = selection.walk(screened, 5, 0.3)
    assert made.kept_layers == kept == selection.walk(lambda n: scores[n - 1], 5, 0.3).kept_layers
    assert seen == full and sorted(screened.estimated + full, reverse=True) == list(made.scores)


def test_estimates_are_made_once_and_none_too_low() -> None:
    made: list[int] = []

    def estimate(number: int, enough: float) -> float:
        made.append(number)
        return 8.0 if number == 8 else number * enough

    screened = scoring.Screened(lambda number: 8.0, estimate, 8, 1 / 16, floor=3, threads=3, margin=0.25)
    assert [screened(number) for number in (8, 7, 6)] == [8, 5.25, 4.5] and sorted(made) == [6, 7, 8]
    assert [screened(number) for number in (4, 3)] == [3, 2.25] and sorted(made) == [3, 4, 6, 7, 8]


def test_fast_decides_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = CASES["falling"]
    known: dict[int, float] = {}  # full scores are made once; every layer has a width of its own

    def score(layer: np.ndarray, *rest: Any) -> float:
        if layer.shape[1] not in known:
            known[layer.shape[1]] = scoring.layer_score(layer, *rest)
        return known[layer.shape[1]]

    monkeypatch.setattr(selection, "layer_score", score)
    full = select_layers(features, labels)
    fast = select_layers(features, labels, SLSConfig(fast=True))
    assert fast.kept_layers == full.kept_layers and list(fast.scores) == list(full.scores) and fast.estimated
    assert fast.scores[len(features)] == full.scores[len(features)] and fast.threshold == full.threshold
    assert all((fast.scores[n] == full.scores[n]) != (n in fast.estimated) for n in full.scores)
    assert fast.estimated == tuple(sorted(fast.estimated, reverse=True))
    for threads in (1, 3):  # how many layers are estimated at once shows nowhere
        assert select_layers(features, labels, SLSConfig(fast=True, threads=threads)) == fast
    monkeypatch.setattr(selection, "MOST_IMAGES", 90)  # of 95
    assert select_layers(features, labels, SLSConfig(fast=True)) == full


# ---------------------------------------------------------------------- refusals
GOOD, LABELS = blobs(2, 20, 2, [1.0, 1.0])
BROKEN = GOOD[1].clone()
BROKEN[3, 4] = torch.nan


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (GOOD, torch.zeros(20, dtype=torch.long), r"at least 2 classes: all 20 images are of class \[0\]"),
        (GOOD, LABELS[:19], "layer 1 has features of 20 images, and there are 19 labels"),
        (GOOD, torch.where(LABELS == 1, -100, 0), "10 of 20 images have a negative class"),
        (GOOD, torch.eye(20)[:, :2], "one class number an image, not torch.float32 of shape"),
        (GOOD, LABELS.float(), "one class number an image"),
        ([GOOD[0], BROKEN], LABELS, "layer 2 are not finite for 1 of 20 images"),
        ([GOOD[0], GOOD[1][:, :1]], LABELS, "layer 2 are .* at least 2 channels"),
        ([GOOD[0][0]], LABELS, r"\(images, channels\)"),
        ([], LABELS, "list of"),
        ("model", LABELS, "give a model and a data set.*not str"),
    ],
)
def test_what_cannot_be_scored_is_refused(features: Any, labels: Any, words: str) -> None:
    with pytest.raises(InvalidDataError, match=words):
        select_layers(features, labels)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0}, "alpha must lie strictly between 0 and 1"), ({"alpha": 1.0}, "alpha"),
        ({"alpha": -0.3}, "alpha"),
        ({"alpha": "0.3"}, "alpha"), ({"target": 0.5}, "TruncationConfig"), ({"gate_learning_rate": 0.1}, "no gates"),
        ({"perplexity": 0}, "perplexity"), ({"iterations": 100}, "iterations is a whole number of at least 250"),
        ({"seed": -1}, "seed"), ({"stages": 0}, "stages"), ({"target_metric": "latency"}, "leave target_metric out"),
        ({"max_samples": 0}, "max_samples"), ({"threads": 0}, "threads"),
        ({"fast": "yes"}, "fast"), ({"batch_size": 2.0}, "batch_size"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfigError, match=words):
        SLSConfig(**settings)
