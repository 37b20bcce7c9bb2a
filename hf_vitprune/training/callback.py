"""PruningCallback: what pruning does in any ``Trainer``."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..compensate import Compensation
from ..errors import InvalidConfigError
from ..methods import PruningMethod, Stage
from ..utils.batches import ImageBatches
from ..utils.examples import processed
from ..utils.finite import check_gradients
from .lessons import training_facts
from .model import PruningModel
from .setup import check_agreement, check_model, check_setup, check_trainer
from .zero import restore_precision

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback):
    """Trains the gates of a :class:`PruningModel` and decides at the end; works in any ``Trainer``.

    The penalty's gradient is added right before the optimizer steps, so it counts once whatever the gradient
    accumulation, number of processes or mixed precision; it is neither clipped nor part of the logged ``loss``, and
    appears in the logs as ``penalty``.

    Only ``PruningTrainer`` gives the gates a learning rate of their own (here they have the Trainer's, without weight
    decay), distillation, exact resume of stock models, losses that are exact under gradient accumulation for every
    head, and an error for missing labels before training starts.

    Args:
        images: what the decision looks at (anything that ``ImageBatches`` takes); by default the training images.

    Attributes:
        gradient_scale: what undoes the clipping of the current gradients; ``PruningTrainer`` sets it.
        by_engine: DeepSpeed's engine calls :meth:`before_step`, as it takes backward pass and step in one.
        learned_from: what the loss is of, in words for the model's card.
        checked: ``PruningTrainer`` has called :meth:`check_images`, as no pass may begin inside of the model now.

    Raises:
        InvalidConfigError: when training begins: the model is no PruningModel, its gates are not in the optimizer or
            not at the rate that the config asks for, the gradients are not whole on every process, the method scores
            by gradients and a plain Trainer clips them, or it decides by images and there are none to read again.
        InvalidDataError: when training begins: the method cannot decide by the images.
    """

    def __init__(self, images: Any = None) -> None:
        self.images = images
        self._penalty: torch.Tensor | None = None
        self._logged: set[str] = set()
        self.gradient_scale: float | None = None
        self.by_engine = False
        self.learned_from = "labels"
        self.checked = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        method = pruning_model_of(model).method
        check_setup(args, model)
        check_model(model)
        check_trainer(args, model, ours=self.gradient_scale is not None)
        check_agreement(model)
        model.guided = True
        _check_checkpointing(args, model)
        if method.traits.decides_by == "gradients" and self.gradient_scale is None and args.max_grad_norm:
            raise InvalidConfigError(
                f"{method.config.method_name} scores by gradients, and this Trainer clips them first: use "
                "PruningTrainer, which undoes the clipping for the scores, or max_grad_norm=0"
            )
        method.check_training(args, state.max_steps)
        if not self.by_engine:  # its optimizer has flat tensors of all
            _check_optimizer(kwargs.get("optimizer"), method)
        if not self.checked:
            self.check_images(kwargs.get("train_dataloader"), pruning_model_of(model))
        if method.decided:
            model.tuned = True
            logger.warning("what to prune is decided already: this training tunes what stays and changes no choice")

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """What was best before the method came to its target is forgotten: it is not what is trained for."""
        if pruning_model_of(model).method.stage < Stage.ON_TARGET:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        scale = 1.0 if self.gradient_scale is None else self.gradient_scale
        if not (self.by_engine or args.fp16):  # whose scaler skips such steps
            check_gradients(pruning_model_of(model).model, state.global_step)
        if not self.by_engine:
            self._penalty = pruning_model_of(model).before_step(state.global_step, state.max_steps, scale)

    def before_step(self, model: Any, state: TrainerState) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Between backward pass and step, of gradients that are not clipped; what to add to those of the gates."""
        penalty = pruning_model_of(model).regularise(state.global_step, state.max_steps)
        self._penalty = None if penalty is None else penalty.detach()
        return pruning_model_of(model).method.gradients_of(penalty)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        pruning_model_of(model).after_step(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if pruning_model_of(model).method.stage == Stage.FINISHED:
            control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        penalty = 0.0 if self._penalty is None else self._penalty.item()
        extra = {"penalty": penalty, **pruning_model_of(model).method.logs()}
        self._logged |= extra.keys()
        logs.update(extra)
        state.log_history[-1].update(extra)  # log() has stored a copy already

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        pruning_model = pruning_model_of(model)
        pruning_model.training_images = _images_of(kwargs.get("train_dataloader"))
        if self.by_engine:
            restore_precision(pruning_model.method.parameters())
        pruning_model.learned = training_facts(args, state, self.learned_from)
        pruning_model.decide(self.images)
        numbers = {name: n for name, n in pruning_model.method.logs().items() if name not in self._logged}
        if numbers:
            state.log_history.append({**numbers, "step": state.global_step})
        summary = {unit: round(share, 3) for unit, share in pruning_model.plan().summary().items() if share < 1}
        logger.info(f"pruning decided; share of units kept: {summary}")
        if self.gradient_scale is None:
            logger.warning(
                "what this Trainer's save_model() writes is a checkpoint with gates: save the small model with "
                "trainer.model.save_pretrained(folder), or train with PruningTrainer, whose save_model() does it"
            )

    def check_images(self, loader: Any, model: PruningModel) -> None:
        """What would be missed after the training is missed before it."""
        method, training_images = model.method, _images_of(loader)
        if training_images is None and Compensation.of(model.compensate) is not None:
            if model.compensate != "auto":
                raise InvalidConfigError(
                    f"compensate={model.compensate!r} looks at training images again, and these are a stream: leave "
                    "it out, and give images to the export: export(calibration=<images>, compensate=...)"
                )
            logger.warning(
                "the training images are a stream, so that export() compensates only with export(calibration=<images>)"
            )
        if method.decided:
            return
        given = processed(self.images, model.get_base_model())
        images = None if given is None else ImageBatches(given)
        if images is None and method.traits.decides_by == "held_out_images":
            raise InvalidConfigError(
                f"{method.config.method_name} decides by images that were not trained on: give the Trainer "
                "callbacks=[PruningCallback(images=<evaluation set>)]"
            )
        images = training_images if images is None else images
        if images is None and method.traits.decides_by == "images":
            raise InvalidConfigError(
                f"{method.config.method_name} decides by labelled images that it reads again at the end, and these "
                "training images are a stream: give the Trainer callbacks=[PruningCallback(images=<labelled images in "
                "a list, or in a data set with a length>)]"
            )
        if images is not None:
            method.check_images(model.model, images)


def _images_of(loader: Any) -> ImageBatches | None:
    """The training images in order, where they can be read again."""
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not len(dataset):
        return None
    return ImageBatches(loader, as_trained=True)


def pruning_model_of(model: Any) -> PruningModel:
    if not isinstance(model, PruningModel):
        raise InvalidConfigError(
            f"PruningCallback works on get_pruning_model(model, config), not on the Trainer's {type(model).__name__}"
        )
    return model


def _check_checkpointing(args: TrainingArguments, model: PruningModel) -> None:
    """The reentrant kind gives no gradient to gates in layers whose input needs none."""
    settings = args.activation_checkpointing_kwargs
    reentrant = bool(args.activation_checkpointing and isinstance(settings, dict) and settings.get("use_reentrant"))
    if reentrant and not all(p.requires_grad for p in model.model.parameters()):
        raise InvalidConfigError(
            "reentrant activation checkpointing starves the gates when weights are frozen (as under LoRA): leave "
            "use_reentrant out, or set it to False"
        )


def _check_optimizer(optimizer: Any, method: PruningMethod) -> None:
    """The optimizer steps every gate that learns, at the rate that was asked for."""
    if optimizer is None:
        return
    rates = {id(p): g.get("initial_lr", g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    gates = [p for p in method.gate_parameters() if p.requires_grad]
    missing = sum(id(p) not in rates for p in gates)
    if missing:
        raise InvalidConfigError(
            f"{missing} gates are not in the optimizer: it was made before the PruningModel; give the Trainer the "
            "PruningModel and let it make the optimizer"
        )
    wanted = method.config.gate_learning_rate
    given = {rates[id(p)] for p in gates}
    if wanted is not None and given - {wanted}:
        raise InvalidConfigError(
            f"gate_learning_rate is {wanted}, but the optimizer has {sorted(given)} for the gates: use "
            "PruningTrainer, which makes a group for them, or leave gate_learning_rate out"
        )
