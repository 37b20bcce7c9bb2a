"""Learning from features: the student's hidden states are brought to the dense model's. No labels, no logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidConfigError, InvalidDataError, VitPruneError
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture, unwrap
from ..spec.configs import task_of
from ..spec.towers import Tower, pruned_tower, tower_module
from .distillation import DistillationConfig, Teacher, at_least_float32

#: share of the loss that CLS (and a distillation token) have, beside the patches
SPECIAL_SHARE = 0.5
_EPS = 1e-6


def feature_loss(student: Tensor, teacher: Tensor, loss: str, weights: Tensor | None = None) -> Tensor:
    """How far the tokens of each image are from the teacher's.

    "cosine": one minus the cosine, token by token. "normalised": the mean squared difference of tokens that are
    brought to mean 0 and variance 1 over their channels, each by itself. "standardised": the same of channels that are
    brought to mean 0 and variance 1 over the teacher's tokens in this batch; every channel counts the same.

    Args:
        student: (images, tokens, channels).
        teacher: the same shape; never differentiated.
        loss: one of the three.
        weights: (tokens,) that sum to one; None: all tokens alike.

    Returns:
        (images,) losses, in float32 at least.

    Raises:
        InvalidDataError: the shapes differ.
    """
    if student.ndim != 3 or student.shape != teacher.shape:
        raise InvalidDataError(
            "features of student and teacher are (images, tokens, channels) of one shape, not "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: both models must cut images of this size into the "
            "same tokens"
        )
    s, t = at_least_float32(student), at_least_float32(teacher.detach())
    if loss == "cosine":
        errors = 1 - F.cosine_similarity(s, t, dim=-1)
    elif loss == "normalised":
        width = s.shape[-1:]
        errors = (F.layer_norm(s, width, eps=_EPS) - F.layer_norm(t, width, eps=_EPS)).square().mean(-1)
    else:
        variance = t.var((0, 1), correction=0)
        errors = ((s - t).square() / (variance + _EPS)).mean(-1)
    if weights is None:
        return errors.mean(-1)
    return errors @ weights.to(errors)


def token_weights(architecture: Architecture, tokens: int, device: torch.device) -> Tensor | None:
    """(tokens,) weights that sum to one: CLS (and a distillation token) half, patches half, registers nothing.

    None, all alike, for towers without special tokens.
    """
    family, config = architecture.family, architecture.config
    special = family.extra_tokens_of(config)
    registers = getattr(family.sizes_config(config), "num_register_tokens", 0) or 0
    read = special - registers
    if read < 1 or tokens <= special:
        return None
    weights = torch.zeros(tokens, dtype=torch.float32, device=device)
    weights[:read] = SPECIAL_SHARE / read
    weights[special:] = (1 - SPECIAL_SHARE) / (tokens - special)
    return weights


class FeatureReader:
    """Reads hidden states of a tower (``part``; its only one by default) while its model runs.

    Args:
        layers: whose outputs, counted from 1; None: what leaves the tower.

    Attributes:
        points: layer -> path of the module whose output it is; layer 0 is what leaves the tower.
    """

    def __init__(self, model: Any, layers: tuple[int, ...] | None = None, part: str | None = None) -> None:
        self.tower: Any = tower_module(model, part)
        self.architecture = Architecture.from_config(self.tower.config, task=task_of(self.tower))
        family = self.architecture.family
        root = family.encoder_path(self.tower)
        names = [root + n for n in family.output_names(len(self.architecture.layers), self.architecture.depths)]
        self.points = {0: names[-1]} if layers is None else {layer: names[layer - 1] for layer in layers}
        norm = family.head_norm(self.architecture.task)
        path = None if norm is None else root + norm
        self._norm = path if path in dict(self.tower.named_modules()) else None

    @contextlib.contextmanager
    def reading(self, pool: Callable[[Tensor], Tensor] | None = None) -> Iterator[dict[int, Tensor]]:
        """Fills the mapping layer -> (images, tokens, channels) while the model runs; its hooks go afterwards.

        Args:
            pool: applied to what is read, at once: hidden states of all layers take much memory.
        """
        states: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if layer == 0 and self._norm is not None:
                    hidden = self.tower.get_submodule(self._norm)(hidden)
                states[layer] = hidden if pool is None else pool(hidden)

            return hook

        handles = [
            self.tower.get_submodule(path).register_forward_hook(keep(layer)) for layer, path in self.points.items()
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


class FeatureTeacher(Teacher):
    """A dense model whose hidden states a student learns: a small model, or a PruningModel.

    It is of the student's kind: the same tokens, and the same residual width unless ``config.plan`` says which
    channels the student has kept.

    Raises:
        InvalidConfigError: widths differ and nothing says which channels stay, a layer that student or teacher lack,
            shared tensors, or a student that is the teacher over again.
    """

    def __init__(self, model: nn.Module, student: nn.Module, config: DistillationConfig) -> None:
        super().__init__(model, student)
        self.config = config
        part = _part_of(student, config)
        whole = FeatureReader(model, part=part).architecture
        small = FeatureReader(student, part=part).architecture
        self.pairs = _paired_layers(whole, small, config)
        self.reader, self.student_reader = (
            FeatureReader(one, None if 0 in layers else layers, part)
            for one, layers in ((model, tuple(self.pairs)), (student, tuple(self.pairs.values())))
        )
        self.kept = _kept_channels(whole, small, config.plan)
        if whole == small and not hasattr(student, "pruning_config") and _equal(self.reader, self.student_reader):
            raise InvalidConfigError(
                "the student is not pruned: it has the teacher's sizes and weights, and there is nothing to learn. "
                "Train prune(model, plan), or get_pruning_model(model, ...)"
            )

    def features(
        self, pixel_values: Tensor, *, autocast: AbstractContextManager[Any] | None = None, **kwargs: Any
    ) -> dict[int, Tensor]:
        """Layer of the teacher -> (images, tokens, kept channels); refused where it masks patches at random."""
        if hasattr(self.reader.tower.config, "mask_ratio") and "noise" not in kwargs:
            raise InvalidDataError(
                f"{type(self.reader.tower).__name__} draws at random which patches it sees, and student and teacher "
                "would see different ones: put noise (images, patches) into the batches, which both then go by"
            )
        with self.reader.reading() as states:
            self.run(pixel_values, autocast=autocast, **kwargs)
        if self.kept is None:
            return dict(states)
        return {layer: hidden[..., self.kept.to(hidden.device)] for layer, hidden in states.items()}

    def reading(self) -> AbstractContextManager[dict[int, Tensor]]:
        """To be open while the student runs."""
        return self.student_reader.reading()

    def term(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], noise: float = 0.0) -> Tensor:
        """(images,) weighted losses, averaged over layers, of what :meth:`reading` and :meth:`features` gave.

        ``noise``: standard deviation of random numbers that the teacher's features get, in units of that of every
        token. While nothing is removed, student and teacher are one and the loss has no gradient; with noise, the
        expected squares of gradients say how much the features depend on a weight (Gauss-Newton).
        """
        losses = []
        for layer, theirs in teacher.items():
            mine = student.get(self.pairs[layer])
            if mine is None:
                raise InvalidConfigError("the student has run without its tower: there are no features to learn")
            if noise:
                theirs = theirs + noise * theirs.std(-1, keepdim=True) * torch.randn_like(theirs)
            weights = token_weights(self.reader.architecture, theirs.shape[1], theirs.device)
            losses.append(feature_loss(mine, theirs, self.config.loss, weights))
        return self.config.weight * torch.stack(losses).mean(0)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse images that the teacher does not take, before training: an InvalidDataError names both sizes."""
        images = batch["pixel_values"]
        try:
            self.features(**batch)
        except VitPruneError:
            raise
        except (ValueError, RuntimeError, AssertionError) as error:
            config = self.reader.architecture.family.sizes_config(self.reader.architecture.config)
            raise InvalidDataError(
                f"the teacher does not take images of shape {tuple(images.shape[1:])} (its own size is "
                f"{getattr(config, 'image_size', 'unknown')}): {str(error).rstrip('.')}. Put them through its image "
                "processor, or give both models one that takes them"
            ) from error


