"""PruningModel: a model, a method that scores it while it trains, and the way out to a small model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import AdapterError, InvalidConfigError, InvalidDataError, InvalidPlanError, UnsupportedModelError
from ..losses.task import is_classifier, task_loss
from ..methods import PruningConfig, method_for
from ..modeling.native import to_native
from ..modeling.peft_twin import is_peft, plain_twin
from ..peft import save_pruned_peft
from ..plan.plan import PruningPlan
from ..plan.select import say_if_far_under
from ..pruning import prune
from ..spec.architecture import Architecture, unwrap
from ..spec.towers import find_tower
from ..surgery.composite import check_host
from ..surgery.transplant import check_own_modules
from ..utils.batches import ImageBatches
from ..utils.examples import processed
from ..utils.finite import check_finite, check_step
from ..utils.modules import get
from ..utils.offload import check_present, check_weights
from ..utils.processes import broadcast, is_first_process
from ..utils.sharding import all_finite, gathered, is_sharded, shaped, unsharded, whole_root
from ..utils.upload import upload
from .exporting import export_plan
from .setup import check_adapters, check_model, check_sliceable, check_tower, method_on
from .wrapper import Checkpoints, class_with, signature_of, takes_loss_kwargs


def get_pruning_model(model: Any, config: PruningConfig, part: str | None = None) -> PruningModel:
    """Wrap a stock, pruned or PEFT model so that training it also decides what to prune.

    Args:
        model: a transformers vision model of a registered family, a bigger model with one in it, or a PeftModel over
            either; a bigger model trains by its own loss.
        config: ``VTPConfig(...)`` or another method's config.
        part: which tower of a bigger model (see :func:`hf_vitprune.towers`); its only one by default.

    Raises:
        UnsupportedModelError: no family is registered for the model, there are several towers and no ``part``, or the
            bigger model could not be loaded again with a pruned tower.
        AdapterError: the model's adapters cannot be carried over to a pruned one.
        InvalidConfigError: the config is no pruning config; the model is in a wrapper (DataParallel, an engine), or
            its parameters are spread over processes in a way that cannot be pruned.
        UnreachableTargetError: the target lies under what the settings allow.
        NotFiniteError: the model has weights that are infinite or no numbers.
    """
    check_present(model, "training")
    check_weights(model, "training")
    check_model(model)
    if isinstance(model, PruningModel):
        raise InvalidConfigError("the model is a PruningModel already; unload() or export() it first")
    with shaped(model) if isinstance(model, torch.nn.Module) else contextlib.nullcontext():
        return PruningModel(model, config, part)


class PruningModel(Checkpoints):
    """A model with gates. Train it with ``PruningTrainer``, then ``plan()`` and ``export()``.

    The wrapped model keeps its weights, names and classes; gates act through hooks that :meth:`unload` removes. This
    takes what the wrapped model takes, and checkpoints are its state dict, which a Trainer restores exactly.

    In a training loop of one's own, call :meth:`before_step` and :meth:`after_step` around every ``optimizer.step()``
    (of an optimizer over :meth:`parameter_groups`), and :meth:`decide` at the end.

    Attributes:
        model: the wrapped model.
        tower: what is pruned of it; at the path ``""`` where that is the model itself.
        method: scores, penalty and decision.
        training_images: of the last training, in the order of its data set; None before.
        compensate: what :meth:`export` does about the loss when it is given no images, and there are
            ``training_images``: ``"auto"``, unless a ``PruningTrainer`` was told otherwise.
        tuned: it was trained after the decision.
    """

    def __new__(cls, model: Any = None, config: Any = None, part: str | None = None) -> PruningModel:
        if model is not None and isinstance(base := unwrap(model), PreTrainedModel):  # copies are made without one
            cls = class_with(PruningModel, signature_of(base))
        return super().__new__(cls)

    def __init__(self, model: Any, config: PruningConfig, part: str | None = None) -> None:
        super().__init__()
        base = unwrap(model)
        if not isinstance(base, PreTrainedModel):
            raise UnsupportedModelError(f"expected a transformers or PEFT model, got {type(model).__name__}")
        self.tower = find_tower(base, part)
        check_own_modules(get(base, self.tower.path), Architecture.of(base, part))
        check_finite(model, "trained")
        if self.tower.path:
            with unsharded(base):
                check_host(plain_twin(base, part=self.tower.path) if is_peft(model) else base, self.tower)
        if is_peft(model):
            check_adapters(model)
            if method_for(config).traits.adapters == "none":
                raise AdapterError(
                    f"{config.method_name} makes new weights of the frozen ones, which adapters would no longer fit: "
                    "merge them first (model.merge_and_unload()), and train adapters on the exported model"
                )
        self.model = model
        self.method = method_on(base, self.tower, config)
        if self.tower.path:
            check_tower(self.method, self.tower, base, is_peft(model))
        self.training_images: ImageBatches | None = None
        self.compensate: Any = "auto"
        self.tuned = False
        self.guided = False
        self.learned: dict[str, Any] | None = None  # how the gates were trained, for the record
        self._changes: int | None = None  # of the weights, when the first training pass began
        if is_peft(model) and self.method.traits.adapters == "sliced":
            check_sliceable(model, self.pruning_config.method_name, self.tower.path)
        self._handles = self.method.attach(get(base, self.tower.path))
        self._arguments = list(signature_of(base).parameters)
        self._classifies = is_classifier(base)
        #: what the Trainer asks: whether the loss below is normalised by num_items_in_batch
        self.accepts_loss_kwargs = self._classifies or takes_loss_kwargs(base)

    def __reduce__(self) -> Any:
        return _empty, (signature_of(self.get_base_model()),), self.__dict__

    # ------------------------------------------------------------------ running
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapped model's.

        The classification loss is computed here, with the model's own loss function: several stock heads ignore
        ``num_items_in_batch`` (gradients grow with accumulation), and DeiT's two-headed one takes no labels at all.

        Raises:
            InvalidConfigError: a Trainer without ``PruningCallback`` begins to train.
        """
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        if len(args) > len(self._arguments) or len(given) < len(args) + len(kwargs):
            raise TypeError(f"{type(self.get_base_model()).__name__} takes {', '.join(self._arguments)}, each once")
        if self.training and torch.is_grad_enabled():
            self._note_training("num_items_in_batch" in given)
        if not self._classifies:
            return self.model(**given)
        labels, num_items = given.pop("labels", None), given.pop("num_items_in_batch", None)
        return_dict = given.pop("return_dict", None)
        outputs = self.model(return_dict=True, **given)
        if labels is not None:
            outputs["loss"] = task_loss(self.get_base_model(), labels, outputs.logits, num_items)
            outputs.move_to_end("loss", last=False)
        return outputs if return_dict is not False else outputs.to_tuple()

    def _note_training(self, by_a_trainer: bool) -> None:
        if self._changes is None:
            self._changes = _changes(self.model)
        if self.method.decided:
            self.tuned = True
        elif by_a_trainer and self.method.traits.by_steps and not self.guided:
            raise InvalidConfigError(
                f"this Trainer has no PruningCallback, and {self.pruning_config.method_name} would learn nothing: use "
                "PruningTrainer, or Trainer(..., callbacks=[PruningCallback()])"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet
                raise
            return getattr(self.model, name)

    def get_base_model(self) -> Any:
        """The transformers model inside."""
        return unwrap(self.model)

    @property
    def scored(self) -> Any:
        """What the method looks at: the wrapped model, or the tower in it."""
        return get(self.get_base_model(), self.tower.path) if self.tower.path else self.model

    # ------------------------------------------------------------------ a training loop of one's own
    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: everything that learns, gates at their own learning rate, without decay.

        Args:
            weight_decay: of all but gates.
        """
        own = self.gate_group()
        known = {id(p) for p in own["params"]}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": others, "weight_decay": weight_decay}, *([own] if known else [])]

    def gate_group(self) -> dict[str, Any]:
        """The gates that learn, as a group of an optimizer."""
        rate = self.pruning_config.gate_learning_rate
        gates = [p for p in self.method.gate_parameters() if p.requires_grad]
        return {"params": gates, "weight_decay": 0.0, **({} if rate is None else {"lr": rate})}

    def before_step(self, step: int, max_steps: int, gradient_scale: float = 1.0) -> torch.Tensor | None:
        """To be called right before ``optimizer.step()``: the method looks at the gradients, its penalty joins them.

        Args:
            step: updates made so far, of ``max_steps``; the gradients are those of the whole update, unscaled.
            gradient_scale: what undoes a clipping of the gradients, where they were clipped; NViT scores by them.

        Returns:
            The penalty (its gradient has been added, do not add it to the loss), None where there is none.
        """
        penalty = self.regularise(step, max_steps, gradient_scale)
        for parameter, grad in self.method.gradients_of(penalty):
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return None if penalty is None else penalty.detach()

    def regularise(self, step: int, max_steps: int, gradient_scale: float = 1.0) -> torch.Tensor | None:
        """As :meth:`before_step`, with a penalty whose gradients are left to the caller."""
        self.guided = True
        return self.method.before_step(self.scored, step / max(max_steps, 1), gradient_scale)

    def after_step(self, step: int, max_steps: int) -> None:
        """To be called right after ``optimizer.step()``, with the same numbers as :meth:`before_step`.

        Raises:
            NotFiniteError: the step has made weights infinite, or no numbers.
        """
        check_step(self.model, step + 1)
        self.method.after_step(self.scored, step + 1, max_steps)

    # ------------------------------------------------------------------ results
    @property
    def pruning_config(self) -> PruningConfig:
        return self.method.config

    def decide(self, images: Any = None) -> None:
        """Fix which units stay; from here on the gated model computes what the exported one will.

        Args:
            images: what the decision may look at (anything that ``ImageBatches`` takes); by default the images of
                the training by ``PruningTrainer`` or ``PruningCallback``.

        Raises:
            InvalidDataError: the method decides by images, and there are none.
            InvalidPlanError: the method has learned nothing so far, or the training diverged.
        """
        method, name = self.method, self.pruning_config.method_name
        fresh, by = not method.decided, method.traits.decides_by
        if fresh:
            self._check_trained()
        batches = None if by == "held_out_images" else self.training_images
        if images is not None:
            batches = ImageBatches(processed(images, self.get_base_model()))
        if batches is None and fresh and by in ("images", "held_out_images"):
            raise InvalidDataError(
                f"{name} decides by images: pass decide(images=<training set>), or train with PruningTrainer first"
                if by == "images"
                else f"{name} decides by images: pass decide(images=<evaluation set>), or give "
                "PruningCallback(images=...) to the Trainer"
            )
        with whole_root(self):
            method.decide(self.scored, batches)
        broadcast(method)
        reached = method.against_target() if fresh else None
        if reached is not None and is_first_process():
            ratio, target, metric = reached
            say_if_far_under(ratio, target, metric, method.undershoot)

    def _check_trained(self) -> None:
        trained = self._changes is not None and _changes(self.model) > self._changes
        if trained and self.method.traits.by_steps and not self.guided:
            raise InvalidPlanError(
                f"the model was trained without {self.pruning_config.method_name}, which has learned nothing: train "
                "with PruningTrainer, with Trainer(..., callbacks=[PruningCallback()]), or call before_step() and "
                "after_step() around every optimizer.step() of your own loop"
            )
        broken = [name for name, p in self.model.named_parameters() if not all_finite(p)]
        if broken:
            raise InvalidPlanError(
                f"{len(broken)} tensors of the model are not finite ({broken[0]}, ...): the training diverged. Look "
                "for images that are not finite, or lower the learning rate"
            )

    def plan(self) -> PruningPlan:
        """The plan of the current decision; decides first where none was taken."""
        if not self.method.decided:
            self.decide()
        return self.method.choose().of_part(self.tower.part if self.tower.path else None)

    def export(
        self, native: bool = False, *, calibration: Any = None, compensate: Any = "auto", weights: Any = None
    ) -> Any:
        """The small model, without gates.

        Without compensation it computes what this model computes in eval mode. With it, its weights make up for what
        the decision took away, from ``calibration``, or from 128 images of the training set after a training with
        ``PruningTrainer`` or ``PruningCallback``: they bring it close to the model as it was trained, all units there.

        Args:
            native: require a model that loads without this library; otherwise one is given where the shape allows it.
            calibration: unlabelled images (anything that ``ImageBatches`` takes; about 128 are enough).
            compensate: as in ``hf_vitprune.prune``; ``"none"`` or False for plain slices, with images and without.
            weights: a model of the wrapped one's shape, whose weights the small one gets (those from before the
                training, say), and that ``calibration`` brings it close to.

        Returns:
            A model of the wrapped one's class where that can hold the shape, else a ``Pruned<X>...`` one; a PeftModel
            over one if the wrapped model is a PeftModel. Of a sharded model, for which every process has to call this:
            the first process has it, on the CPU, and the others None.

        Raises:
            NativeExportError: ``native``, and the shape does not allow it.
            InvalidPlanError: the decision removes nothing, and the method is not one that may keep everything.
            AdapterError: ``calibration`` for adapters over layers that are whole.
            InvalidDataError, InvalidConfigError: ``compensate`` needs images, and there are none for this model.
        """
        if is_sharded(self.model.parameters()):
            if not self.method.decided:
                self.decide()
            model = gathered(self, shared=self.training_images)
            settings = {"calibration": calibration, "compensate": compensate, "weights": weights}
            return None if model is None else model.export(native, **settings)
        if self.method.decided:  # else the decision looks
            check_finite(self.model if weights is None else weights, "exported")
        plan = export_plan(self, calibration, compensate, weights)
        if self.learned is not None:
            plan = replace(plan, info={**plan.info, "learning": self.learned})
        source = self.model if weights is None else weights
        small = prune(source, plan, allow_unchanged=self.method.traits.may_keep_everything)
        return to_native(small) if native else small

    def unload(self) -> Any:
        """The wrapped model without gates, as it was (its weights as trained)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the small model, as ``export().save_pretrained(...)`` does; with adapters, their pruned base too.

        Raises:
            UnsupportedModelError: nothing is decided yet; a gated model is no finished model.
            AdapterError: ``kwargs`` with adapters.
        """
        small = self._finished()
        if small is None:  # the first process has it
            return
        if not is_peft(small):
            small.save_pretrained(save_directory, **kwargs)
        elif kwargs:
            raise AdapterError(f"a PeftModel is saved whole, without {', '.join(kwargs)}; export() and save that")
        else:
            save_pruned_peft(small, save_directory)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the small model, as ``export().push_to_hub(...)`` does; raises as :meth:`save_pretrained`."""
        small = self._finished()
        return None if small is None else upload(small, *args, **kwargs)

    def _finished(self) -> Any:
        if not self.method.decided:
            raise UnsupportedModelError(
                "nothing is decided yet, so there is no small model to export: train first, or call decide(). The "
                "full one is unload(); a checkpoint of the training is the state_dict()"
            )
        return self.export()


def _changes(model: torch.nn.Module) -> int:
    """How often weights were changed in place, as an optimizer does."""
    return sum(parameter._version for parameter in model.parameters())


def _empty(signature: Any) -> Any:
    """A PruningModel that a copy or a pickle is read into."""
    return object.__new__(class_with(PruningModel, signature))
