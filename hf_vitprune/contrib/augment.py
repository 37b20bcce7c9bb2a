"""The images that DeiT trains on (Touvron et al., arXiv 2012.12877, table 9), made by kornia on the batch's device.

And a learning rate for each layer (Bao et al., BEiT, arXiv 2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Sampler

from ..errors import InvalidConfigError
from ..spec.towers import unwrap
from ..training.trainer import PruningTrainer
from ..utils.extras import need
from ..utils.settings import check_counts
from .own_layers import own_layers


@dataclass(frozen=True)
class AugmentationConfig:
    """DeiT's settings.

    Attributes:
        rand_augment: (operations an image, magnitude of 0 to 30); (0, 0): none. kornia's operations, of one magnitude;
            DeiT's are timm's, whose magnitudes have a deviation of 0.5.
        erasing: chance of an image to lose a rectangle, which turns grey; DeiT fills it with noise.
        mixup, cutmix: alpha of their Beta distributions; 0: none.
        switch: chance of CutMix where both are on.
        smoothing: share of a label that goes to all classes alike, in [0, 1).
        repeats: views of an image in a batch; an epoch has as many images as without, so fewer different ones.
    """

    rand_augment: tuple[int, int] = (2, 9)
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1
    repeats: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "rand_augment", tuple(self.rand_augment))
        for name in ("erasing", "switch", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidConfigError(f"{name} is a share between 0 and 1, not {getattr(self, name)!r}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfigError(f"{name} is the alpha of a Beta distribution, not {getattr(self, name)!r}")
        check_counts(self, "repeats")
        operations, magnitude = self.rand_augment
        if type(operations) is not int or operations < 0 or not 0 <= magnitude <= 30:
            raise InvalidConfigError(f"rand_augment is (operations, magnitude up to 30), not {self.rand_augment!r}")


class RandomCrop:
    """PIL image -> (side, side, 3) array: a random part of 8 to 100 % of its area, maybe mirrored."""

    def __init__(self, side: int) -> None:
        kornia = _kornia()
        self.crop = kornia.RandomResizedCrop((side, side), resample="BICUBIC", keepdim=True)
        self.flip = kornia.RandomHorizontalFlip(keepdim=True)

    def __call__(self, image: Any) -> np.ndarray:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
        cropped = self.flip(self.crop(pixels)).clamp(0, 255).round()
        return cropped.permute(1, 2, 0).to(torch.uint8).numpy()


class Augmentation:
    """Batches of normalised images and classes -> augmented images and soft labels.

    Args:
        config: what is done.
        mean, std: of the normalisation, a number a channel.
        num_labels: classes.

    Raises:
        MissingExtraError: kornia is not here.
    """

    def __init__(self, config: AugmentationConfig, mean: Any, std: Any, num_labels: int) -> None:
        self.config, self.num_labels = config, num_labels
        self.kornia = _kornia()
        self.mean, self.std = (torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        operations, magnitude = config.rand_augment
        self.varied = self.kornia.auto.RandAugment(operations, magnitude) if operations else None
        self.erased = self.kornia.RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 3.3), p=config.erasing)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``pixel_values`` (B, 3, H, W), ``labels`` (B,) -> the same, with labels (B, classes) that sum to one."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        mean, std = (values.to(pixels.device, pixels.dtype) for values in (self.mean, self.std))
        with torch.no_grad():
            if self.varied is not None:
                pixels = (self.varied((pixels * std + mean).clamp(0, 1)) - mean) / std
            pixels = self.erased(pixels)
            smoothing = self.config.smoothing
            targets = F.one_hot(labels, self.num_labels).float() * (1 - smoothing) + smoothing / self.num_labels
            pixels, targets = self._mixed(pixels, targets)
        return {**batch, "pixel_values": pixels, "labels": targets}

    def _mixed(self, pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixup or CutMix of the whole batch with one drawn order of it."""
        config = self.config
        if not config.mixup and not config.cutmix:
            return pixels, targets
        chance = config.switch if config.mixup and config.cutmix else float(config.cutmix > 0)
        numbers = torch.arange(len(pixels), device=pixels.device)
        keys = {"data_keys": ["input", "class"]}
        if float(torch.rand(())) < chance:
            mix = self.kornia.RandomCutMixV2(beta=config.cutmix, same_on_batch=True, use_correct_lambda=True, **keys)
            pixels, (pairs,) = mix(pixels, numbers)
            share = pairs[:, 2:].to(targets)
        else:
            alpha = torch.tensor(config.mixup)
            drawn = float(torch.distributions.Beta(alpha, alpha).sample())
            pixels, pairs = self.kornia.RandomMixUpV2(lambda_val=(drawn, drawn), **keys)(pixels, numbers)
            share = 1 - pairs[:, 2:].to(targets)  # here kornia says how much is of the other image
        first, second = targets[pairs[:, 0].long()], targets[pairs[:, 1].long()]
        return pixels, share * first + (1 - share) * second


