"""What a pruning method is: a config, and a module that decides which units stay."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments

from ..cost.meter import ClosedFormMeter, CostMeter
from ..errors import InvalidConfigError
from ..latency.table import LatencyTable
from ..losses.distillation import DistillationConfig
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..surgery.gates import Gate
from ..utils.batches import ImageBatches

#: what a target can count
METRICS = ("macs", "params", "latency")


@dataclass
class PruningConfig:
    """Settings that every method has.

    Attributes:
        target: fraction of the dense model's cost that may remain, in (0, 1); None where the method has its own goal.
        target_metric: what ``target`` counts: ``macs``, ``params`` or ``latency``.
        image_size: side (or height and width) in pixels at which MACs are counted and latency was measured; the
            model's own by default.
        latency_table: for the metric ``latency``: a LatencyTable, or the file of one.
        latency_batch_size: images a forward pass that the pruned model is for; a table of another batch is refused.
            None: whatever the table has.
        allow_other_device: the table was measured on another device than this machine's, where the model is to run.
        gate_learning_rate: learning rate of gates; None uses the optimizer's.
        takes_target: a target is all that the method needs to be told.
    """

    takes_target: ClassVar[bool] = True
    target: float | None = None
    target_metric: str = "macs"
    image_size: int | tuple[int, int] | None = None
    gate_learning_rate: float | None = None
    latency_table: str | Path | LatencyTable | None = None
    latency_batch_size: int | None = None
    allow_other_device: bool = False

    def __post_init__(self) -> None:
        if self.target is not None:
            check_open_interval("target", self.target)
        if self.target_metric not in METRICS:
            raise InvalidConfigError(f"target_metric is one of {', '.join(METRICS)}, not {self.target_metric!r}")
        if self.gate_learning_rate is not None:
            check_number("gate_learning_rate", self.gate_learning_rate)
            if self.gate_learning_rate == 0:
                raise InvalidConfigError("gate_learning_rate must be positive, not 0; None uses the optimizer's")
        sides = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2
        if self.image_size is not None and (len(sides) != 2 or any(type(s) is not int or s < 1 for s in sides)):
            raise InvalidConfigError(f"image_size is a number of pixels or (height, width), not {self.image_size!r}")
        self._check_latency()

    def _check_latency(self) -> None:
        if (self.target_metric == "latency") != (self.latency_table is not None):
            raise InvalidConfigError(
                "target_metric='latency' and latency_table go together: make a table with LatencyTable.measure or "
                f"hf-vitprune latency; got {self.target_metric!r} and {self.latency_table!r}"
            )
        batch = self.latency_batch_size
        if batch is not None and (type(batch) is not int or batch < 1):
            raise InvalidConfigError(f"latency_batch_size is a whole number of at least 1, not {batch!r}")
        if not isinstance(self.allow_other_device, bool):
            raise InvalidConfigError(f"allow_other_device is True or False, not {self.allow_other_device!r}")
        self._table: LatencyTable | None = None
        if self.latency_table is not None:
            known = isinstance(self.latency_table, (str, Path, LatencyTable))
            if not known or (isinstance(self.latency_table, (str, Path)) and not Path(self.latency_table).is_file()):
                raise InvalidConfigError(f"latency_table is a LatencyTable or a file, not {self.latency_table!r}")
            table = self.latency_table
            self._table = table if isinstance(table, LatencyTable) else LatencyTable.load(table)

    def meter(self, reference: Architecture) -> CostMeter:
        """What ``target`` counts, for models pruned from ``reference``.

        Raises:
            LatencyTableError: the table is of another model, input, batch or device, or its grid does not cover the
                reference.
        """
        if self._table is None:
            return ClosedFormMeter(self.target_metric, reference, self.image_size)
        return self._table.meter(
            reference,
            self.image_size,
            batch_size=self.latency_batch_size,
            allow_other_device=self.allow_other_device,
        )

    @classmethod
    def from_goal(
        cls,
        target: float | None,
        target_metric: str = "macs",
        latency_table: str | Path | LatencyTable | None = None,
        *,
        round_to: int | None = None,
        **settings: Any,
    ) -> Self:
        """Settings for a goal: for callers that know nothing else of the method, such as the command line.

        Args:
            target, target_metric, latency_table: as the attributes.
            round_to: kept channels and neurons are to be a multiple of this, where the method has a say in it; None:
                as it does by itself.
            settings: of the method; they go before what it would choose.

        Raises:
            InvalidConfigError: an impossible setting, or one that the method does not have.
        """
        known = {field.name for field in fields(cls)}
        if settings.keys() - known:
            unknown = ", ".join(sorted(settings.keys() - known))
            raise InvalidConfigError(f"{cls.__name__} has no {unknown}; it has {', '.join(sorted(known))}")
        goal = {"target": target, "target_metric": target_metric, "latency_table": latency_table}
        own = {} if round_to is None else cls.rounded_to(round_to)
        own |= cls.defaults_for_goal()
        return cls(**{**goal, **{name: value for name, value in own.items() if name in known}, **settings})

    @classmethod
    def rounded_to(cls, multiple: int) -> dict[str, Any]:
        """The settings under which kept channels and neurons are a multiple of this."""
        return {"round_to": multiple}

    @classmethod
    def defaults_for_goal(cls) -> dict[str, Any]:
        """Other settings that :meth:`from_goal` chooses."""
        return {}

    @property
    def method_name(self) -> str:
        return type(self).__name__.removesuffix("Config")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; of a latency table, where and when it was made, and a digest."""
        table = {} if self._table is None else {"latency_table": self._table.summary()}
        return {"method": self.method_name, **asdict(self), **table}


