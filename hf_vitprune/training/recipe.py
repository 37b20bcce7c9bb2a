"""How a model was trained, for its record and so for its card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..plan.lineage import lineage_of, note
from ..spec.architecture import unwrap
from ..spec.configs import is_pruned
from ..spec.towers import towers
from .lessons import Lesson


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
