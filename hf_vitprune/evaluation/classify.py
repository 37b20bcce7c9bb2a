"""Accuracy, latency and throughput of an image classification pipeline, by ``evaluate``'s evaluator of that task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from evaluate import ImageClassificationEvaluator
from evaluate.evaluator.utils import DatasetColumn
from torch import nn
from tqdm.auto import tqdm
from transformers import ImageClassificationPipeline
from transformers.image_utils import load_image

from ..errors import InvalidDataError
from ..utils.modes import evaluating
from .metrics import TopK, ranked_classes


class _LogitsPipeline(ImageClassificationPipeline):
    """The pipeline up to its logits: two classes of one name (ImageNet has cranes and cranes) stay two."""

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        return model_outputs["logits"][0].float().numpy()


class _GraphPipeline:
    """The same for an exported graph, which is no model of transformers."""

    def __init__(self, graph: Any, processor: Any, batch_size: int) -> None:
        self.graph, self.processor, self.batch_size = graph, processor, batch_size

    def __call__(self, images: Any, **_: Any) -> list[np.ndarray]:
        images = images if isinstance(images, list) else [images]
        rows: list[np.ndarray] = []
        for start in range(0, len(images), self.batch_size):
            places = range(start, min(start + self.batch_size, len(images)))
            batch = [load_image(images[i]) for i in places]
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            rows += list(self.graph(pixel_values=pixels).logits.float().numpy())
        return rows


class _Images(DatasetColumn):
    """Images of a data set, read one at a time, with a bar."""

    def __init__(self, dataset: Any, key: str) -> None:
        super().__init__(dataset, key)
        self.bar = tqdm(total=len(dataset), desc="evaluating", leave=False, delay=3)

    def __getitem__(self, i: Any) -> Any:
        self.bar.update()
        return super().__getitem__(i)


class RankingEvaluator(ImageClassificationEvaluator):
    """As ``evaluate.evaluator("image-classification")``, with the ``k`` likeliest classes of every image.

    evaluate 0.4.6 takes no pipeline under transformers 5, and gives the best class alone: replaced here.

    Attributes:
        ranks: (images, k) class numbers, best first, of the last data.
    """

    def __init__(self, numbers: Sequence[int] | None = None, k: int = 5) -> None:
        super().__init__()
        self.numbers, self.k, self.ranks = numbers, k, np.empty((0, k), dtype=int)

    def prepare_pipeline(self, model_or_pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        return model_or_pipeline

    def prepare_data(self, data: Any, input_column: str, label_column: str, *args: Any, **kwargs: Any) -> Any:
        self.check_required_columns(data, {"input_column": input_column, "label_column": label_column})
        labels = [int(label) for label in data[label_column]]
        own = labels if self.numbers is None else [self.numbers[label] for label in labels]
        return {"references": own}, _Images(data, input_column)

    def predictions_processor(self, predictions: Any, label_mapping: Any = None) -> dict[str, Any]:
        self.ranks = ranked_classes(predictions, self.k)
        return {"predictions": self.ranks}


def evaluate_classifier(
    model: Any,
    processor: Any,
    data: Any,
    *,
    image_column: str = "image",
    label_column: str = "label",
    numbers: Sequence[int] | None = None,
    k: int = 5,
    batch_size: int = 8,
) -> tuple[dict[str, float], np.ndarray]:
    """Accuracy of a classifier's pipeline, and how long it takes, from the decoded image to the class.

    Args:
        model: an image classifier, or a graph that was exported from one.
        data: ``datasets.Dataset`` with the two columns.
        numbers: class number in the data -> class number of the model; None: the same.
        k: of ``top_k_accuracy``, which is left out where the model has no more classes than that.
        batch_size: images a forward pass; accuracies do not depend on it.

    Returns:
        ``accuracy``, ``top_k_accuracy``, ``total_time_in_seconds``, ``samples_per_second``, ``latency_in_seconds`` (an
        image); and (images, k) class numbers of the model, likeliest first.

    Raises:
        InvalidDataError: there are no images, labels are no classes of the model, its logits are no finite numbers, or
            its image processor gives images of several sizes.
    """
    if not len(data):
        raise InvalidDataError("there are no images to evaluate on")
    classes = model.config.num_labels
    known = range(classes) if numbers is None else range(len(numbers))
    unknown = sorted(set(map(int, data[label_column])) - set(known))
    if unknown:
        raise InvalidDataError(f"there are images of class {unknown[0]}, and the model has {classes} classes")
    is_model = isinstance(model, nn.Module)
    pipeline: Any = _GraphPipeline(model, processor, batch_size)
    if is_model:
        pipeline = _LogitsPipeline(model=model, image_processor=processor, device=model.device, batch_size=batch_size)
    judge = RankingEvaluator(numbers, k if k < classes else 1)
    with evaluating(model) if is_model else torch.no_grad():
        pipeline(data[0][image_column])  # the first run prepares, and is not timed
        try:
            found = judge.compute(pipeline, data, metric=TopK(), input_column=image_column, label_column=label_column)
        except RuntimeError as error:
            if "Sizes of tensors must match" not in str(error):
                raise
            raise InvalidDataError(
                "the image processor gives images of several sizes, which make no batch: have it resize and crop them "
                "to one, or evaluate with a batch size of 1"
            ) from error
    return found, judge.ranks
