"""Pruning while it trains: labelled images to a small, fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, set_seed

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.losses.distillation import DistillationConfig
from hf_vitprune.methods import config_class_of, method_names
from hf_vitprune.utils.data import load_images

from .app import say
from .classifier import load_classifier
from .workflow import Schedule, finish, prune_and_tune


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
    """Learn what to prune, prune, fine-tune (but for 0 steps), save, and print what came of it.

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
    result = prune_and_tune(
        classifier,
        config,
        *images.processed(processor),
        learn=learn,
        tune=None if tune.steps == 0 else tune,
        distillation=DistillationConfig(),
        fresh_head=new_head,
    )
    finish(model, out, classifier, config.method_name, result, processor, images.source, timed=True)
    say(f"saved to {out}")