def _part_of(student: Any, config: DistillationConfig) -> str | None:
    """Which tower learns: that of a PruningModel or of the plan, else the only one or the only pruned one."""
    tower = getattr(student, "tower", None)
    if not isinstance(tower, Tower):
        tower = pruned_tower(student, None if config.plan is None else config.plan.part)
    return tower.part if tower.path else None


def _paired_layers(whole: Architecture, small: Architecture, config: DistillationConfig) -> dict[int, int]:
    """Layer of the teacher -> the same layer of the student, from 1; 0 is what leaves the tower."""
    if config.layers is None:
        outputs = _outputs_of(whole), _outputs_of(small)
        return dict(zip(*outputs, strict=True)) if outputs[0] and len(outputs[0]) == len(outputs[1]) else {0: 0}
    total = len(whole.layers)
    wrong = [layer for layer in config.layers if layer > total]
    if wrong:
        raise InvalidConfigError(f"layers are counted from 1, and the teacher has {total}: there is no {wrong[0]}")
    if total == len(small.layers):
        return {layer: layer for layer in config.layers}
    if config.plan is None:
        raise InvalidConfigError(
            f"the student has {len(small.layers)} of the teacher's {total} layers, and nothing says which: "
            "give DistillationConfig(plan=<the plan it was pruned by>), or leave layers out"
        )
    place = {entry.index + 1: i for i, entry in enumerate(config.plan.layers, start=1)}
    gone = [layer for layer in config.layers if layer not in place]
    if gone:
        raise InvalidConfigError(f"layer {gone[0]} of the teacher is gone in the student: leave it out of layers")
    return {layer: place[layer] for layer in config.layers}


