"""How well classes lie apart in a layer's features: t-SNE to two dimensions, the silhouette, and a cheap t-SNE."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import ThreadpoolController, threadpool_limits

from ...errors import InvalidDataError
from .config import SLSConfig

#: with three or more threads, t-SNE's sums depend on which thread ends first
MOST_THREADS = 2


def layer_score(features: np.ndarray, labels: np.ndarray, config: SLSConfig) -> float:
    """Mean silhouette coefficient, in [-1, 1], of the true classes in the t-SNE map of (images, channels) features."""
    return map_score(tsne_map(features, config), labels)


def tsne_map(features: np.ndarray, config: SLSConfig) -> np.ndarray:
    """(images, 2) coordinates by scikit-learn's t-SNE, not yet scaled."""
    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), dtype=features.dtype)  # all alike: there is nothing to lay out
    tsne = TSNE(
        perplexity=effective_perplexity(len(features), config),
        max_iter=config.iterations,
        init="pca",
        random_state=config.seed,
    )
    with threadpool_limits(thread_count(config), "openmp" if config.threads is None else None):
        coordinates = tsne.fit_transform(features)
    if not np.isfinite(coordinates).all():
        raise InvalidDataError("t-SNE gave coordinates that are not finite; the features may be too large for float32")
    return coordinates


