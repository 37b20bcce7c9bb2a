"""What methods share that remove layers from the top: which depths a model can have, and how it runs at one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import InvalidConfigError, InvalidDataError, InvalidPlanError
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture, unwrap
from ..surgery.gates import DepthGate
from ..surgery.points import attach_depth_gate
from ..utils.batches import ImageBatches, fixed_randomness, run_images
from ..utils.modes import evaluating
from .base import PruningConfig
from .contract import PruningMethod, Traits


def fewest_layers(model: Any, stages: int | None = None) -> int:
    """The smallest number of bottom layers that a model can be cut to.

    A layer whose output is read by its number stays; of a backbone with stages, a layer of each.

    Args:
        model: stock, pruned, PEFT or PruningModel.
        stages: of models with stages (Swin), how many of the last ones can lose layers; None: all of them.
    """
    base = unwrap(model)
    architecture = Architecture.of(base)
    total, depths = len(architecture.layers), architecture.depths
    if "layers" not in architecture.units:
        return total
    if depths is None:
        return architecture.family.fewest_layers(base.config, architecture.task, total)
    if architecture.task == "Backbone":
        return total - depths[-1] + 1
    return 1 if stages is None else sum(depths[:-stages]) + 1


def class_numbers(batch: dict[str, Any]) -> torch.Tensor:
    """(images,) class numbers of a batch, negative where an image has no class."""
    if "labels" not in batch:
        raise InvalidDataError(
            "the images have no labels, and layers are judged by the images' classes. Without labels: "
            "TruncationConfig(layers='features'), which keeps the layers that the last one's features can be regained "
            "from; or images with labels, by PruningCallback(images=...)"
        )
    labels = torch.as_tensor(batch["labels"])
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise InvalidDataError(
            f"layers are judged by how well classes separate: labels are one class number an image, not "
            f"{labels.dtype} of shape {tuple(labels.shape)}. Where training has other labels (several classes, "
            "mixtures), give PruningCallback(images=<images with class numbers>)"
        )
    return labels.cpu().long()


class DepthMethod(PruningMethod):
    """A method that decides how many of the bottom layers stay: subclasses' ``decide`` ends in :meth:`keep`.

    Attributes:
        floor: the fewest layers that may stay.
        found: layer number from 1 -> what the decision was taken by; for a subclass to fill with :meth:`record`.
    """

    found_bits: torch.Tensor

    traits = Traits(decides_by="config", adapters="all", may_keep_everything=True)

    def __init__(self, config: PruningConfig, model: PreTrainedModel, stages: int | None = None) -> None:
        super().__init__(config, model)
        self.floor = 0
        total = len(self.architecture.layers)
        why = "it gives the output of its last layer (out_features)"
        if "layers" not in self.architecture.units:
            why = self.architecture.family.refused_units(self.architecture.config).get("layers", "its layers all stay")
        elif self.architecture.task != "Backbone":
            why = "it has only one" if total == 1 else "its last layer has to stay"
        self.keep_at_least(fewest_layers(model, stages), why)
        device = next(model.parameters()).device
        self.depth = DepthGate(total, device)
        # float64 numbers as their bits, NaN where there is none: model.half() leaves whole numbers alone
        nothing = torch.full((total,), torch.nan, dtype=torch.float64).view(torch.int64)
        self.register_buffer("found_bits", nothing.to(device))

    def keep_at_least(self, layers: int, reader: str) -> None:
        self.floor = max(self.floor, layers)
        if self.floor >= len(self.architecture.layers):
            raise InvalidConfigError(
                f"{self.config.method_name} removes layers from the top, and of this {self.architecture.model_type} "
                f"none can go: {reader}"
            )

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return attach_depth_gate(model, self.architecture, self.depth)

    def check_sharded(self, how: str) -> None:
        if how == "zero3" and self.traits.decides_by != "config":
            raise InvalidConfigError(
                f"{self.config.method_name} runs images through the model outside of the training, where ZeRO-3's "
                "engine gathers no weights: use stage 2, or FSDP2"
            )

    def check_images(self, model: Any, images: ImageBatches) -> None:
        """Two images are looked at: their labels, and whether the model takes them."""
        if self.traits.decides_by == "config":
            return
        base = unwrap(model)
        with fixed_randomness(), evaluating(base), torch.no_grad():
            batch = next(iter(ImageBatches(images, batch_size=2, limit=2)))
            class_numbers(batch)
            run_images(base, batch)

    @property
    def decided(self) -> bool:
        return self.depth.decided

    def keep(self, layers: int) -> None:
        """Switch all but the first ``layers`` off for good."""
        self.depth.decide(layers)

    def record(self, found: dict[int, float]) -> None:
        """Put numbers into the checkpoint: layer number from 1 -> number."""
        numbers = torch.full((len(self.found_bits),), torch.nan, dtype=torch.float64)
        for layer, number in found.items():
            numbers[layer - 1] = number
        self.found_bits.copy_(numbers.view(torch.int64))

    @property
    def found(self) -> dict[int, float]:
        numbers = self.found_bits.cpu().clone().view(torch.float64).tolist()
        return {i + 1: number for i, number in reversed(list(enumerate(numbers))) if number == number}

    def choose(self, weights: PreTrainedModel | None = None) -> PruningPlan:
        """The plan that keeps the first layers."""
        if not self.decided:
            raise InvalidPlanError(f"{self.config.method_name} has not decided yet: train first, or call decide()")
        plan = PruningPlan.dense(self.architecture).keep_layers(range(self.depth.layers))
        return replace(plan, info={**self.config.to_dict(), **self.report()})

    def reference(self) -> PruningPlan:
        """All layers."""
        return PruningPlan.dense(self.architecture)

    def report(self) -> dict[str, Any]:
        """What the decision came from, for the plan's info; JSON only."""
        return {}
