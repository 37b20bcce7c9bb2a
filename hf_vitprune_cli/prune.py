"""``hf-vitprune prune``."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import ForceOption, ModelArgument, OutArgument, empty_output


def _grouped(panel: str, help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


_source = partial(_grouped, "What it learns from: one of these")
_goal = partial(_grouped, "What remains")
_training = partial(_grouped, "Training")


#: the method that needs no labels and no training
ONE_SHOT = "oneshot"


class Metric(StrEnum):
    """What ``--target`` counts."""

    macs = "macs"
    params = "params"
    latency = "latency"


def prune(
    model: ModelArgument,
    out: OutArgument,
    data: Annotated[
        str | None, _source("Labelled: digits, a folder with one sub-folder a class, or a Hub dataset.")
    ] = None,
    images: Annotated[Path | None, _source("Folder of images without labels; 128 of them are used.")] = None,
    scores: Annotated[
        Path | None, _source("File of one-shot scores: read; with --images, written and kept for other targets.")
    ] = None,
    method: Annotated[
        str | None, _goal(f"vtp (by default with --data), nvit, spvit, ... or {ONE_SHOT} (without labels).")
    ] = None,
    target: Annotated[float, _goal("Fraction of the cost that may remain, in (0, 1).")] = 0.5,
    target_metric: Annotated[Metric, _goal("What target counts.")] = Metric.macs,
    latency_table: Annotated[Path | None, _goal("For latency: what hf-vitprune latency made.")] = None,
    round_to: Annotated[int, _goal("Kept sizes are multiples of this (of heads: any).", min=1)] = 8,
    epochs: Annotated[
        tuple[float, float], _training("Epochs that learn what to prune, and of fine-tuning.", metavar="LEARN TUNE")
    ] = (3.0, 10.0),
    learning_rate: Annotated[float, _training("Peak learning rate.")] = 1e-4,
    batch_size: Annotated[int, _training("Images a step, or a forward pass.", min=1)] = 32,
    new_head: Annotated[bool, _training("A new classifier, for the data's classes.", "--new-head")] = False,
    force: ForceOption = False,
) -> None:
    """Prune an image classifier, and save a model folder with a card.

    With --data: learn what to prune, prune, fine-tune. With --images: without labels or training, in seconds to
    minutes. With --scores of an earlier run: to another target, in seconds.
    """
    method = _method(method, data, images, scores)
    written = [out] if images is None or scores is None else [out, scores]
    for path in written:
        empty_output(path, force)
    goal = {"target": target, "target_metric": target_metric.value, "latency_table": latency_table}
    if data is None:
        from .from_images import prune_from_images

        prune_from_images(model, out, images, scores, goal, round_to=round_to, batch_size=batch_size)
        return
    from .from_labels import prune_from_labels
    from .workflow import Schedule

    learn, tune = (Schedule(number, learning_rate, batch_size) for number in epochs)
    prune_from_labels(model, out, data, method, goal, learn, tune, round_to=round_to, new_head=new_head)


def _method(method: str | None, data: str | None, images: Path | None, scores: Path | None) -> str:
    """The method that goes with what it is given to learn from.

    Raises:
        UsageError: it is given nothing, two things, or not what the method takes.
    """
    if data is None and images is None and scores is None:
        raise typer.BadParameter(
            "give --data (labelled images: prunes while it trains), --images (a folder, no labels, no training) or "
            "--scores (a file of an earlier run)"
        )
    if data is not None and (images is not None or scores is not None):
        raise typer.BadParameter("--data is for training; --images and --scores are for pruning without it")
    chosen = method or (ONE_SHOT if data is None else "vtp")
    if chosen == ONE_SHOT and data is not None:
        raise typer.BadParameter(f"--method {ONE_SHOT} takes no labels: give a folder by --images")
    if chosen != ONE_SHOT and data is None:
        raise typer.BadParameter(f"--method {chosen} trains on labels: give them by --data")
    return chosen
