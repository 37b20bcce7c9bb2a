"""Every layer looked at: scores, the accuracy of a linear probe, and the maps (arXiv 2407.14330, figure 2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from ...errors import InvalidDataError
from .config import SLSConfig
from .features import check_classes, given_features
from .scoring import map_score, tsne_map, unit_square
from .selection import LayerSelection, walk

#: steps of the probe's solver; it has converged long before on features of a trained model
PROBE_STEPS = 1000


@dataclass(frozen=True)
class LayerAnalysis:
    """What every layer, by its number from 1, knows of the classes; and what SLS decides (``selection``).

    Attributes:
        scores: silhouette coefficients.
        probe_accuracy: of a linear classifier on the layer's features.
        correlation: Spearman's rank correlation of the two over the layers; None where one of them is constant.
        maps: (images, 2) t-SNE coordinates in the unit square.
        labels: (images,) class numbers, in the order of the maps.
    """

    scores: dict[int, float]
    probe_accuracy: dict[int, float]
    correlation: float | None
    selection: LayerSelection
    maps: dict[int, np.ndarray] = field(repr=False, compare=False)
    labels: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without maps and labels."""
        return {
            "scores": {str(number): score for number, score in self.scores.items()},
            "probe_accuracy": {str(number): accuracy for number, accuracy in self.probe_accuracy.items()},
            "correlation": self.correlation,
            "selection": self.selection.to_dict(),
        }


def analyse_layers(
    features: Any,
    labels: Any,
    config: SLSConfig | None = None,
    probe_features: Any = None,
    probe_labels: Any = None,
) -> LayerAnalysis:
    """Score and probe every layer.

    Args:
        features: one (images, channels) tensor or array a layer, bottom to top (``extract_features`` gives them).
        labels: (images,) class numbers.
        config: as for ``select_layers``.
        probe_features: features of other images, layer by layer, that the probes are tested on; by default they are
            tested on the same images, by cross-validation in at most five folds.
        probe_labels: of those.

    Raises:
        InvalidDataError: as ``select_layers``; features of fewer layers to test on; or no class has two images, so
            that nothing can be held out.
    """
    config = config or SLSConfig()
    layers, labels = given_features(features, labels, config)
    classes = check_classes(labels)
    held_out = None
    if probe_features is not None:
        tests, test_labels = given_features(probe_features, probe_labels, replace(config, max_samples=None))
        if tests.keys() != layers.keys():
            raise InvalidDataError(f"there are features of {len(layers)} layers, and probe_features of {len(tests)}")
        held_out = tests, test_labels.numpy()
    maps, scores, accuracy = {}, {}, {}
    for number, layer in tqdm(layers.items(), desc="analysing layers", leave=False, disable=None):
        coordinates = tsne_map(layer, config)
        maps[number] = unit_square(coordinates)
        scores[number] = map_score(coordinates, classes)
        if held_out is None:
            accuracy[number] = cross_validated(layer, classes)
        else:
            accuracy[number] = probe().fit(layer, classes).score(held_out[0][number], held_out[1])
    selection = walk(scores.__getitem__, len(layers), config.alpha)
    correlation = rank_correlation(list(scores.values()), list(accuracy.values()))
    return LayerAnalysis(scores, accuracy, correlation, selection, maps, classes)


def probe() -> Any:
    """A linear classifier over standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_STEPS))


def cross_validated(features: np.ndarray, classes: np.ndarray) -> float:
    """Accuracy of the probe on images that it was not fitted on."""
    most = int(np.bincount(np.unique(classes, return_inverse=True)[1]).max())
    if most < 2:
        raise InvalidDataError("a probe needs images to be tested on: no class has two; pass probe_features")
    folds = StratifiedKFold(min(5, most), shuffle=True, random_state=0)
    return float(cross_val_score(probe(), features, classes, cv=folds).mean())


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's; None where one side is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