class RepeatedSampler(Sampler[int]):
    """Images in random order, each so many times in a row; as many in all as there are images (DeiT's RASampler)."""

    def __init__(self, length: int, repeats: int, seed: int) -> None:
        self.length, self.repeats, self.seed, self.epoch = length, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The order follows from the seed and the epoch, in a resumed run too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)
        return iter(order[: self.length].tolist())


class AugmentedTrainer(PruningTrainer):
    """A ``PruningTrainer`` whose training batches are augmented where they are used.

    Args:
        augmentation: what is done to them; None: nothing.
        layer_decay: every layer learns at this share of the rate of the one behind it; 1: all alike.

    Raises:
        InvalidConfigError: ``layer_decay`` is no such share; or as ``PruningTrainer``.
        UnsupportedModelError: ``layer_decay`` for a bigger model with towers in it.
    """

    def __init__(
        self, *args: Any, augmentation: Augmentation | None = None, layer_decay: float = 1.0, **kwargs: Any
    ) -> None:
        check_layer_decay(layer_decay)
        super().__init__(*args, **kwargs)
        if layer_decay != 1:
            own_layers(self.model)  # raises
        self.augmentation, self.layer_decay = augmentation, layer_decay

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent's, with a rate for each layer."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not made:
            decay_by_layer(optimizer, self.model, self.layer_decay)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, which counts labels: it sees the mixed ones."""
        if self.augmentation is not None:
            epoch_iterator = self._augmented(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def _augmented(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Draws follow from the seed, the process, the step and the micro-batch: a resumed run has the same."""
        assert self.augmentation is not None
        place = (self.args.seed * 1009 + self.state.global_step) * 1009 + self.args.process_index
        for number, batch in enumerate(batches):
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would set the accelerator's generator too; kornia draws on the CPU
                torch.default_generator.manual_seed((place * 1009 + number) % 2**63)
                augmented = self.augmentation(batch)
            yield augmented

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.augmentation is None or self.augmentation.config.repeats == 1:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedSampler(len(dataset), self.augmentation.config.repeats, seed)


def check_layer_decay(decay: float) -> None:
    """Raises:
    InvalidConfigError: it is no factor in (0, 1].
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise InvalidConfigError(f"layer_decay is a factor in (0, 1] from a layer to the one before it, not {decay!r}")


def depths(model: Any) -> dict[int, int]:
    """Id of every parameter of the model -> its depth: of layer i of L, from 1, it is i.

    What is registered in front of the layers (embeddings) has 0, what lies between two (Swin's patch merging) that of
    the first of them, what comes behind (norm, head) L + 1. Gates of a PruningModel are not among them.
    """
    base = unwrap(model)
    layers = [paths.layer + "." for paths, _ in own_layers(base)]
    depth, found = 0, {}
    for name, parameter in base.named_parameters():
        inside = next((i for i, path in enumerate(layers, start=1) if name.startswith(path)), None)
        found[id(parameter)] = depth = inside or depth + (depth == len(layers))
    return found


def decay_by_layer(optimizer: torch.optim.Optimizer, model: Any, decay: float) -> None:
    """Split the optimizer's groups: at depth i of L the rate is ``decay ** (L + 1 - i)`` of the group's.

    Args:
        optimizer: new, without a scheduler yet.
        model: what it trains; parameters that are not the model's own (gates) keep their rate.
        decay: in (0, 1]; 1 changes nothing.
    """
    check_layer_decay(decay)
    if decay == 1:
        return
    known = depths(model)
    head = max(known.values())
    groups = []
    for group in optimizer.param_groups:
        by_depth: dict[int, list[Any]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(known.get(id(parameter), head), []).append(parameter)
        groups += [
            {**group, "params": parameters, "lr": group["lr"] * decay ** (head - depth)}
            for depth, parameters in sorted(by_depth.items())
        ]
    optimizer.param_groups[:] = groups


def check_available() -> None:
    """Raises:
    MissingExtraError: kornia is not installed.
    """
    need("augmentations", "kornia")


def _kornia() -> Any:
    check_available()
    import kornia.augmentation.auto

    return kornia.augmentation
