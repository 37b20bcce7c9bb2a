"""Recovery: a pruned model is brought back to the dense one's features, gently, from images without labels."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..errors import InvalidConfigError, InvalidDataError
from ..losses.distillation import DistillationConfig
from ..plan.plan import PruningPlan
from ..utils.batches import ImageBatches
from ..utils.crops import random_crops
from ..utils.examples import processed
from ..utils.settings import check_counts, check_number, check_open_interval
from .keep_best import KeepBest
from .trainer import PruningTrainer

logger = logging.get_logger(__name__)

#: images that are looked at before a recovery begins
LOOKED_AT = 64


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained on features. The defaults are measured (``docs/features.md``).

    Attributes:
        steps: of the optimizer.
        learning_rate: peak of AdamW's, after a linear warm-up, before a cosine decay. A compensated model starts near
            an optimum: ten times this rate ends worse than it began.
        warmup: share of the steps, in [0, 1).
        batch_size: images a step and process.
        held_out: share of the images that are not trained on, by whose loss the best weights are kept, in (0, 1).
        checks: how often that loss is looked at, beside the start.
        crops: train on random parts of the images, of at least this share of their area, half of them mirrored, in
            (0, 1]; None: on the images as they are.
        bf16: student and teacher run in bfloat16 (weights stay in their own type).
        seed: of the order of images, and of their parts.
    """

    steps: int = 300
    learning_rate: float = 1e-5
    warmup: float = 0.2
    batch_size: int = 32
    held_out: float = 0.1
    checks: int = 10
    crops: float | None = None
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "checks")
        check_number("learning_rate", self.learning_rate)
        check_number("warmup", self.warmup, highest=1)
        check_open_interval("held_out", self.held_out)
        if self.crops is not None and not 0 < self.crops <= 1:
            raise InvalidConfigError(f"crops is a share of an image's area, in (0, 1], or None, not {self.crops!r}")


@dataclass(frozen=True)
class Recovered:
    """What a recovery came to.

    ``losses``: optimizer steps -> feature loss of so many ``held_out`` images; step 0 is the start. ``best``: the step
    whose weights the model has now.
    """

    losses: dict[int, float]
    best: int
    held_out: int

    @property
    def one_line(self) -> str:
        start, end = self.losses[0], self.losses[self.best]
        seen = f"feature loss on {self.held_out} held-out images"
        if self.best == 0:
            return f"{seen} {start:.4g}: no training step was better than the start, whose weights stay"
        return f"{seen} {start:.4g} -> {end:.4g}: the weights of step {self.best} of {max(self.losses)} stay"


def recover(
    small: Any,
    dense: Any,
    images: Any,
    settings: Recovery | None = None,
    *,
    held_out: Any = None,
    distillation: DistillationConfig | None = None,
    plan: PruningPlan | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    folder: str | Path | None = None,
) -> Recovered:
    """Train a pruned model, in place, on the dense one's features; it ends with the best of its weights.

    Best is by the feature loss of images that are held out; the start is among the candidates.

    Args:
        small: the pruned model, compensated or not; in eval mode afterwards.
        dense: what it was pruned from; unchanged.
        images: anything that ``ImageBatches`` takes; labels are not looked at.
        settings: how long and how fast.
        held_out: images to choose the best by, neither trained on nor calibrated with; by default a share of
            ``images``.
        distillation: another loss, or other layers, of ``kind="features"``.
        plan: what ``small`` was pruned by; needed where its residual stream is narrower.
        callbacks: for the Trainer (a progress bar, say; it has none of its own).
        folder: for checkpoints, one a check, from which the same call goes on after it was cut off; None: no such.

    Raises:
        InvalidDataError: too few images to hold any out, or not for these models.
        InvalidConfigError: the models do not go together; see ``FeatureTeacher``.
    """
    settings = settings or Recovery()
    config = distillation or DistillationConfig(kind="features", plan=plan)
    if config.kind != "features":
        raise InvalidConfigError(f"a recovery is by features, without labels, not by {config.kind!r} distillation")
    images, held_out = processed(images, dense), processed(held_out, dense)
    for given in (images, held_out):
        if given is not None:
            next(iter(ImageBatches(given, LOOKED_AT, LOOKED_AT)))  # raises
    batches = ImageBatches(images)
    if held_out is None:
        rest, apart = hold_out(batches.images, settings.held_out)
        train_set, judged = _Unlabelled(batches, rest), _Unlabelled(batches, apart)
    else:
        train_set, judged = _Unlabelled(batches), _Unlabelled(ImageBatches(held_out))
    keep = KeepBest(folder=folder)
    with contextlib.nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        on_cpu = train_set[0]["pixel_values"].device.type == "cpu"
        trainer = _CroppingTrainer(
            small,
            _arguments(settings, str(place), folder is not None, pin_memory=on_cpu and torch.cuda.is_available()),
            teacher=dense,
            distillation=config,
            train_dataset=train_set,
            eval_dataset=judged,
            data_collator=train_set.images.collate_fn,
            callbacks=[keep, *callbacks],
            crops=settings.crops,
        )
        trainer.remove_callback(PrinterCallback)
        before = None if folder is None or not Path(folder).is_dir() else get_last_checkpoint(str(folder))
        trainer.train(resume_from_checkpoint=before)
    small.eval()
    done = Recovered(dict(keep.losses), keep.best, len(judged))
    logger.info(done.one_line)
    return done


class _CroppingTrainer(PruningTrainer):
    """A ``PruningTrainer`` that sees random parts (see ``Recovery.crops``); the same ones when it is resumed."""

    def __init__(self, *args: Any, crops: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.crops = crops

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.crops is not None:
            inputs = self._prepare_inputs(inputs)
            seed = self.args.seed * 2**32 + self.state.global_step
            inputs["pixel_values"] = random_crops(inputs["pixel_values"], self.crops, seed)
        return super().training_step(model, inputs, *args, **kwargs)


class _Unlabelled(Dataset):
    """Some of the images, all by default, without their labels."""

    def __init__(self, images: ImageBatches, chosen: Sequence[int] | None = None) -> None:
        self.images, self.chosen = images, range(images.images) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self.images.example(self.chosen[i])
        kept = {name: value for name, value in example.items() if name not in ("labels", "label")}
        return {**kept, "pixel_values": torch.as_tensor(kept["pixel_values"])}


def hold_out(images: int, share: float) -> tuple[list[int], list[int]]:
    """(numbers of the images to train on, of those that are held out, evenly spaced); neither may be empty."""
    if images < 2:
        raise InvalidDataError("there is one image: a recovery holds some out, to keep the best weights by them")
    count = max(1, round(share * images))
    apart = {i * images // count for i in range(count)}
    if len(apart) == images:
        raise InvalidDataError(f"all {images} images are held out, and none is left to train on: lower held_out")
    return [i for i in range(images) if i not in apart], sorted(apart)


def _arguments(settings: Recovery, folder: str, saves: bool, pin_memory: bool) -> TrainingArguments:
    each = max(1, settings.steps // settings.checks)
    return TrainingArguments(
        folder,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(settings.warmup * settings.steps)),
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        eval_strategy="steps",
        eval_steps=each,
        eval_on_start=True,
        save_strategy="steps" if saves else "no",
        save_steps=each,
        save_total_limit=1,
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        logging_nan_inf_filter=False,  # it would wait for the device in every step
        dataloader_pin_memory=pin_memory,
        use_cpu=PartialState().device.type == "cpu",
    )
