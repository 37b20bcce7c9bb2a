"""``hf-vitprune prune``."""

from __future__ import annotations

import shutil
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


TRAIN = ("none", "features", "labels")


class Training(NamedTuple):
    """What ``--train`` says, as in ``features,learning_rate=1e-4,batch_size=16``."""

    on: str | None = None
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
            return cls(TRAIN[TRAIN.index(on)], **values)
        except (KeyError, ValueError) as error:
            raise typer.BadParameter(
                f"{text!r} is not one of {', '.join(TRAIN)}, then learning_rate=..., batch_size=... (numbers above 0)"
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
    given, rate, batch_size = train or Training()
    method = method or (ONE_SHOT if data is None else "vtp")
    on = given or ("none" if data is None else "labels")
    neither = data is None and images is None and scores is None
    refusals: list[tuple[Any, str]] = [
        (neither, "give --data (labelled images: prunes while it trains), --images (a folder without labels) or "
         "--scores (a file of an earlier run)"),
        (data and (images or scores), "--data is for training on labels; --images and --scores are for pruning "
         "without them"),
        (method == ONE_SHOT and data, f"--method {ONE_SHOT} takes no labels: give a folder by --images"),
        (method != ONE_SHOT and not data, f"--method {method} trains on labels: give them by --data"),
        (on == "labels" and not data, "--train labels takes labelled images: give them by --data"),
        (on != "labels" and data, f"--train {on} looks at no labels: give the folder of images by --images"),
        (on == "features" and not images, "--train features takes images, which a file of scores has none of: give "
         "--images"),
        (on == "none" and (steps or rate), "--steps and learning_rate are for a training: add --train features"),
        (part and data, "--part is for a tower of a bigger model, which is pruned with --images or --scores"),
    ]  # fmt: skip
    for wrong, message in refusals:
        if wrong:
            raise typer.BadParameter(message)
    goes_on = on == "features" and is_unfinished(out)
    empty_output(out, force or goes_on, model, data, images, scores)
    if images is not None and scores is not None:
        empty_output(scores, force or goes_on, model, images, file=True)
    if force:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    need_plots()
    goal: dict[str, Any] = {"target": target, "target_metric": target_metric, "latency_table": None}
    if target_metric not in ("macs", "params"):
        goal |= {"target_metric": "latency", "latency_table": Path(target_metric)}
    if uniform:
        goal["uniform"] = True
    if data is not None:
        from .from_labels import prune_from_labels
        from .workflow import Schedule

        learned = None if steps is None else max(1, round(steps * 3 / 13))  # as many of all as epochs by default
        tuned = None if steps is None or learned is None else steps - learned
        learn, tune = (
            Schedule(epochs, rate or 1e-4, batch_size, steps=some) for epochs, some in ((3, learned), (10, tuned))
        )
        prune_from_labels(model, out, data, method, goal, learn, tune, round_to=round_to, new_head=new_head)
        return
    from hf_vitprune.training.recovery import Recovery

    from .from_images import prune_from_images

    settings: dict[str, Any] = {"steps": steps, "learning_rate": rate, "batch_size": batch_size}
    recovery = Recovery(**{name: value for name, value in settings.items() if value is not None})
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
            recovery=recovery if on == "features" else None,
        )
