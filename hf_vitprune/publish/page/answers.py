"""What models say of the same images (predictions, or neighbours by features), and cards of what changed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
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
#: cards that are shown at the most; one of neighbours has many pictures
CLASS_CARDS, NEIGHBOUR_CARDS = 24, 9


@dataclass(frozen=True)
class Answers:
    """What every model says of every image; the first model is the dense one.

    Attributes:
        kind: ``"classes"`` or ``"neighbours"``.
        chosen: model -> (images, 1) class numbers, or (images, k) numbers of the nearest other images.
        sure: model -> (images) probability of the chosen class; of neighbours, as ``class_names``: empty.
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
        return float(_are_in(self.chosen[name], next(iter(self.chosen.values()))).mean())

    def changed(self) -> list[int]:
        """Images for which a model says something else, those that change most first."""
        dense, *others = self.chosen.values()
        lost = sum((~_are_in(own, dense)).sum(1) for own in others)
        sure = next(iter(self.sure.values()), np.zeros(len(dense)))
        order = sorted(range(len(dense)), key=lambda i: (-int(lost[i]), -float(sure[i]), i))
        return [i for i in order if lost[i]]


def _are_in(own: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Which of the numbers of an image are among the dense model's for it."""
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
        return _classes(rows, errors, pictures.labels, class_names)
    return _neighbours(rows, errors, pictures.labels)


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
    logits: dict[str, np.ndarray], errors: dict[str, float], labels: Sequence[int] | None, class_names: list[str]
) -> Answers:
    chosen, sure, accuracy = {}, {}, {}
    for name, rows in logits.items():
        chosen[name] = ranked_classes(rows, 1)
        sure[name] = np.take_along_axis(softmax(rows, axis=1), chosen[name], 1)[:, 0]
        if labels is not None:
            accuracy[name] = (TopK().compute(predictions=chosen[name], references=labels) or {})["accuracy"]
    return Answers("classes", chosen, sure, class_names, errors, accuracy, "accuracy")


def _neighbours(features: dict[str, np.ndarray], errors: dict[str, float], labels: Sequence[int] | None) -> Answers:
    chosen, accuracy = {}, {}
    for name, rows in features.items():
        if not np.isfinite(rows).all():
            raise InvalidDataError(f"features of {name} are no numbers: its weights are broken")
        k = min(NEIGHBOURS, len(rows) - 1)
        found = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(rows)
        chosen[name] = found.kneighbors(return_distance=False)
        if labels is not None:
            scores = NearestNeighbourAccuracy().compute(predictions=rows, references=labels, k=k)
            accuracy[name] = next(iter((scores or {}).values()))
    return Answers("neighbours", chosen, {}, [], errors, accuracy, f"{k}-nearest-neighbour accuracy")


# ---------------------------------------------------------------------- cards of those that changed
def answers_section(answers: Answers, pictures: Pictures) -> dict[str, Any]:
    """Heading, a sentence for every model, and the cards."""
    dense, *others = answers.chosen
    changed = answers.changed()
    if answers.kind == "classes":
        cards = [_class_card(answers, pictures, i) for i in changed[:CLASS_CARDS]]
        heading, what, order = "Predictions that changed", "images have another class", "surest first"
        counts = {name: sum(answers.chosen[name][:, 0] != answers.chosen[dense][:, 0]) for name in others}
        said = "; ".join(f"{name}: {n} of {len(pictures)} {what}" for name, n in counts.items())
    else:
        thumbnail = cache(pictures.thumbnail)
        cards = [_neighbour_card(answers, pictures, i, thumbnail) for i in changed[:NEIGHBOUR_CARDS]]
        heading, order = "Nearest neighbours that changed", "those that changed most first"
        k = answers.chosen[dense].shape[1]
        said = "; ".join(f"{n}: {answers.agreement(n):.1%} of the {k} nearest images are the same" for n in others)
    summary = f"On {pictures.source}, beside the dense model: {said}."
    if answers.accuracy:
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in answers.accuracy.items())
        summary += f" {answers.accuracy_name.capitalize()}: {rates}."
    shown = f"{len(cards)} of {len(changed)} images, {order}." if cards else ""
    return {"kind": answers.kind, "heading": heading, "summary": summary, "cards": cards, "shown": shown}


def _class_card(answers: Answers, pictures: Pictures, image: int) -> dict[str, Any]:
    truth = None if pictures.labels is None else pictures.labels[image]
    says = []
    for name, chosen in answers.chosen.items():
        number = int(chosen[image, 0])
        mark = "" if truth is None else "right" if number == truth else "wrong"
        sure = f"{answers.sure[name][image]:.0%}"
        says.append({"model": name, "what": answers.class_names[number], "sure": sure, "mark": mark})
    return {
        "thumbnail": pictures.thumbnail(image),
        "name": pictures.names[image],
        "truth": "" if truth is None else answers.class_names[truth],
        "says": says,
    }


def _neighbour_card(answers: Answers, pictures: Pictures, image: int, thumbnail: Any) -> dict[str, Any]:
    dense = next(iter(answers.chosen))
    before = set(answers.chosen[dense][image].tolist())
    says = []
    for name, chosen in answers.chosen.items():
        nearest = [
            {
                "thumbnail": thumbnail(near),
                "name": pictures.names[near],
                "new": near not in before,
                "caption": "new" if near not in before else "" if name == dense else "same",
            }
            for near in chosen[image].tolist()
        ]
        says.append({"model": f"{name}: nearest images", "nearest": nearest})
    return {"thumbnail": thumbnail(image), "name": pictures.names[image], "truth": "", "says": says}