def _outputs_of(model: Architecture) -> tuple[int, ...]:
    """Layers, from 1, whose outputs a backbone gives; none of other models."""
    if model.task != "Backbone":
        return ()
    total, depths = len(model.layers), model.depths
    numbers = (i % (total + 1) if depths is None else sum(depths[:i]) for i in model.config.out_indices)
    return tuple(number for number in numbers if number > 0)


def _kept_channels(whole: Architecture, small: Architecture, plan: PruningPlan | None) -> Tensor | None:
    """Residual channels of the teacher that the student has; None: all."""
    if whole.hidden_size == small.hidden_size:
        return None
    kept = None if plan is None else plan.embedding
    if kept is None or len(kept) != small.hidden_size or plan is None or plan.source.hidden_size != whole.hidden_size:
        known = "nothing says which channels it has kept" if plan is None else "the plan is not between the two"
        raise InvalidConfigError(
            f"the student's hidden states have {small.hidden_size} channels, the teacher's {whole.hidden_size}, and "
            f"{known}: give DistillationConfig(plan=<the plan it was pruned by>), or a teacher of the student's width"
        )
    return torch.tensor(kept)


def _equal(teacher: FeatureReader, student: FeatureReader) -> bool:
    mine, theirs = (dict(reader.tower.named_parameters()) for reader in (student, teacher))
    return mine.keys() == theirs.keys() and all(
        p.shape == theirs[name].shape and torch.equal(p.detach(), theirs[name].detach().to(p.device))
        for name, p in mine.items()
    )


def has_head(model: Any) -> bool:
    """Whether a transformers model has a task, and so a loss, of its own."""
    base = unwrap(model)
    task = task_of(base) if hasattr(base, "config") else ""
    return not task.endswith(("Model", "ModelWithProjection", "Backbone"))
