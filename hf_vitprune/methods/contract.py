"""What a pruning method is: what it needs of a training, and the calls by which a training reaches it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments

from ..cost.meter import ClosedFormMeter, CostMeter
from ..losses.distillation import DistillationConfig
from ..plan.layer_plan import PAD
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..surgery.gates import Gate
from ..surgery.points import EMBEDDING, POINTS, point_name, point_sizes
from ..utils.batches import ImageBatches
from .base import PruningConfig


@dataclass(frozen=True)
class Traits:
    """What a method needs, and what it does to a model in training.

    Attributes:
        decides_by: ``steps``: what it saw around the optimizer's steps; ``gradients``: these, which must be whole and
            not clipped; ``images``: the training images; ``held_out_images``: labelled images that were not trained
            on; ``config``: its settings alone.
        adapters: of a PeftModel: ``all`` stay, the plan cuts nothing inside of a layer; ``sliced``: those that can
            be; ``none``: PeftModels are refused.
        may_keep_everything: a decision that removes nothing is no mistake.
        zeroes_weights: removed weights are zero after the training: the model is no teacher, a copy from before is.
        constant_gate_rate: gates keep their learning rate, whatever the Trainer's schedule does to the others.
        distillation: what the method's authors train with beside the labels; None: nothing.
    """

    decides_by: Literal["steps", "gradients", "images", "held_out_images", "config"] = "steps"
    adapters: Literal["all", "sliced", "none"] = "sliced"
    may_keep_everything: bool = False
    zeroes_weights: bool = False
    constant_gate_rate: bool = False
    distillation: DistillationConfig | None = None

    @property
    def by_steps(self) -> bool:
        """Whether a training without the method's steps has told it nothing."""
        return self.decides_by in ("steps", "gradients")


class Stage(IntEnum):
    """How far a method is, in a training."""

    #: nothing is removed yet, and something will be before the end: ``kl`` distillation waits
    WHOLE = 0
    #: on the way to the target: evaluations are no candidates for ``load_best_model_at_end``
    REMOVING = 1
    #: evaluations are of a model that may be kept as it is
    ON_TARGET = 2
    #: nothing is left to learn about what to prune: the training stops
    FINISHED = 3


