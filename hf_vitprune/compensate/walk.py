"""A model run layer by layer on stored hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidDataError, UnsupportedModelError
from ..modeling.peft_twin import whole_shadow
from ..modeling.structure import finish_mixers, layer_paths
from ..spec.architecture import Architecture
from ..surgery.masked import MaskedState
from ..utils.batches import ImageBatches, run_images
from ..utils.modules import set_tensor
from ..utils.offload import StateDict, Waiting, device_of
from .layer import Layer, inputs_of

#: images that tell how the model calls its layers
FIRST = 2


class Walk:
    """The layers of a model, and what lies before and between them.

    Args:
        model: a plain transformers model; it is neither changed nor moved. Of weights that wait outside of it, those
            of the layers are fetched when a layer is run, and all others at once.
        batches: images: the first ones tell how the model calls its layers.
        state: the weights, where the model is one without a copy of its own.

    Raises:
        InvalidDataError: the model does not take these images, or they come with an attention mask.
        UnsupportedModelError: a layer is not two branches, each behind a norm of its own, on a residual stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        batches: ImageBatches,
        state: MaskedState | None = None,
    ) -> None:
        if architecture.family.post_norm:
            raise UnsupportedModelError(
                f"{architecture.model_type} models have norms behind the branches, which compensation and one-shot "
                "scores cannot follow: prune them without calibration images"
            )
        self.model: Any = whole_shadow(model).eval()
        finish_mixers(self.model, architecture.family)  # the shadow has lost the hook
        self.architecture = architecture
        self.device = device_of(model, "running layers one by one") if state is None else state.device
        self._paths = layer_paths(model, architecture)
        tensors = StateDict(model) if state is None else state
        layers = tuple(f"{paths.layer}." for paths in self._paths)
        for name in tensors.waiting():
            if not name.startswith(layers):
                set_tensor(self.model, name, tensors[name])
        modules = [self.model.get_submodule(paths.layer) for paths in self._paths]
        waiting = [Waiting(tensors, paths.layer, m) for paths, m in zip(self._paths, modules, strict=True)]
        root = architecture.family.encoder_path(model)
        names = architecture.layer_names()
        outputs = architecture.family.output_names(len(names), architecture.depths)
        bridges = [root + path for path, name in zip(outputs, names, strict=True) if path != name]
        self._bridges = bridges[: architecture.stages[-1]]  # none behind the last layer, into stages that are empty
        batch = next(iter(ImageBatches(batches, FIRST)))
        calls = self._record(batch)
        sequences = architecture.family.sequences(architecture.config)
        self.layers = [
            Layer(module, paths, calls[paths.layer], weights, sequences)
            for module, paths, weights in zip(modules, self._paths, waiting, strict=True)
        ]
        self._bridge_calls = [calls[path] for path in self._bridges]
        self._check(self.start(batch)[:sequences])

    @torch.no_grad()
    def _check(self, hidden: torch.Tensor) -> None:
        """Refuse layers that put their norms behind the branches, or run the branches side by side."""
        stages = self.architecture.stages
        for i, (layer, shape) in enumerate(zip(self.layers, self.architecture.layers, strict=True)):
            for below in range(stages[i - 1] if i else 0, stages[i]):
                hidden = self.bridge(below, hidden)
            steps = hidden
            with layer.present():
                out = layer.run(hidden)
                if shape.mixer == "attention" and layer.has("q"):  # a masked model may have another mixer there
                    steps = layer.past("o", hidden, layer.context(hidden))
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
        """What the model calls its layers and bridges with, behind the hidden states."""
        calls: dict[str, Any] = {}
        with contextlib.ExitStack() as hooks:
            for path in [*(paths.layer for paths in self._paths), *self._bridges]:

                def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                    calls[path] = args[1:], kwargs

                module = self.model.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            inputs_of(self.model.get_submodule(self._paths[-1].norm2), lambda: run_images(self.model, batch))
        if any(kwargs.get("attention_mask") is not None for _, kwargs in calls.values()):
            raise InvalidDataError(
                "layers are run one by one without an attention_mask: leave it out of the batches; models that add "
                "position biases to it for all layers are pruned without calibration images"
            )
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
