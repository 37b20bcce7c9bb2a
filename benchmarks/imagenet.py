"""Top-1 and top-5 accuracy on a folder of ImageNet's layout: the shorter side to 256, the middle 224 x 224 of it.

    python -m benchmarks.imagenet MODEL IMAGENET/val                  # a model folder or Hub id; pruned ones too
    python -m benchmarks.imagenet MODEL IMAGENET/val --batch-size 256 --workers 12 --device cuda
    python -m benchmarks.imagenet MODEL IMAGENET/val --classes examples/imagenet100.txt
    python -m benchmarks.imagenet MODEL uoft-cs/cifar100              # the evaluation images of a data set of the Hub

The folder has a sub-folder a class, found among the model's classes by name; ImageNet's 1000 synsets are a model's
classes in their usual order, and so are the sub-folders that ``--classes`` names, in its order. Every image counts
once, whatever the batch size and the order. Other resolutions keep the ratio of 256 to 224.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessorPil

import hf_vitprune  # noqa: F401  registers pruned models
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils.classes import match_classes
from hf_vitprune.utils.data import load_images
from hf_vitprune.utils.images import open_image, to_rgb

SUFFIXES = (".jpeg", ".jpg", ".png")
#: shorter side of an image as a multiple of the crop
RATIO = 256 / 224
TOP = (1, 5)


class ImageFolder(Dataset[tuple[torch.Tensor, int]]):
    """Images of a folder with a sub-folder a class, in the order of their paths.

    ``classes``: names of the sub-folders to use, in the model's order; None: all, sorted.
    """

    def __init__(self, folder: Path, processor: Any, classes: Sequence[str] | None = None) -> None:
        if not folder.is_dir():
            raise InvalidDataError(f"{folder} is no folder; give one with a sub-folder of images a class")
        self.classes = sorted(one.name for one in folder.iterdir() if one.is_dir()) if classes is None else [*classes]
        lacking = [name for name in self.classes if not (folder / name).is_dir()]
        if lacking or len(set(self.classes)) < len(self.classes):
            what = f"lacks {len(lacking)}, {lacking[0]} among them" if lacking else "is asked for one of them twice"
            raise InvalidDataError(f"{folder} has a sub-folder a class, and {what}")
        self.files = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise InvalidDataError(f"{folder} has no images in sub-folders ({', '.join(SUFFIXES)})")
        self.processor = processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        return self.processor(images=open_image(path), return_tensors="pt")["pixel_values"][0], label


class EvaluationImages(Dataset[tuple[torch.Tensor, int]]):
    """The images that a data set of the Hub (or the built-in digits) is evaluated on."""

    def __init__(self, source: str, processor: Any) -> None:
        images = load_images(source, training=False)
        self.classes, self.rows = images.label_names, images.evaluation
        self.columns, self.processor = (images.image_column, images.label_column), processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = (self.rows[index][column] for column in self.columns)
        return self.processor(images=to_rgb(image), return_tensors="pt")["pixel_values"][0], label


def processor_for(model: Any, path: str) -> BitImageProcessorPil:
    """Resize, crop and normalise for a model; mean and deviation are those of its own image processor, at ``path``."""
    own = AutoImageProcessor.from_pretrained(path)
    side = model.config.image_size
    side = side if isinstance(side, int) else side[0]
    return BitImageProcessorPil(
        size={"shortest_edge": round(side * RATIO)},
        crop_size={"height": side, "width": side},
        resample=Image.Resampling.BICUBIC,
        image_mean=own.image_mean,
        image_std=own.image_std,
    )


@torch.inference_mode()
def accuracies(
    model: Any,
    dataset: ImageFolder | EvaluationImages,
    batch_size: int = 64,
    workers: int = 0,
    order: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """``images``, and ``top1``, ``top5``: shares of them with the right class among the first one and five.

    Args:
        workers: processes that read.
        order: in which images are looked at.
        numbers: class of the data -> the model's; by default found by name.
    """
    if numbers is None:
        match = match_classes(dataset.classes, model.config.id2label, every=False)
        print(match.how, end="\n" * bool(match.how), file=sys.stderr)
        numbers = match.numbers
    elif model.config.num_labels != len(numbers):
        raise InvalidDataError(f"the model has {model.config.num_labels} classes and --classes names {len(numbers)}")
    number_of = torch.tensor(numbers)
    device = next(model.parameters()).device
    model.eval()
    loader: Any = DataLoader(dataset, batch_size, sampler=order, num_workers=workers)
    correct = dict.fromkeys(TOP, 0)
    for pixels, labels in tqdm(loader, "images", delay=3, leave=False):
        logits = model(pixel_values=pixels.to(device)).logits.float()
        best = logits.topk(min(max(TOP), logits.shape[1]), dim=1).indices.cpu()
        hits = best == number_of[labels][:, None]
        for number in TOP:
            correct[number] += int(hits[:, :number].any(1).sum())
    seen = len(dataset) if order is None else len(order)
    return {"images": seen, **{f"top{number}": correct[number] / seen for number in TOP}}


def main(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    data: Annotated[str, typer.Argument(help="Folder with a sub-folder a class, or a data set of the Hub.")],
    classes: Annotated[Path | None, typer.Option(help="File with the sub-folders to use, one a line.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 4,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Top-1 and top-5 accuracy on a folder of ImageNet's layout, or on a data set of the Hub."""
    loaded = AutoModelForImageClassification.from_pretrained(model).to(device)
    processor = processor_for(loaded, model)
    dataset: ImageFolder | EvaluationImages
    if Path(data).is_dir() or classes is not None:
        dataset = ImageFolder(Path(data), processor, None if classes is None else classes.read_text().split())
    else:
        dataset = EvaluationImages(data, processor)
    numbers = None if classes is None else range(len(dataset.classes))
    print(json.dumps(accuracies(loaded, dataset, batch_size, workers, numbers=numbers), indent=2))


if __name__ == "__main__":
    typer.run(main)
