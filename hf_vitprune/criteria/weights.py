"""Criteria of weights: their size, what the loss would change by without them, and the baseline of both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import MissingLabelsError, UnsupportedModelError
from ..modeling.peft_twin import is_peft, merged_twin
from ..spec.architecture import Architecture, unwrap
from ..spec.configs import task_of
from ..spec.units import check_units, unit_sets
from ..utils.batches import run_images
from ..utils.examples import processed
from ..utils.modes import evaluating, outside_inference_mode
from ..utils.offload import StateDict, check_weights
from ..utils.settings import check_count
from .scores import UnitScores, UnitSums, batches_of, model_to_score

#: (model, batch) -> scalar loss
Loss = Callable[[Any, Mapping[str, Any]], torch.Tensor]


def magnitude(model: Any, part: str | None = None) -> UnitScores:
    """L2 norm of the weights of every unit: rows that compute it and columns that read it (Li et al., 1608.08710).

    Matrices and convolutions inside the layers count, each once; biases, norms and what lies outside do not.

    Args:
        model: stock or pruned transformers model, or a PeftModel over one (its active adapters count).
        part: which tower of a bigger model (see :func:`hf_vitprune.towers`); its only one by default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        AdapterError: an adapter cannot be merged.
        ScoresError: a weight is not finite.
    """
    base, architecture, paths = model_to_score(model, part)
    check_weights(model, "scoring")
    weights, state = dict(base.named_parameters()), StateDict(base)
    squares = UnitSums(architecture, paths, weights)
    for name, weight in weights.items():
        if weight.ndim > 1 and name.endswith(".weight") and squares.layer_of(name) is not None:
            squares.add(name, state[name].detach().double().square())
    return UnitScores(architecture, {name: values.sqrt() for name, values in squares.sums.items()}, "magnitude")


def random(model: Any, seed: int = 0, units: Collection[str] | None = None, part: str | None = None) -> UnitScores:
    """Uniform draws from [0, 1), the same for the same seed and architecture: the baseline of every criterion.

    Args:
        model: a model, or its Architecture: weights are not looked at.
        seed: of the draw.
        units: draw for these units only (``heads``, ``qk``, ``v``, ``mlp``, ``embedding``, ``layers``); None: all.
        part: as of :func:`magnitude`.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        UnsupportedUnitError: the family has not got one of the units.
        InvalidConfigError: the seed is no whole number.
    """
    check_count("seed", seed, least=0)
    architecture = Architecture.given(model, part)
    if units is not None:
        check_units(architecture, units)
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for one in unit_sets(architecture).values():
        if units is None or one.unit in units:
            sizes = (architecture.depths or (one.size,)) if one.unit == "layers" else (one.size,)
            scores[one.name] = torch.cat([torch.rand(size, generator=generator) for size in sizes])
    return UnitScores(architecture, scores, "random", {"seed": seed})


@outside_inference_mode()
def taylor(model: Any, batches: Any, loss: Loss | None = None, part: str | None = None) -> UnitScores:
    """Sum of ``|weight * gradient|`` over all weights of a unit, averaged over the images.

    The first-order Taylor criterion of Molchanov et al. (arXiv 1906.10771), with the absolute value of every weight
    before the sum, as in the element-wise variant of LLM-Pruner (Ma et al., arXiv 2305.11627). Weights, biases and
    norms count; the gradient is that of a batch's mean loss, in evaluation mode. Weights need not require gradients;
    the model, its gradients and its mode are left as they were.

    Args:
        model: an image classifier, stock or pruned, or a PeftModel over one (active adapters merged).
        batches: labelled: an iterable of batches, a DataLoader, or anything that ``ImageBatches`` takes, 64 a batch.
            Their size matters: small ones see more of what differs between images.
        loss: (model, batch) -> scalar, for models without labels or with a loss of their own; ``model`` is the whole
            one. By default the loss that the classifier is trained with.
        part: as of :func:`magnitude`.

    Raises:
        UnsupportedModelError: no family is registered for the model, or it is no classifier and there is no ``loss``.
        MissingLabelsError: a batch has no labels and there is no ``loss``.
        InvalidDataError: there are no images, or they cannot be read.
        ScoresError: a gradient is not finite.
    """
    whole = merged_twin(model) if is_peft(model) else unwrap(model)
    base, architecture, paths = model_to_score(whole, part)
    check_weights(model, "scoring")
    if loss is None and not task_of(base).startswith("ForImageClassification"):
        raise UnsupportedModelError(
            f"{type(base).__name__} is no image classifier: pass loss=, a function of (model, batch)"
        )
    weights = {name: weight for name, weight in base.named_parameters() if weight.is_floating_point()}
    sums = UnitSums(architecture, paths, weights)
    device = next(base.parameters()).device
    images = count = 0
    with evaluating(whole), _trainable(base), torch.enable_grad():
        for batch in batches_of(processed(batches, whole)):
            on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            value = (loss or _classification_loss)(whole, on_device)
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            size = len(batch["pixel_values"])
            images, count = images + size, count + 1
            with torch.no_grad():
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is not None:
                        sums.add(name, (weight.float() * gradient.float()).abs() * size)
    scores = {name: values / images for name, values in sums.sums.items()}
    return UnitScores(architecture, scores, "taylor", {"images": images, "batches": count})


def _classification_loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    if "labels" not in batch:
        raise MissingLabelsError("Taylor scores need labels, and the batch has none: pass labelled images, or loss=")
    return model.loss_function(batch["labels"], run_images(model, batch).logits, model.config)


@contextlib.contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """All weights require gradients; afterwards those do that did."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
