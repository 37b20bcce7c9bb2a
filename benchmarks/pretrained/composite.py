"""Tower and decoder as one model: pruned in its tower, trained without labels against the dense model's own maps."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
)
from transformers.modeling_outputs import DepthEstimatorOutput

from hf_vitprune import Compensation, OneShotScores, prune
from hf_vitprune.methods import OneShotSettings

from ..common import quiet_arguments
from .drawings import Split
from .measures import overlap
from .tower import Decoder


class SaliencyConfig(PreTrainedConfig):
    """Of a tower, in ``backbone_config``, and the widths of the decoder behind it."""

    model_type = "benchmark_saliency"
    sub_configs = {"backbone_config": Dinov2Config}

    def __init__(self, backbone_config: Any = None, widths: tuple[int, ...] = (), **kwargs: Any) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = Dinov2Config(**backbone_config)
        self.backbone_config, self.widths = backbone_config or Dinov2Config(), list(widths)
        super().__init__(**kwargs)


class SaliencyModel(PreTrainedModel):
    """Images -> maps (images, height, width) in (0, 1)."""

    config_class = SaliencyConfig

    def __init__(self, config: SaliencyConfig) -> None:
        super().__init__(config)
        self.backbone = Dinov2Model(config.backbone_config)
        self.decoder = Decoder(config.widths)
        self.post_init()

    def train(self, mode: bool = True) -> SaliencyModel:
        """The decoder's norms keep their statistics."""
        super().train(mode)
        self.decoder.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> DepthEstimatorOutput:
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state
        maps = self.decoder(tokens[:, 1:], (pixel_values.shape[2], pixel_values.shape[3]))
        return DepthEstimatorOutput(predicted_depth=maps)


def composite(model: Dinov2Model, decoder: Decoder) -> SaliencyModel:
    """Both as one, with weights of their own."""
    steps = [module for module in decoder.children() if isinstance(module, nn.ConvTranspose2d)]
    widths = steps[0].in_channels, *(step.out_channels for step in steps)
    whole = SaliencyModel(SaliencyConfig(copy.deepcopy(model.config), widths))
    whole.backbone.load_state_dict(model.state_dict())
    whole.decoder.load_state_dict(decoder.state_dict())
    return whole.eval()


class Goal(NamedTuple):
    """Share of the MACs, and the training: steps, peak of the rate, images a step."""

    target: float
    steps: int
    rate: float = 1e-5
    batch: int = 24


def rows(dense: SaliencyModel, split: Split, goal: Goal) -> Iterator[dict[str, Any]]:
    """Overlap and correlation of maps on the asked images: untrained, and trained on the dense model's maps."""
    images, queries = split.calibration.pixels, split.queries.pixels
    size = queries.shape[-1]
    clock = time.process_time()
    scores = OneShotScores.measure(dense, images, OneShotSettings(images=None, statistics=False), part="backbone")
    plan = scores.plan(goal.target, image_size=size)
    small = prune(dense, plan, calibration=images, compensate=Compensation(images=None))
    for steps in (0, goal.steps):
        if steps:
            _train(small, dense, images, goal)
        iou, correlation = overlap(maps(dense, queries), maps(small, queries))
        seconds = time.process_time() - clock
        yield {"steps": steps, "iou": iou, "correlation": correlation, "cpu_seconds": seconds}


@torch.no_grad()
def maps(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(images, height * width)."""
    return torch.cat([model.eval()(pixel_values=some).predicted_depth.flatten(1) for some in pixels.split(32)])


def _train(small: Any, dense: Any, pixels: torch.Tensor, goal: Goal) -> None:
    class OnMaps(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                expected = dense(**inputs).predicted_depth
            found = model(**inputs).predicted_depth
            return (found - expected).square().mean() / expected.var().clamp(min=1e-12)

    with TemporaryDirectory() as folder:
        more = {"lr_scheduler_type": "cosine", "warmup_steps": max(1, goal.steps // 5), "weight_decay": 0.0}
        arguments = quiet_arguments(folder, goal.steps, goal.batch, learning_rate=goal.rate, **more)
        trainer = OnMaps(small, arguments, train_dataset=[{"pixel_values": one} for one in pixels])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
