"""A model run layer by layer on stored hidden states: what goes into, through and out of every branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidDataError, UnsupportedModelError
from ..families import LayerPaths
from ..modeling.peft_twin import whole_shadow
from ..modeling.structure import finish_mixers, layer_paths
from ..spec.architecture import Architecture
from ..utils.batches import run_images


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

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Stop:
        pass
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedModelError(f"{type(module).__name__} is never called: what it reads cannot be measured")
    return seen[0]


class Layer:
    """One layer: a shadow of the model's own (its tensors, no hooks), called as the model calls it.

    Parts go by their names in ``LayerPaths`` (``fc1.0`` and ``fc1.1`` for gate and up), which are the same in the
    dense layer and in what is left of it.

    Attributes:
        paths: part -> path in the model; parts that the family has not got are absent.
    """

    def __init__(self, module: nn.Module, paths: LayerPaths, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.module = module
        self._names = paths
        named = {k: v for k, v in paths._asdict().items() if isinstance(v, str)}
        self.paths = {**named, **{f"fc1.{j}": path for j, path in enumerate(paths.fc1)}}
        self.fc1 = [f"fc1.{j}" for j in range(len(paths.fc1))]
        self._args, self._kwargs = call
        self._order: torch.Tensor | None = None
        self._order_of = self

    def part(self, name: str) -> Any:
        """A module of the layer."""
        return self.module.get_submodule(self._local(name))

    def table(self) -> Any:
        """Position biases (positions, heads) of the attention's windows; None in families without."""
        return self.module.get_parameter(self._local("bias_table")) if "bias_table" in self.paths else None

    def replace_table(self, table: torch.Tensor) -> None:
        """Give a copy the position biases of another layer."""
        parent, _, leaf = self._local("bias_table").rpartition(".")
        self.module.get_submodule(parent)._parameters[leaf] = nn.Parameter(table.detach(), requires_grad=False)

    def _local(self, name: str) -> str:
        return self.paths[name][len(self.paths["layer"]) + 1 :]

    def copy(self) -> Layer:
        """Another shadow, whose tensors and sizes can be replaced."""
        other = Layer(whole_shadow(self.module), self._names, (self._args, self._kwargs))
        other._order_of = self
        return other

    def _run(self, hidden: torch.Tensor) -> Any:
        return self.module(hidden, *self._args, **self._kwargs)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream behind the layer."""
        out = self._run(hidden)
        return out[0] if isinstance(out, tuple) else out

    # ------------------------------------------------------------------ attention
    def attention_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What q, k and v read: (sequences, tokens, channels); sequences are images, or windows of them."""
        return inputs_of(self.part("q"), lambda: self._run(hidden))[0][0]

    def context(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output projection reads: (images, tokens, heads * channels), tokens ordered as in ``hidden``."""
        context = inputs_of(self.part("o"), lambda: self._run(hidden))[0][0]
        return context if context.shape[:2] == hidden.shape[:2] else self._reordered(context, hidden)

    def _reordered(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        same = self._order_of  # a copy whose sizes were changed cannot run to its end
        if same._order is None:
            same._order = same._token_order(hidden[:1])
        return context.reshape(len(hidden), -1, context.shape[-1])[:, same._order]

    def trace(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``q``, ``o`` and ``fc2`` read in one run of the layer, as the methods here give it, and its ``out``."""
        seen: dict[str, torch.Tensor] = {}
        parts = [part for part in ("q", "o", "fc2") if self._has(part)]
        handles = [
            self.part(part).register_forward_pre_hook(lambda _, args, part=part: seen.update({part: args[0]}))
            for part in parts
        ]
        try:
            out = self._run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        seen["out"] = out[0] if isinstance(out, tuple) else out
        if "o" in seen and seen["o"].shape[:2] != hidden.shape[:2]:
            seen["o"] = self._reordered(seen["o"], hidden)
        return seen

    def _has(self, part: str) -> bool:
        try:
            self.part(part)
        except AttributeError:  # a removed branch, or another mixer
            return False
        return True

    def _token_order(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where each token's row is in the windows of an image: rows are numbered and followed through the layer."""
        module = self.part("o")
        rows: list[torch.Tensor] = []

        def number(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            rows.append(torch.arange(output.shape[:-1].numel(), dtype=torch.float32, device=output.device))
            return rows[0].view(*output.shape[:-1], 1).expand(output.shape)

        handle = module.register_forward_hook(number)
        try:
            numbered = self.after_attention(torch.zeros_like(hidden))
        finally:
            handle.remove()
        return numbered[0, :, 0].round().long()

    def past(self, part: str, scale: str, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Residual stream behind a branch, from the stream before it and what the branch's last Linear reads."""
        out = self.part(part)(inputs)
        return hidden + (self.part(scale)(out) if scale in self.paths else out)

    def after_attention(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream between the two branches."""
        return inputs_of(self.part("norm2"), lambda: self._run(hidden))[0][0]

    # ------------------------------------------------------------------ MLP
    def mlp_inputs(self, residual: torch.Tensor) -> torch.Tensor:
        """What fc1 reads: (images, tokens, channels)."""
        return inputs_of(self.part("fc1.0"), lambda: self._mlp(residual))[0][0]

    def hidden_units(self, residual: torch.Tensor) -> torch.Tensor:
        """What fc2 reads: (images, tokens, hidden)."""
        return inputs_of(self.part("fc2"), lambda: self._mlp(residual))[0][0]

    def after_mlp(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual stream at the end of the layer."""
        out = self._mlp(residual)
        if "scale2" in self.paths:
            out = self.part("scale2")(out)
        return residual + out

    def _mlp(self, residual: torch.Tensor) -> torch.Tensor:
        return self.part("mlp")(self.part("norm2")(residual))


class Walk:
    """The layers of a model, and what lies before and between them.

    Args:
        model: a plain transformers model; it is neither changed nor moved.
        architecture: of it.
        batch: a first batch of ``ImageBatches``: tells how the model calls its layers.

    Raises:
        InvalidDataError: the model does not take these images, or they come with an attention mask.
        UnsupportedModelError: a layer is not two branches, each behind a norm of its own, on a residual stream.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, batch: Mapping[str, Any]) -> None:
        self.model: Any = whole_shadow(model).eval()
        finish_mixers(self.model, architecture.family)  # the shadow has lost the hook
        self.architecture = architecture
        self.first = next(model.parameters())
        self._paths = layer_paths(model, architecture)
        root = architecture.family.encoder_path(model)
        names = architecture.layer_names()
        outputs = architecture.family.output_names(len(names), architecture.depths)
        bridges = [root + path for path, name in zip(outputs, names, strict=True) if path != name]
        self._bridges = bridges[: architecture.stages[-1]]  # none behind the last layer, into stages that are empty
        calls = self._record(batch)
        self.layers = [
            Layer(self.model.get_submodule(paths.layer), paths, calls[paths.layer]) for paths in self._paths
        ]
        self._bridge_calls = [calls[path] for path in self._bridges]
        self._check(self.start(batch)[:1])

    @torch.no_grad()
    def _check(self, hidden: torch.Tensor) -> None:
        """Refuse layers that put their norms behind the branches, or run the branches side by side."""
        stages = self.architecture.stages
        for i, (layer, shape) in enumerate(zip(self.layers, self.architecture.layers, strict=True)):
            for below in range(stages[i - 1] if i else 0, stages[i]):
                hidden = self.bridge(below, hidden)
            out = layer.run(hidden)
            steps = hidden
            if shape.mixer == "attention":
                steps = layer.past("o", "scale1", hidden, layer.context(hidden))
            elif shape.mixer != "none":
                steps = layer.after_attention(hidden)
            steps = layer.after_mlp(steps) if shape.mlp else steps
            share, rounding = (0.05, 0.01) if out.element_size() < 4 else (1e-3, 1e-5)
            if float((steps - out).norm()) > share * float((out - hidden).norm()) + rounding * float(out.norm()):
                raise UnsupportedModelError(
                    f"{layer.paths['layer']} of this {self.architecture.model_type} model is not what compensation "
                    "and one-shot scores can follow: a norm, attention, and their sum with what came in, then the "
                    "same with the MLP. Prune it without calibration images"
                )
            hidden = out

    def _record(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        calls: dict[str, Any] = {}
        handles = []

        def listen(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls[path] = args[1:], kwargs

            return hook

        for path in [paths.layer for paths in self._paths] + self._bridges:
            module = self.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(listen(path), with_kwargs=True))
        try:
            inputs_of(self.model.get_submodule(self._paths[-1].norm2), lambda: run_images(self.model, batch))
        finally:
            for handle in handles:
                handle.remove()
        if any(kwargs.get("attention_mask") is not None for _, kwargs in calls.values()):
            raise InvalidDataError("layers are run one by one without an attention_mask: leave it out of the batches")
        return calls

    def start(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Residual stream before the first layer."""
        first = self.model.get_submodule(self._paths[0].layer)
        return inputs_of(first, lambda: run_images(self.model, batch))[0][0]

    def bridge(self, stage: int, hidden: torch.Tensor) -> torch.Tensor:
        """From the last layer of a stage to the first one of the next."""
        args, kwargs = self._bridge_calls[stage]
        return self.model.get_submodule(self._bridges[stage])(hidden, *args, **kwargs)

    def behind(self, norm: str | None, hidden: torch.Tensor) -> torch.Tensor:
        """Final tokens: the residual stream through a norm of the encoder, or as it is."""
        if norm is None:
            return hidden
        root = self.architecture.family.encoder_path(self.model)
        return self.model.get_submodule(root + norm)(hidden)
