"""The whole way on one machine without a download: pretrain, adapt, prune, retrain, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_vitprune.errors import MissingExtraError, VitPruneError

from ..common import once
from .pretrain import SOURCE, Backbone, pretrain
from .pruning import Choice
from .settings import Machine, Recipe, Run, Settings
from .sweep import run_sweep, runs_of

TASKS = ("dsprites_loc", "dsprites_ori", "digits")
PRUNINGS = ("none", "sls", "truncate:k=random", "truncate:k=sls", "depgraph")


@dataclass(frozen=True)
class Local:
    """Sizes of the run; the defaults take about 25 minutes on one core.

    ``source_images`` and ``source_recipe`` are of the pretraining, ``recipe`` of adaptation and retraining, ``rank``
    of LoRA, ``seeds`` of the adaptation.
    """

    source_images: int = 20_000
    source_recipe: Recipe = field(default_factory=lambda: Recipe(8, 1, 1e-3, 0.05, 32))
    recipe: Recipe = field(default_factory=lambda: Recipe(30, 3, 3e-3, 1e-4, 64))
    test_limit: int = 2000
    rank: int = 8
    seeds: tuple[int, ...] = (42,)
    backbone: Backbone = field(default_factory=Backbone)

    def settings(self, model: Path) -> Settings:
        return Settings(
            model=str(model),
            recipe=self.recipe,
            rank=self.rank,
            selection=False,
            test_limit=self.test_limit,
            source="local",
        )


def source_model(local: Local, folder: Path, machine: Machine, console: Console) -> Path:
    """The pretrained model's folder; it is made when it is not there."""
    wanted = {"source": SOURCE, "images": local.source_images, "epochs": local.source_recipe.epochs}
    wanted |= asdict(local.backbone)

    def record() -> dict[str, Any]:
        reached, trained = pretrain(
            folder,
            images=local.source_images,
            recipe=local.source_recipe,
            seed=0,
            machine=machine,
            backbone=local.backbone,
        )
        console.print(f"pretrained on {SOURCE}: {reached:.1%} on other images, {trained.seconds:.0f} s")
        return {**wanted, "accuracy": reached, "seconds": trained.seconds}

    known = once(folder / "pretraining.json", record)  # written last
    if any(known[name] != value for name, value in wanted.items()):
        raise VitPruneError(f"{folder} was pretrained with other sizes: use another --output")
    return folder


def note_on_model(output: Path) -> list[str]:
    """What a report has to say of the model that was pretrained here, if it was."""
    note = output / "source-model" / "pretraining.json"
    if not note.is_file():
        return []
    record = json.loads(note.read_text(encoding="utf-8"))
    return [
        f"- The model is a small ViT pretrained here, in {record['seconds']:.0f} s, on {record['images']} images of "
        f"{record['source']} ({record['accuracy']:.1%} on others of them); numbers do not compare with published ones."
    ]


def possible(prunings: Sequence[str], console: Console) -> list[str]:
    """Those that this installation has the packages for; the console is told of the others."""
    there = []
    for label in prunings:
        try:
            Choice.parse(label).check_available()
        except MissingExtraError as error:
            console.print(f"[yellow]without {label}: {error}[/]")
            continue
        there.append(label)
    return there


def run_local(
    local: Local, tasks: Sequence[str], output: Path, machine: Machine, console: Console
) -> list[tuple[Run, VitPruneError]]:
    """Pretrain and sweep; started again, it goes on where it was.

    Returns:
        The runs that could not be done.
    """
    model = source_model(local, output / "source-model", machine, console)
    runs = runs_of(tasks, ["lora"], possible(PRUNINGS, console), local.seeds)
    return run_sweep(local.settings(model), runs, Path("data/vtab-1k"), output, machine, console)


def shortened(local: Local, epochs: int | None, source_images: int | None) -> Local:
    """With other lengths, the rest in proportion."""
    recipe = local.recipe if epochs is None else local.recipe.of_length(epochs)
    return replace(local, recipe=recipe, source_images=source_images or local.source_images)
