"""Adapters on a layer's whole attention or MLP (PEFT's own change Linears): what Convpass and RepAdapter share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ...errors import AdapterError, InvalidConfigError
from ...modeling.structure import layer_paths
from ...spec.architecture import Architecture
from .kind import AdapterKind, LayerCut


@dataclass
class BranchConfig(PeftConfig):
    """Settings that both methods share.

    Attributes:
        r: width of the bottleneck.
        scale: factor of what the adapter adds (``s`` in the papers, which search it for every task).
        dropout: on the bottleneck's features, in training.
        target_modules: names, suffixes or a regular expression of attention and MLP modules; all of them by default.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as of PEFT's own methods.
    """

    r: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    #: set by subclasses
    method_name = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method_name)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if type(self.r) is not int or self.r < 1:
            raise InvalidConfigError(f"r is the width of the bottleneck, at least 1; got {self.r!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not self.scale:
            raise InvalidConfigError(f"scale is a number other than 0; got {self.scale!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise InvalidConfigError(f"dropout must lie in [0, 1); got {self.dropout!r}")


class Branch(NamedTuple):
    """An attention or MLP module: the channels that come in, and names of Linears in it that read and write them.

    Attributes:
        layer: path of the layer that it is in.
        norm: path of the norm in front of an attention; None of an MLP.
    """

    width: int
    readers: tuple[str, ...]
    writer: str
    layer: str
    norm: str | None = None


def branches(model: Any, architecture: Architecture) -> dict[str, Branch]:
    """Name of every attention and MLP module of the layers -> its parts; those that were removed are left out."""

    def inside(path: str, *names: str) -> tuple[str, ...]:
        return tuple(name.removeprefix(path + ".") for name in names)

    found = {}
    for i, (paths, shape) in enumerate(zip(layer_paths(model, architecture), architecture.layers, strict=True)):
        width = architecture.width(i)
        if shape.mixer == "attention":
            readers = inside(paths.attention, paths.q, paths.k, paths.v)
            writer = inside(paths.attention, paths.o)[0]
            found[paths.attention] = Branch(width, readers, writer, paths.layer, paths.norm1)
        if shape.mlp:
            readers, writer = inside(paths.mlp, *paths.fc1), inside(paths.mlp, paths.fc2)[0]
            found[paths.mlp] = Branch(width, readers, writer, paths.layer)
    return found


class BranchKind(AdapterKind):
    """Stays where its branch keeps what the adapter touches."""

    def cut_of(self, layer: Any, cut: Callable[[str], LayerCut]) -> LayerCut:
        """Inputs of what reads in the branch, outputs of what writes."""
        readers = [cut(name) for name in layer.branch.readers]
        reader = next((c for c in readers if not c.keeps_inputs), readers[0])
        return LayerCut(cut(layer.branch.writer).rows, reader.columns, reader.scale)


class BranchLayer(nn.Module, BaseTunerLayer):
    """A branch with adapters, ``base_layer`` the attention or MLP module of a model of this architecture."""

    other_param_names = ("r", "scale", "dropout")

    def __init__(self, base_layer: nn.Module, branch: Branch, architecture: Architecture) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.branch = branch
        self.width = branch.width
        self.r: dict[str, int] = {}
        self.scale: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def reader(self, name: str) -> nn.Linear:
        """One of the Linears that read the branch's input, without wrappers of other adapters."""
        linear = self.base_layer.get_submodule(name)
        if isinstance(linear, BaseTunerLayer):
            linear = linear.get_base_layer()
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise AdapterError(f"{name} is a {type(linear).__name__}; these adapters need floating-point Linears")
        return linear

    def make_adapter(self, name: str, config: Any) -> None:
        """Put new modules for one adapter into the layer's dicts."""
        raise NotImplementedError

    def update_layer(self, name: str, config: Any) -> None:
        """Add an adapter, on the device and in the dtype of the branch."""
        self.r[name], self.scale[name], self.dropout[name] = config.r, float(config.scale), config.dropout
        self.make_adapter(name, config)
        weight = self.reader(self.branch.readers[0]).weight
        for attribute in self.adapter_layer_names:
            module = getattr(self, attribute)[name]
            if not any(tensor.is_meta for tensor in module.parameters()):
                module.to(weight.device, weight.dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active(self) -> list[str]:
        """Adapters that act, in order."""
        return [name for name in self.active_adapters if name in self.r]

    def unmerge(self) -> None:
        """Nothing is merged."""


class BranchTuner(BaseTuner):
    """Puts adapters on attention and MLP modules of the model's layers."""

    layer_class: type[BranchLayer]

    def check_model(self, architecture: Architecture) -> None:
        """Refuse models that the method does not fit.

        Raises:
            AdapterError: with the reason.
        """

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("these adapters act on whole batches: choose one with set_adapter, not by image")
        yield

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        self.architecture = Architecture.of(self.model)
        self.check_model(self.architecture)
        self.branches = branches(self.model, self.architecture)
        if peft_config.target_modules is None:
            named = set(self.branches)
            if peft_config.layers_to_transform is not None:  # which PEFT applies to suffixes only
                named = {name.rpartition(".")[2] for name in named}
            peft_config.target_modules = named
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BranchLayer):
            target.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                target.set_requires_grad(adapter_name, False)
            return
        if current_key not in self.branches:
            examples = ", ".join(list(self.branches)[:2])
            raise AdapterError(
                f"target_modules names {current_key}, and {peft_config.peft_type.value} adapters sit on attention and "
                f"MLP modules of the layers ({examples}, ...); leave target_modules out for all of them"
            )
        layer = self.layer_class(target, self.branches[current_key], self.architecture)
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:  # a further adapter is not trained until it is active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        self.placed(layer)

    def placed(self, layer: Any) -> None:
        """A new layer is in its place."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own expects a weight in the old module