class PruningMethod(nn.Module):
    """Scores the units of one model while it trains, then decides once.

    Everything that a decision depends on is a parameter or buffer, so that an ordinary checkpoint restores it.
    Subclasses state their :class:`Traits`, implement :meth:`attach`, :meth:`choose` and :meth:`decide`, and those of
    the other calls that they need. What cannot be done is an ``InvalidConfigError`` of the ``check_...`` calls.

    Attributes:
        traits: of the class, or of this instance where they follow from the config.
        gates: what is learned beside the weights, by name.
        undershoot: how to come closer to a target that a decision ended far under.
    """

    traits = Traits()
    undershoot: ClassVar[str] = "Lower round_to, or raise the target"

    def __init__(self, config: PruningConfig, model: PreTrainedModel) -> None:
        super().__init__()
        self.config = config
        self.architecture = Architecture.of(model)
        # transformers gives no weight decay to parameters under a name that ends in "_norm": with any Trainer,
        # gates are not decayed
        self.gates_norm = nn.ModuleDict()

    @property
    def gates(self) -> nn.ModuleDict:
        return self.gates_norm

    def gate_parameters(self) -> list[nn.Parameter]:
        return list(self.gates.parameters())

    @property
    def narrows(self) -> bool:
        """Whether the decision may take residual channels away."""
        return False

    def at_full_width(self) -> PruningConfig | None:
        """The config without residual channels, where nobody asked for them in so many words; else None."""
        return None

    def keep_at_least(self, layers: int, reader: str) -> None:
        """Called once, for a tower in a bigger model where ``reader`` reads the output of so many layers."""

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hook the gates into the model."""
        raise NotImplementedError

    # ------------------------------------------------------------------ training
    def check_training(self, args: TrainingArguments, max_steps: int) -> None:
        """Called when training begins."""

    def check_sharded(self, how: str) -> None:
        """Called when a training begins that is spread over processes.

        ``fsdp2``, ``zero3``: the weights are sharded; ``zero1``, ``zero2``: gradients and optimizer are.
        """

    def check_images(self, model: Any, images: ImageBatches) -> None:
        """Called when training begins, with the images that :meth:`decide` will get, of which a few are looked at.

        An ``InvalidDataError`` where the method could not decide by them.
        """

    def before_step(self, model: Any, progress: float, gradient_scale: float) -> torch.Tensor | None:
        """Called once an update, before the optimizer's step; a place to look at the gradients in ``parameter.grad``.

        They are whole: summed over micro-batches, averaged over processes, unscaled. ``progress`` is the share of the
        training that is over, ``gradient_scale`` undoes the clipping.

        Returns:
            A regulariser whose gradient is added to that of the gates; None for nothing.
        """
        return None

    def gradients_of(self, penalty: torch.Tensor | None) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """What a regulariser adds to the gradient of which gate; nothing for None."""
        if penalty is None:
            return []
        parameters = self.gate_parameters()
        return list(zip(parameters, torch.autograd.grad(penalty, parameters), strict=True))

    def after_step(self, model: Any, step: int, max_steps: int) -> None:
        """Called after the optimizer's step; ``step`` of ``max_steps`` updates have been made."""

    @property
    def stage(self) -> Stage:
        """By default the method does not change what the model computes before it decides."""
        return Stage.ON_TARGET

    def logs(self) -> dict[str, float]:
        """Numbers for the Trainer's log; those of the decision too, once it is taken."""
        return {}

    def ratios(self, now: Architecture) -> dict[str, float]:
        """What is left of multiply-adds, parameters and what the target counts, as fractions: for logs."""
        size = self.config.image_size
        meters: list[CostMeter] = [ClosedFormMeter(metric, self.architecture, size) for metric in ("macs", "params")]
        meters.append(self.config.meter(self.architecture))
        return {f"{meter.metric}_ratio": meter.ratio(now) for meter in meters}

    def kept_at_points(self, plan: PruningPlan) -> dict[str, torch.Tensor]:
        """(units,) booleans of what a plan that keeps every layer keeps, at every gated place of the model."""
        units: dict[str, tuple[int, Iterable[int] | None]] = {}
        units[EMBEDDING] = (self.architecture.hidden_size, plan.embedding)
        for entry in plan.layers:
            for point, size in point_sizes(self.architecture, entry.index).items():
                kept: Iterable[int] | None = getattr(entry, POINTS[point])
                if point in ("queries", "attention_out"):
                    rows = entry.qk if point == "queries" else entry.v
                    width = size // self.architecture.layers[entry.index].heads
                    kept = [h * width + c for h, row in zip(entry.heads, rows, strict=True) for c in row if c != PAD]
                units[point_name(entry.index, point)] = (size, kept)
        found = {name: torch.zeros(size, dtype=torch.bool) for name, (size, _) in units.items()}
        for name, (_, kept) in units.items():
            found[name][slice(None) if kept is None else list(kept)] = True
        return found

    # ------------------------------------------------------------------ decision
    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Fix what :meth:`choose` says; the first process's decision is then broadcast.

        ``images``: those of the training with labels, in a fixed order; given if there are any.
        """
        raise NotImplementedError

    def against_target(self) -> tuple[float, float, str] | None:
        """(cost of the current plan as a fraction of the model's, the target, what cost is); None without a target."""
        if self.config.target is None:
            return None
        meter = self.config.meter(self.architecture)
        return meter.ratio(self.choose().architecture), self.config.target, meter.metric

    @property
    def decided(self) -> bool:
        return any(gate.decided for gate in self.gates.values() if isinstance(gate, Gate))

    def choose(self, weights: PreTrainedModel | None = None) -> PruningPlan:
        """The plan that the current scores give; where plans hold weights, for this model of the same shape."""
        raise NotImplementedError

    def reference(self) -> PruningPlan | str:
        """The model whose outputs a compensated export is to keep, as a plan for the wrapped one.

        It is what was trained up to the decision: nothing removed, where removing is all that the decision does; with
        ``scales`` for factors that the model runs with.

        Returns:
            The reason, where there is no such model: the method trains without what it removes, say.
        """
        return "what this method trains has no removed units left that could be made up for"
