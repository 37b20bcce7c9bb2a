"""PruningTrainer: what a Trainer with ``PruningCallback`` leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..compensate import Compensation
from ..errors import InvalidConfigError, MissingLabelsError
from ..losses.distillation import DistillationConfig
from ..losses.features import FeatureTeacher, has_head
from ..losses.task import is_classifier, task_loss
from ..methods import Stage
from ..spec.architecture import unwrap
from ..utils.batches import fixed_randomness
from ..utils.finite import check_images, check_loss
from ..utils.sharding import is_sharded
from ..utils.upload import upload, write_card
from .callback import PruningCallback, pruning_model_of
from .lessons import Answers, Lesson, by_features, learned_from, lessons_of, note_training, pairs_of, training_facts
from .model import PruningModel
from .resume import enable_exact_resume
from .setup import check_setup
from .sharded import ShardedTraining

logger = logging.get_logger(__name__)

#: of the teacher's features, where gradients are scores; in units of each token's standard deviation
TARGET_NOISE = 0.1


class PruningTrainer(ShardedTraining):
    """A ``Trainer`` for pruning, and for fine-tuning a pruned model with distillation.

    Args:
        model: a :class:`PruningModel`, or any model to fine-tune (a pruned one, say).
        distillation: learn from a teacher's logits or hidden states too, in a list from several; see
            :class:`DistillationConfig`. Without head or labels, a PruningModel, or one with a teacher, learns from
            hidden states alone by default.
        teacher: image classifier to learn from, of any architecture, or for hidden states the dense model; a list of
            them for a list above. By default, for a PruningModel, a copy of the wrapped model as it is now.
        compensate: what a PruningModel's ``export()`` does afterwards about what pruning took away, with images of
            the training set: ``"auto"``, or anything that ``hf_vitprune.prune`` takes; False for plain slices.
        Everything else as ``transformers.Trainer``.

    Raises:
        InvalidConfigError: distillation without a teacher, or lists of unequal lengths; or see
            :class:`PruningCallback`.
        MissingLabelsError: ``train()``, before the first step, for an image classifier: there are no labels, and no
            lesson that does without.
        InvalidDataError: ``train()``, before the first step: the teacher does not take the images.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        distillation: DistillationConfig | Sequence[DistillationConfig] | None = None,
        teacher: Any = None,
        compensate: Any = "auto",
        **kwargs: Any,
    ) -> None:
        Compensation.of(compensate)  # raises
        self._given_lessons = distillation, teacher
        pairs_of(distillation, teacher)  # raises
        self._compensate = compensate
        self.lessons: list[Lesson] = []
        super().__init__(model=model, args=args, **kwargs)
        if self._gated:
            check_setup(self.args, self.model)
            self._put_callback_first()
        if is_classifier(self.model) and not self.label_names:
            self.label_names = ["labels"]  # DeiT's two-headed classifier takes none by itself
        if is_classifier(self.model) and self.compute_loss_func is None and self.label_smoother is None:
            self.compute_loss_func = self._task_loss
        self._prepare_model(self.model)

    @property
    def _gated(self) -> bool:
        return isinstance(self.model, PruningModel)

    def _scores_by_gradients(self) -> bool:
        return self._gated and pruning_model_of(self.model).method.traits.decides_by == "gradients"

    def call_model_init(self, trial: Any = None) -> Any:
        """As the parent's, which makes a model for ``__init__`` and another for every training."""
        model = super().call_model_init(trial)
        if hasattr(self, "callback_handler"):  # not the first one: that is prepared at the end of __init__
            self._prepare_model(model)
        return model

    def _prepare_model(self, model: Any) -> None:
        """What a model gets from this Trainer: its compensation or exact resume, and its teachers."""
        if isinstance(model, PruningModel):
            model.compensate = self._compensate
        elif isinstance(model, PreTrainedModel):
            enable_exact_resume(model)
        distillation, teacher = self._given_lessons
        if distillation is None and (teacher is not None or self._gated) and not self._has_labels(model):
            distillation = DistillationConfig(kind="features")
            logger.info("there are no labels to learn from: the model learns the hidden states of its teacher")
        self.lessons = lessons_of(distillation, teacher, model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's. In a hyperparameter search, what counts is the model after the decision."""
        source = learned_from(self._has_labels(self.model), self.lessons)
        if self._gated:
            self._pruning_callback.learned_from = source
        output = super().train(*args, **kwargs)
        if not self._gated:
            note_training(self.model, training_facts(self.args, self.state, source))
        if self._gated and self.hp_search_backend is not None:
            self.objective = None  # of the last evaluation, all units there; the search then evaluates once more
        return output

    def _put_callback_first(self) -> None:
        """In front of those that report: they then see what it adds to the logs."""
        callbacks = self.callback_handler.callbacks
        ours = next((c for c in callbacks if isinstance(c, PruningCallback)), None) or PruningCallback()
        ours.gradient_scale = 1.0
        callbacks[:] = [ours, *(c for c in callbacks if c is not ours)]
        self._pruning_callback = ours

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As the parent's; images or a loss that are no numbers end the training, ``logging_nan_inf_filter`` or not.

        Raises:
            NotFiniteError: naming the cause; in fp16 not of a loss: its step is skipped, as ever.
        """
        check_images(inputs, self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.args.fp16:
            check_loss(loss, self.state.global_step)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """As the parent's; methods that score by gradients learn what the clipping has multiplied them by."""
        norm = super()._clip_grad_norm(model)
        if self._scores_by_gradients() and not self.is_deepspeed_enabled:
            factor = self.args.max_grad_norm / (float(norm) + 1e-6)  # as torch.nn.utils.clip_grad_norm_
            self._pruning_callback.gradient_scale = 1 / factor if 0 < factor < 1 else 1.0
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's, which takes one step too many when it resumes after the last one."""
        finished = self._gated and pruning_model_of(self.model).method.stage == Stage.FINISHED
        if finished or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ------------------------------------------------------------------ optimizer
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent's, with the gates in a group of their own: own learning rate, no weight decay."""
        if self.optimizer is not None or not self._gated:
            return super().create_optimizer(model)
        own = pruning_model_of(self.model).gate_group()
        gates = own["params"]
        for parameter in gates:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            for parameter in gates:
                parameter.requires_grad_(True)
        if self.is_fsdp_enabled:  # of a group without parameters, sharded checkpoints lose the settings
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}  # optimizer_cls_and_kwargs
        own["params"] = [p for p in gates if id(p) not in held]
        if own["params"]:
            optimizer.add_param_group(own)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the parent's; gates whose method wants it keep the learning rate that they start with.

        Raises:
            InvalidConfigError: the schedule cannot leave a group alone.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not self._gated or not pruning_model_of(self.model).method.traits.constant_gate_rate:
            return scheduler
        gates = {id(p) for p in pruning_model_of(self.model).method.gate_parameters()}
        if not isinstance(scheduler, LambdaLR):
            raise InvalidConfigError(
                f"gates keep their learning rate, and lr_scheduler_type {self.args.lr_scheduler_type!s} changes all "
                "alike: use constant, linear, cosine or polynomial"
            )
        for i, group in enumerate(scheduler.optimizer.param_groups):
            if gates & {id(p) for p in group["params"]}:
                scheduler.lr_lambdas[i] = lambda step: 1.0
                group["lr"] = group["initial_lr"]  # a warm-up has set it already
                scheduler._last_lr[i] = group["lr"]
        return scheduler

    # ------------------------------------------------------------------ loss
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = self._labels_in(inputs)
        by_labels = labels is not None and has_head(self.model)
        lessons = self._lessons_now()
        if not model.training and (by_labels or not by_features(lessons)):
            lessons = []
        if not lessons:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        images = self._unlabelled(inputs)
        with Answers(lessons, images, self.accelerator.autocast) as answers:
            if by_labels or not by_features(lessons):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                outputs = model(**images)
                loss = outputs.get("loss")
                loss = images["pixel_values"].new_zeros(()) if loss is None else loss
        # the parent has multiplied a loss that is normalised over all processes by their number
        over_all = self.args.average_tokens_across_devices and num_items_in_batch is not None
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        items = num_items_in_batch if accepts else None
        if items is not None and isinstance(labels, torch.Tensor) and labels.ndim == 2:
            items = items / labels.shape[1]  # the Trainer counts every entry of the rows
        # the Trainer divides by the number of micro-batches, except where a loss function of ours does
        ours = model.training and self.compute_loss_func is not None
        parts = getattr(self, "current_gradient_accumulation_steps", 1) if ours else 1
        scale = self.accelerator.num_processes if over_all and accepts and self.args.n_gpu <= 1 else 1.0
        # where nothing is removed at first, a loss on features alone has no gradients to score by
        scores = model.training and not by_labels and self._scores_by_gradients()
        noisy = scores and pruning_model_of(self.model).method.stage < Stage.ON_TARGET
        noise = TARGET_NOISE if noisy else 0.0
        loss = answers.loss(loss, outputs, items, scale=scale, parts=parts, noise=noise)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As the parent's; where hidden states are all that is learned, their loss is the one that is reported."""
        by_labels = self._labels_in(inputs) is not None and has_head(self.model)
        if not by_features(self.lessons) or by_labels:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None

    def _lessons_now(self) -> list[Lesson]:
        """Without those that wait for the first prune step."""
        if not self._gated or pruning_model_of(self.model).method.stage > Stage.WHOLE:
            return self.lessons
        return [(config, teacher) for config, teacher in self.lessons if config.kind != "kl"]

    def _task_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Computed here rather than in the model, as :meth:`PruningModel.run` does."""
        # a head that learns from a teacher leaves the labels to the other one
        own_head = "cls_logits" in outputs and any(config.kind != "kl" for config, _ in self.lessons)
        logits = outputs["cls_logits" if own_head else "logits"]
        return task_loss(unwrap(self.model), labels, logits, num_items_in_batch)

    def push_to_hub(  # type: ignore[override]  # one commit is made, and waited for
        self, commit_message: str | None = None, **kwargs: Any
    ) -> Any:
        """Push the model to ``args.hub_model_id`` with a card: the exported one, for a PruningModel.

        Args:
            kwargs: for ``hf_vitprune.push_to_hub`` (``card``, ``private``, ``token``, ...).

        Returns:
            What the Hub says of the commit; None on all but the first process.
        """
        model: Any = self.model
        model = model.export() if self._gated else model
        if not self.is_world_process_zero():
            return None
        args = self.args
        repo = self.hub_model_id or args.hub_model_id or Path(args.output_dir or "").name
        own = {"card_folder": args.output_dir, "token": args.hub_token, "private": args.hub_private_repo}
        kwargs = {**own, "image_processor": self.processing_class, "commit_message": commit_message, **kwargs}
        return upload(model, repo, **kwargs)

    def create_model_card(self, **kwargs: Any) -> None:  # type: ignore[override]  # by name alone
        """As the parent's; of a pruned model a card that says so, and one that is there already stays."""
        if self.is_world_process_zero() and not write_card(self, **kwargs):
            super().create_model_card(**kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """After the decision of a PruningModel: the small model, which ``from_pretrained`` loads.

        Before, in a training, and for checkpoints: as the parent's. With adapters, their pruned base stands beside.
        """
        model: Any = self.model
        if not self._gated or _internal_call or self.is_in_train or not model.method.decided:
            super().save_model(output_dir, _internal_call)
            return
        folder = str(output_dir or self.args.output_dir)
        if self.args.should_save or is_sharded(model.parameters()):
            model.save_pretrained(folder)
        if self.args.should_save and self.processing_class is not None:  # and no training_args.bin: it is a pickle
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def get_train_dataloader(self) -> Any:
        self._check_data()
        return super().get_train_dataloader()

    def _example(self) -> Mapping[str, Any] | None:
        """A batch of the first training image; None where there is none to be had."""
        dataset: Any = self.train_dataset
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
            return None
        with fixed_randomness():
            batch = self._get_collator_with_removed_columns(self.data_collator)([dataset[0]])
        return batch if isinstance(batch, Mapping) else None

    def _has_labels(self, model: Any) -> bool:
        """Whether the model has a loss of its own on the training data."""
        if not is_classifier(model):
            return has_head(model)
        batch = self._example()
        return batch is None or self._labels_in(batch) is not None

    def _labels_in(self, batch: Mapping[str, Any]) -> Any:
        return next((batch[name] for name in (*self.label_names, "labels") if batch.get(name) is not None), None)

    def _unlabelled(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in (*self.label_names, "labels")}

    def _check_data(self) -> None:
        """What would fail at the first step is found before it."""
        teachers = [teacher for _, teacher in self.lessons if isinstance(teacher, FeatureTeacher)]
        if not is_classifier(self.model) and not teachers:
            return
        batch = self._example()
        if batch is None:
            return
        for teacher in teachers:
            teacher.check(self._unlabelled(batch))
        labelled = self._labels_in(batch) is not None
        ddp = "MULTI" in str(self.accelerator.distributed_type) and not self.is_distributed_loading_by_transformers
        if ddp and teachers and not labelled and has_head(self.model):
            raise InvalidConfigError(
                "a head that gets no gradient stops DDP, and without labels there is none: train the model without "
                "its head, in one process, or under FSDP2 or DeepSpeed"
            )
        if teachers or labelled:
            return
        raise MissingLabelsError(
            f"training needs labels; a batch has only {', '.join(map(str, batch))}. Name the column labels, or learn "
            'from hidden states: distillation=DistillationConfig(kind="features"), teacher=<the unpruned model>'
        )
