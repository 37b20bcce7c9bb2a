"""What models say of the same images: predictions of classifiers, neighbours by features of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from tqdm.auto import tqdm

from ...errors import InvalidDataError
from ...evaluation.features import image_vectors
from ...evaluation.metrics import NearestNeighbourAccuracy, TopK, ranked_classes
from ...losses.features import FeatureReader
from ...methods.oneshot.probe import read_outputs
from ...spec.architecture import Architecture
from ...utils.batches import ImageBatches, run_images
from ...utils.modes import evaluating
from .pictures import Pictures

#: neighbours of every image that are compared
NEIGHBOURS = 4


@dataclass(frozen=True)
class Answers:
    """What every model says of every image; the first model is the dense one.

    Attributes:
        kind: ``"classes"`` or ``"neighbours"``.
        chosen: model -> (images, 1) class numbers, or (images, k) numbers of the nearest other images.
        sure: model -> (images) probability of the chosen class; of neighbours: empty.
        class_names: of the dense model; of neighbours: empty.
        errors: model -> relative squared error of its output to the dense one's, by what one-shot scores go by, where
            both have outputs of one shape.
        accuracy: model -> share of right classes, where images have labels; of neighbours, by a vote of the nearest.
        accuracy_name: what is counted.
    """

    kind: str
    chosen: dict[str, np.ndarray]
    sure: dict[str, np.ndarray]
    class_names: list[str]
    errors: dict[str, float]
    accuracy: dict[str, float]
    accuracy_name: str

    def agreement(self, name: str) -> float:
        """Share of images with the dense model's class, or of neighbours that the dense model finds too."""
        dense, own = next(iter(self.chosen.values())), self.chosen[name]
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(own, dense, strict=True)]))

    def changed(self) -> list[int]:
        """Images for which a model says something else, those that change most first."""
        dense, *others = self.chosen.values()
        lost = sum((~_isin_rows(own, dense)).sum(1) for own in others)
        sure = next(iter(self.sure.values()), np.zeros(len(dense)))
        order = sorted(range(len(dense)), key=lambda i: (-int(lost[i]), -float(sure[i]), i))
        return [i for i in order if lost[i]]


def _isin_rows(own: np.ndarray, dense: np.ndarray) -> np.ndarray:
    return (own[:, :, None] == dense[:, None, :]).any(2)


def compare_answers(
    models: Mapping[str, Any], processor: Any, pictures: Pictures, *, part: str | None = None, batch_size: int = 16
) -> Answers:
    """Run all models on the images.

    Classifiers are compared by their classes, as whole models. Everything else by features: a tower runs by itself,
    and an image's features are CLS or the mean over patches, as ``hf-vitprune evaluate`` takes them.

    Args:
        models: name -> model; the first one is the dense one.
        processor: the dense model's image processor: all see the same pixels.
        pictures: at least two, where features are compared.
        part: which tower of a bigger model.
        batch_size: images a forward pass.

    Raises:
        InvalidDataError: the models do not run on the images, classes of the models differ, or a feature is no number.
        UnsupportedModelError: the tower reads no images.
    """
    dense = next(iter(models.values()))
    is_classifier = all("ForImageClassification" in type(model).__name__ for model in models.values())
    architecture = Architecture.of(dense, part)
    architecture.check_looks("a page of images")
    names = {name: [model.config.id2label[i] for i in sorted(model.config.id2label)] for name, model in models.items()}
    class_names = next(iter(names.values())) if is_classifier else []
    if is_classifier and any(other != class_names for other in names.values()):
        raise InvalidDataError(
            "the models have other classes (id2label), so that their predictions cannot be compared"
        )
    if not is_classifier and len(pictures) < 2:
        raise InvalidDataError("neighbours need at least two images")
    readers = {name: FeatureReader(model, part=part) for name, model in models.items()}
    runs = dict(models) if is_classifier else {name: reader.tower for name, reader in readers.items()}
    rows, errors = _run(runs, readers, ImageBatches(pictures.processed(processor), batch_size), is_classifier)
    if is_classifier:
        return _classes(rows, errors, pictures, class_names)
    return _neighbours(rows, errors, pictures)


def _run(
    models: Mapping[str, Any], readers: Mapping[str, FeatureReader], batches: ImageBatches, is_classifier: bool
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Logits or features of every model, and its error at the output."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    lost, whole = dict.fromkeys(models, 0.0), 0.0
    architecture = next(iter(readers.values())).architecture
    special = architecture.family.extra_tokens_of(architecture.config)
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for batch in tqdm(batches, "comparing", delay=3, leave=False):
            expected = None
            for name, model in models.items():
                with readers[name].reading() as states:
                    output = run_images(model, batch)
                vectors = output.logits if is_classifier else image_vectors(readers[name], states[0])
                rows[name].append(vectors.float().cpu())
                read = read_outputs(output, special)
                read = states[0].flatten(1).double() if read is None else read
                if expected is None:
                    expected, whole = read, whole + float(read.square().sum())
                elif read.shape == expected.shape:
                    lost[name] += float((read - expected).square().sum())
                else:  # another width: the errors cannot be told
                    lost[name] = float("nan")
    errors = {name: lost[name] / whole for name in [*models][1:] if lost[name] == lost[name]}
    return {name: torch.cat(some).numpy() for name, some in rows.items()}, errors


def _classes(
    logits: dict[str, np.ndarray], errors: dict[str, float], pictures: Pictures, class_names: list[str]
) -> Answers:
    chosen = {name: ranked_classes(rows, 1) for name, rows in logits.items()}
    sure = {}
    for name, rows in logits.items():
        shares = torch.from_numpy(rows).softmax(-1).numpy()
        sure[name] = np.take_along_axis(shares, chosen[name], 1)[:, 0]
    accuracy = {}
    if pictures.labels is not None:
        for name, rows in chosen.items():
            accuracy[name] = (TopK().compute(predictions=rows, references=pictures.labels) or {})["accuracy"]
    return Answers("classes", chosen, sure, class_names, errors, accuracy, "accuracy")


def _neighbours(features: dict[str, np.ndarray], errors: dict[str, float], pictures: Pictures) -> Answers:
    k = min(NEIGHBOURS, len(pictures) - 1)
    chosen = {}
    for name, rows in features.items():
        if not np.isfinite(rows).all():
            raise InvalidDataError(f"features of {name} are no numbers: its weights are broken")
        found = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(rows)
        chosen[name] = found.kneighbors(return_distance=False)
    accuracy = {}
    if pictures.labels is not None:
        for name, rows in features.items():
            scores = NearestNeighbourAccuracy().compute(predictions=rows, references=pictures.labels, k=k)
            accuracy[name] = next(iter((scores or {}).values()))
    return Answers("neighbours", chosen, {}, [], errors, accuracy, f"{k}-nearest-neighbour accuracy")
