"""Pruning while it trains: labelled images to a small, fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoImageProcessor, set_seed

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.latency.measure import device_name
from hf_vitprune.losses.distillation import DistillationConfig
from hf_vitprune.methods import config_class_of, method_names
from hf_vitprune.publish.report import comparison_table
from hf_vitprune.utils.data import load_images

from .app import say
from .classifier import load_classifier
from .workflow import Schedule, compare, prune_and_tune, save_result


def prune_from_labels(
    model: str,
    out: Path,
    data: str,
    method: str,
    goal: dict[str, Any],
    learn: Schedule,
    tune: Schedule,
    *,
    round_to: int,
    new_head: bool,
) -> None:
    """Learn what to prune, prune, fine-tune, save, and print what came of it.

    Args:
        model: folder or Hub id of an image classifier.
        out: folder for the pruned model.
        data: what ``load_images`` takes.
        method: name of a registered method.
        goal: ``target``, ``target_metric``, ``latency_table``.
        learn: schedule of the training that decides.
        tune: of the fine-tuning; of 0 steps for none.
        round_to: kept sizes are multiples of it.
        new_head: replace the classifier by a fresh one for the data's classes.

    Raises:
        InvalidConfigError: an unknown method, or an impossible goal.
        InvalidDataError: data without labelled images, or of other classes than the classifier's.
    """
    config_class = config_class_of(method)
    if not config_class.takes_target:
        raise InvalidConfigError(f"{method} has no target to prune to; one of {', '.join(method_names())}, oneshot")
    config = config_class.from_goal(**goal, round_to=round_to)
    set_seed(learn.seed)
    images = load_images(data, seed=learn.seed)
    say(images.one_line)
    classifier, images = load_classifier(model, images, new_head)
    if images.match is not None and images.match.how:
        say(images.match.how)
    processor = AutoImageProcessor.from_pretrained(model)
    train_set, eval_set = images.processed(processor)
    result = prune_and_tune(
        classifier,
        config,
        train_set,
        eval_set,
        learn=learn,
        tune=None if tune.steps == 0 else tune,
        distillation=DistillationConfig(),
        fresh_head=new_head,
    )
    rows, timings = compare(classifier, result.accuracy["dense"], {config.method_name: result}, batch_size=8)
    pair = {"before": timings["dense"], "after": timings[config.method_name]}
    save_result(out, result, processor, pair, dataset=images.source, base_model=model)
    Console().print(comparison_table(rows, title=f"{model} on {data}, measured on {device_name()}, batch 8"))
    say(f"saved to {out}")
