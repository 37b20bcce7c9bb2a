"""Published training runs as JSON files (``recipes/``), for the scripts beside this file, and their GPU hours."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, TrainingArguments

from hf_vitprune.contrib.augment import Augmentation, AugmentationConfig, RandomCrop, check_available
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.families.base import pair

#: what a GPU hour is here: an A100's dense bf16 operations a second, and the share of them that training reaches
PEAK, REACHED = 312e12, 0.35
#: operations of a multiply-add; of a training step as multiples of a forward pass: forward, and backward twice
OPERATIONS, TRAINING, INFERENCE = 2, 3, 1
#: where the weights are frozen, and gradients of activations are all that goes back
ADAPTING = 2
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
        tasks: settings of the adapter that differ by task, beside those in ``arguments``; a task is then to be named.
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
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

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

    def for_task(self, task: str | None) -> Recipe:
        """With the adapter's settings of the task.

        Raises:
            InvalidConfigError: the recipe has none for it; or it has tasks, and none is named.
        """
        if not self.tasks and task is None:
            return self
        if task not in self.tasks:
            what = "name a task" if task is None else f"nothing is published for {task!r}"
            raise InvalidConfigError(f"{self.name}: {what}; tasks are {', '.join(self.tasks) or 'not told apart'}")
        settings = {**self.arguments.get("adapter_config", {}), **self.tasks[task]}
        return replace(self, arguments={**self.arguments, "adapter_config": settings})

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


def gpu_hours(
    images: int, epochs: float, student_macs: float, teacher_macs: float = 0.0, training: int = TRAINING
) -> float:
    """Hours of one A100 at 35 % of its bf16 peak: operations of training the student, and of running the teachers.

    ``images * epochs * 2 * (training * student + teachers) / (0.35 * 312e12 * 3600)``.

    Args:
        images: of the training set.
        epochs: over it.
        student_macs: multiply-adds of one image, forward.
        teacher_macs: of all teachers together.
        training: forward passes that a step is worth; 2 where the weights are frozen under adapters.
    """
    operations = images * epochs * OPERATIONS * (training * student_macs + INFERENCE * teacher_macs)
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
    def of(cls, arguments: list[str], folder: Path, adapters: bool = False) -> tuple[Run, list[str]]:
        """The run of a command line, and the command line with the recipe's arguments in front.

        Args:
            arguments: of the command line.
            folder: of the recipes.
            adapters: whether the script trains adapters.

        Raises:
            InvalidConfigError: there is no such recipe in ``folder``, it is for another script, or its augmentation
                needs what is not here.
        """
        given = {word[2:].split("=")[0] for word in arguments if word.startswith("--")}
        name = _value("--recipe", arguments)
        if name is None:
            return cls(None, given), arguments
        recipe = Recipe.load(folder, name)
        if ("adapter" in recipe.arguments) != adapters:
            script = "run_image_classification_pruning" if adapters else "run_sls_peft"
            raise InvalidConfigError(f"recipe {name} is for examples/{script}.py")
        recipe = recipe.for_task(_value("--task", arguments))
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
        teacher = getattr(options, "teacher_name_or_path", None)
        convnet = forward_macs(teacher) if teacher else 0.0
        adapted = hasattr(options, "adapter")
        total = 0.0
        for stage in STAGES:
            if not getattr(recipe, stage):
                continue
            epochs = self.stage(stage, args).get("num_train_epochs", args.num_train_epochs)
            # the unpruned model teaches
            own = not adapted and (options.distillation != "none" if stage == "tune" else options.method == "nvit")
            other = convnet if adapted or stage != "learn" or options.teacher_stages == "both" else 0.0
            student = macs * (recipe.tuned_share if stage == "tune" else 1.0)
            training = ADAPTING if adapted else TRAINING
            hours = gpu_hours(images, epochs, student, other + macs * own, training)
            total += hours
            lines.append(f"  {stage}: {epochs:g} epochs of {images:,} images, {hours:,.3g} GPU hours")
        lines.append(f"  about {total:,.3g} hours of an A100 at {REACHED:.0%} of its bf16 peak, by calculation")
        return lines


def _value(option: str, arguments: list[str]) -> str | None:
    """What is given for an option, as ``--option value`` or ``--option=value``."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
