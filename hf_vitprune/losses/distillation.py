"""Distillation: learn from a teacher's logits beside the labels (DeiT: Touvron et al., arXiv 2012.12877)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidConfigError, InvalidDataError
from ..plan.plan import PruningPlan
from ..utils.batches import accepted
from ..utils.classes import match_classes
from ..utils.settings import check_number, check_one_of, check_positive

DistillationKind = Literal["soft", "hard", "kl", "features", "none"]
Direction = Literal["teacher_student", "student_teacher"]
FeatureLoss = Literal["cosine", "normalised", "standardised"]


@dataclass(frozen=True)
class DistillationConfig:
    """What the student learns from the teacher.

    Attributes:
        kind: "soft" matches the teacher's whole distribution (DeiT eq. 2), "hard" takes the teacher's best class as a
            second label (eq. 3), "kl" adds `weight * KL` to the task loss (NViT), "features" adds `weight *` the
            distance of hidden states, and needs no labels; "none" leaves the task loss alone.
        weight: Share of the distillation term, from 0 to 1; the task loss gets the rest. DeiT uses 0.1 for soft and
            0.5 for hard distillation. For "kl" and "features" a factor of any size (NViT: 100; 1 by default for
            "features"); the task loss stays whole. Of several at once every weight means the same:
            `(1 - shares) * task + sum of weight * term`.
        temperature: Both distributions are softened by it, for "soft" and "kl". The "soft" term is multiplied by its
            square, so that the size of the gradient does not depend on it. DeiT and NViT use 3.
        direction: For "kl": "teacher_student" is `KL(teacher || student)`, as NViT's code has it; "student_teacher"
            is `KL(student || teacher)`.
        layers: For "features": whose outputs are matched, counted from 1 in the teacher; None: what leaves the tower,
            after the final norm.
        loss: For "features": "standardised", "cosine" or "normalised"; see ``features.feature_loss``. The first
            divides by the spread of each channel in a batch, so micro-batches add up to one only nearly.
        plan: For "features": what the student was pruned by, where its residual stream is narrower than the
            teacher's (it is matched on the channels that stay), or where it lost layers and ``layers`` names some.
    """

    kind: DistillationKind = "soft"
    weight: float = None  # type: ignore[assignment]  # 0.5, and 1 for features
    temperature: float = 1.0
    direction: Direction = "teacher_student"
    layers: tuple[int, ...] | None = None
    loss: FeatureLoss = "standardised"
    plan: PruningPlan | None = None

    def __post_init__(self) -> None:
        check_one_of(self, "kind", get_args(DistillationKind))
        if self.weight is None:
            object.__setattr__(self, "weight", 1.0 if self.kind == "features" else 0.5)
        check_number("weight", self.weight, math.inf if self.kind in ("kl", "features") else 1.0)
        check_positive("temperature", self.temperature)
        check_one_of(self, "direction", get_args(Direction))
        if self.kind != "kl" and self.direction != "teacher_student":
            raise InvalidConfigError(f"direction is an option of kind 'kl'; {self.kind!r} has one direction only")
        self._check_features()

    def _check_features(self) -> None:
        if self.kind != "features":
            if (self.layers, self.loss, self.plan) != (None, "standardised", None):
                raise InvalidConfigError(f"layers, loss and plan are options of kind 'features', not of {self.kind!r}")
            return
        if self.temperature != 1.0:
            raise InvalidConfigError("features have no temperature: leave it out")
        check_one_of(self, "loss", get_args(FeatureLoss))
        if self.plan is not None and not isinstance(self.plan, PruningPlan):
            raise InvalidConfigError(f"plan is a PruningPlan, not a {type(self.plan).__name__}")
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, (list, tuple)) else ()
            if not layers or any(type(n) is not int or n < 1 for n in layers) or len(set(layers)) < len(layers):
                raise InvalidConfigError(f"layers are numbers of layers, from 1, each once; not {self.layers!r}")
            object.__setattr__(self, "layers", layers)

    @property
    def share(self) -> float:
        """What is taken from the weight of the task loss."""
        return self.weight if self.kind in ("soft", "hard") else 0.0


def task_share(configs: Iterable[DistillationConfig]) -> float:
    """Weight of the task loss beside these terms, from 0 to 1."""
    shares = [config.share for config in configs]
    if sum(shares) > 1 + 1e-9:
        raise InvalidConfigError(
            f"the weights of soft and hard distillation are shares of one loss, and {' + '.join(map(str, shares))} "
            "are more than 1: lower them, what is left is the weight of the labels"
        )
    return max(0.0, 1.0 - sum(shares))


def distillation_term(
    student_logits: Tensor,
    teacher_logits: Tensor,
    config: DistillationConfig,
    *,
    distillation_logits: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """What a teacher adds to the loss, times its weight.

    The term is `T^2 * KL(teacher || student)` at temperature T ("soft"), or the cross-entropy with the teacher's best
    class ("hard"), or a KL at temperature T without the square ("kl"), averaged over images. (DeiT's code divides the
    KL by images *and* classes; the paper's equation, followed here, does not.)

    Args:
        student_logits: (B, C), from the head that the task loss comes from.
        teacher_logits: (B, C), never differentiated.
        config: Kind, weight, temperature and direction.
        distillation_logits: (B, C) of a distillation head of its own (DeiT with teacher): the term is then computed
            on these in place of `student_logits`; a "kl" teacher is compared with the whole student.
        num_items_in_batch: What Trainer passes to `compute_loss`: the number of labelled images in all micro-batches
            (and processes) of one update, by which the term is then divided as the task loss is, so that gradients of
            micro-batches add up to those of the big batch; without it, by the size of this batch.
    """
    logits = student_logits if distillation_logits is None or config.kind == "kl" else distillation_logits
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must both be (images, classes), "
            f"not {tuple(logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    logits, target = at_least_float32(logits), at_least_float32(teacher_logits.detach())
    if config.kind in ("soft", "kl"):
        t = config.temperature
        student, teacher = F.log_softmax(logits / t, dim=-1), F.log_softmax(target / t, dim=-1)
        if config.direction == "student_teacher":
            student, teacher = teacher, student
        total = F.kl_div(student, teacher, reduction="sum", log_target=True)
        total = total * t**2 if config.kind == "soft" else total
    else:
        total = F.cross_entropy(logits, target.argmax(dim=-1), reduction="sum")
    items = len(logits) if num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.flatten()[0].to(total.device)  # one copy per device under DataParallel
    return config.weight * total / items


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision is too coarse for the tail of a softmax; float64 stays what it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Teacher:
    """An image classifier that a student learns from: any module that takes `pixel_values` and returns `.logits`.

    Deliberately no `nn.Module`: kept as an attribute of a model or a Trainer, it is not saved with the student, not
    given to the optimizer, not wrapped by DDP, and `student.train()` does not switch its dropout on. It is put in eval
    mode, not copied. No gradient goes through it, and its parameters keep their ``requires_grad``.

    A `student` is checked against it: the same number of classes, in the same order where both configs name them
    alike, and no shared tensors (a teacher that changes with its student teaches nothing).
    """

    def __init__(self, model: nn.Module, student: nn.Module | None = None) -> None:
        if student is not None:
            _check_pair(model, student)
        self.model = model.eval()

    def __call__(
        self, pixel_values: Tensor, *, autocast: AbstractContextManager[Any] | None = None, **kwargs: Any
    ) -> Tensor:
        """The teacher's logits for a batch; see :meth:`run`."""
        output = self.run(pixel_values, autocast=autocast, **kwargs)
        logits = getattr(output, "logits", None)
        if logits is None:
            raise TypeError(f"a teacher must return .logits; {type(self.model).__name__} returned {type(output)}")
        return logits

    def run(self, pixel_values: Tensor, *, autocast: AbstractContextManager[Any] | None = None, **kwargs: Any) -> Any:
        """What the teacher returns for a batch, whose device it follows; of `kwargs` it gets what its forward takes.

        `autocast`: the mixed precision that the student runs in. Trainer opens no autocast around `compute_loss`
        (accelerate wraps the student's `forward` alone), so pass `trainer.accelerator.autocast()` for the same.
        """
        if self.model.training:  # somebody else may hold the model, too
            self.model.eval()
        tensor = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if tensor is not None and getattr(self.model, "hf_device_map", None) is None:
            if tensor.device != pixel_values.device:
                self.model.to(pixel_values.device)
            pixel_values = pixel_values.to(tensor.dtype)
        with torch.no_grad(), autocast or nullcontext():
            return self.model(pixel_values=pixel_values, **accepted(self.model, kwargs))


def _check_pair(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse what would train without an error and teach nonsense."""
    of_teacher = {id(p) for p in teacher.parameters()}
    if any(id(p) in of_teacher for p in student.parameters()):
        raise InvalidConfigError("teacher and student share tensors: give a copy.deepcopy of the model as teacher")
    configs: list[Any] = [getattr(model, "config", None) for model in (teacher, student)]
    if not all(hasattr(config, "id2label") for config in configs):
        return  # distillation_term still compares the shapes
    names = [[label for _, label in sorted(config.id2label.items())] for config in configs]
    if len(names[0]) != len(names[1]):
        raise InvalidConfigError(f"the teacher has {len(names[0])} classes and the student {len(names[1])}")
    turned = names[0] != names[1] and sorted(names[0]) == sorted(names[1])
    with suppress(InvalidDataError):  # names that have nothing to do with each other say nothing of the order
        turned |= match_classes(names[1], configs[0].id2label).numbers != tuple(range(len(names[0])))
    if turned:
        raise InvalidConfigError("teacher and student have the same classes in a different order (config.id2label)")
