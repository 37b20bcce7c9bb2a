"""Saved models measured on images: what ``hf-vitprune evaluate`` asks, and the results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from hf_vitprune.cost import count
from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.evaluation.classify import evaluate_classifier
from hf_vitprune.evaluation.features import evaluate_features, image_features
from hf_vitprune.evaluation.results import weights_digest
from hf_vitprune.evaluation.zero_shot import zero_shot_metrics
from hf_vitprune.latency.measure import device_name
from hf_vitprune.plan.lineage import plain_name
from hf_vitprune.publish.report import comparison_table
from hf_vitprune.publish.snippet import pipeline_tag
from hf_vitprune.spec.towers import find_tower
from hf_vitprune.utils.data import LabelledImages, load_images, read_folder
from hf_vitprune.utils.sources import Source

from .app import say
from .saved import is_adapter_alone, load_adapted, load_any_config, model_class_of

CLASSIFY, ZERO_SHOT, FEATURES = (
    "image-classification",
    "zero-shot-image-classification",
    "image-feature-extraction",
)
#: formats of exported graphs
GRAPHS = ("onnx", "openvino", "executorch")
#: what evaluate's evaluator says of time
_TIMES = ("total_time_in_seconds", "samples_per_second", "latency_in_seconds")


@dataclass(frozen=True)
class Question:
    """What a model is measured on, and how; see the options of ``hf-vitprune evaluate``."""

    data: str
    part: str | None = None
    split: str | None = None
    limit: int | None = None
    top_k: int = 5
    neighbours: int = 5
    template: str = "a photo of a {}."
    batch_size: int = 8


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
    loaded = load_model(model)
    other = None if dense is None else load_model(dense)
    task = FEATURES if question.part is not None else _task(loaded)
    if other is not None and question.part is None and _task(other) != task:
        raise InvalidConfigError(f"{model} is for {task} and {dense} for {_task(other)}: nothing to compare")
    if task == FEATURES:
        found = _features(question, model, loaded, dense, other)
    else:
        images = _labelled(question).at_most(evaluation=question.limit)
        found = _predictions(question, task, images, model, loaded, dense, other)
    common = {
        "task": task,
        "part": question.part,
        "data": plain_name(Source.parse(question.data).name),
        "split": question.split,
    }
    setting = {"batch_size": question.batch_size, "device": device_name()}
    _show(question, found)
    return {**common, "setting": setting, **found}


def _labelled(question: Question) -> LabelledImages:
    """The images; without a split those that a training on this data holds out, and never those it sees."""
    return load_images(question.data, eval_split=question.split, training=False)


def load_model(model: str) -> Any:
    """A saved model of any form, in evaluation mode: stock, pruned, adapters with their base, an exported graph.

    Raises:
        OSError: there is no such model.
        UnsupportedModelError: transformers or this library does not know its kind.
    """
    record = Path(model) / "checked.json"
    to = json.loads(record.read_text("utf-8")).get("to") if record.is_file() else None
    if to in GRAPHS:
        from hf_vitprune.publish.exporters.formats import load_graph

        return load_graph(to, model)
    if is_adapter_alone(model):
        return load_adapted(model)
    return model_class_of(load_any_config(model)).from_pretrained(model).eval()


def _task(model: Any) -> str:
    if not isinstance(model, nn.Module):
        kind = next(iter(model.config.architectures or []), "")
        if not kind.endswith("ForImageClassification"):
            raise InvalidConfigError(f"of exported graphs only image classifiers are evaluated, and this is a {kind}")
        return CLASSIFY
    tag = pipeline_tag(model)
    return tag if tag in (CLASSIFY, ZERO_SHOT) else FEATURES


def _row(model: str, loaded: Any, part: str | None) -> dict[str, Any]:
    about = {"model": plain_name(model), "weights": weights_digest(model) if Path(model).is_dir() else None}
    if not isinstance(loaded, nn.Module):  # its config has the dense model's sizes
        return {**about, "params": None, "macs": None}
    cost = count(loaded, part=part)
    return {**about, "params": cost.params, "macs": cost.macs}


# ---------------------------------------------------------------------- classes
def _predictions(
    question: Question, task: str, images: LabelledImages, model: str, loaded: Any, dense: str | None, other: Any
) -> dict[str, Any]:
    judge = _classified if task == CLASSIFY else _zero_shot
    row, ranks = judge(question, images, model, loaded)
    row["images"] = len(images.evaluation)
    if dense is not None:
        row["dense"], theirs = judge(question, images, dense, other)
        if ranks is not None and theirs is not None and _same_classes(loaded, other):
            row["metrics"]["same_prediction_as_dense"] = float((ranks[:, 0] == theirs[:, 0]).mean())
    return row


def _same_classes(model: Any, other: Any) -> bool:
    return model.config.id2label == other.config.id2label


def _classified(
    question: Question, images: LabelledImages, model: str, loaded: Any
) -> tuple[dict[str, Any], np.ndarray | None]:
    own = images.aligned_to(loaded.config, every=False, model=model)
    if own.match is not None and own.match.how:
        say(own.match.how)
    found, ranks = evaluate_classifier(
        loaded,
        AutoImageProcessor.from_pretrained(model),
        own.evaluation,
        image_column=own.image_column,
        label_column=own.label_column,
        numbers=None if own.match is None else own.match.numbers,
        k=question.top_k,
        batch_size=question.batch_size,
    )
    timing = {name: found.pop(name) for name in _TIMES}
    return {**_row(model, loaded, None), "metrics": found, "timing": timing}, ranks


def _zero_shot(question: Question, images: LabelledImages, model: str, loaded: Any) -> tuple[dict[str, Any], None]:
    _, evaluation = images.processed(AutoImageProcessor.from_pretrained(model))
    found = zero_shot_metrics(
        loaded,
        AutoTokenizer.from_pretrained(model),
        evaluation,
        images.label_names,
        question.template,
        question.batch_size,
        question.top_k,
    )
    return {**_row(model, loaded, "vision"), "metrics": found}, None


# ---------------------------------------------------------------------- features
def _features(question: Question, model: str, loaded: Any, dense: str | None, other: Any) -> dict[str, Any]:
    find_tower(loaded, question.part)  # says what there is
    row = _row(model, loaded, question.part)
    evaluation, gallery = _feature_images(question, model, dense is not None)

    def seen(which: Any, data: Any) -> Any:
        return image_features(which, data, part=question.part, batch_size=question.batch_size)

    theirs = None if other is None else seen(other, evaluation)[0]
    ours, labels = seen(loaded, evaluation)

    def metrics(which: Any, features: Any, reference: Any = None) -> dict[str, float]:
        known = None if gallery is None else seen(which, gallery)
        return evaluate_features(features, labels, dense=reference, gallery=known, k=question.neighbours)

    row |= {"images": len(ours), "metrics": metrics(loaded, ours, theirs)}
    if dense is not None:
        row["dense"] = {**_row(dense, other, question.part), "metrics": metrics(other, theirs)}
    return row


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
