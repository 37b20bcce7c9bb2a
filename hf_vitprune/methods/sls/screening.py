"""A t-SNE good enough to tell which layers are far from the threshold, at a small part of the cost.

It differs from scikit-learn's in three ways: on a share of the images, exact gradients as products of small dense
matrices instead of a tree, and a rate that is four times as high over half the steps. Scores come out within a few
hundredths where classes lie well apart, and far too low where they are about to come apart: then fewer images are not
enough for clusters to form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA

from .config import SLSConfig
from .scoring import effective_perplexity, map_score

#: images that are laid out; enough for classes to form clusters, few enough for the matrices to stay in the cache
MOST_IMAGES = 500
EXAGGERATION = 12.0
EXAGGERATED_STEPS, PLAIN_STEPS = 60, 440
BISECTIONS = 25
#: of the last layer's score: what the second half of a t-SNE's steps may still change
HALFWAY_MARGIN = 0.1
MOST_PRECISION = 1e30
#: spread of the first coordinates, as scikit-learn's
FIRST_SPREAD = 1e-4

#: of a layer, by its number from 1
Score = Callable[[int], float]


class Screened:
    """Scores of layers from the top, as cheaply as the decision allows.

    The cheap t-SNE may only pass a layer: with a score over the threshold by ``margin`` times the last layer's. It
    errs downwards where classes are about to come apart, so that a low one says nothing. What it does not pass gets
    scikit-learn's t-SNE, at first stopped halfway, which is the same run up to there; and to its end where that score
    is within :data:`HALFWAY_MARGIN` of the threshold. The last layer is always scored in full. If its cheap score is
    over the full one by the margin, cheap scores are not used.

    Args:
        score: the full score.
        halfway: of the t-SNE that stops halfway; None where it is too short for that.
        estimate: of the cheap t-SNE.
        layers: number of layers.
        config: ``alpha`` and ``margin`` are read.

    Attributes:
        estimated: the layers whose score is not the full one.
    """

    def __init__(self, score: Score, halfway: Score | None, estimate: Score, layers: int, config: SLSConfig) -> None:
        self.score, self.halfway, self.estimate = score, halfway, estimate
        self.layers, self.config = layers, config
        self.estimated: list[int] = []
        self.top: float | None = None
        self.trusted: bool | None = None

    def __call__(self, number: int) -> float:
        if number == self.layers:
            self.top = self.score(number)
            return self.top
        assert self.top is not None, "layers are scored from the top"
        threshold, margin = self.config.alpha * self.top, self.config.margin * self.top
        if self.trusted is None:
            self.trusted = self.estimate(self.layers) - self.top <= margin
        if self.trusted:
            guess = self.estimate(number)
            if guess > threshold + margin:
                self.estimated.append(number)
                return guess
        if self.halfway is not None:
            guess = self.halfway(number)
            if abs(guess - threshold) > HALFWAY_MARGIN * self.top:
                self.estimated.append(number)
                return guess
        return self.score(number)


def estimated_score(features: np.ndarray, labels: np.ndarray, config: SLSConfig) -> float:
    """About what ``layer_score`` gives; see there."""
    chosen = evenly_by_class(labels, MOST_IMAGES)
    share, classes = features[chosen].astype(np.float32), labels[chosen]
    if not np.ptp(share, axis=0).any():
        return 0.0
    perplexity = effective_perplexity(len(features), config) * len(chosen) / len(features)
    return map_score(quick_map(share, min(perplexity, (len(chosen) - 1) / 3), config), classes, config)


def evenly_by_class(labels: np.ndarray, most: int) -> np.ndarray:
    """Positions of at most ``most`` images, of every class in proportion."""
    if len(labels) <= most:
        return np.arange(len(labels))
    by_class = np.argsort(labels, kind="stable")
    return np.sort(by_class[np.arange(most) * len(labels) // most])


def quick_map(features: np.ndarray, perplexity: float, config: SLSConfig) -> np.ndarray:
    """(images, 2) coordinates by t-SNE with exact gradients (van der Maaten and Hinton, 2008, equation 5)."""
    count = len(features)
    wanted = joint_probabilities(features, perplexity)
    points = _first_points(features, config)
    rate = max(count / EXAGGERATION, 50.0)
    step, gains = np.zeros_like(points), np.ones_like(points)
    similarity, force = np.empty_like(wanted), np.empty_like(wanted)
    for iteration in range(EXAGGERATED_STEPS + PLAIN_STEPS):
        exaggerated = iteration < EXAGGERATED_STEPS
        squares = (points**2).sum(1, keepdims=True)
        ones = np.ones_like(squares)
        # 1 + squared distance, as one product; then Student's kernel
        np.matmul(np.hstack([-2 * points, 1 + squares, ones]), np.hstack([points, ones, squares]).T, out=similarity)
        np.reciprocal(similarity, out=similarity)
        np.fill_diagonal(similarity, 0)
        np.multiply(similarity, -1 / similarity.sum(), out=force)
        force += EXAGGERATION * wanted if exaggerated else wanted
        force *= similarity
        pull = force @ np.hstack([points, ones])
        gradient = 4 * (points * pull[:, 2:] - pull[:, :2])
        gains = np.maximum(np.where(step * gradient < 0, gains + 0.2, gains * 0.8), 0.01)
        step = (0.5 if exaggerated else 0.8) * step - rate * gains * gradient
        points = (points + step).astype(np.float32)
    return points


def _first_points(features: np.ndarray, config: SLSConfig) -> np.ndarray:
    if config.init == "pca":
        pca = PCA(2, svd_solver="randomized", random_state=config.seed)
        points = pca.fit_transform(features)
        points /= points[:, 0].std()
    else:
        points = np.random.RandomState(config.seed).standard_normal((len(features), 2))
    return (FIRST_SPREAD * points).astype(np.float32)


def joint_probabilities(features: np.ndarray, perplexity: float) -> np.ndarray:
    """(images, images) symmetric affinities that sum to one; every row of the conditional ones has this perplexity.

    The width of every row's kernel is found by bisection, of all rows at once.
    """
    squares = (features**2).sum(1)
    distances = squares[:, None] + squares - 2 * features @ features.T
    np.fill_diagonal(distances, np.inf)
    distances -= distances.min(1, keepdims=True)  # the nearest at zero: no row underflows, and no affinity changes
    np.fill_diagonal(distances, 0)
    off_diagonal = 1 - np.eye(len(features), dtype=np.float32)
    low, high = np.zeros(len(features)), np.full(len(features), np.inf)
    precision = 1 / np.maximum(np.median(distances, axis=1), np.finfo(np.float32).tiny).astype(float)
    for _ in range(BISECTIONS):
        # a row of nothing but copies of one image asks for ever more precision
        factors = -np.minimum(precision, MOST_PRECISION)[:, None].astype(np.float32)
        with np.errstate(over="ignore"):
            affinities = np.exp(distances * factors) * off_diagonal
        total = affinities.sum(1)
        entropy = np.log(total) + precision * np.einsum("ij,ij->i", affinities, distances) / total
        flat = entropy > np.log(perplexity)
        low, high = np.where(flat, precision, low), np.where(flat, high, precision)
        precision = np.where(np.isinf(high), 2 * precision, (low + np.where(np.isinf(high), 0, high)) / 2)
    affinities /= total[:, None]
    affinities += affinities.T
    return affinities / affinities.sum()
