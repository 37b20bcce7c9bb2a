"""``hf-vitprune prune``."""

from __future__ import annotations

import shutil
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from .app import (
    UNFINISHED,
    ForceOption,
    ModelArgument,
    OutArgument,
    PartOption,
    empty_output,
    grouped,
    is_unfinished,
    need_plots,
)

_source = partial(grouped, "What it learns from: one of these")
_goal = partial(grouped, "What remains")
_training = partial(grouped, "Training")


#: the method that needs no labels and no training
ONE_SHOT = "oneshot"


class Train(StrEnum):
    """What the small model learns from."""

    none = "none"
    features = "features"
    labels = "labels"


class Training(NamedTuple):
    """What ``--train`` says, as in ``features,learning_rate=1e-4,batch_size=16``."""

    on: Train | None = None
    learning_rate: float | None = None
    batch_size: int = 32

    @classmethod
    def parse(cls, text: str) -> Training:
        on, *settings = text.split(",")
        pairs = [setting.partition("=")[::2] for setting in settings]
        kinds: dict[str, Any] = {"learning_rate": float, "batch_size": int}
        try:
            values = {name: kinds[name](value) for name, value in pairs}
            if len(values) < len(pairs) or any(not value > 0 for value in values.values()):
                raise ValueError("twice, or not above 0")
            return cls(Train(on), **values)
        except (KeyError, ValueError) as error:
            raise typer.BadParameter(
                f"{text!r} is not one of {', '.join(Train)}, then learning_rate=..., batch_size=... (numbers above 0)"
            ) from error


def prune(
    model: ModelArgument,
    out: OutArgument,
    data: Annotated[
        str | None,
        _source("Labelled images: digits, a folder with a sub-folder a class, or a Hub dataset[,label=...]."),
    ] = None,
    images: Annotated[
        Path | None, _source("Folder of images without labels; 512 of them are used, 1,024 to train on features.")
    ] = None,
    scores: Annotated[
        Path | None, _source("File of one-shot scores: read; with --images, written and kept for other targets.")
    ] = None,
    method: Annotated[
        str | None, _goal(f"vtp (by default with --data), nvit, spvit, ... or {ONE_SHOT} (without labels).")
    ] = None,
    target: Annotated[float, _goal("Fraction of the cost that may remain, in (0, 1).")] = 0.5,
    target_metric: Annotated[
        str, _goal("What target counts: macs, params, or latency by a file that hf-vitprune latency made.")
    ] = "macs",
    round_to: Annotated[int, _goal("Kept sizes are multiples of this (of heads: any).", min=1)] = 8,
    uniform: Annotated[
        bool, _goal("The same sizes in every layer: a stock model, which loads without hf_vitprune.", "--uniform")
    ] = False,
    train: Annotated[
        Training | None,
        _training(
            "none (by default with --images), features of the dense model, or labels (by default with --data). With "
            "settings: features,learning_rate=1e-5,batch_size=32 (these; 1e-4 on labels).",
            parser=Training.parse,
            metavar="<none|features|labels>[,...]",
        ),
    ] = None,
    steps: Annotated[
        int | None, _training("Training steps; by default 300 on features, and 13 epochs on labels.", min=1)
    ] = None,
    new_head: Annotated[bool, _training("A new classifier, for the data's classes.", "--new-head")] = False,
    part: PartOption = None,
    force: ForceOption = False,
) -> None:
    """Prune a vision model, or (without labels) a tower of a bigger one, and save a model folder.

    With --data: learn what to prune, prune, fine-tune. With --images: without labels, and without training unless
    --train features, in seconds to minutes; the same command goes on with a training that was cut off. With --scores
    of an earlier run: to another target, in seconds. Layers of a model that is larger than the memory are read from
    the disk one at a time.
    """
    method = _method(method, data, images, scores)
    on, rate, batch_size = train or Training()
    on = _train(on, data, images, steps or rate)
    going_on = on == Train.features and is_unfinished(out)
    empty_output(out, force or going_on, model, data, images, scores)
    if images is not None and scores is not None:
        empty_output(scores, force or going_on, model, images, file=True)
    if force:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    if part is not None and data is not None:
        raise typer.BadParameter("--part is for a tower of a bigger model, which is pruned with --images or --scores")
    need_plots()
    table = None if target_metric in ("macs", "params") else Path(target_metric)
    goal: dict[str, Any] = {
        "target": target,
        "target_metric": target_metric if table is None else "latency",
        "latency_table": table,
    }
    goal |= {"uniform": True} if uniform else {}
    if data is None:
        from hf_vitprune.training.recovery import Recovery

        from .from_images import prune_from_images

        given: dict[str, Any] = {"steps": steps, "learning_rate": rate}
        recovery = Recovery(
            batch_size=batch_size, **{name: value for name, value in given.items() if value is not None}
        )
        with TemporaryDirectory() as copies:
            prune_from_images(
                model,
                out,
                images,
                scores,
                goal,
                round_to=round_to,
                batch_size=batch_size,
                part=part,
                copies=copies,
                recovery=recovery if on == Train.features else None,
            )
        return
    from .from_labels import prune_from_labels
    from .workflow import Schedule

    learn, tune = (Schedule(number, rate or 1e-4, batch_size, steps=share) for number, share in _shares(steps))
    prune_from_labels(model, out, data, method, goal, learn, tune, round_to=round_to, new_head=new_head)


def _shares(steps: int | None) -> list[tuple[float, int | None]]:
    """(epochs, steps) that learn what to prune, and of fine-tuning: three parts, and ten."""
    if steps is None:
        return [(3.0, None), (10.0, None)]
    learn = max(1, round(steps * 3 / 13))
    return [(3.0, learn), (10.0, steps - learn)]


def _train(train: Train | None, data: str | None, images: Path | None, trains: float | None) -> Train:
    """What it is trained on, which goes with what it is given.

    Raises:
        UsageError: it is not given what that takes.
    """
    chosen = train or (Train.none if data is None else Train.labels)
    if chosen == Train.labels and data is None:
        raise typer.BadParameter("--train labels takes labelled images: give them by --data")
    if chosen != Train.labels and data is not None:
        raise typer.BadParameter(f"--train {chosen} looks at no labels: give the folder of images by --images")
    if chosen == Train.features and images is None:
        raise typer.BadParameter("--train features takes images, which a file of scores has none of: give --images")
    if chosen == Train.none and trains is not None:
        raise typer.BadParameter("--steps and learning_rate are for a training: add --train features")
    return chosen


def _method(method: str | None, data: str | None, images: Path | None, scores: Path | None) -> str:
    """The method that goes with what it is given to learn from.

    Raises:
        UsageError: it is given nothing, two things, or not what the method takes.
    """
    if data is None and images is None and scores is None:
        raise typer.BadParameter(
            "give --data (labelled images: prunes while it trains), --images (a folder without labels) or "
            "--scores (a file of an earlier run)"
        )
    if data is not None and (images is not None or scores is not None):
        raise typer.BadParameter(
            "--data is for training on labels; --images and --scores are for pruning without them"
        )
    chosen = method or (ONE_SHOT if data is None else "vtp")
    if chosen == ONE_SHOT and data is not None:
        raise typer.BadParameter(f"--method {ONE_SHOT} takes no labels: give a folder by --images")
    if chosen != ONE_SHOT and data is None:
        raise typer.BadParameter(f"--method {chosen} trains on labels: give them by --data")
    return chosen
