"""A small pretrained ViT without a download: twelve layers, trained on dSprites images that VTAB-1k does not use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from .dsprites import SIDE, TITLE, SpriteReader, factors_of, unused_by_vtab
from .images import IMAGENET_MEAN, IMAGENET_STD, Examples, Images, Literature
from .settings import Machine, Recipe
from .training import Trained, accuracy, train

#: what the source task asks for: 3 shapes x 3 sizes x 4 x 4 places
CLASSES = 144
#: deviation of the first places and class token. With the 0.02 of large models beside patches that are all black or
#: all white, it takes most of a short training until patches at different places differ for the layers
PLACES = 0.5
SOURCE = f"{TITLE}: shape, size and rough place, outside the splits of VTAB-1k"


@dataclass(frozen=True)
class Backbone:
    """Sizes of the model that is pretrained.

    Attributes:
        width, heads, layers, patch: of the ViT; images are 64 x 64.
    """

    width: int = 96
    heads: int = 4
    layers: int = 12
    patch: int = 16

    def build(self) -> ViTForImageClassification:
        config = ViTConfig(  # type: ignore[call-arg]  # labels are keyword arguments of every config
            hidden_size=self.width,
            num_attention_heads=self.heads,
            num_hidden_layers=self.layers,
            intermediate_size=4 * self.width,
            image_size=SIDE,
            patch_size=self.patch,
            num_labels=CLASSES,
            initializer_range=self.width**-0.5,
        )
        model = ViTForImageClassification(config)
        with torch.no_grad():
            self._start(model.vit)
        return model

    def _start(self, encoder: Any) -> None:
        """First weights for a short training: places that count, and branches that add little to the stream at first.

        What 2 x layers branches add then has the deviation of what one would (Radford et al., 2019, section 2.3).
        """
        embeddings = encoder.embeddings
        for tensor in (embeddings.position_embeddings, embeddings.cls_token):
            tensor.normal_(std=PLACES)
        patches = embeddings.patch_embeddings.projection.weight
        patches.normal_(std=0.3 * patches[0].numel() ** -0.5)
        for layer in encoder.layers:
            for last in (layer.attention.o_proj, layer.mlp.fc2):
                last.weight.mul_((2 * self.layers) ** -0.5)


def source_images(count: int) -> Images:
    """So many images with the labels of the source task; none of them is in a split of VTAB-1k."""
    indices = unused_by_vtab(count)
    factors = factors_of(indices)
    labels = ((factors["shape"] * 3 + factors["scale"] // 2) * 4 + factors["x"] // 8) * 4 + factors["y"] // 8
    return Images(labels.astype(np.int64), SpriteReader(indices))


def pretrain(
    output: Path, *, images: int, recipe: Recipe, seed: int, machine: Machine, backbone: Backbone | None = None
) -> tuple[float, Trained]:
    """Train a ViT on the source task and save it as a stock model folder, image processor included.

    A tenth as many other images test the result. Returns (accuracy on these, how the training went).
    """
    torch.manual_seed(seed)
    model: Any = (backbone or Backbone()).build()
    everything = source_images(images + images // 10)
    positions = np.arange(len(everything))
    training = Examples(everything.select(positions[:images]), Literature(SIDE), keep=True)
    testing = Examples(everything.select(positions[images:]), Literature(SIDE))
    trained = train(model, training, recipe, seed=seed, machine=machine, what="pretraining")
    reached = accuracy(model, testing, batch_size=recipe.batch_size, machine=machine)
    if not PartialState().is_main_process:
        return reached, trained
    model.save_pretrained(output)
    size = {"height": SIDE, "width": SIDE}
    processor = ViTImageProcessorPil(size=size, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    processor.save_pretrained(output)
    return reached, trained
