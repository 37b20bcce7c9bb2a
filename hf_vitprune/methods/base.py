"""What a pruning method is: a config, and a module that decides which units stay."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..architecture import Architecture
from ..batches import ImageBatches
from ..errors import InvalidConfigError
from ..gates import Gate
from ..plan import PruningPlan

METRICS = ("macs", "params")


@dataclass
class PruningConfig:
    """Settings that every method has.

    Attributes:
        target: fraction of the dense model's cost that may remain, in (0, 1); None where the method has its own goal.
        target_metric: what ``target`` counts: ``macs`` or ``params``.
        image_size: side (or height and width) in pixels at which MACs are counted; the model's own by default.
        gate_learning_rate: learning rate of gates; None uses the optimizer's.
    """

    target: float | None = None
    target_metric: str = "macs"
    image_size: int | tuple[int, int] | None = None
    gate_learning_rate: float | None = None

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

    @property
    def method_name(self) -> str:
        return type(self).__name__.removesuffix("Config")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method_name, **asdict(self)}


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
        needs_gradients: :meth:`observe` wants the gradients of the task loss.
        needs_images: :meth:`decide` wants the training images.
        removes_layers_only: the plan cuts nothing inside of a layer, so that adapters of every kind can stay.
    """

    needs_gradients = False
    needs_images = False
    removes_layers_only = False

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

    def choose(self) -> PruningPlan:
        """The plan that the current scores give."""
        raise NotImplementedError

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
