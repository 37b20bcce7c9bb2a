"""Metrics as classes of Hugging Face's ``evaluate``: ``evaluate.load`` would fetch scripts, these work offline."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from sklearn.neighbors import NearestNeighbors

from ..errors import InvalidDataError

#: logits closer than this share of an image's largest are a tie: other batch sizes round sums in other ways
TIE = 1e-5


def ranked_classes(logits: Any, k: int) -> np.ndarray:
    """(images, k) class numbers of the largest of (images, classes) logits, best first; of a tie, the lowest number.

    Raises:
        InvalidDataError: there are logits that are no numbers.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise InvalidDataError(
            f"logits are finite numbers of shape (images, classes), and these (of shape {values.shape}) are not: the "
            "model's weights or its images are broken"
        )
    order = np.argsort(-values, axis=1, kind="stable")
    descending = np.take_along_axis(values, order, axis=1)
    widest = TIE * np.abs(values).max(axis=1, keepdims=True)
    group = np.cumsum(-np.diff(descending, axis=1, prepend=descending[:, :1]) > widest, axis=1)
    order = np.take_along_axis(order, np.argsort(group * values.shape[1] + order, axis=1), axis=1)
    return order[:, :k]


class _LocalMetric(evaluate.Metric):
    """A metric that keeps what it compares in memory."""

    predictions: Any = None
    references: Any = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(keep_in_memory=True, **settings)

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root)  # nothing is written, so no folder is made

    def _info(self) -> Any:
        features = Features({"predictions": self.predictions, "references": self.references})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=features
        )


class TopK(_LocalMetric):
    """Share of images whose class is the likeliest (``accuracy``), and is among the ``k`` likeliest.

    Of (images, k) class numbers, best first, as :func:`ranked_classes` gives, and (images) class numbers.
    """

    predictions, references = List(Value("int64")), Value("int64")

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        labels = np.asarray(references)
        if labels.min() < 0:
            raise InvalidDataError(f"labels are class numbers from 0 on, and one is {labels.min()}")
        right = np.asarray(predictions) == labels[:, None]
        k = right.shape[1]
        best = {"accuracy": float(right[:, 0].mean())}
        return best if k == 1 else best | {f"top_{k}_accuracy": float(right.any(axis=1).mean())}


class FeatureCosine(_LocalMetric):
    """Cosine of each image's features to the dense model's: mean, and the lowest."""

    predictions = references = List(Value("float32"))

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        ours, theirs = (_unit(rows) for rows in (predictions, references))
        cosines = (ours * theirs).sum(axis=1)
        return {"feature_cosine": float(cosines.mean()), "lowest_feature_cosine": float(cosines.min())}


class NeighbourAgreement(_LocalMetric):
    """Share of an image's ``k`` (5) nearest other images, by features, that the dense model finds nearest too."""

    predictions = references = List(Value("float32"))

    def _compute(self, predictions: list, references: list, k: int = 5) -> dict[str, float]:
        if len(predictions) < 2:
            raise InvalidDataError("neighbours need at least two images")
        k = min(k, len(predictions) - 1)
        ours, theirs = (_neighbours(rows, None, k) for rows in (predictions, references))
        shared = [len(set(a) & set(b)) / k for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        return {f"shared_{k}_neighbours": float(np.mean(shared))}


class NearestNeighbourAccuracy(_LocalMetric):
    """Share of images whose class most of the ``k`` nearest images of a gallery have, by cosine of features.

    Args (of ``compute``):
        gallery: (others, features) of other images; None: each image is compared with all but itself.
        gallery_labels: (others) their class numbers.
        k: how many vote; of classes with as many votes the lowest number wins.
    """

    predictions, references = List(Value("float32")), Value("int64")

    def _compute(
        self, predictions: list, references: list, gallery: Any = None, gallery_labels: Any = None, k: int = 5
    ) -> dict[str, float]:
        own = np.asarray(references)
        labels = own if gallery is None else np.asarray(gallery_labels)
        k = min(k, len(labels) - (gallery is None))
        if k < 1:
            raise InvalidDataError("a nearest neighbour needs another image with a label")
        nearest = _neighbours(predictions, gallery, k)
        votes = np.zeros((len(own), int(max(labels.max(), own.max())) + 1))
        np.add.at(votes, (np.arange(len(own))[:, None], labels[nearest]), 1)
        return {f"{k}_nearest_neighbour_accuracy": float((votes.argmax(axis=1) == own).mean())}


def _unit(rows: Any) -> np.ndarray:
    values = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InvalidDataError("there are features that are no numbers: the model's weights or its images are broken")
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _neighbours(rows: Any, gallery: Any, k: int) -> np.ndarray:
    """(rows, k) places in the gallery (None: among the rows, not a row itself) of the nearest, by cosine."""
    rows = _unit(rows)
    found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows if gallery is None else _unit(gallery))
    return found.kneighbors(None if gallery is None else rows, return_distance=False)


def accuracy_of(prediction: Any) -> dict[str, float]:
    """``compute_metrics`` for a Trainer: top-1 accuracy."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return TopK().compute(predictions=ranked_classes(logits, 1), references=prediction.label_ids) or {}
