"""RepAdapter: a linear bottleneck in front of attention and of the MLP, free at inference (arXiv 2302.08106).

Nothing in it is non-linear, so ``merge_and_unload`` folds it into the Linears behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import AdapterError, InvalidConfigError
from ...spec.architecture import Architecture
from .branch import Branch, BranchConfig, BranchKind, BranchLayer, BranchTuner
from .kind import add_peft_method


@dataclass
class RepAdapterConfig(BranchConfig):
    """RepAdapters: ``branch(x + scale * up(down(x)))``.

    Attributes:
        groups: of the up-projection; each writes its share of the channels from its share of the bottleneck.

    Raises:
        InvalidConfigError: a setting has an impossible value.
    """

    groups: int = 2

    method_name = "REPADAPTER"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.groups) is not int or self.groups < 1 or self.r % self.groups:
            raise InvalidConfigError(f"groups divides r = {self.r}; got {self.groups!r}")


class GroupedLinear(nn.Module):
    """``groups`` Linears side by side; ``weight`` (outputs, inputs / groups), ``bias`` (outputs,) or None."""

    def __init__(self, inputs: int, outputs: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(outputs, inputs // groups))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def dense(self) -> torch.Tensor:
        """(outputs, inputs), zero outside the groups."""
        return torch.block_diag(*self.weight.chunk(self.groups))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.dense(), self.bias)


class RepAdapterLayer(BranchLayer):
    """A branch with adapters in front. A new adapter is the identity."""

    adapter_layer_names = ("repadapter_down", "repadapter_up")
    repadapter_down: Any
    repadapter_up: Any

    def __init__(self, base_layer: nn.Module, branch: Branch, architecture: Architecture) -> None:
        super().__init__(base_layer, branch, architecture)
        self._unmerged: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def make_adapter(self, name: str, config: Any) -> None:
        if self.width % config.groups:
            raise InvalidConfigError(f"groups = {config.groups} must divide the model's width {self.width}")
        # a shift of the input becomes a bias of the Linears behind, where they have one
        biased = all(self.reader(reader).bias is not None for reader in self.branch.readers)
        down = nn.Linear(self.width, config.r, bias=biased)
        nn.init.xavier_uniform_(down.weight)
        if biased:
            nn.init.zeros_(down.bias)
        self.repadapter_down[name] = down
        self.repadapter_up[name] = GroupedLinear(config.r, self.width, config.groups, biased)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the branch's; ``hidden_states`` (..., width)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.disable_adapters and not self.merged:
            for name in self.active():
                down, up = self.repadapter_down[name], self.repadapter_up[name]
                hidden = F.dropout(down(hidden_states.to(down.weight.dtype)), self.dropout[name], self.training)
                hidden_states = hidden_states + (self.scale[name] * up(hidden)).to(hidden_states.dtype)
        return self.base_layer(hidden_states, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the Linears that read the branch's input.

        Args:
            safe_merge: check that the new weights are finite.
            adapter_names: which; the active ones by default.

        Raises:
            AdapterError: the branch reads only some channels (it was pruned), or weights are not finite.
        """
        if self.merged:
            raise AdapterError(f"adapters {self.merged_adapters} are merged already; unmerge them first")
        names = [n for n in (self.active() if adapter_names is None else adapter_names) if n in self.r]
        if not names:
            return
        if getattr(self.base_layer, "input_index", None) is not None:
            raise AdapterError("the pruned branch reads only some channels, and the adapter in front of it reads all")
        if any(isinstance(self.base_layer.get_submodule(r), BaseTunerLayer) for r in self.branch.readers):
            raise AdapterError("there are other adapters behind this one, which would no longer see its output")
        folded = {}
        for reader in self.branch.readers:
            linear = self.reader(reader)
            weight, bias = self._folded(linear, names)
            if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise AdapterError(f"merging {names} gives weights of {reader} that are not finite")
            folded[reader] = weight, bias
        for reader, (weight, bias) in folded.items():
            linear = self.reader(reader)
            self._unmerged[reader] = linear.weight.data, None if linear.bias is None else linear.bias.data
            linear.weight.data = weight
            if bias is not None:
                linear.bias.data = bias
        self.merged_adapters = names

    @torch.no_grad()
    def _folded(self, linear: nn.Linear, names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (x + s U (D x + d) + s u) + b = (W + s W U D) x + (b + s W (U d + u)), the last adapter first."""
        weight = linear.weight.double()
        bias = None if linear.bias is None else linear.bias.double()
        for name in reversed(names):
            down, up, scale = self.repadapter_down[name], self.repadapter_up[name], self.scale[name]
            dense = up.dense().double()
            if bias is not None and up.bias is not None:
                bias = bias + scale * weight @ (dense @ down.bias.double() + up.bias.double())
            weight = weight + scale * (weight @ dense) @ down.weight.double()
        return weight.to(linear.weight.dtype), None if bias is None else bias.to(linear.weight.dtype)

    def unmerge(self) -> None:
        """Put the old weights back."""
        for reader, (weight, bias) in self._unmerged.items():
            linear = self.reader(reader)
            linear.weight.data = weight
            if bias is not None:
                linear.bias.data = bias
        self._unmerged, self.merged_adapters = {}, []


class RepAdapterModel(BranchTuner):
    """The tuner of REPADAPTER."""

    prefix = "repadapter_"
    tuner_layer_cls = layer_class = RepAdapterLayer


class RepAdapterKind(BranchKind):
    name = "REPADAPTER"
    changes_inputs = True


add_peft_method("REPADAPTER", RepAdapterConfig, RepAdapterModel, RepAdapterModel.prefix)
