"""What a pruned tower still sees: its features against the dense one's, neighbours, a linear probe, saliency."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..common import interleaved, ratio
from .drawings import Split
from .tower import Decoder

#: share of the way from a map's smallest to its largest value above which a pixel is salient: the package's own
THRESHOLD = 0.8


@torch.no_grad()
def features(model: Any, pixels: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """(images, tokens, width) behind the final norm."""
    return torch.cat([model(pixel_values=batch).last_hidden_state for batch in pixels.split(batch_size)])


def cosines(dense: torch.Tensor, small: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of the CLS features, and of the patch features."""
    found = nn.functional.cosine_similarity(dense, small, dim=-1)
    return float(found[:, 0].mean()), float(found[:, 1:].mean())


def neighbours(gallery: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor) -> float:
    """Accuracy in percent of the vote of the five gallery images whose CLS features are nearest (cosine)."""
    gallery, queries = (nn.functional.normalize(one[:, 0], dim=-1) for one in (gallery, queries))
    nearest = labels[(queries @ gallery.T).topk(min(5, len(gallery))).indices]
    votes = nn.functional.one_hot(nearest, int(labels.max()) + 1).sum(1)
    return 100 * float((votes.argmax(1) == truth).double().mean())


def probe(
    gallery: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor, ridge: float = 0.3
) -> float:
    """Accuracy in percent of ridge regression to the classes on standardised CLS features."""
    gallery, queries = gallery[:, 0].double(), queries[:, 0].double()
    mean, spread = gallery.mean(0), gallery.std(0).clamp(min=1e-6)
    gallery, queries = (gallery - mean) / spread, (queries - mean) / spread
    targets = nn.functional.one_hot(labels, int(labels.max()) + 1).double()
    targets -= targets.mean(0)
    damped = gallery.T @ gallery + ridge * len(gallery) * torch.eye(gallery.shape[1]).to(gallery)
    found = (queries @ torch.linalg.solve(damped, gallery.T @ targets)).argmax(1)
    return 100 * float((found == truth).double().mean())


@torch.no_grad()
def saliency(decoder: Decoder, dense: torch.Tensor, small: torch.Tensor, size: tuple[int, int]) -> tuple[float, float]:
    """:func:`overlap` of the maps that the decoder makes of tokens."""
    return overlap(*(decoder(tokens[:, 1:], size).flatten(1) for tokens in (dense, small)))


def overlap(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Of maps (images, pixels): intersection over union of the salient pixels, and correlation; means over images."""
    one, other = one.double(), other.double()
    here, there = (
        values >= torch.lerp(values.amin(1, True), values.amax(1, True), THRESHOLD) for values in (one, other)
    )
    shared = (here & there).sum(1) / (here | there).sum(1)
    one, other = (values - values.mean(1, keepdim=True) for values in (one, other))
    correlation = nn.functional.cosine_similarity(one, other, dim=1)
    return float(shared.double().mean()), float(correlation.mean())


@torch.no_grad()
def latency(dense: Any, small: Any, pixels: torch.Tensor, rounds: int = 9) -> float:
    """Time of a batch in the small tower, relative to the dense one's: median over rounds in which they take turns."""
    calls = {name: partial(model, pixel_values=pixels) for name, model in (("dense", dense), ("small", small))}
    samples = interleaved(calls, rounds)
    return ratio(samples["small"], samples["dense"])


def judged(small: Any, decoder: Decoder, split: Split, dense: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """All measures of a tower.

    Args:
        dense: features of gallery and queries by the dense one.
    """
    gallery, queries = features(small, split.gallery.pixels), features(small, split.queries.pixels)
    labels = split.gallery.labels, split.queries.labels
    cls, patches = cosines(dense[1], queries)
    size = split.queries.pixels.shape[2:]
    overlap, correlation = saliency(decoder, dense[1], queries, (int(size[0]), int(size[1])))
    return {
        "cls": cls,
        "patches": patches,
        "knn": neighbours(gallery, labels[0], queries, labels[1]),
        "probe": probe(gallery, labels[0], queries, labels[1]),
        "iou": overlap,
        "correlation": correlation,
    }
