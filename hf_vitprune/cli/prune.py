"""``hf-vitprune prune`` and ``hf-vitprune demo``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidConfigError

if TYPE_CHECKING:
    from ..methods import PruningConfig

METHODS = ("vtp", "nvit", "spvit")
ONE_SHOT = "oneshot"
TRAIN = ("full", "none")


def prune(
    model: Annotated[str | None, typer.Argument(help="Model folder or Hub id of an image classifier.")] = None,
    data: Annotated[
        str | None,
        typer.Argument(help="'digits', a folder with one sub-folder a class, or a Hub dataset."),
    ] = None,
    output: Annotated[
        Path | None, typer.Argument(help="Folder for the pruned model; by default named after model and target.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The same as OUTPUT.")] = None,
    train: Annotated[
        str | None,
        typer.Option(help="full, or none: no training and no labels; by default none with --images or --scores."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="For --train none: a folder of images, in sub-folders or not. No labels.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="How many of --images are used, drawn by --seed.", min=1)] = 128,
    scores: Annotated[
        Path | None, typer.Option(help="For --train none: what --save-scores wrote, in place of --images.")
    ] = None,
    save_scores: Annotated[
        Path | None, typer.Option(help="Keep the scores here (safetensors), to cut the model to other targets.")
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}; vtp by default.")] = None,
    target: Annotated[float, typer.Option(help="Fraction of the cost that may remain, in (0, 1).")] = 0.5,
    target_metric: Annotated[str, typer.Option(help="What target counts: macs, params or latency.")] = "macs",
    latency_table: Annotated[
        Path | None, typer.Option(help="For --target-metric latency: a table made by hf-vitprune latency.")
    ] = None,
    latency_batch_size: Annotated[int | None, typer.Option(help="Refuse a table of another batch size.")] = None,
    allow_other_device: Annotated[bool, typer.Option(help="The table is of another device than this one.")] = False,
    round_to: Annotated[int, typer.Option(help="Kept sizes are multiples of this (of heads: any).")] = 8,
    epochs: Annotated[float, typer.Option(help="Epochs of the training that learns what to prune.")] = 3.0,
    tune_epochs: Annotated[float, typer.Option(help="Epochs of fine-tuning after it; 0 for none.")] = 10.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of both.")] = 1e-4,
    gate_learning_rate: Annotated[
        float | None, typer.Option(help="Of the importance scores (vtp: 1e-2) or gates (spvit: 1e-3).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step, or a forward pass.")] = 32,
    new_head: Annotated[bool, typer.Option(help="Replace the classifier by one for the data's classes.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="For --train none: overwrite what is in OUTPUT.")] = False,
) -> None:
    """Prune an image classifier, and save a model folder with a card.

    MODEL DATA OUTPUT, with labels: learn what to prune, prune, fine-tune. MODEL OUTPUT --images FOLDER (--train none):
    from unlabelled images alone, without training, in seconds to minutes; then --scores FILE for other targets.
    """
    _prune(SimpleNamespace(**locals()))


def _prune(o: Any) -> None:
    """``o``: the arguments and options of ``prune``."""
    names = ("target", "target_metric", "latency_table", "latency_batch_size", "allow_other_device")
    goal = {name: getattr(o, name) for name in names}
    unlabelled = o.images is not None or o.scores is not None
    if o.train not in (None, *TRAIN):
        raise InvalidConfigError(f"--train is one of {', '.join(TRAIN)}, not {o.train!r}")
    if o.train == "none" or (o.train is None and unlabelled):
        if o.method not in (None, ONE_SHOT):
            raise InvalidConfigError(f"--method {o.method} trains; leave it out with --train none")
        if o.output is not None or (o.data is not None and o.out is not None):
            raise InvalidConfigError(f"--train none takes no labels: leave out {o.data!r}, images come from --images")
        _one_shot(o, goal)
        return
    if unlabelled or o.save_scores is not None:
        raise InvalidConfigError("--images, --scores and --save-scores are for --train none")
    if o.model is None or o.data is None or (o.output or o.out) is None:
        raise InvalidConfigError(
            "give MODEL, DATA and OUTPUT to prune with training, or MODEL and --images FOLDER to prune without"
        )
    _train_and_prune(o, goal)


def _one_shot(o: Any, goal: dict[str, Any]) -> None:
    from .one_shot import OneShotRun

    out = o.out if o.data is None else Path(o.data)
    images = o.images, o.num_images, o.scores, o.save_scores
    OneShotRun(o.model, out, *images, goal, o.round_to, o.batch_size, o.seed, o.force).run()


def _train_and_prune(o: Any, goal: dict[str, Any]) -> None:
    from rich.console import Console
    from transformers import AutoImageProcessor, set_seed

    from ..latency.measure import device_name
    from ..losses.distillation import DistillationConfig
    from ..publish.report import comparison_table
    from ..utils.data import load_images
    from .workflow import Schedule, compare, prune_and_tune, save_result

    method = o.method or METHODS[0]
    if method not in METHODS:
        raise InvalidConfigError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    config = _config(method, goal, o.round_to, o.gate_learning_rate)
    set_seed(o.seed)
    images = load_images(o.data, seed=o.seed)
    classifier = _classifier(o.model, images.label_names, o.new_head)
    processor = AutoImageProcessor.from_pretrained(o.model)
    train_set, eval_set = images.processed(processor)
    learn = Schedule(o.epochs, o.learning_rate, o.batch_size, seed=o.seed)
    tune = Schedule(o.tune_epochs, o.learning_rate, o.batch_size, seed=o.seed) if o.tune_epochs else None
    result = prune_and_tune(
        classifier, config, train_set, eval_set, learn=learn, tune=tune, distillation=DistillationConfig()
    )
    rows, timings = compare(classifier, result.accuracy["dense"], {config.method_name: result}, batch_size=8)
    pair = {"before": timings["dense"], "after": timings[config.method_name]}
    output = o.output or o.out
    save_result(output, result, processor, pair, dataset=o.data, base_model=o.model)
    Console().print(comparison_table(rows, title=f"{o.model} on {o.data}, measured on {device_name()}, batch 8"))
    Console().print(f"saved to {output}")


def _config(method: str, goal: dict[str, Any], round_to: int, gate_learning_rate: float | None) -> PruningConfig:
    from ..methods import NViTConfig, SPViTConfig, VTPConfig

    if method == "spvit":
        rate: dict[str, Any] = {} if gate_learning_rate is None else {"gate_learning_rate": gate_learning_rate}
        return SPViTConfig(**goal, round_to=round_to, **rate)

    if method == "nvit":
        sizes = {unit: round_to for unit in ("embedding", "qk", "v", "mlp")}
        return NViTConfig(**goal, group_sizes={**sizes, "heads": 1})
    return VTPConfig(**goal, round_to=round_to, gate_learning_rate=gate_learning_rate or 1e-2)


def _classifier(model: str, label_names: list[str], new_head: bool) -> Any:
    """The image classifier, with the data's classes.

    Raises:
        InvalidConfigError: its classes are not the data's, and no new head is asked for.
    """
    from transformers import AutoModelForImageClassification

    names = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    if new_head:
        return AutoModelForImageClassification.from_pretrained(model, ignore_mismatched_sizes=True, **names)
    classifier = AutoModelForImageClassification.from_pretrained(model)
    if classifier.config.num_labels != len(label_names):
        raise InvalidConfigError(
            f"{model} has {classifier.config.num_labels} classes and the data {len(label_names)}: fine-tune the model "
            "first, or pass --new-head"
        )
    return classifier


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pruned models.")] = Path("hf-vitprune-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train a small ViT on real digits, prune it by every method, save, load back, and print a table (3 minutes)."""
    from .demo import run_demo

    run_demo(output, seed)