def map_score(coordinates: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette coefficient on a map whose axes are stretched to [0, 1]; 0 for the only image of a class."""
    if len(np.unique(labels)) == len(labels):
        return 0.0  # every image is the only one of its class
    return float(silhouette_score(unit_square(coordinates), labels))


def unit_square(coordinates: np.ndarray) -> np.ndarray:
    """Each axis stretched to [0, 1]; an axis without extent becomes 0."""
    low, extent = coordinates.min(axis=0), np.ptp(coordinates, axis=0)
    return (coordinates - low) / np.where(extent > 0, extent, 1)


def effective_perplexity(images: int, config: SLSConfig) -> float:
    """The config's, or (images - 1) / 3 where that is less."""
    return min(config.perplexity, (images - 1) / 3)


def thread_count(config: SLSConfig) -> int:
    """Threads that scores are made with: the config's, or those of OpenMP, but two at most."""
    if config.threads is not None:
        return config.threads
    counts = [pool["num_threads"] for pool in ThreadpoolController().info() if pool["user_api"] == "openmp"]
    return min(MOST_THREADS, max(counts, default=1))


# ---------------------------------------------------------------------- a cheap form, at a tenth of the cost
# Exact gradients as products of dense matrices, four times the rate over half the steps. Scores come out within a few
# hundredths, and within 0.15 where classes are about to come apart; on a share of the images they were off by 0.35.

#: with more images, matrices of all pairs are no cheaper than scikit-learn's tree
MOST_IMAGES = 3000
EXAGGERATION = 12.0
EXAGGERATED_STEPS, PLAIN_STEPS = 60, 440
#: steps after which a map is looked at: is its score high enough already?
LOOKS = (100, 200)
BISECTIONS = 25
MOST_PRECISION = 1e30
#: spread of the first coordinates, as scikit-learn's
FIRST_SPREAD = 1e-4
#: images a side of the blocks of pairs that are worked on at once: small enough for a core's cache, and few enough
#: that two threads do not wait for each other between them
BLOCK = 500

#: a cheap score counts when it is further from the threshold than this: low scores err by as much as high ones
MARGIN = 0.15

#: of a layer, by its number from 1
Score = Callable[[int], float]


class Screened:
    """Scores of layers from the top, as cheaply as the decision allows.

    A cheap score counts where it is further from the threshold (``alpha`` times the last layer's) than the margin;
    otherwise the full one is taken. The last layer is always scored in full. If its cheap score is off by more than
    that, cheap scores are not used.

    Args:
        score: the full score.
        estimate: the cheap one; at least its second argument means that high.
        floor: the lowest layer that may be asked for.
        threads: layers that are estimated at once, from the one asked for downwards, as the walk goes.

    Attributes:
        estimated: the layers whose score is not the full one.
    """

    def __init__(
        self,
        score: Score,
        estimate: Callable[[int, float], float],
        layers: int,
        alpha: float,
        floor: int = 1,
        threads: int = 1,
        margin: float = MARGIN,
    ) -> None:
        self.score, self.estimate, self.layers, self.alpha = score, estimate, layers, alpha
        self.floor, self.threads, self.margin = floor, threads, margin
        self.estimated: list[int] = []
        self.known: dict[int, float] = {}
        self.top = 0.0

    def __call__(self, number: int) -> float:
        if number == self.layers:
            self.top = self.score(number)
            return self.top
        if abs(self._estimated(self.layers) - self.top) <= self.margin:
            guess = self._estimated(number)
            if abs(guess - self.alpha * self.top) > self.margin:
                self.estimated.append(number)
                return guess
        return self.score(number)

    def _estimated(self, number: int) -> float:
        """The cheap score, which is made once, and with it those of the next layers down, one a thread."""
        if number not in self.known:
            batch = range(number, max(number - self.threads, self.floor - 1), -1)
            enough = self.alpha * self.top + self.margin
            # all of them end here: scikit-learn's t-SNE crawls where another thread works beside it
            with ThreadPoolExecutor(len(batch)) as threads, threadpool_limits(1, "blas"):
                self.known.update(zip(batch, threads.map(self.estimate, batch, repeat(enough)), strict=True))
        return self.known[number]


def estimated_score(features: np.ndarray, labels: np.ndarray, config: SLSConfig, enough: float | None = None) -> float:
    """About what ``layer_score`` gives; see there.

    Args:
        enough: a map that scores more than this while it settles is left as it is: the score comes out a little low.
    """
    if not np.ptp(features, axis=0).any():
        return 0.0

    def clear(points: np.ndarray) -> bool:
        return enough is not None and map_score(points, labels) > enough

    return map_score(quick_map(features.astype(np.float32), config, clear), labels)


def quick_map(features: np.ndarray, config: SLSConfig, clear: Callable[[np.ndarray], bool]) -> np.ndarray:
    """(images, 2) coordinates by t-SNE with exact gradients (van der Maaten and Hinton, 2008, equation 5).

    After ``LOOKS`` steps ``clear`` is asked whether they are good enough.
    """
    forces = _Forces(joint_probabilities(features, effective_perplexity(len(features), config)))
    points = PCA(2, svd_solver="randomized", random_state=config.seed).fit_transform(features)
    points = (FIRST_SPREAD * points / points[:, 0].std()).astype(np.float32)
    rate = max(len(features) / EXAGGERATION, 50.0)
    step, gains = np.zeros_like(points), np.ones_like(points)
    for number in range(EXAGGERATED_STEPS + PLAIN_STEPS):
        if number == EXAGGERATED_STEPS:
            step, gains = np.zeros_like(points), np.ones_like(points)
        if number in LOOKS and clear(points):
            break
        factor, momentum = (EXAGGERATION, 0.5) if number < EXAGGERATED_STEPS else (1.0, 0.8)
        gradient = forces.gradient(points, factor)
        gains = np.maximum(np.where(step * gradient < 0, gains + 0.2, gains * 0.8), 0.01)
        step = momentum * step - rate * gains * gradient
        points = (points + step).astype(np.float32)
    return points


class _Forces:
    """The gradient for (images, images) joint probabilities, by blocks of pairs, each above the diagonal once."""

    def __init__(self, wanted: np.ndarray) -> None:
        images = len(wanted)
        parts = [slice(start, min(start + BLOCK, images)) for start in range(0, images, BLOCK)]
        self.blocks = [
            (rows, columns, np.ascontiguousarray(wanted[rows, columns]))
            for number, rows in enumerate(parts)
            for columns in parts[number:]
        ]
        self.space = np.empty((2, min(BLOCK, images) ** 2), wanted.dtype)

    def gradient(self, points: np.ndarray, factor: float) -> np.ndarray:
        """(images, 2) of the divergence of the map from the joint probabilities times ``factor``."""
        squares = np.einsum("ij,ij->i", points, points)[:, None]
        ones = np.ones_like(squares)
        left = np.hstack([-2 * points, 1 + squares, ones])
        right = np.ascontiguousarray(np.hstack([points, ones, squares]).T)
        weights, one = np.hstack([points, ones]), ones[:, 0]
        together, apart = np.zeros_like(weights), np.zeros_like(weights)
        total = -float(len(points))  # an image is no neighbour of its own
        for rows, columns, part in self.blocks:
            similarity, product = self.space[:, : part.size].reshape(2, *part.shape)
            # 1 + squared distance, as one product; then Student's kernel
            np.matmul(left[rows], right[:, columns], out=similarity)
            np.reciprocal(similarity, out=similarity)
            mass = float(one[rows] @ (similarity @ one[columns]))
            total += mass if rows == columns else 2 * mass
            np.multiply(similarity, part, out=product)
            np.square(similarity, out=similarity)
            for pairs, forces in ((product, together), (similarity, apart)):
                forces[rows] += pairs @ weights[columns]
                if rows != columns:
                    forces[columns] += pairs.T @ weights[rows]
        pull = factor * together - apart / total
        return 4 * (points * pull[:, 2:] - pull[:, :2])


def joint_probabilities(features: np.ndarray, perplexity: float) -> np.ndarray:
    """(images, images) symmetric affinities that sum to one; every row of the conditional ones has this perplexity.

    As in scikit-learn, only an image's nearest three times the perplexity are its neighbours. The width of every
    row's kernel is found by bisection, of all rows at once.
    """
    images = len(features)
    neighbours = min(images - 1, int(3 * perplexity + 1))
    squares = (features**2).sum(1)
    distances = squares[:, None] + squares - 2 * features @ features.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argpartition(distances, neighbours - 1, axis=1)[:, :neighbours]
    distances = np.take_along_axis(distances, nearest, axis=1)
    distances -= distances.min(1, keepdims=True)  # the nearest at zero: no row underflows, and no affinity changes
    low, high = np.zeros(images), np.full(images, np.inf)
    precision = 1 / np.maximum(np.median(distances, axis=1), np.finfo(np.float32).tiny).astype(float)
    for _ in range(BISECTIONS):
        # a row of nothing but copies of one image asks for ever more precision
        factors = -np.minimum(precision, MOST_PRECISION)[:, None].astype(np.float32)
        with np.errstate(over="ignore"):
            affinities = np.exp(distances * factors)
        total = affinities.sum(1)
        entropy = np.log(total) + precision * np.einsum("ij,ij->i", affinities, distances) / total
        flat = entropy > np.log(perplexity)
        low, high = np.where(flat, precision, low), np.where(flat, high, precision)
        precision = np.where(np.isinf(high), 2 * precision, (low + np.where(np.isinf(high), 0, high)) / 2)
    joint = np.zeros((images, images), features.dtype)
    np.put_along_axis(joint, nearest, affinities / total[:, None], axis=1)
    joint += joint.T.copy()
    return joint / joint.sum()