def check_open_interval(name: str, value: Any) -> None:
    """Raises:
    InvalidConfigError: ``value`` is not a number strictly between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InvalidConfigError(f"{name} must lie strictly between 0 and 1, not {value!r}")


def check_number(name: str, value: Any, highest: float = math.inf) -> None:
    """Raises:
    InvalidConfigError: ``value`` is not a finite number of 0 to ``highest``.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not 0 <= value <= highest:
        limit = "not negative" if math.isinf(highest) else f"between 0 and {highest:g}"
        raise InvalidConfigError(f"{name} is a number, {limit}; got {value!r}")


class PruningMethod(nn.Module):
    """Scores the units of one model while it trains, then decides once.

    Everything that a decision depends on is a parameter or buffer, so that an ordinary checkpoint restores it.
    Subclasses implement :meth:`attach`, :meth:`choose` and :meth:`decide`, and those of the other calls that they
    need. In every step of a training: :meth:`penalty`, :meth:`observe` (``needs_gradients``), the optimizer's step,
    :meth:`after_step`; at its end :meth:`decide`.

    Attributes:
        needs_steps: the decision comes from :meth:`penalty`, :meth:`observe` or :meth:`after_step`; a training without
            them has told it nothing.
        needs_gradients: :meth:`observe` wants the gradients of the task loss.
        needs_images: :meth:`decide` wants the training images.
        needs_held_out_images: :meth:`decide` wants labelled images that were not trained on.
        removes_layers_only: the plan cuts nothing inside of a layer, so that adapters of every kind can stay.
        may_keep_everything: a decision that removes nothing is no mistake.
        zeroes_weights: training sets removed weights to zero, so that the unloaded model teaches nobody: take a copy
            from before.
        takes_adapters: works on PeftModels.
        constant_gate_rate: gates keep their learning rate, whatever the Trainer's schedule does to the others.
        distillation: what the method's authors train with beside the labels; None: nothing.
    """

    needs_steps = True
    needs_gradients = False
    needs_images = False
    needs_held_out_images = False
    zeroes_weights = False
    distillation: DistillationConfig | None = None
    #: why :meth:`reference` gives None
    no_reference = "what this method trains has no removed units left that could be made up for"
    takes_adapters = True
    constant_gate_rate = False
    removes_layers_only = False
    may_keep_everything = False

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

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hook the gates into the model."""
        raise NotImplementedError

    def check_training(self, args: TrainingArguments, max_steps: int) -> None:
        """Called when training begins.

        Raises:
            InvalidConfigError: the method cannot do its work in such a training.
        """

    def check_images(self, model: Any, images: ImageBatches) -> None:
        """Called when training begins, with the images that :meth:`decide` will get.

        Args:
            model: the wrapped model.
            images: only a few are to be looked at.

        Raises:
            InvalidDataError: the method could not decide by them.
        """

    @property
    def distils(self) -> bool:
        """Whether a ``kl`` term counts yet (see :class:`DistillationConfig`)."""
        return True

    def penalty(self, progress: float) -> torch.Tensor | None:
        """Regulariser added to the training loss, at a share of the training in [0, 1]; None for nothing."""
        return None

    def observe(self, model: Any, gradient_scale: float) -> None:
        """Look at the gradients in ``parameter.grad``, once an update, before the optimizer's step.

        They are whole: summed over micro-batches, averaged over processes, unscaled.

        Args:
            model: the wrapped model (stock or PeftModel).
            gradient_scale: factor that undoes the clipping.
        """

    def after_step(self, model: Any, step: int, max_steps: int) -> None:
        """Called after the optimizer's step.

        Args:
            model: the wrapped model.
            step: updates made so far, of ``max_steps``.
        """

    @property
    def on_target(self) -> bool:
        """Whether evaluations now are of a model that may be kept as it is.

        What was best on the way to a target, with more units, is no candidate for ``load_best_model_at_end``.
        """
        return True

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to learn about what to prune: the training stops."""
        return False

    def choose(self) -> PruningPlan:
        """The plan that the current scores give."""
        raise NotImplementedError

    def reference(self) -> PruningPlan | None:
        """The model whose outputs an export is to keep, as a plan for the wrapped one: removed units and all.

        Compensation brings the small model to where that one is. It is what was trained up to the decision: nothing
        removed, where removing is all that the decision does; with ``scales`` for factors that the model runs with.

        Returns:
            None where there is no such model: the method trains without what it removes, say.
        """
        return None

    def choose_for(self, model: PreTrainedModel) -> PruningPlan:
        """The same plan for a model of the same shape with other weights, where plans hold weights."""
        return self.choose()

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Fix what :meth:`choose` says; the first process's decision is then broadcast.

        Args:
            model: the wrapped model.
            images: training images with labels, in a fixed order; given if there are any.
        """
        raise NotImplementedError

    @property
    def decided(self) -> bool:
        return any(gate.decided for gate in self.gates.values() if isinstance(gate, Gate))

    def logs(self) -> dict[str, float]:
        """Numbers for the Trainer's log."""
        return {}

    def decision_logs(self) -> dict[str, float]:
        """Numbers of the decision, for the end of the Trainer's log."""
        return {}
