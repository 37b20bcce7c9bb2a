"""Training with pruning: a callback for any Trainer, and a Trainer that does the rest."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .architecture import unwrap
from .distillation import DistillationConfig, Teacher, distillation_loss
from .errors import InvalidConfigError, MissingLabelsError
from .gates import strip_gates
from .hub import push_to_hub
from .methods import PruningMethod
from .model import PruningModel, is_classifier, task_loss
from .resume import enable_exact_resume

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback):
    """Trains the gates of a :class:`PruningModel` and decides at the end; works in any ``Trainer``.

    The penalty's gradient is added right before the optimizer steps, so it counts once whatever the gradient
    accumulation, number of processes or mixed precision; it is neither clipped nor part of the logged ``loss``, and
    appears in the logs as ``penalty``.

    With a plain ``Trainer`` the gates learn at the Trainer's learning rate, without weight decay. What only
    ``PruningTrainer`` gives: a learning rate of their own for the gates, distillation, exact resume of stock models,
    losses that are exact under gradient accumulation for every head, and an error for missing labels before training
    starts.

    Raises:
        InvalidConfigError: when training begins: the model is no PruningModel, its gates are not in the optimizer or
            not at the rate that the config asks for, or the gradients are not whole on every process.
    """

    def __init__(self) -> None:
        self._penalty = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        method = _pruning_model(model).method
        _check_setup(args)
        _check_checkpointing(args, model)
        _check_optimizer(kwargs.get("optimizer"), method)
        if method.decided:
            logger.warning("what to prune is decided already: this training tunes what stays and changes no choice")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        method = _pruning_model(model).method
        penalty = method.penalty(state.global_step / max(state.max_steps, 1))
        if penalty is None:
            self._penalty = 0.0
            return
        parameters = method.gate_parameters()
        for parameter, grad in zip(parameters, torch.autograd.grad(penalty, parameters), strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._penalty = penalty.item()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        extra = {"penalty": self._penalty, **_pruning_model(model).method.logs()}
        logs.update(extra)
        state.log_history[-1].update(extra)  # log() has stored a copy already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        pruning_model = _pruning_model(model)
        pruning_model.decide()
        summary = {unit: round(share, 3) for unit, share in pruning_model.plan().summary().items() if share < 1}
        logger.info(f"pruning decided; share of units kept: {summary}")


class PruningTrainer(Trainer):
    """A ``Trainer`` for pruning, and for fine-tuning a pruned model with distillation.

    Args:
        model: a :class:`PruningModel`, or any model to fine-tune (a pruned one, say).
        distillation: learn from a teacher's logits too; see :class:`DistillationConfig`.
        teacher: image classifier to learn from. By default a frozen copy of the wrapped model as it is now, for a
            PruningModel; required for other models.
        Everything else as ``transformers.Trainer``.

    Raises:
        InvalidConfigError: distillation without a teacher; or see :class:`PruningCallback`.
        MissingLabelsError: ``train()``, before the first step, for an image classifier: there are no labels.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        distillation: DistillationConfig | None = None,
        teacher: Any = None,
        **kwargs: Any,
    ) -> None:
        if teacher is not None and distillation is None:
            distillation = DistillationConfig()
        self.distillation = distillation if distillation is not None and distillation.kind != "none" else None
        self.teacher: Teacher | None = None
        super().__init__(model=model, args=args, **kwargs)
        self._gated = isinstance(self.model, PruningModel)
        if self._gated:
            _check_setup(self.args)
            self._put_callback_first()
        if is_classifier(self.model) and not self.label_names:
            self.label_names = ["labels"]  # DeiT's two-headed classifier takes none by itself
        if isinstance(self.model, PreTrainedModel):
            enable_exact_resume(self.model)
        if is_classifier(self.model) and self.compute_loss_func is None and self.label_smoother is None:
            self.compute_loss_func = self._task_loss
        if self.distillation is not None:
            if teacher is None and not self._gated:
                raise InvalidConfigError("distillation needs a teacher: pass teacher=<the unpruned model>")
            source = teacher if teacher is not None else _ungated_copy(_pruning_model(self.model))
            self.teacher = Teacher(source, student=self.model)

    def _put_callback_first(self) -> None:
        """In front of those that report: they then see what it adds to the logs."""
        callbacks = self.callback_handler.callbacks
        ours = next((c for c in callbacks if isinstance(c, PruningCallback)), None) or PruningCallback()
        callbacks[:] = [ours, *(c for c in callbacks if c is not ours)]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's, which takes one step too many when it resumes after the last one of ``max_steps``."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------ optimizer
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent's, with the gates in a group of their own: own learning rate, no weight decay."""
        if self.optimizer is not None or not self._gated:
            return super().create_optimizer(model)
        method = _pruning_model(self.model).method
        gates = [p for p in method.gate_parameters() if p.requires_grad]
        for parameter in gates:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            for parameter in gates:
                parameter.requires_grad_(True)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}  # optimizer_cls_and_kwargs
        gates = [p for p in gates if id(p) not in held]
        if gates:
            rate = method.config.gate_learning_rate
            optimizer.add_param_group({"params": gates, "weight_decay": 0.0, **({} if rate is None else {"lr": rate})})
        return optimizer

    # ------------------------------------------------------------------ loss
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self.distillation is not None
        images = {k: v for k, v in inputs.items() if k not in (*self.label_names, "labels")}
        teacher_logits = self.teacher(**images, autocast=self.accelerator.autocast())
        task_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # the parent has multiplied a loss that is normalised over all processes by their number
        over_all = self.args.average_tokens_across_devices and num_items_in_batch is not None
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        loss = distillation_loss(
            outputs["logits"],
            teacher_logits,
            task_loss,
            self.distillation,
            distillation_logits=outputs.get("distillation_logits"),
            num_items_in_batch=num_items_in_batch if accepts else None,
            loss_scale=self.accelerator.num_processes if over_all and accepts and self.args.n_gpu <= 1 else 1.0,
        )
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Computed here rather than in the model: several stock heads ignore ``num_items_in_batch`` (their gradients
        then grow with accumulation), and DeiT's two-headed one takes no labels at all.
        """
        # a head that learns from a teacher leaves the labels to the other one
        own_head = self.teacher is not None and "cls_logits" in outputs
        logits = outputs["cls_logits" if own_head else "logits"]
        return task_loss(unwrap(self.model), labels, logits, num_items_in_batch)

    def push_to_hub(  # type: ignore[override]  # one commit is made, and waited for
        self, commit_message: str | None = None, **kwargs: Any
    ) -> Any:
        """Push the model to ``args.hub_model_id`` with a card: the exported one, for a PruningModel.

        Args:
            commit_message: title of the commit.
            kwargs: for ``hf_vitprune.push_to_hub`` (``card``, ``private``, ``token``, ...).

        Returns:
            What the Hub says of the commit; None on all but the first process.
        """
        model: Any = self.model
        model = model.export() if self._gated else model
        if not self.is_world_process_zero():
            return None
        repo = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir or "").name
        kwargs.setdefault("token", self.args.hub_token)
        kwargs.setdefault("private", self.args.hub_private_repo)
        return push_to_hub(model, repo, image_processor=self.processing_class, commit_message=commit_message, **kwargs)

    def get_train_dataloader(self) -> Any:
        self._check_labels()
        return super().get_train_dataloader()

    def _check_labels(self) -> None:
        dataset: Any = self.train_dataset
        sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not is_classifier(self.model) or not sized or not len(dataset):
            return
        batch = self._get_collator_with_removed_columns(self.data_collator)([dataset[0]])
        names = (*self.label_names, "labels")
        if isinstance(batch, Mapping) and not any(batch.get(name) is not None for name in names):
            raise MissingLabelsError(
                f"training needs labels; a batch has only {', '.join(map(str, batch))}. Name the column labels"
            )


def _pruning_model(model: Any) -> PruningModel:
    if not isinstance(model, PruningModel):
        raise InvalidConfigError(
            f"PruningCallback works on get_pruning_model(model, config), not on the Trainer's {type(model).__name__}"
        )
    return model


def _check_setup(args: TrainingArguments) -> None:
    """Gates need whole gradients on every process, and one model for each.

    Raises:
        InvalidConfigError: naming what to use instead.
    """
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    if args.deepspeed or getattr(args, "deepspeed_plugin", None) is not None or args.fsdp or by_launcher:
        raise InvalidConfigError(
            "pruning needs whole gradients on every process: DeepSpeed and FSDP are not supported, DDP is (torchrun "
            "or accelerate launch without deepspeed and fsdp)"
        )
    if args.n_gpu > 1:
        raise InvalidConfigError(
            "pruning does not work in one process with several GPUs (DataParallel): start one process for each with "
            "torchrun, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def _check_checkpointing(args: TrainingArguments, model: PruningModel) -> None:
    """The reentrant kind gives no gradient to gates in layers whose input needs none.

    Raises:
        InvalidConfigError: it is asked for, over frozen weights.
    """
    settings = args.activation_checkpointing_kwargs
    reentrant = bool(args.activation_checkpointing and isinstance(settings, dict) and settings.get("use_reentrant"))
    if reentrant and not all(p.requires_grad for p in model.model.parameters()):
        raise InvalidConfigError(
            "reentrant activation checkpointing starves the gates when weights are frozen (as under LoRA): leave "
            "use_reentrant out, or set it to False"
        )


def _check_optimizer(optimizer: Any, method: PruningMethod) -> None:
    """The optimizer steps every gate that learns, at the rate that was asked for.

    Raises:
        InvalidConfigError: it does not.
    """
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


def _ungated_copy(model: PruningModel) -> Any:
    """The wrapped model as it is now, without gates: what the student starts from."""
    teacher = copy.deepcopy(model.model)
    strip_gates(teacher)
    return teacher
