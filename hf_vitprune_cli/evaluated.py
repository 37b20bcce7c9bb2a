"""Saved models measured on images: what ``hf-vitprune evaluate`` asks, and the results."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer

from hf_vitprune.cost import count
from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.evaluation.classify import evaluate_classifier
from hf_vitprune.evaluation.features import evaluate_features, image_features
from hf_vitprune.evaluation.results import weights_digest
from hf_vitprune.evaluation.zero_shot import zero_shot_accuracy, zero_shot_metrics
from hf_vitprune.latency.measure import device_name
from hf_vitprune.plan.lineage import plain_name
from hf_vitprune.publish.exporters.formats import GRAPHS, load_graph
from hf_vitprune.publish.report import comparison_table
from hf_vitprune.publish.snippet import pipeline_tag
from hf_vitprune.spec.towers import find_tower
from hf_vitprune.utils.classes import chance_note
from hf_vitprune.utils.data import LabelledImages, load_images, read_folder
from hf_vitprune.utils.sources import Source

from .app import say
from .saved import is_adapter_alone, load_model

CLASSIFY, ZERO_SHOT, FEATURES = (
    "image-classification",
    "zero-shot-image-classification",
    "image-feature-extraction",
)
#: what evaluate's evaluator says of time
_TIMES = ("total_time_in_seconds", "samples_per_second", "latency_in_seconds")


@dataclass(frozen=True)
class Question:
    """What a model is measured on, and how; see the options of ``hf-vitprune evaluate``."""

    data: str
    part: str | None
    split: str | None
    limit: int | None
    top_k: int
    neighbours: int
    template: str
    batch_size: int


class Subject(NamedTuple):
    """A saved model, by its folder or Hub id, and loaded."""

    name: str
    model: Any

    @classmethod
    def load(cls, name: str) -> Subject:
        """In evaluation mode: stock, pruned, adapters with their base, or an exported graph.

        Raises:
            OSError: there is no such model.
            UnsupportedModelError: transformers or this library does not know its kind.
        """
        record = Path(name) / "checked.json"
        to = json.loads(record.read_text("utf-8")).get("to") if record.is_file() else None
        if to in GRAPHS:
            return cls(name, load_graph(to, name))
        if is_adapter_alone(name):
            return cls(name, AutoModelForImageClassification.from_pretrained(name).eval())
        return cls(name, load_model(name))

    @property
    def task(self) -> str:
        if not isinstance(self.model, nn.Module):
            kind = next(iter(self.model.config.architectures or []), "")
            if not kind.endswith("ForImageClassification"):
                raise InvalidConfigError(
                    f"of exported graphs only image classifiers are evaluated, and this is a {kind}"
                )
            return CLASSIFY
        tag = pipeline_tag(self.model)
        return tag if tag in (CLASSIFY, ZERO_SHOT) else FEATURES

    def row(self, metrics: dict[str, float], part: str | None, **more: Any) -> dict[str, Any]:
        """Of the results; of a graph no sizes: its config has the dense model's."""
        cost = count(self.model, part=part) if isinstance(self.model, nn.Module) else None
        digest = weights_digest(self.name) if Path(self.name).is_dir() else None
        sizes = {name: None if cost is None else getattr(cost, name) for name in ("params", "macs")}
        return {"model": plain_name(self.name), "weights": digest, **sizes, "metrics": metrics, **more}


def ask(question: Question, model: str, dense: str | None = None) -> dict[str, Any]:
    """Results of a saved model, and of the dense one; prints a table.

    Returns:
        ``task``, ``data``, ``split``, ``images`` and ``setting``; of the model ``model``, ``weights`` (a digest),
        ``params``, ``macs``, ``metrics`` and ``timing``; ``dense``, the same of the dense model.

    Raises:
        OSError: there is no such model, or no image processor with it.
        InvalidDataError: no such data, classes that the model does not have, or images without labels where the task
            needs some.
        InvalidConfigError: the two models have different tasks.
    """
    own, other = Subject.load(model), None if dense is None else Subject.load(dense)
    task = FEATURES if question.part is not None else own.task
    if other is not None and question.part is None and other.task != task:
        raise InvalidConfigError(f"{model} is for {task} and {dense} for {other.task}: nothing to compare")
    found = (_features if task == FEATURES else _predictions)(question, own, other)
    _show(question, found)
    return {
        "task": task,
        "part": question.part,
        "data": plain_name(Source.parse(question.data).name),
        "split": question.split,
        "setting": {"batch_size": question.batch_size, "device": device_name()},
        **found,
    }


def _labelled(question: Question) -> LabelledImages:
    """The images; without a split those that a training on this data holds out, and never those it sees."""
    return load_images(question.data, eval_split=question.split, training=False)


