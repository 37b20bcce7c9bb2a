"""``hf-vitprune report --out``: models loaded, run on images and timed, and a page of it written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.latency.measure import measure_speed
from hf_vitprune.methods import OneShotScores
from hf_vitprune.publish.page import Pictures, budgets_of, compare_answers, write_page
from hf_vitprune.publish.page.shapes import places_of, plan_beside
from hf_vitprune.spec.configs import lineage_of
from hf_vitprune.spec.towers import tower_module
from hf_vitprune.utils.data import load_images

from .saved import load_any_config, load_processor, load_tower, model_class_of

#: images that are drawn; more change percentages by less than a point
NUM_IMAGES = 512


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Folder or Hub id -> the shortest end of it that no other has.

    Raises:
        InvalidConfigError: a model is given twice.
    """
    if len({*models}) < len(models):
        raise InvalidConfigError("a model is given twice: give each once")
    parts = {model: [part for part in model.replace("\\", "/").split("/") if part] or [model] for model in models}
    names = {}
    for model, mine in parts.items():
        for length in range(1, len(mine) + 1):
            if sum(other[-length:] == mine[-length:] for other in parts.values()) == 1:
                break
        names[model] = "/".join(mine[-length:])
    return names


def report_page(
    models: Sequence[str],
    out: Path,
    *,
    images: Path | None,
    data: str | None,
    scores: Path | None,
    image_size: int | None,
    part: str | None,
    batch_size: int,
    rounds: int,
    metrics: Mapping[str, Mapping[str, float]],
) -> Path:
    """Load the models (dense first), compare them, and write the page.

    Args:
        metrics: model -> more columns of the page's table.
    """
    names = short_names(models)
    shapes = {names[model]: load_tower(model, part) for model in models}
    dense, *pruned = shapes
    places = {
        names[model]: places_of(shapes[dense][0], *_remembered(shapes[names[model]]), plan_beside(model))
        for model in models[1:]
    }
    pictures = _pictures(images, data, models[0])
    kept = None if scores is None else OneShotScores.load(scores)
    loaded: dict[str, Any] = {
        names[model]: model_class_of(load_any_config(model)).from_pretrained(model).eval() for model in models
    }
    budgets = []
    if kept is not None:
        kept.check(loaded[dense])
        budgets = budgets_of(kept)
    answers = None
    if pictures is not None:
        answers = compare_answers(loaded, load_processor(models[0]), pictures, part=part, batch_size=batch_size)
    towers = {name: tower_module(model, part) for name, model in loaded.items()}
    timings = measure_speed(towers, batch_size=batch_size, image_size=image_size, rounds=rounds)
    return write_page(
        out,
        {name: architecture for name, (architecture, _) in shapes.items()},
        places,
        image_size=image_size,
        timings=timings,
        budgets=budgets,
        scored_images=0 if kept is None else kept.images,
        answers=answers,
        pictures=pictures,
        metrics={names[model]: row for model, row in metrics.items()},
    )


def _remembered(shape: tuple[Any, Any]) -> tuple[Any, dict[str, Any]]:
    architecture, config = shape
    return architecture, lineage_of(config)


def _pictures(images: Path | None, data: str | None, dense: str) -> Pictures | None:
    if data is not None:
        return Pictures.from_labelled(load_images(data), NUM_IMAGES)
    return None if images is None else Pictures.from_folder(images, NUM_IMAGES)
