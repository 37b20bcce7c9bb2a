"""What a sweep holds fixed, and what tells its runs apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import TrainingArguments

from hf_vitprune.errors import InvalidConfigError

from .tasks import TRAIN, TRAIN_ALL

MODEL = "google/vit-base-patch16-224-in21k"
PREPROCESSINGS = ("literature", "checkpoint")
#: how a pruned model is retrained: see README.md
RETRAININGS = ("clr", "ft", "tfs")
LAST, BEST = "last_epoch", "best_on_val200"
#: result that a run reports -> the images that it is trained on
RESULTS = {LAST: TRAIN_ALL, BEST: TRAIN}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are those of the PEFT literature on VTAB-1k.

    Attributes:
        warmup_epochs: of the epochs, those in which the learning rate of AdamW rises; then it falls along a cosine.
        batch_size: images an update, over all processes.
        drop_path: chance of the last layer's branches to be dropped while training.
        clipping: largest norm of the gradient; 0: none.
        drop_last: leave out the last, incomplete batch of an epoch.
        lowest_rate: learning rate at the end of the cosine.
    """

    epochs: int = 100
    warmup_epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 64
    drop_path: float = 0.0
    clipping: float = 1.0
    drop_last: bool = False
    lowest_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise InvalidConfigError(f"epochs and batch_size are at least 1, not {self.epochs} and {self.batch_size}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise InvalidConfigError(f"{self.warmup_epochs} warm-up epochs do not fit into {self.epochs} epochs")
        if not 0 <= self.lowest_rate < self.learning_rate or self.clipping < 0:
            raise InvalidConfigError("lowest_rate is under learning_rate, and neither it nor clipping is negative")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise InvalidConfigError("learning_rate is positive, and weight_decay not negative")

    def published(self) -> Recipe:
        """With the training's settings of the runs that SLS's authors published (arXiv 2407.14330)."""
        return replace(self, drop_path=0.1, clipping=0.0, drop_last=True, lowest_rate=1e-5)

    def of_length(self, epochs: int) -> Recipe:
        """The same with other epochs, the warm-up in proportion."""
        return replace(self, epochs=epochs, warmup_epochs=self.warmup_epochs * epochs // self.epochs)

    def steps(self, images: int) -> int:
        """Updates of a whole training."""
        return self.epochs * (images // self.batch_size if self.drop_last else -(-images // self.batch_size))


@dataclass(frozen=True)
class Settings:
    """What all runs of a sweep have in common; results of other settings belong in another folder.

    Attributes:
        model: Hub id or folder of the pretrained model.
        preprocessing: ``literature`` or ``checkpoint``; see ``images.py``. ``image_size``: in pixels, of the former.
        recipe: of the adaptation, and of the retraining, which may have other epochs (0: none).
        rank: of adapters that have one; ``published``: their scales and initialisations as in the published runs.
        alpha: threshold of SLS, unless a run says another.
        selection: also train on train800 and keep the epoch that is best on val200.
        test_limit: test on this many images, the same in every run, instead of all.
        source, any_size: where tasks are read from, and whether splits may be other than VTAB-1k's; see ``data.py``.
        speed_batch, speed_rounds: images a forward pass, and rounds, of the throughput measurement.
    """

    model: str = MODEL
    preprocessing: str = "literature"
    image_size: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    retraining: str = "clr"
    retraining_epochs: int | None = None
    rank: int = 8
    published: bool = False
    alpha: float = 0.3
    selection: bool = True
    test_limit: int | None = None
    source: str = "auto"
    any_size: bool = False
    speed_batch: int = 32
    speed_rounds: int = 15

    def __post_init__(self) -> None:
        for name, choices in (("preprocessing", PREPROCESSINGS), ("retraining", RETRAININGS)):
            if getattr(self, name) not in choices:
                raise InvalidConfigError(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.preprocessing == "checkpoint" and self.image_size is not None:
            raise InvalidConfigError("the checkpoint's image processor has a size of its own: leave image_size out")
        for name in ("image_size", "rank", "test_limit", "speed_batch", "speed_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfigError(f"{name} is at least 1, not {value}")
        if not 0 < self.alpha < 1:
            raise InvalidConfigError(f"alpha must lie strictly between 0 and 1, not {self.alpha}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Settings:
        """From :meth:`to_dict`'s."""
        return cls(**{**record, "recipe": Recipe(**record["recipe"])})


@dataclass(frozen=True)
class Run:
    """One cell of a sweep: names of a task, an adaptation and a pruning, and the seed of head, adapters and order."""

    task: str
    peft: str
    pruning: str
    seed: int

    @property
    def name(self) -> str:
        """For a file."""
        return f"{self.task}--{self.peft}--{self.pruning.replace(':', '-')}--seed{self.seed}"

    @property
    def adapted_name(self) -> str:
        """For the folder of the adapted model, which runs that differ in pruning alone share."""
        return f"{self.task}--{self.peft}--seed{self.seed}"


@dataclass(frozen=True)
class Machine:
    """What a run depends on without being part of it.

    ``workers`` load images; ``cpu``: train on the processor even where there is an accelerator.
    """

    workers: int = 0
    cpu: bool = False

    def arguments(self, recipe: Recipe, seed: int, output_dir: str, processes: int, **more: Any) -> TrainingArguments:
        """For a Trainer; ``processes`` share the batch."""
        if recipe.batch_size % processes:
            raise InvalidConfigError(f"a batch of {recipe.batch_size} cannot be shared by {processes} processes")
        arguments = TrainingArguments(
            output_dir,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            per_device_train_batch_size=recipe.batch_size // processes,
            per_device_eval_batch_size=4 * (recipe.batch_size // processes),
            max_grad_norm=recipe.clipping,
            lr_scheduler_type="cosine_with_min_lr" if recipe.lowest_rate else "cosine",
            lr_scheduler_kwargs={"min_lr": recipe.lowest_rate} if recipe.lowest_rate else {},
            warmup_steps=recipe.warmup_epochs / recipe.epochs,
            seed=seed,
            data_seed=seed,
            dataloader_num_workers=self.workers,
            use_cpu=self.cpu,
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            **more,
        )
        if arguments.n_gpu > 1:
            raise InvalidConfigError(
                f"one process sees {arguments.n_gpu} accelerators: start one for each (accelerate launch -m "
                "benchmarks.vtab run ...), or show one of them (CUDA_VISIBLE_DEVICES=0)"
            )
        return arguments
