"""Hooks of methods: objects that a copy of a model has of its own, and that are found again to be removed."""

from __future__ import annotations

from typing import Any

from torch import nn


class GateHook:
    """A hook that a method puts on a model: an object, not a closure, so that a copy of the model has its own."""


class ForwardOverride(GateHook):
    """Stands in front of a module's forward, where a hook would compute too much; subclasses are called instead."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def attach(self) -> ForwardOverride:
        """Take the module's place; itself, as a handle."""
        self.module.forward = self
        return self

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward


def strip_gates(model: nn.Module) -> None:
    """Remove the gate hooks that a copy of a gated model brought along."""
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, GateHook)]:
                del hooks[key]
                with_kwargs.pop(key, None)
        if isinstance(module.__dict__.get("forward"), ForwardOverride):
            del module.forward  # of this module: a shallow copy's override is that of the model it was copied from
