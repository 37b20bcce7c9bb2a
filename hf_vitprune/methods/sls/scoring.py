"""How well the classes lie apart in a layer's features: t-SNE to two dimensions, then the silhouette."""

from __future__ import annotations

import numpy as np
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
