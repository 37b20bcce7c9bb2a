"""What the example scripts ask of their data and of the folder that they write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments

from hf_vitprune.utils.data import DIGITS, LabelledImages, load_images
from hf_vitprune.utils.sources import Source
from hf_vitprune_cli.app import empty_output


@dataclass
class DataArguments:
    """What to learn from."""

    dataset: str = field(
        default=DIGITS, metadata={"help": "digits, a folder with one sub-folder a class, or a Hub dataset"}
    )
    train_split: str | None = field(default=None, metadata={"help": "training split; 'train' by default"})
    eval_split: str | None = field(
        default=None, metadata={"help": "evaluation split; found, or split off, by default"}
    )
    image_column: str | None = field(default=None, metadata={"help": "column with the images; found by default"})
    label_column: str | None = field(default=None, metadata={"help": "column with the labels; found by default"})
    classes: str | None = field(
        default=None, metadata={"help": "file with the names of the classes to use, one a line; all by default"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only so many training images, drawn at random from every class"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "so many evaluation images, drawn alike"})
    force: bool = field(default=False, metadata={"help": "overwrite what is in output_dir"})

    @property
    def name(self) -> str:
        """Of the data, without what is said of its splits and columns."""
        return Source.parse(self.dataset).name

    @property
    def in_memory(self) -> bool:
        """Whether all of it may be kept in memory, processed."""
        return Source.parse(self.dataset).is_built_in

    def load(self, seed: int) -> LabelledImages:
        """All images of the data, or of the classes that are asked for; errors as ``load_images``, ``of_classes``."""
        images = load_images(
            self.dataset,
            train_split=self.train_split,
            eval_split=self.eval_split,
            image_column=self.image_column,
            label_column=self.label_column,
            seed=seed,
        )
        if self.classes is not None:
            images = images.of_classes(Path(self.classes).read_text().split())
        return images

    def drawn(self, images: LabelledImages, seed: int) -> LabelledImages:
        """As many of them as are asked for."""
        return images.at_most(self.max_train_samples, self.max_eval_samples, seed)

    def check_output(self, args: TrainingArguments, model: str | None) -> None:
        """Refuse (FileExistsError) to write over anything; a run that goes on finds its own checkpoints there."""
        if PartialState().is_main_process:  # the others may come late, and find what this one wrote
            force = self.force or bool(args.resume_from_checkpoint)
            empty_output(Path(args.output_dir or "."), force, model, self.name)
