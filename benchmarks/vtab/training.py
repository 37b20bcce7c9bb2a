"""Training and testing one model, by transformers' Trainer."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback

from hf_vitprune.contrib.drop_path import attach_drop_path
from hf_vitprune.contrib.retraining import retraining_arguments
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.training.keep_best import KeepBest
from hf_vitprune_cli.progress import use_quiet_progress

from .settings import Machine, Recipe


@dataclass(frozen=True)
class Trained:
    """How a training went: the epoch whose weights the model has (the last, or with validation the best, the first of
    equals), the accuracy after every epoch (empty without validation), and seconds on the clock.
    """

    epoch: int
    validation: list[float]
    seconds: float


def train(
    model: Any,
    examples: Any,
    recipe: Recipe,
    *,
    seed: int,
    machine: Machine,
    what: str,
    validation: Any = None,
    keep_zero_ranks: bool = False,
    schedule: str | None = None,
) -> Trained:
    """Train a model in place.

    Args:
        validation: examples; where given, the weights of the epoch that is best on them are put back at the end.
        keep_zero_ranks: leave AdaLoRA's pruned ranks pruned (they were chosen in an earlier training).
        schedule: of a retraining: ``CLR``, ``FT`` or ``TFS``; None for a first training.
    """
    start = time.perf_counter()
    best = KeepBest("eval_negative_accuracy")  # the smallest is the best
    strategy = {"eval_strategy": "no" if validation is None else "epoch"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = machine.arguments(recipe, seed, folder, PartialState().num_processes, **strategy)
        if schedule is not None:
            arguments = retraining_arguments(arguments, schedule, warm_up=recipe.warmup_epochs / recipe.epochs)
        trainer = _Trainer(
            model,
            arguments,
            drop_last=recipe.drop_last,
            train_dataset=examples,
            eval_dataset=validation,
            compute_metrics=accuracy_of_choices,
            preprocess_logits_for_metrics=choices_of,
            callbacks=[best, *_rank_callbacks(model, keep_zero_ranks)],
        )
        use_quiet_progress(trainer, what)
        handles = attach_drop_path(model, recipe.drop_path)
        loss = trainer.train().training_loss
        for handle in handles:
            handle.remove()
    if not np.isfinite(loss):
        raise InvalidDataError(f"{what}: the loss is {loss}; the training diverged, lower the learning rate")
    epoch = recipe.epochs if validation is None else 1 + [*best.losses].index(best.best)
    return Trained(epoch, [-loss for loss in best.losses.values()], time.perf_counter() - start)


class _Trainer(Trainer):
    """Leaves out incomplete batches in training alone; transformers' argument would do so in evaluation too."""

    def __init__(self, *args: Any, drop_last: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_last = drop_last

    def get_train_dataloader(self) -> Any:
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, self.drop_last
        loader = super().get_train_dataloader()
        self.args.dataloader_drop_last = before
        return loader


def accuracy(model: Any, examples: Any, *, batch_size: int, machine: Machine) -> float:
    """Share of the examples whose class has the highest logit."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=batch_size)
        arguments = machine.arguments(recipe, 0, folder, PartialState().num_processes)
        trainer = Trainer(
            model,
            arguments,
            eval_dataset=examples,
            compute_metrics=accuracy_of_choices,
            preprocess_logits_for_metrics=choices_of,
        )
        use_quiet_progress(trainer, "testing")
        return trainer.evaluate()["eval_accuracy"]


def choices_of(logits: Any, labels: Any) -> torch.Tensor:
    """(batch,) classes with the highest logit: all that has to be gathered."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy_of_choices(prediction: Any) -> dict[str, float]:
    accuracy = float((prediction.predictions == prediction.label_ids).mean())
    return {"accuracy": accuracy, "negative_accuracy": -accuracy}


# ---------------------------------------------------------------------- AdaLoRA
def _rank_callbacks(model: Any, keep_zero_ranks: bool) -> list[TrainerCallback]:
    if not any("lora_E" in name for name, _ in model.named_parameters()):
        return []
    return [KeepRanks() if keep_zero_ranks else AllocateRanks()]


class AllocateRanks(TrainerCallback):
    """AdaLoRA's allocation of ranks, which has to be called after every update."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


class KeepRanks(TrainerCallback):
    """Ranks that AdaLoRA has pruned stay so."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        parts = [p for name, p in model.named_parameters() if "lora_E" in name]
        self._kept = [(p, (p.detach() != 0).to(p.dtype)) for p in parts]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for parameter, mask in self._kept:
            parameter.mul_(mask)
