"""The weights of the evaluation that was best: what a training ends with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from ..errors import InvalidConfigError


class KeepBest(TrainerCallback):
    """Ends a training with the weights of the evaluation that was best; of the start, too, with ``eval_on_start``.

    For ``PruningTrainer`` or any ``Trainer`` with ``eval_strategy="steps"``.

    Args:
        metric: of the evaluations, which is to be small.
        folder: where the weights are kept, for a resumed training to find them; None: in memory, on the CPU.

    Attributes:
        losses: step -> the metric.
        best: the step of the smallest.
    """

    def __init__(self, metric: str = "eval_loss", folder: str | Path | None = None) -> None:
        self.metric = metric
        self.folder = None if folder is None else Path(folder)
        self.losses: dict[int, float] = {}
        self.best = 0
        self._weights: dict[str, torch.Tensor] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """What was seen before the checkpoint that a training is resumed from."""
        rows = [] if self.folder is None else [row for row in state.log_history if self.metric in row]
        self.losses = {int(row["step"]): row[self.metric] for row in rows}
        self.best = min(self.losses, key=lambda step: (self.losses[step], step), default=0)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = kwargs["metrics"].get(self.metric)
        if found is None:
            raise InvalidConfigError(f"the evaluation has no {self.metric}: there is nothing to choose the best by")
        least = min(self.losses.values(), default=float("inf"))
        self.losses[state.global_step] = found
        if found < least:
            self.best = state.global_step
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            if self.folder is None:
                self._weights = weights
            else:  # every process writes the same file, and none reads another's half
                self.folder.mkdir(parents=True, exist_ok=True)
                part = self._file(self.best).with_suffix(f".{os.getpid()}")
                save_file(weights, part)
                part.replace(self._file(self.best))

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Older ones are of no use any more: there is a checkpoint that knows of the best."""
        if self.folder is not None:
            for path in self.folder.glob("best-*.safetensors"):
                if path != self._file(self.best):
                    path.unlink(missing_ok=True)  # another process may have been quicker

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.folder is not None and self.losses:
            self._weights = load_file(self._file(self.best))
        if self._weights is not None:
            model.load_state_dict(self._weights)
            self._weights = None

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"best-{step}.safetensors"
