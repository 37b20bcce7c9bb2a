"""The weights of the evaluation that was best: what a training ends with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InvalidConfigError


class KeepBest(TrainerCallback):
    """Ends a training with the weights of the evaluation that was best; of the start, too, with ``eval_on_start``.

    They are kept in memory, on the CPU. For ``PruningTrainer`` or any ``Trainer`` with ``eval_strategy="steps"``.

    Args:
        metric: of the evaluations, which is to be small.

    Attributes:
        losses: step -> the metric.
        best: the step of the smallest.
    """

    def __init__(self, metric: str = "eval_loss") -> None:
        self.metric = metric
        self.losses: dict[int, float] = {}
        self.best = 0
        self._weights: dict[str, torch.Tensor] | None = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        found = kwargs["metrics"].get(self.metric)
        if found is None:
            raise InvalidConfigError(f"the evaluation has no {self.metric}: there is nothing to choose the best by")
        least = min(self.losses.values(), default=float("inf"))
        self.losses[state.global_step] = found
        if found < least:
            self.best = state.global_step
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._weights is not None:
            model.load_state_dict(self._weights)
            self._weights = None
