"""What a student learns from teachers beside its labels, or without any: put together once, asked at every step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InvalidConfigError
from ..losses.distillation import DistillationConfig, Teacher, distillation_term, task_share
from ..losses.features import FeatureTeacher
from ..utils.hooks import strip_gates
from .model import PruningModel
from .setup import check_given_teacher, check_teacher

#: a kind of distillation with its teacher
Lesson = tuple[DistillationConfig, Teacher]


def pairs_of(distillation: Any, teacher: Any) -> list[tuple[DistillationConfig, Any]]:
    """Every kind of distillation with its teacher (None: the default one).

    Raises:
        InvalidConfigError: there are not as many teachers as kinds.
    """
    if distillation is None:
        distillation = DistillationConfig() if teacher is not None else []
    configs = list(distillation) if isinstance(distillation, (list, tuple)) else [distillation]
    task_share(configs)  # raises
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher] * min(len(configs), 1)
    if teacher is None:
        teachers = [None] * len(configs)
    if len(teachers) != len(configs):
        raise InvalidConfigError(
            f"{len(configs)} kinds of distillation and {len(teachers)} teachers: give one teacher for each, in a list "
            "(None for the unpruned model itself)"
        )
    return [(config, one) for config, one in zip(configs, teachers, strict=True) if config.kind != "none"]


def lessons_of(distillation: Any, teacher: Any, student: Any) -> list[Lesson]:
    """The lessons of one student; of a PruningModel, a copy of it as it is now is the teacher by default.

    Raises:
        InvalidConfigError: there is no teacher, or not one for this student.
    """
    lessons: list[Lesson] = []
    for config, model in pairs_of(distillation, teacher):
        if model is None and not isinstance(student, PruningModel):
            raise InvalidConfigError("distillation needs a teacher: pass teacher=<the unpruned model>")
        model = _ungated_copy(student) if model is None else model
        check_given_teacher(model)
        if config.kind == "features":
            lessons.append((config, FeatureTeacher(model, student, config)))
        else:
            lessons.append((config, Teacher(model, student=student)))
    return lessons


def by_features(lessons: Sequence[Lesson]) -> bool:
    """Whether one of them needs no labels."""
    return any(config.kind == "features" for config, _ in lessons)


class Answers:
    """What the teachers say of a batch, and the student's hidden states: to be open while the student runs.

    Args:
        lessons: whose teachers are asked.
        images: the batch without labels.
        autocast: makes the context of the student's mixed precision.
    """

    def __init__(self, lessons: Sequence[Lesson], images: Mapping[str, Any], autocast: Any) -> None:
        self.lessons = lessons
        self._stack = contextlib.ExitStack()
        self._given: list[Any] = []
        for _, teacher in lessons:
            if isinstance(teacher, FeatureTeacher):
                self._given.append(teacher.features(**images, autocast=autocast()))
            else:
                self._given.append(teacher(**images, autocast=autocast()))

    def __enter__(self) -> Answers:
        self._read = [
            self._stack.enter_context(teacher.reading()) if isinstance(teacher, FeatureTeacher) else {}
            for _, teacher in self.lessons
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def loss(self, task: torch.Tensor, outputs: Any, items: Any, *, scale: float, parts: int, noise: float) -> Any:
        """The whole loss of the batch.

        Args:
            task: the loss on its labels; zero without.
            outputs: of the student.
            items: images of the whole update, by which the terms are divided; None: means over this batch.
            scale: of every term, as ``task`` was scaled.
            parts: by which means over a batch are divided, where nobody else does.
            noise: see ``FeatureTeacher.term``.
        """
        loss = task_share(config for config, _ in self.lessons) * task
        for (config, teacher), given, read in zip(self.lessons, self._given, self._read, strict=True):
            if isinstance(teacher, FeatureTeacher):
                each = teacher.term(read, given, noise=noise)
                count = items.flatten()[0].to(each.device) if isinstance(items, torch.Tensor) else items
                term = each.mean() / parts if count is None else each.sum() / count
            else:
                heads = outputs["logits"], given, config
                own = outputs.get("distillation_logits")
                term = distillation_term(*heads, distillation_logits=own, num_items_in_batch=items)
            loss = loss + scale * term
        return loss


def _ungated_copy(model: PruningModel) -> Any:
    """The wrapped model as it is now, without gates: what the student starts from."""
    check_teacher(model)
    teacher = copy.deepcopy(model.model)
    strip_gates(teacher)
    return teacher
