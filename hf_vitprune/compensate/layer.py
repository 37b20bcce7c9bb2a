"""One layer on stored hidden states: what goes into, through and out of each of its two branches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..families import LayerPaths
from ..modeling.peft_twin import whole_shadow
from ..utils.modules import owner
from ..utils.offload import Waiting
from .fits import Branch
from .moments import Statistics, precise_device

#: last Linear of a branch -> the LayerScale behind it, by their names in ``LayerPaths``
SCALES = {"o": "scale1", "fc2": "scale2"}


class _Stop(Exception):
    """Ends a forward pass: all that was asked of it is known."""


def inputs_of(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``run`` calls ``module`` with; it goes no further.

    Raises:
        UnsupportedModelError: it does not call it.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    with module.register_forward_pre_hook(hook, with_kwargs=True), contextlib.suppress(_Stop):
        run()
    if not seen:
        raise UnsupportedModelError(f"{type(module).__name__} is never called: what it reads cannot be measured")
    return seen[0]


class Layer:
    """One layer: a shadow of the model's own (its tensors, no hooks), called as the model calls it.

    Weights that wait outside of the model are only there inside of :meth:`present`.

    Parts go by their names in ``LayerPaths`` (``fc1.0`` and ``fc1.1`` for gate and up), which are the same in the
    dense layer and in what is left of it.

    Args:
        call: what the model calls it with, behind the hidden states.
        waiting: its weights, where they are not in memory.
        sequences: that it gets for an image (windows).

    Attributes:
        paths: part -> path in the model; parts that the family has not got are absent.
    """

    def __init__(
        self,
        module: nn.Module,
        paths: LayerPaths,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        waiting: Waiting | None = None,
        sequences: int = 1,
    ) -> None:
        self.module = module
        self._waiting = waiting
        self._sequences = sequences
        self._names = paths
        named = {k: v for k, v in paths._asdict().items() if isinstance(v, str)}
        self.paths = {**named, **{f"fc1.{j}": path for j, path in enumerate(paths.fc1)}}
        self.fc1 = [name for name in self.paths if name.startswith("fc1.")]
        self._args, self._kwargs = call
        self._order: torch.Tensor | None = None
        self._order_of = self

    def present(self) -> contextlib.AbstractContextManager[None]:
        """All of its weights are in memory inside."""
        return contextlib.nullcontext() if self._waiting is None else self._waiting.present()

    def part(self, name: str) -> Any:
        """A module of the layer."""
        return self.module.get_submodule(self._local(name))

    def _parameter(self, name: str) -> Any:
        return self.module.get_parameter(self._local(name)) if name in self.paths else None

    def per_head(self) -> list[tuple[Any, int]]:
        """Parameters with a value for every head (position biases of windows), and the axis of the heads."""
        return [(self.module.get_parameter(self._below(path)), axis) for path, axis in self._names.per_head]

    def take_per_head(self, other: Layer) -> None:
        """Give a copy the parameters of every head that another layer has."""
        for (path, _), (tensor, _) in zip(self._names.per_head, other.per_head(), strict=True):
            module, leaf = owner(self.module, self._below(path))
            module._parameters[leaf] = nn.Parameter(tensor.detach(), requires_grad=False)

    def _local(self, name: str) -> str:
        return self._below(self.paths[name])

    def _below(self, path: str) -> str:
        return path[len(self.paths["layer"]) + 1 :]

    def copy(self) -> Layer:
        """Another shadow, whose tensors and sizes can be replaced."""
        call = self._args, self._kwargs
        other = Layer(whole_shadow(self.module), self._names, call, sequences=self._sequences)
        other._order_of = self
        return other

    # ------------------------------------------------------------------ weights
    def weights(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias (zeros where there is none) of a Linear, in double precision."""
        linear = self.part(part)
        weight = linear.weight.detach().to(precise_device(linear.weight.device), torch.float64)
        return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().to(weight)

    def scale(self, last: str) -> torch.Tensor | None:
        """LayerScale behind the last Linear of a branch, where the family has it, in double precision."""
        factors = self._parameter(SCALES[last])
        return None if factors is None else factors.detach().to(precise_device(factors.device), torch.float64)

    def branch(self, last: str, stats: Statistics) -> Branch:
        """The end of a branch that adds what it adds; ``stats``: of what its last Linear reads."""
        return Branch.itself(stats, *self.weights(last), self.scale(last))

    def replace(self, part: str, *tensors: torch.Tensor) -> None:
        """Give a Linear of a copy another weight and bias; it has a bias if it had one."""
        linear = self.part(part)
        for name, new in zip(("weight", "bias"), tensors, strict=True):
            old = linear._parameters[name]
            if old is not None:
                linear._parameters[name] = nn.Parameter(new.to(old), requires_grad=False)

    def call(self, hidden: torch.Tensor) -> Any:
        return self.module(hidden, *self._args, **self._kwargs)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream behind the layer."""
        out = self.call(hidden)
        return out[0] if isinstance(out, tuple) else out

    # ------------------------------------------------------------------ attention
    def attention_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What q, k and v read: (sequences, tokens, channels); sequences are images, or windows of them."""
        return inputs_of(self.part("q"), lambda: self.call(hidden))[0][0]

    def context(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output projection reads: (images, tokens, heads * channels), tokens ordered as in ``hidden``."""
        context = inputs_of(self.part("o"), lambda: self.call(hidden))[0][0]
        return context if context.shape[:2] == hidden.shape[:2] else self._reordered(context, hidden)

    def _reordered(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        same = self._order_of  # a copy whose sizes were changed cannot run to its end
        if same._order is None:
            same._order = same._token_order(hidden[: self._sequences])
        return context.reshape(len(hidden), -1, context.shape[-1])[:, same._order]

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``q`` and ``k`` give and ``o`` and ``fc2`` read in one run of the layer, and its ``out``."""
        seen: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for part in filter(self.has, ("q", "k", "o", "fc2")):

                def hook(_: nn.Module, args: Any, out: Any, part: str = part) -> None:
                    seen[part] = out if part in ("q", "k") else args[0]

                hooks.enter_context(self.part(part).register_forward_hook(hook))
            seen["out"] = self.run(hidden)
        if "o" in seen and seen["o"].shape[:2] != hidden.shape[:2]:
            seen["o"] = self._reordered(seen["o"], hidden)
        return seen

    def has(self, part: str) -> bool:
        try:
            self.part(part)
        except AttributeError:  # a removed branch, or another mixer
            return False
        return True

    def _token_order(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where each token's row is in the windows of an image: rows are numbered and followed through the layer."""

        def number(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(output.shape[:-1].numel(), dtype=torch.float32, device=output.device)
            return rows.view(*output.shape[:-1], 1).expand(output.shape)

        with self.part("o").register_forward_hook(number):
            return self.after_attention(torch.zeros_like(hidden))[0, :, 0].round().long()

    def past(self, last: str, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Residual stream behind a branch, from the stream before it and what the branch's last Linear reads."""
        return self._added(last, hidden, self.part(last)(inputs))

    def _added(self, last: str, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        factors = self._parameter(SCALES[last])
        return hidden + (out if factors is None else out * factors)

    def after_attention(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream between the two branches."""
        return inputs_of(self.part("norm2"), lambda: self.call(hidden))[0][0]

    # ------------------------------------------------------------------ MLP
    def mlp_inputs(self, residual: torch.Tensor) -> torch.Tensor:
        """What fc1 reads: (images, tokens, channels)."""
        return inputs_of(self.part("fc1.0"), lambda: self._mlp(residual))[0][0]

    def hidden_units(self, residual: torch.Tensor) -> torch.Tensor:
        """What fc2 reads: (images, tokens, hidden)."""
        return inputs_of(self.part("fc2"), lambda: self._mlp(residual))[0][0]

    def after_mlp(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual stream at the end of the layer."""
        return self._added("fc2", residual, self._mlp(residual))

    def _mlp(self, residual: torch.Tensor) -> torch.Tensor:
        out = self.part("mlp")(self.part("norm2")(residual))
        beside = not self.paths["fc2"].startswith(f"{self.paths['mlp']}.")  # the halves are modules side by side
        return self.part("fc2")(out) if beside else out
