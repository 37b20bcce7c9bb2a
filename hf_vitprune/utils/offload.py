"""Weights that wait on the disk or in CPU memory (``device_map``): read by name, or present for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter

from ..errors import CheckpointMismatchError, UnsupportedModelError
from .modules import set_tensor


def _hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        yield from getattr(hook, "hooks", (hook,) if hook is not None else ())


def is_offloaded(model: Any) -> bool:
    """Whether some weights of a model wait outside of it."""
    return isinstance(model, nn.Module) and any(getattr(hook, "offload", False) for hook in _hooks(model))


def check_present(model: Any, what: str) -> None:
    """Refuse to do ``what`` with a model whose weights wait outside of it (UnsupportedModelError)."""
    if is_offloaded(model):
        raise UnsupportedModelError(
            f"{what} needs all weights in the model, and device_map left some on the disk or in CPU memory: load it "
            "without device_map (prune and OneShotScores.measure read such models layer by layer)"
        )


def check_weights(model: Any, what: str) -> None:
    """Refuse to do ``what`` with a model that has no weights, as it was built on the meta device."""
    empty = [name for name, p in model.named_parameters() if p.is_meta] if isinstance(model, nn.Module) else []
    if empty and not is_offloaded(model):
        raise UnsupportedModelError(
            f"{what} needs weights, and {len(empty)} of the model's are on the meta device ({empty[0]}, ...): load it "
            "with from_pretrained, or build it outside of torch.device('meta')"
        )


def device_of(model: nn.Module, what: str) -> torch.device:
    """The one device on which a model computes, wherever its weights wait.

    Raises:
        UnsupportedModelError: there are several.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if is_offloaded(model):
        devices.discard(torch.device("meta"))
    devices |= {torch.device(hook.execution_device) for hook in _hooks(model) if getattr(hook, "offload", False)}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{what} needs the model on one device, not on {', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop() if devices else torch.device("meta")


def input_device(model: nn.Module) -> torch.device:
    """The device of a model's first weights, or the one that they are fetched to."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return device_of(model, "reading weights")


class StateDict(Mapping[str, torch.Tensor]):
    """The state dict of a model, in which tensors that wait outside are read whenever they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._tensors = model.state_dict()
        self._offloaded = is_offloaded(model)

    def waiting(self) -> list[str]:
        """Names of the tensors that wait outside."""
        return [name for name, tensor in self._tensors.items() if self._offloaded and tensor.device.type == "meta"]

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if not self._offloaded or tensor.device.type != "meta":
            return tensor
        try:
            found = load_offloaded_parameter(self._model, name)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointMismatchError(
                f"{name} cannot be read from where device_map left it ({error}): a file of weights lacks it, or was "
                "moved, cut short or changed since the model was loaded. Fetch the files again, and load it anew"
            ) from error
        if found.shape != tensor.shape:
            raise CheckpointMismatchError(
                f"{name} is {tuple(found.shape)} where device_map left it, and {tuple(tensor.shape)} in the model"
            )
        return found.to(device_of(self._model, "reading weights"), tensor.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Waiting:
    """The tensors of a module that wait outside of the model, and a shadow of the module that gets them for a while.

    Args:
        state: of the model.
        path: of the module in it.
        module: its shadow, without hooks. Whenever it runs, they are present.
    """

    def __init__(self, state: StateDict, path: str, module: nn.Module) -> None:
        prefix = f"{path}." if path else ""
        self._state, self._module, self._prefix = state, module, prefix
        self._empty = {n.removeprefix(prefix): state._tensors[n] for n in state.waiting() if n.startswith(prefix)}
        self._inside = 0
        if self._empty:
            module.register_forward_pre_hook(lambda *_: self._enter())
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self) -> None:
        self._inside += 1
        if self._inside == 1:
            for name in self._empty:
                set_tensor(self._module, name, self._state[self._prefix + name])

    def _leave(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            for name, empty in self._empty.items():
                set_tensor(self._module, name, empty)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """They are in the module inside."""
        try:
            self._enter()
            yield
        finally:
            self._leave()
