"""An exported model against the one it was made from: equal, or (int8) how much they agree; and a record of it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
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

RECORD, PAGE = "checked.json", "README.md"
_PACKAGES = ("hf_vitprune", "transformers", "torch", "onnxruntime", "openvino", "nncf", "executorch", "torchao")


@dataclass(frozen=True)
class Agreement:
    """How much of the model an exported file keeps, on the user's images.

    Attributes:
        cosine: between the two ``output`` for an image, the mean; ``least_cosine``: of the worst image.
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
    pairs = [list(named_tensors(one)) for one in (expected, actual)]
    shapes = [[(name, tuple(value.shape)) for name, value in one] for one in pairs]
    for theirs, ours in zip_longest(*shapes):
        if theirs != ours:
            raise ExportError(f"the exported model gives {ours} where the model gives {theirs}")
    worst = 0.0
    for (name, want), (_, got) in zip(*pairs, strict=True):
        if not torch.isfinite(got).all() and torch.isfinite(want).all():
            raise ExportError(f"output {name} of the exported model is not finite")
        difference = (want.double() - got.double()).abs()
        worst = max(worst, float(difference.max() / want.double().abs().max().clamp(min=1e-12)) if len(want) else 0.0)
    return worst


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
    """Compare the answers of the model, in evaluation mode, and of the exported one on images, and labels if any.

    ``inputs``: what else the model takes.

    Raises:
        ExportError: an answer that is not finite.
    """
    cosines, same, right = [], [], []
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
            chosen = torch.stack([want.argmax(-1), got.argmax(-1)])
            same.append(chosen[0] == chosen[1])
            if isinstance(batch.get("labels"), torch.Tensor):
                right.append(chosen == batch["labels"])
    every = torch.cat(cosines)
    top1 = float(torch.cat(same).double().mean()) if classes else None
    accuracies = torch.cat(right, 1).double().mean(1).tolist() if right else (None, None)
    return Agreement(len(every), name, float(every.mean()), float(every.min()), top1, *accuracies)


# ---------------------------------------------------------------------- kept
@dataclass(frozen=True)
class ExportRecord:
    """What an export was checked on, and what came of it.

    Attributes:
        to: format. ``model``: class that it was made from.
        inputs: name -> shape; words for what may vary.
        batches: batch sizes that were compared; ``sizes``: (height, width) of the images.
        error: largest difference of an output from the model's, as a share of its largest value.
        int8: whether Linears are in int8; it is compared on images, without a ``tolerance``.
        agreement: on the user's images; None without any.
    """

    to: str
    model: str
    inputs: dict[str, list[int | str]]
    batches: list[int]
    error: float
    versions: dict[str, str]
    int8: bool = False
    sizes: Sequence[tuple[int, int]] = ()
    tolerance: float | None = TOLERANCE
    agreement: Agreement | None = None

    @classmethod
    def of(cls, model: Any, to: str, error: float, inputs: dict[str, Any], **more: Any) -> ExportRecord:
        """What was found of a model; ``more``: the other fields that are not by default."""
        known = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
        versions = {name: known[name] for name in _PACKAGES if name in known}
        return cls(to=to, model=type(model).__name__, inputs=inputs, error=error, versions=versions, **more)

    @property
    def one_line(self) -> str:
        """For people."""
        kind = f"{self.to}, int8" if self.int8 else self.to
        batches = ", ".join(map(str, self.batches))
        said = f"{kind}: outputs within {self.error:.1g} of the model's largest values, in batches of {batches}"
        return said if self.agreement is None else f"{said}; {self.agreement.one_line}"

    def save(self, folder: Path) -> None:
        """Write ``checked.json``, and a page for who receives it where there is none."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")
        if not (folder / PAGE).exists():
            pages = Environment(loader=PackageLoader("hf_vitprune.publish"), trim_blocks=True)
            said = None if self.agreement is None else self.agreement.one_line
            page = pages.get_template("export.md").render(vars(self), file=RECORD, one_line=said)
            (folder / PAGE).write_text(page)