# ---------------------------------------------------------------------- classes
def _predictions(question: Question, own: Subject, other: Subject | None) -> dict[str, Any]:
    images = _labelled(question).at_most(evaluation=question.limit)
    judge = _classified if own.task == CLASSIFY else _zero_shot
    row, ranks = judge(question, images, own)
    row["images"] = len(images.evaluation)
    if other is not None:
        row["dense"], theirs = judge(question, images, other)
        same_classes = own.model.config.id2label == getattr(other.model.config, "id2label", None)
        if ranks is not None and theirs is not None and same_classes:
            row["metrics"]["same_prediction_as_dense"] = float((ranks[:, 0] == theirs[:, 0]).mean())
    return row


def _classified(question: Question, images: LabelledImages, subject: Subject) -> tuple[dict[str, Any], Any]:
    own = images.aligned_to(subject.model.config, every=False, model=subject.name)
    if own.match is not None and own.match.how:
        say(own.match.how)
    found, ranks = evaluate_classifier(
        subject.model,
        AutoImageProcessor.from_pretrained(subject.name),
        own.evaluation,
        image_column=own.image_column,
        label_column=own.label_column,
        numbers=None if own.match is None else own.match.numbers,
        k=question.top_k,
        batch_size=question.batch_size,
    )
    timing = {name: found.pop(name) for name in _TIMES}
    return subject.row(found, None, timing=timing), ranks


def _zero_shot(question: Question, images: LabelledImages, subject: Subject) -> tuple[dict[str, Any], Any]:
    _, evaluation = images.processed(AutoImageProcessor.from_pretrained(subject.name))
    tokenizer = AutoTokenizer.from_pretrained(subject.name)
    settings = (question.template, question.batch_size, question.top_k)
    return subject.row(
        zero_shot_metrics(subject.model, tokenizer, evaluation, images.label_names, *settings), "vision"
    ), None


def accuracy_of_saved(model: str, source: str) -> float:
    """Zero-shot accuracy of a saved dual encoder on the evaluation split of labelled images (``load_images``).

    Raises:
        OSError: there is no such model, or no tokenizer or image processor with it.
        InvalidDataError, UnsupportedModelError: as :func:`zero_shot_accuracy`.
    """
    images, loaded = load_images(source, training=False), load_model(model)
    _, evaluation = images.processed(AutoImageProcessor.from_pretrained(model))
    accuracy = zero_shot_accuracy(loaded, AutoTokenizer.from_pretrained(model), evaluation, images.label_names)
    captions = f"{model} with captions like 'a photo of a {images.label_names[0]}'"
    at_chance = chance_note(accuracy, evaluation.labels, captions)
    if at_chance is not None:
        print(at_chance, file=sys.stderr)  # what is printed may be JSON
    return accuracy


# ---------------------------------------------------------------------- features
def _features(question: Question, own: Subject, other: Subject | None) -> dict[str, Any]:
    find_tower(own.model, question.part)  # says what there is
    evaluation, gallery = _feature_images(question, own.name, other is not None)

    def seen(subject: Subject, data: Any) -> Any:
        return image_features(subject.model, data, part=question.part, batch_size=question.batch_size)

    theirs = None if other is None else seen(other, evaluation)[0]
    ours, labels = seen(own, evaluation)

    def row(subject: Subject, features: Any, reference: Any = None, **more: Any) -> dict[str, Any]:
        known = None if gallery is None else seen(subject, gallery)
        metrics = evaluate_features(features, labels, dense=reference, gallery=known, k=question.neighbours)
        return subject.row(metrics, question.part, **more)

    found = row(own, ours, theirs, images=len(ours))
    return found if other is None else {**found, "dense": row(other, theirs)}


def _feature_images(question: Question, model: str, has_dense: bool) -> tuple[Any, Any]:
    """(images to measure on, labelled images to look neighbours up in, or None)."""
    processor = AutoImageProcessor.from_pretrained(model)
    folder = Path(question.data)
    if folder.is_dir() and not any(inner.is_dir() for inner in folder.iterdir()):
        if not has_dense:
            raise InvalidDataError(
                f"{folder} has images without labels, and features alone say nothing: give --dense, the model they "
                "are compared with, or a folder with one sub-folder a class"
            )
        return read_folder(folder, processor, question.limit), None
    labelled = _labelled(question)
    gallery, evaluation = labelled.at_most(question.limit, question.limit).processed(processor)
    same = labelled.train._fingerprint == labelled.evaluation._fingerprint  # an image would be its own neighbour
    return evaluation, None if same else gallery


def _show(question: Question, found: dict[str, Any]) -> None:
    rows = []
    for name, row in (("dense", found.get("dense")), (found["model"], found)):
        if row is not None:
            time = {"latency_ms": row["timing"]["latency_in_seconds"] * 1e3} if "timing" in row else {}
            rows.append({"name": name, **row["metrics"], "params": row["params"], "macs": row["macs"], **time})
    about = f"{found['images']} images of {question.data}"
    if any("timing" in row for row in (found, found.get("dense") or {})):
        about += f"; latency an image, decoding and resizing included, batch {question.batch_size}, {device_name()}"
    Console().print(comparison_table(rows, title=about))
