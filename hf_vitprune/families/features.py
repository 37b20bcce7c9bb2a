"""Which hidden states a model reads by their numbers, and what lies between these and its outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig


class ReadsFeatures:
    """Of a family: backbones give the outputs of some layers, segmentation models read them."""

    def depths(self, config: PreTrainedConfig) -> tuple[int, ...] | None:
        raise NotImplementedError

    def read_states(self, config: PreTrainedConfig, task: str, layers: int) -> list[int]:
        """Hidden states (0: of the embedding) that a model reads by their numbers; none, where it reads the last.

        Args:
            config: of the model.
            task: class name without its family prefix.
            layers: how many it has.
        """
        if task != "Backbone" or self.depths(config) is not None:
            return []
        return [index % (layers + 1) for index in config.out_indices]

    def name_states(self, config: PreTrainedConfig, task: str, states: Sequence[int]) -> None:
        """Set these in a config whose depth is set, in place.

        Raises:
            ValueError: it cannot name one of them; says why.
        """
        names = ["stem" if state == 0 else f"stage{state}" for state in states]
        config.set_output_features_output_indices(out_features=names, out_indices=None)

    def fewest_layers(self, config: PreTrainedConfig, task: str, layers: int) -> int:
        """How many of the bottom layers a model needs for what it reads of them."""
        return max(1, *self.read_states(config, task, layers), 0)

    def has_neck(self, config: PreTrainedConfig, task: str) -> bool:
        """Whether features of several layers run through modules of the dense width, which no stock config holds."""
        return False

    def neck(self, model: nn.Module) -> list[str]:
        """Paths of the modules that the features of several layers (B, channels, height, width) enter by."""
        return []
