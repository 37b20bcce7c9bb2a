"""What a changed layer does to the output of the whole model: a few images, run on from that layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...compensate.walk import Walk
from ...modeling.peft_twin import whole_shadow
from ...utils.batches import run_images

#: new weight and bias of a Linear, by its part of the layer
Changes = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Probe:
    """Errors at the output for a batch of a few images, measured with the layers above as they are."""

    def __init__(self, walk: Walk, batch: Mapping[str, Any]) -> None:
        self.walk = walk
        self.batch = batch
        self.hidden = walk.start(batch)
        self.position = 0
        self._stages = walk.architecture.stages
        self._special = walk.architecture.family.extra_tokens_of(walk.architecture.config)
        self._readout = whole_shadow(walk.model).eval()
        self._final = self.hidden
        one = walk.architecture.family.sequences(walk.architecture.config)
        self._tuples = isinstance(walk.layers[0].call(self.hidden[:one]), tuple)
        names = [layer.paths["layer"] for layer in walk.layers]
        for name in names:  # behind the layers, the model goes on as always
            self._readout.get_submodule(name).forward = self._last if name == names[-1] else self._skip
        self._expected = self._read(self._on(self.hidden, 0))
        self._changed: list[torch.Tensor] = []

    def _skip(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, None) if self._tuples else hidden

    def _last(self, *args: Any, **kwargs: Any) -> Any:
        return (self._final, None) if self._tuples else self._final

    def _read(self, hidden: torch.Tensor) -> torch.Tensor:
        self._final = hidden
        outputs = read_outputs(run_images(self._readout, self.batch), self._special)
        return hidden.flatten(1).double() if outputs is None else outputs

    def _on(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """The stream before layer ``start``, run on behind the last one; of the layers one at a time is in memory."""
        for i in range(start, len(self._stages)):
            with self.walk.layers[i].present():
                hidden = self.walk.layers[i].run(self._bridged(hidden, i))
        return hidden

    def _bridged(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        for below in range(self._stages[layer - 1] if layer else 0, self._stages[layer]):
            hidden = self.walk.bridge(below, hidden)
        return hidden

    def advance(self, layer: int) -> None:
        """Take the stream past a layer: the next one is up for changes."""
        self.hidden = self.walk.layers[layer].run(self._bridged(self.hidden, layer))

    def change(self, layer: int, changes: Changes) -> None:
        """Other weights in the layer that is up."""
        other = self.walk.layers[layer].copy()
        for part, tensors in changes.items():
            other.replace(part, *tensors)
        self._changed.append(other.run(self._bridged(self.hidden, layer)))

    def errors(self, layer: int) -> list[float]:
        """Relative squared error of the output for each change of the layer since the last call."""
        if not self._changed:
            return []
        changed, self._changed = torch.cat(self._changed), []
        streams = self._on(changed, layer + 1).split(len(self.hidden))
        lost = [(self._read(hidden) - self._expected).square().sum() for hidden in streams]
        return [float(one / self._expected.square().sum()) for one in lost]


def read_outputs(output: Any, special: int = 0) -> torch.Tensor | None:
    """(images, values) what a model's output is judged by: logits around their mean, or features.

    Of features per token, directions count, as in a cosine, and the first ``special`` tokens as much as all patches
    together. None for backbones, whose features are recorded inside: they are judged by the last layer's.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return (logits - logits.mean(-1, keepdim=True)).double()
    for name in ("image_embeds", "last_hidden_state", "reconstruction"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return (_balanced(value.double(), special) if value.ndim == 3 else value.double()).flatten(1)
    return None


def _balanced(tokens: torch.Tensor, special: int) -> torch.Tensor:
    """(images, tokens, width) of unit length around their mean, weighted."""
    tokens = nn.functional.normalize(tokens - tokens.mean(-1, keepdim=True), dim=-1)
    count = tokens.shape[1]
    if not 0 < special < count:
        return tokens
    share = tokens.new_tensor([0.5 / special] * special + [0.5 / (count - special)] * (count - special))
    return tokens * (count * share).sqrt()[:, None]
