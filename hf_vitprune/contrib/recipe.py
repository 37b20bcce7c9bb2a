"""Published training runs as JSON files, and what one costs in GPU hours."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, TrainingArguments

from ..errors import InvalidConfigError
from ..families.base import pair
from .augment import Augmentation, AugmentationConfig, RandomCrop, check_available

#: what a GPU hour is here: an A100's dense bf16 operations a second, and the share of them that training reaches
PEAK, REACHED = 312e12, 0.35
#: operations of a multiply-add; of a training step as multiples of a forward pass: forward, and backward twice
OPERATIONS, TRAINING, INFERENCE = 2, 3, 1
STAGES = ("learn", "tune", "scratch")


@dataclass(frozen=True)
class Recipe:
    """One published run.

    Attributes:
        name: of the file.
        published: what the paper reports for it.
        arguments: options of the example script, by name; those on the command line go before them.
        batch: images an optimizer step, on all devices together; learning rates are for it.
        learn, tune, scratch: settings of ``TrainingArguments``, by stage; absent where there is no such stage.
        augmentation: settings of :class:`~hf_vitprune.contrib.augment.AugmentationConfig`; None: no augmentation.
        tuned_share: multiply-adds of the small model, as a share of the dense one's, for the calculation of hours.
        notes: where it departs from what was published, or guesses.
    """

    name: str
    published: str
    arguments: dict[str, Any]
    batch: int
    learn: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] | None = None
    tuned_share: float = 1.0
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path, name: str) -> Recipe:
        """The recipe of this name.

        Raises:
            InvalidConfigError: there is none, or the file has other entries than a recipe.
        """
        path = folder / f"{name}.json"
        if not path.is_file():
            known = ", ".join(sorted(one.stem for one in folder.glob("*.json")))
            raise InvalidConfigError(f"there is no recipe {name!r}; there are {known}")
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InvalidConfigError(f"{path} is not JSON: {error}") from error
        known_fields = {one.name for one in fields(cls)} - {"name"}
        if not isinstance(record, dict) or record.keys() - known_fields or not {"published", "batch"} <= record.keys():
            raise InvalidConfigError(f"{path} has other entries than {', '.join(sorted(known_fields))}")
        return cls(name=name, **{**record, "notes": tuple(record.get("notes", ()))})

    def command_line(self) -> list[str]:
        """Its arguments as the example script takes them."""
        words: list[str] = []
        for name, value in self.arguments.items():
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return words

    def stage(self, name: str, given: set[str], per_device: int, processes: int) -> dict[str, Any]:
        """Settings of a stage, but for those that were ``given`` on the command line.

        Args:
            name: of the stage.
            given: names of options.
            per_device: images a device takes at a time.
            processes: devices.

        Raises:
            InvalidConfigError: the batch is no multiple of what the devices take at a time.
        """
        settings = {key: value for key, value in getattr(self, name).items() if key not in given}
        at_once = per_device * processes
        if "gradient_accumulation_steps" not in given:
            if self.batch % at_once:
                raise InvalidConfigError(
                    f"the recipe has {self.batch} images a step, and {processes} x {per_device} at a time do not "
                    "divide them: change per_device_train_batch_size, or give gradient_accumulation_steps and a "
                    "learning_rate for your batch"
                )
            settings["gradient_accumulation_steps"] = self.batch // at_once
        return settings


def gpu_hours(images: int, epochs: float, student_macs: float, teacher_macs: float = 0.0) -> float:
    """Hours of one A100 at 35 % of its bf16 peak: operations of training the student, and of running the teachers.

    ``images * epochs * 2 * (3 * student + teachers) / (0.35 * 312e12 * 3600)``.

    Args:
        images: of the training set.
        epochs: over it.
        student_macs: multiply-adds of one image, forward.
        teacher_macs: of all teachers together.
    """
    operations = images * epochs * OPERATIONS * (TRAINING * student_macs + INFERENCE * teacher_macs)
    return operations / (PEAK * REACHED * 3600)


def forward_macs(path: str) -> float:
    """Multiply-adds of any image classifier for one image, counted by torch on the meta device.

    Args:
        path: folder or Hub id; only its config is read.
    """
    config = AutoConfig.from_pretrained(path)
    side = pair(getattr(config, "image_size", 224))[0]
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
        image = torch.empty(1, getattr(config, "num_channels", 3), side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / OPERATIONS


@dataclass
class Run:
    """One call of the example script.

    Attributes:
        recipe: None without one.
        given: names of the options that were given by hand.
        augmentation: of the training images; None for none.
    """

    recipe: Recipe | None
    given: set[str]
    augmentation: Augmentation | None = None

    @classmethod
    def of(cls, arguments: list[str], folder: Path) -> tuple[Run, list[str]]:
        """The run of a command line, and the command line with the recipe's arguments in front.

        Raises:
            InvalidConfigError: there is no such recipe in ``folder``, or its augmentation needs what is not here.
        """
        given = {word[2:].split("=")[0] for word in arguments if word.startswith("--")}
        joined = next((word for word in arguments if word.startswith("--recipe=")), None)
        if joined is None and "--recipe" not in arguments[:-1]:
            return cls(None, given), arguments
        name = joined.partition("=")[2] if joined else arguments[arguments.index("--recipe") + 1]
        recipe = Recipe.load(folder, name)
        if recipe.augmentation is not None:
            check_available()
        return cls(recipe, given), [*recipe.command_line(), *arguments]

    def stage(self, name: str, args: TrainingArguments) -> dict[str, Any]:
        """What the recipe changes in the arguments of a stage."""
        if self.recipe is None:
            return {}
        return self.recipe.stage(name, self.given, args.train_batch_size, args.world_size)

    def augment(self, train_set: Any, config: PreTrainedConfig) -> None:
        """Prepare the recipe's augmentation: crops in the data set, the rest for the trainers.

        Args:
            train_set: with an image ``processor`` and an ``augment``, both of which are set.
            config: of the model.
        """
        if self.recipe is None or self.recipe.augmentation is None:
            return
        side = pair(config.image_size)[0]
        processor = copy.deepcopy(train_set.processor)
        if getattr(processor, "do_center_crop", False):
            processor.do_center_crop = False
        processor.size = type(processor.size)(height=side, width=side)
        train_set.processor, train_set.augment = processor, RandomCrop(side)
        settings = AugmentationConfig(**self.recipe.augmentation)
        assert config.num_labels is not None
        self.augmentation = Augmentation(settings, processor.image_mean, processor.image_std, config.num_labels)

    def announcement(self, macs: float, images: int, options: Any, args: TrainingArguments) -> list[str]:
        """What is said before a recipe's work starts: what it is of, where it departs, and its GPU hours.

        Args:
            macs: of the dense model for one image.
            images: of the training set.
            options: of the example script.
            args: of the training.
        """
        recipe = self.recipe
        if recipe is None:
            return []
        lines = [f"{recipe.name}: {recipe.published}", *(f"  - {note}" for note in recipe.notes)]
        convnet = forward_macs(options.teacher_name_or_path) if options.teacher_name_or_path else 0.0
        total = 0.0
        for stage in STAGES:
            if not getattr(recipe, stage):
                continue
            epochs = self.stage(stage, args).get("num_train_epochs", args.num_train_epochs)
            own = stage == "tune" and options.distillation != "none"
            own = own or (stage == "learn" and options.method == "nvit")  # the unpruned model teaches
            other = convnet if stage != "learn" or options.teacher_stages == "both" else 0.0
            student = macs * (recipe.tuned_share if stage == "tune" else 1.0)
            hours = gpu_hours(images, epochs, student, other + macs * own)
            total += hours
            lines.append(f"  {stage}: {epochs:g} epochs of {images:,} images, {hours:,.3g} GPU hours")
        lines.append(f"  about {total:,.3g} hours of an A100 at {REACHED:.0%} of its bf16 peak, by calculation")
        return lines
