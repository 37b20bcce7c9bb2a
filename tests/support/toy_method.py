"""A method of somebody else's: keeps the neurons with the largest biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_vitprune import PruningPlan
from hf_vitprune.methods import PruningConfig, PruningMethod
from hf_vitprune.modeling.structure import layer_paths


@dataclass
class ToyConfig(PruningConfig):
    """Settings of the toy."""

    round_to: int = 8


class Toy(PruningMethod):
    """Scores neurons by their biases."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        self._decided: PruningPlan | None = None
        self._model = [model]

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return []

    @property
    def decided(self) -> bool:
        return self._decided is not None

    def decide(self, model: Any, images: Any = None) -> None:
        self._decided = self.choose()

    def choose(self) -> PruningPlan:
        model = self._model[0]
        biases = {
            f"layer {i} mlp": model.get_submodule(paths.fc1[0]).bias.detach().abs()
            for i, paths in enumerate(layer_paths(model, self.architecture))
        }
        units = {"units": ["mlp"], "round_to": self.config.round_to}
        plan = PruningPlan.from_scores(
            self.architecture, biases, self.config.target, self.config.target_metric, **units
        )
        return replace(plan, info=self.config.to_dict())
