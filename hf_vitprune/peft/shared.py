"""One backbone in memory for the adapters of many tasks, each with the number of layers that its task kept."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterError
from ..modeling.peft_twin import SwitchedLayers, is_shared
from ..spec.architecture import Architecture
from ..spec.configs import is_pruned
from .record import Labels, recorded_labels, set_labels


def share_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a dense model to carry adapters of truncated models, of any depths, all at once (docs/peft.md).

    Without this, loading an adapter of a truncated model removes the layers it does without. A shared backbone keeps
    them, and runs as many as the active adapter has; with adapters switched off, all of them. Each adapter computes
    what it computes when loaded alone, with its own classifier and labels where it saved one (``modules_to_save``).

    Args:
        model: a dense model without adapters. It is changed in place, and given back.

    Raises:
        AdapterError: it is pruned, has adapters already, or is no transformers model.
    """
    if not isinstance(model, PreTrainedModel) or type(model).__name__.endswith("Backbone"):
        raise AdapterError(f"a shared backbone is a dense transformers model, not a {type(model).__name__}")
    architecture = Architecture.of(model)
    if is_pruned(model.config):
        raise AdapterError("this model is pruned; share the dense one that the adapters' tasks were cut from")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError("this model has adapters already; share the backbone before the first one is loaded")
    if not is_shared(model):
        prefix = architecture.family.encoder_path(model)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in architecture.layer_names()):
            model.get_submodule(prefix + path).__class__ = SwitchedLayers
        switch = _Switch({int(i): name for i, name in (model.config.id2label or {}).items()})
        model.register_forward_pre_hook(switch.before)
        model.register_forward_hook(switch.after, always_call=True)
        model.get_submodule(prefix.rstrip(".")).register_forward_pre_hook(switch.check)
    return model


def target_visible_layers(model: nn.Module, config: Any) -> None:
    """Name the target modules one by one, without those of layers that the adapter does without."""
    depth = len(config.pruning["kept_layers"])
    architecture = Architecture.of(model)
    prefix = architecture.family.encoder_path(model)
    hidden = tuple(f"{prefix}{name}." for name in architecture.layer_names()[depth:])
    if isinstance(config.target_modules, (list, set)):
        config.target_modules = {
            name
            for name, _ in model.named_modules()
            if name and not name.startswith(hidden) and check_target_module_exists(config, name) is True
        }


class _Switch:
    """Hooks that make a model as deep as its active adapter. They hold no module: copies of a model keep their own."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.running = False

    def before(self, model: Any, args: Any) -> None:
        depth, labels = self.active_task(model)
        for module in model.modules():
            if isinstance(module, SwitchedLayers):
                module.visible = None if depth is None else max(0, min(len(module), depth))
                depth = None if depth is None else depth - len(module)
        if model.config.id2label != labels:
            set_labels(model, labels)
        self.running = True

    def after(self, model: Any, args: Any, output: Any) -> None:
        self.running = False

    def check(self, encoder: nn.Module, args: Any) -> None:
        if not self.running and any(isinstance(module, BaseTunerLayer) for module in encoder.modules()):
            raise AdapterError(
                "a shared backbone chooses its depth when the whole model is called; call that, not its encoder"
            )

    def active_task(self, model: Any) -> tuple[int | None, Labels]:
        """(layers, labels) of the active adapter; (None: all, the base model's own) without one.

        Raises:
            AdapterError: several are active, or in one batch, and do not agree.
        """
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
        active = {name: None for layer in layers for name in _names_of_batch(layer) or layer.active_adapters}
        configs = {**getattr(model, "peft_config", {}), "__base__": None}  # as PEFT calls a row without an adapter
        tasks = {name: self.task_of(configs[name]) for name in active if name in configs}
        values = list(tasks.values()) or [(None, self.labels)]
        if any(task != values[0] for task in values):
            depths = {name: "all" if depth is None else depth for name, (depth, _) in tasks.items()}
            raise AdapterError(
                f"adapters of different depth or labels are active together, or in one batch (layers: {depths}); "
                "activate one of them with set_adapter, and pass the images of every task apart"
            )
        return values[0]

    def task_of(self, config: Any) -> tuple[int | None, Labels]:
        record = getattr(config, "pruning", None)
        depth = None if record is None else len(record["kept_layers"])
        return depth, recorded_labels(config) or self.labels


def _names_of_batch(layer: Any) -> list[str] | None:
    """The ``adapter_names`` of a forward call, one an image: PEFT hands them to its layers by hooks."""
    given = (getattr(hook, "keywords", {}).get("adapter_names") for hook in layer._forward_pre_hooks.values())
    return next((names for names in given if names is not None), None)
