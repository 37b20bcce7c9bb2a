"""An exported model against the one it was made from: equal outputs, or (int8) how much they agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from ...errors import ExportError
from ...utils.batches import ImageBatches

#: largest difference that an exported model may have, as a share of an output's largest value: other kernels add up
#: float32 in another order; a wrong graph is off by tenths
TOLERANCE = 1e-3
#: outputs of an int8 model that are less alike than this come from a broken file, not from rounding
LEAST_COSINE = 0.5
#: outputs in the order in which they are looked for: what a model says of an image
_ANSWERS = ("logits", "logits_per_image", "image_embeds", "pooler_output", "predicted_depth", "last_hidden_state")


@dataclass(frozen=True)
class Agreement:
    """How much of the model an exported file keeps, on the user's images.

    Attributes:
        images: how many.
        output: which output was compared.
        cosine: between the two outputs for an image, the mean; ``least_cosine``: of the worst image.
        top1: share of images with the same most likely class; None without classes.
        accuracy, exported_accuracy: share of right labels, of the model and of the file; None without labels.
    """

    images: int
    output: str
    cosine: float
    least_cosine: float
    top1: float | None = None
    accuracy: float | None = None
    exported_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @property
    def one_line(self) -> str:
        """For people."""
        said = f"cosine of {self.output} {self.cosine:.4f} (worst image {self.least_cosine:.4f})"
        if self.top1 is not None:
            said += f", same class for {self.top1:.1%}"
        if self.accuracy is not None:
            said += f", accuracy {self.accuracy:.1%} -> {self.exported_accuracy:.1%}"
        return f"{said} on {self.images} images"


def named_tensors(output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an output, those inside of others too."""
    for path, value in tree_flatten_with_path(output)[0]:
        if isinstance(value, torch.Tensor):
            yield keystr(path), value


def largest_error(expected: Any, actual: Any) -> float:
    """The largest difference between two outputs, as a share of the largest value of the tensor that it is in.

    Raises:
        ExportError: other tensors, other shapes, or values that are not finite.
    """
    pairs = [(list(named_tensors(one))) for one in (expected, actual)]
    shapes = [[(name, tuple(value.shape)) for name, value in one] for one in pairs]
    if shapes[0] != shapes[1]:
        differing = next((a, b) for a, b in zip(*map(_padded(shapes), (0, 1)), strict=True) if a != b)
        raise ExportError(f"the exported model gives {differing[1]} where the model gives {differing[0]}")
    worst = 0.0
    for (name, want), (_, got) in zip(*pairs, strict=True):
        if not torch.isfinite(got).all() and torch.isfinite(want).all():
            raise ExportError(f"output {name} of the exported model is not finite")
        difference = (want.double() - got.double()).abs()
        worst = max(worst, float(difference.max() / want.double().abs().max().clamp(min=1e-12)) if len(want) else 0.0)
    return worst


def _padded(shapes: list[list[Any]]) -> Any:
    longest = max(map(len, shapes))
    return lambda which: [*shapes[which], *[None] * (longest - len(shapes[which]))]


def answer(output: Any) -> tuple[str, torch.Tensor]:
    """What a model says of each image: its logits where it has some, else features; (name, (images, ...))."""
    found = next((name for name in _ANSWERS if isinstance(output.get(name), torch.Tensor)), None)
    if found is not None:
        return found, output[found]
    if output.get("feature_maps"):
        return "the last feature map", output["feature_maps"][-1]
    name, tensor = next((name, value) for name, value in named_tensors(output) if value.is_floating_point())
    return name, tensor


@torch.no_grad()
def agreement(model: Any, exported: Any, batches: ImageBatches, inputs: dict[str, Any]) -> Agreement:
    """Compare the answers of the model and of the exported one.

    Args:
        model: the model, in evaluation mode.
        exported: what :func:`load_graph` gives.
        batches: the images, with labels where there are any.
        inputs: what else the model takes.

    Raises:
        ExportError: an answer that is not finite.
    """
    cosines, same, right, right_exported, labelled = [], 0, 0, 0, 0
    name, classes = "", False
    for batch in batches:
        taken = {**inputs, "pixel_values": batch["pixel_values"].float()}
        name, want = answer(model(**taken))
        _, got = answer(exported(**taken))
        if not torch.isfinite(got).all():
            raise ExportError(f"{name} of the exported model is not finite")
        cosines.append(torch.cosine_similarity(want.double().flatten(1), got.double().flatten(1)))
        classes = name.startswith("logits") and want.ndim == 2
        if classes:
            same += int((want.argmax(-1) == got.argmax(-1)).sum())
        labels = batch.get("labels")
        if classes and isinstance(labels, torch.Tensor):
            labelled += len(labels)
            right += int((want.argmax(-1) == labels).sum())
            right_exported += int((got.argmax(-1) == labels).sum())
    every = torch.cat(cosines)
    count = len(every)
    return Agreement(
        count,
        name,
        float(every.mean()),
        float(every.min()),
        same / count if classes else None,
        right / labelled if labelled else None,
        right_exported / labelled if labelled else None,
    )
