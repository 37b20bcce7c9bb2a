"""PruningModel: a model, a method that scores it while it trains, and the way out to a small model."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterError, InvalidConfigError, InvalidDataError, ResumeError, UnsupportedModelError
from ..losses.task import is_classifier, task_loss
from ..methods import PruningConfig, method_for
from ..modeling.native import to_native
from ..modeling.peft_twin import check_peft_model, is_peft, tuner_layers
from ..peft.configs import check_config
from ..peft.methods.convpass import ConvpassLayer
from ..plan.plan import PruningPlan
from ..pruning import prune
from ..spec.architecture import Architecture, unwrap
from ..utils.batches import ImageBatches
from ..utils.processes import broadcast
from .exporting import export_plan


def get_pruning_model(model: Any, config: PruningConfig) -> PruningModel:
    """Wrap a stock, pruned or PEFT model so that training it also decides what to prune.

    Args:
        model: a transformers vision model of a registered family, or a PeftModel over one.
        config: ``VTPConfig(...)`` or another method's config.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        AdapterError: the model's adapters cannot be carried over to a pruned one.
        InvalidConfigError: the config is no pruning config.
        UnreachableTargetError: the target lies under what the settings allow.
    """
    if isinstance(model, PruningModel):
        raise InvalidConfigError("the model is a PruningModel already; unload() or export() it first")
    return PruningModel(model, config)


class PruningModel(nn.Module):
    """A model with gates. Train it with ``PruningTrainer``, then ``plan()`` and ``export()``.

    The wrapped model keeps its weights, names and classes; gates act through hooks that :meth:`unload` removes. Its
    checkpoints are this wrapper's state dict, so that a Trainer restores every tensor exactly.

    Attributes:
        model: the wrapped model.
        method: scores, penalty and decision.
        training_images: of the last training, in the order of its data set; None before.
        compensate: what :meth:`export` does about the loss when it is given no images: ``"none"``, until a
            ``PruningTrainer`` says otherwise.
        tuned: it was trained after the decision.
    """

    #: tells the Trainer that the loss below is normalised by num_items_in_batch
    accepts_loss_kwargs = True

    def __init__(self, model: Any, config: PruningConfig) -> None:
        super().__init__()
        base = unwrap(model)
        if not isinstance(base, PreTrainedModel):
            raise UnsupportedModelError(f"expected a transformers or PEFT model, got {type(model).__name__}")
        Architecture.of(base)  # raises for unknown families
        if is_peft(model):
            _check_adapters(model)
            if not method_for(config).takes_adapters:
                raise AdapterError(
                    f"{config.method_name} makes new weights of the frozen ones, which adapters would no longer fit: "
                    "merge them first (model.merge_and_unload()), and train adapters on the exported model"
                )
        self.model = model
        self.method = method_for(config)(config, base)
        self.training_images: ImageBatches | None = None
        self.compensate: Any = "none"
        self.tuned = False
        if is_peft(model) and not self.method.removes_layers_only:
            _check_sliceable(model, self.pruning_config.method_name)
        self._handles = self.method.attach(base)
        self._takes_labels = "labels" in inspect.signature(base.forward).parameters
        self._classifies = is_classifier(base)

    # ------------------------------------------------------------------ running
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the wrapped model's; ``pixel_values`` (batch, channels, height, width), ``labels`` (batch,).

        The classification loss is computed here, with the model's own loss function: several stock heads ignore
        ``num_items_in_batch`` (their gradients then grow with accumulation), and DeiT's two-headed one takes no
        labels at all.
        """
        if self.training and torch.is_grad_enabled() and self.method.decided:
            self.tuned = True
        if not self._classifies:
            if labels is not None and self._takes_labels:
                kwargs["labels"] = labels
            return self.model(pixel_values=pixel_values, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.model(pixel_values=pixel_values, return_dict=True, **kwargs)
        if labels is not None:
            outputs["loss"] = task_loss(self.get_base_model(), labels, outputs.logits, num_items_in_batch)
            outputs.move_to_end("loss", last=False)
        return outputs if return_dict is not False else outputs.to_tuple()

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

    # ------------------------------------------------------------------ checkpoints
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As any module's, but every tensor once: safetensors refuses shared ones (VeRA's adapters have some)."""
        state = super().state_dict(*args, **kwargs)
        for name in self._shared():
            state.pop(kwargs.get("prefix", "") + name)
        return state

    def _shared(self) -> dict[str, str]:
        """Name of every tensor that was there before -> the name it was first under."""
        first: dict[int, str] = {}
        tensors = super().state_dict(keep_vars=True)
        return {name: old for name, t in tensors.items() if (old := first.setdefault(id(t), name)) != name}

    def get_extra_state(self) -> torch.Tensor:
        """What the checkpoint is of, as JSON in bytes (a tensor: safetensors holds nothing else)."""
        architecture = self.method.architecture
        record = {k: v for k, v in architecture.to_dict().items() if k != "config"}  # training may set things there
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
        settings = {"model": f"{architecture.model_type} of {len(architecture.layers)} layers ({digest})"}
        settings |= {key: str(value) for key, value in self.pruning_config.to_dict().items()}
        return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        theirs, ours = (json.loads(bytes(t.tolist())) for t in (state, self.get_extra_state()))
        differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if differing:
            rows = [f"{key} was {theirs.get(key)} and is {ours.get(key)}" for key in differing]
            raise ResumeError(
                f"the checkpoint is of another pruning run: {'; '.join(rows)}. Use the same model and settings, or "
                "start anew"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Called by ``load_state_dict``, before the parts inside are loaded: refuses what would restore only some.

        Raises:
            ResumeError: the checkpoint is of another model, or of another method or settings.
        """
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # compares the settings
        own = {prefix + key for key in self.state_dict()}
        given = {key for key in state_dict if key.startswith(prefix)}
        if own != given:
            raise ResumeError(
                f"this is no checkpoint of the {type(self).__name__}: {_some(own - given)} missing, "
                f"{_some(given - own)} left over. Wrap the same model in the same way as for the run that wrote it"
            )
        for name, first in self._shared().items():
            state_dict[prefix + name] = state_dict[prefix + first]

    # ------------------------------------------------------------------ results
    @property
    def pruning_config(self) -> PruningConfig:
        return self.method.config

    def decide(self, images: Any = None) -> None:
        """Fix which units stay; from here on the gated model computes what the exported one will.

        With several processes, all take the decision of the first.

        Args:
            images: what the decision may look at (anything that ``ImageBatches`` takes); by default the images of
                the training, where one of ``PruningTrainer`` or ``PruningCallback`` has run.

        Raises:
            InvalidDataError: the method decides by images, and there are none.
        """
        method = self.method
        if images is not None:
            batches: ImageBatches | None = ImageBatches(images)
        else:
            batches = None if method.needs_held_out_images else self.training_images
        if batches is None and not method.decided and (method.needs_images or method.needs_held_out_images):
            kind, cure = (
                ("<evaluation set>", "give PruningCallback(images=...) to the Trainer")
                if method.needs_held_out_images
                else ("<training set>", "train with PruningTrainer first")
            )
            raise InvalidDataError(
                f"{self.pruning_config.method_name} decides by images: pass decide(images={kind}), or {cure}"
            )
        self.method.decide(self.model, batches)
        broadcast(self.method)

    def plan(self) -> PruningPlan:
        """The plan of the current decision; decides first where none was taken."""
        if not self.method.decided:
            self.decide()
        return self.method.choose()

    def export(
        self, native: bool = False, *, calibration: Any = None, compensate: Any = "auto", weights: Any = None
    ) -> Any:
        """The small model, without gates.

        Without compensation it computes what this model computes in eval mode. With it, the shape is the same, and
        the weights make up for what the decision took away: they bring it close to the model as it was trained, all
        units there. That is done from ``calibration``, or after a training by ``PruningTrainer`` from 128 images of
        its training set.

        Args:
            native: a stock transformers model that loads without this library, where the shape allows it.
            calibration: unlabelled images (anything that ``ImageBatches`` takes; about 128 are enough).
            compensate: as in ``hf_vitprune.prune``; ``"none"`` or False for plain slices, with images and without.
            weights: a model of the wrapped one's shape, whose weights the small one gets (those from before the
                training, say), and which ``calibration`` then brings it close to.

        Returns:
            A ``Pruned<X>...`` model; a PeftModel over one if the wrapped model is a PeftModel; a stock model if
            ``native``.

        Raises:
            NativeExportError: ``native`` and the shape does not allow it; the message says why.
            InvalidPlanError: the decision removes nothing, and the method is not one that may keep everything.
            AdapterError: ``calibration`` for adapters over layers that are whole.
            InvalidDataError: the images are none, or not for this model.
            InvalidConfigError: ``compensate`` asks for something, and there are no images.
        """
        plan = export_plan(self, calibration, compensate, weights)
        source = self.model if weights is None else weights
        small = prune(source, plan, allow_unchanged=self.method.may_keep_everything)
        if native:
            return to_native(small)
        return small

    def unload(self) -> Any:
        """The wrapped model without gates, as it was (its weights as trained)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: a gated model is no finished model.

        Raises:
            UnsupportedModelError: always; says what to call instead.
        """
        raise UnsupportedModelError(
            "a PruningModel holds gates in training; save export().save_pretrained(...) (the small model) or "
            "unload().save_pretrained(...) (the full one)"
        )

    push_to_hub = save_pretrained


def _check_adapters(model: Any) -> None:
    check_peft_model(model)
    for config in model.peft_config.values():
        check_config(config)


def _check_sliceable(model: Any, method: str) -> None:
    for name, layer in tuner_layers(unwrap(model)).items():
        if isinstance(layer, ConvpassLayer):
            raise AdapterError(
                f"{method} narrows layers, and the Convpass adapter of {name} can neither be sliced nor merged; "
                "remove whole layers (truncate), or use another adapter"
            )


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names) or ["nothing"]
    return f"{first} and {len(rest)} more" if rest else first
