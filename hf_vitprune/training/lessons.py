"""What a student learns from teachers beside its labels, or without any: put together once, asked at every step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..errors import InvalidConfigError
from ..losses.distillation import DistillationConfig, Teacher, distillation_term, task_share
from ..losses.features import FeatureTeacher
from ..plan.lineage import lineage_of, note
from ..spec.architecture import unwrap
from ..spec.configs import is_pruned
from ..spec.towers import towers
from ..utils.hooks import strip_gates
from .model import PruningModel
from .setup import check_given_teacher, check_teacher

#: a kind of distillation with its teacher
Lesson = tuple[DistillationConfig, Teacher]


def pairs_of(distillation: Any, teacher: Any) -> list[tuple[DistillationConfig, Any]]:
    """Every kind of distillation with its teacher (None: the default one); refused unless as many as kinds."""
    if distillation is None:
        distillation = DistillationConfig() if teacher is not None else []
    configs = list(distillation) if isinstance(distillation, (list, tuple)) else [distillation]
    task_share(configs)  # raises
    if teacher is None:
        teacher = [None] * len(configs)
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher] * min(len(configs), 1)
    if len(teachers) != len(configs):
        raise InvalidConfigError(
            f"{len(configs)} kinds of distillation and {len(teachers)} teachers: give one teacher for each, in a list "
            "(None for the unpruned model itself)"
        )
    return [(config, one) for config, one in zip(configs, teachers, strict=True) if config.kind != "none"]


def lessons_of(distillation: Any, teacher: Any, student: Any) -> list[Lesson]:
    """The lessons of one student; of a PruningModel, a copy of it as it is now is the teacher by default."""
    lessons: list[Lesson] = []
    for config, model in pairs_of(distillation, teacher):
        if model is None:
            if not isinstance(student, PruningModel):
                raise InvalidConfigError("distillation needs a teacher: pass teacher=<the unpruned model>")
            check_teacher(student)
            model = copy.deepcopy(student.model)
            strip_gates(model)
        check_given_teacher(model)
        by_features = config.kind == "features"
        lessons.append((config, FeatureTeacher(model, student, config) if by_features else Teacher(model, student)))
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
            ask = teacher.features if isinstance(teacher, FeatureTeacher) else teacher
            self._given.append(ask(**images, autocast=autocast()))

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
                own = outputs.get("distillation_logits")
                heads = outputs["logits"], given, config
                term = distillation_term(*heads, distillation_logits=own, num_items_in_batch=items)
            loss = loss + scale * term
        return loss


# ---------------------------------------------------------------------- how a model was trained, for its record
def training_facts(args: TrainingArguments, state: TrainerState, learned_from: str = "labels") -> dict[str, Any]:
    """``learned_from``, ``steps`` of the optimizer, peak ``learning_rate`` and ``batch_size`` (images a step)."""
    images = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rate = args.learning_rate
    return {"learned_from": learned_from, "steps": state.global_step, "learning_rate": rate, "batch_size": images}


def learned_from(labelled: bool, lessons: Sequence[Lesson]) -> str:
    """``"labels and the soft logits of a teacher"``, in words for a reader."""
    taught = [
        "the features of a teacher" if config.kind == "features" else f"the {config.kind} logits of a teacher"
        for config, _ in lessons
    ]
    return " and ".join([*(["labels"] if labelled else []), *taught])


def note_training(model: Any, facts: dict[str, Any]) -> None:
    """Put a training into the record of every pruned tower of a model; a dense model has no record."""
    base = unwrap(model)
    for tower in towers(base).values() if isinstance(base, PreTrainedModel) else ():
        config = base.get_submodule(tower.path).config
        if is_pruned(config):
            note(config, training=[*lineage_of(config).get("training", []), facts])
