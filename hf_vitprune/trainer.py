"""Training with pruning: a callback for any Trainer, and a Trainer that does the rest."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .distillation import DistillationConfig, Teacher, distillation_loss
from .errors import InvalidConfigError, MissingLabelsError
from .gates import strip_gates
from .model import PruningModel
from .resume import enable_exact_resume

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback):
    """Trains the gates of a :class:`PruningModel` and decides at the end; works in any ``Trainer``.

    The penalty's gradient is added right before the optimizer steps, so it counts once whatever the gradient
    accumulation, number of processes or mixed precision; it is neither clipped nor part of the logged ``loss``, and
    appears in the logs as ``penalty``.

    What only ``PruningTrainer`` gives: a learning rate of their own for the gates, distillation, exact resume of
    stock models, and an error for missing labels before training starts.
    """

    def __init__(self) -> None:
        self._penalty = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        method = _pruning_model(model).method
        if args.deepspeed or args.fsdp:
            raise InvalidConfigError(
                "pruning needs whole gradients on every process: DeepSpeed and FSDP are not supported, DDP is"
            )
        missing = _missing_from(kwargs.get("optimizer"), method.gate_parameters())
        if missing:
            raise InvalidConfigError(
                f"{missing} gates are not in the optimizer: it was made before the PruningModel; give the Trainer the "
                "PruningModel and let it make the optimizer"
            )

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
        InvalidConfigError: distillation without a teacher.
        MissingLabelsError: the training set's first example has no labels.
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
        if self._gated and not any(isinstance(c, PruningCallback) for c in self.callback_handler.callbacks):
            self.add_callback(PruningCallback())
        if isinstance(self.model, PreTrainedModel):
            enable_exact_resume(self.model)
        if self.distillation is not None:
            if teacher is None and not self._gated:
                raise InvalidConfigError("distillation needs a teacher: pass teacher=<the unpruned model>")
            source = teacher if teacher is not None else _ungated_copy(self.model)
            self.teacher = Teacher(source, student=self.model)

    # ------------------------------------------------------------------ optimizer
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent's, with the gates in a group of their own: own learning rate, no weight decay."""
        if self.optimizer is not None or not self._gated:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        gates = self.model.method.gate_parameters()
        trainable = [p.requires_grad for p in gates]
        for parameter in gates:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        finally:
            for parameter, before in zip(gates, trainable, strict=True):
                parameter.requires_grad_(before)
        rate = self.model.method.config.gate_learning_rate
        group: dict[str, Any] = {"params": gates, "weight_decay": 0.0}
        if rate is not None:
            group["lr"] = rate
        optimizer.add_param_group(group)
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

    def get_train_dataloader(self) -> Any:
        self._check_labels()
        return super().get_train_dataloader()

    def _check_labels(self) -> None:
        dataset = self.train_dataset
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
            return
        example = dataset[0]
        names = self.label_names or ["labels"]
        if isinstance(example, dict) and not any(n in example for n in (*names, "label", "label_ids")):
            raise MissingLabelsError(f"training needs labels; the first example has only {', '.join(example)}")


def _pruning_model(model: Any) -> PruningModel:
    if not isinstance(model, PruningModel):
        raise InvalidConfigError(
            f"PruningCallback works on get_pruning_model(model, config); the Trainer's model is a {type(model).__name__}"
        )
    return model


def _missing_from(optimizer: Any, parameters: list[torch.nn.Parameter]) -> int:
    if optimizer is None:
        return 0
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return sum(id(p) not in held for p in parameters)


def _ungated_copy(model: PruningModel) -> Any:
    """The wrapped model as it is now, without gates: what the student starts from."""
    teacher = copy.deepcopy(model.model)
    strip_gates(teacher)
    return teacher
