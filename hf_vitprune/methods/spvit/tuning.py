"""Fine-tuning of a searched architecture from fresh convolutions, unfolded: the start that SPViT's authors take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...errors import InvalidConfigError, InvalidPlanError
from ...modeling.structure import layer_paths
from ...plan.plan import PruningPlan
from ...spec.layer_shape import KERNELS
from ...utils.batches import ImageBatches
from ..base import PruningConfig
from ..contract import PruningMethod, Traits
from .branches import Attention, SharedBranches, refuse_zero
from .gates import LEVELS
from .hooks import attach_mixers
from .mixing import FixedMixer, with_convolutions

#: settings that every method has, and that say nothing here
_UNUSED = ("target", "gate_learning_rate", "latency_table", "latency_batch_size")


@dataclass
class SPViTTuningConfig(PruningConfig):
    """What mixes the tokens of every layer, decided; the convolutions train as heads and a table that mixes them.

    The table starts at ones and the BatchNorms are new, as in the fine-tuning of SPViT's authors. Exporting folds
    them. :func:`hf_vitprune.contrib.spvit_start.released_start` makes the model for it out of a search's plan.

    Attributes:
        mixers: of every layer: ``attention``, ``conv3x3``, ``conv1x1`` or ``none``.
    """

    takes_target: ClassVar[bool] = False
    unused: ClassVar = dict.fromkeys(_UNUSED, "the architecture is decided, nothing is searched")
    mixers: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixers = tuple(self.mixers)
        unknown = [mixer for mixer in self.mixers if mixer not in LEVELS]
        if unknown or not self.mixers:
            raise InvalidConfigError(f"mixers are {', '.join(LEVELS)}, one a layer; not {self.mixers!r}")

    @property
    def method_name(self) -> str:
        return "SPViT"


class SPViTTuning(PruningMethod):
    """The convolutions of a decided architecture, over a model whose attention they are made of."""

    config: SPViTTuningConfig
    traits = Traits(decides_by="config", adapters="none", may_keep_everything=True)
    decided = True

    def __init__(self, config: SPViTTuningConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        shapes = self.architecture.layers
        if len(config.mixers) != len(shapes):
            raise InvalidPlanError(f"{len(config.mixers)} mixers are given for a model of {len(shapes)} layers")
        # by this name, unlike gates, the tables have the optimizer's weight decay, as the authors' code gives them
        self.branches = nn.ModuleDict()
        self._paths = layer_paths(model, self.architecture)
        self._mixers: dict[int, FixedMixer] = {}
        like = next(model.parameters())
        special = self.architecture.family.extra_tokens_of(self.architecture.config)
        for i, (kind, shape) in enumerate(zip(config.mixers, shapes, strict=True)):
            if kind == shape.mixer:
                continue
            if shape.mixer != "attention":
                raise InvalidPlanError(f"layer {i} has {shape.mixer}, which {kind} cannot be made of")
            attention = Attention.of(model, self.architecture, i, self._paths[i])
            kinds = [kind] if kind in KERNELS else []
            branches = SharedBranches(self.architecture, i, like, kinds)
            if kinds:
                self.branches[f"layer{i}"] = branches
            self._mixers[i] = FixedMixer(kind, branches, attention, special)

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return attach_mixers(model, self.architecture, self._mixers, self._paths)

    def check_sharded(self, how: str) -> None:
        refuse_zero(how)

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Nothing is left to decide."""

    def choose(self, weights: PreTrainedModel | None = None) -> PruningPlan:
        """The architecture, its convolutions folded as they are now, or made of another model's weights."""
        plan = PruningPlan.dense(self.architecture)
        layers = list(plan.layers)
        for i, mixer in self._mixers.items():
            channels = self.architecture.layers[i].v_dim if mixer.kind in KERNELS else None
            layers[i] = layers[i].with_mixer(mixer.kind, channels)
        plan = replace(plan.with_layers(layers), info=self.config.to_dict())
        return with_convolutions(plan, self._mixers, self._paths, weights)

    def reference(self) -> str:
        return "the architecture was fine-tuned as it is exported"
