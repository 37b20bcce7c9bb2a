"""``hf-vitprune report --out``: models loaded, run on images and timed, and a page of it written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.latency.measure import measure_speed
from hf_vitprune.methods import OneShotScores
from hf_vitprune.publish.page import Pictures, budgets_of, compare_answers, write_page
from hf_vitprune.publish.page.shapes import places_of, plan_beside
from hf_vitprune.spec.configs import lineage_of
from hf_vitprune.spec.towers import tower_module
from hf_vitprune.utils.data import load_images

from .classifier import aligned
from .saved import load_any_config, load_model, load_processor, load_tower, model_class_of

#: images that are drawn; more change percentages by less than a point
NUM_IMAGES = 512
#: pruned models that colours tell apart
MOST = 6


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
    """Load the models (dense first), compare them, and write the page; ``metrics``: more columns of its table.

    Raises:
        InvalidConfigError: a model is given twice, or there are more than colours can tell apart.
        ModelMismatchError: one was not made from the dense model.
        InvalidDataError, UnsupportedModelError: images or scores do not go with the models.
    """
    if len(models) > MOST + 1:
        raise InvalidConfigError(f"a page shows up to {MOST} pruned models, not {len(models) - 1}: give fewer")
    names = short_names(models)
    dense, *pruned = names.values()
    architectures, places = {}, {}
    for model, name in names.items():
        architectures[name], config = load_tower(model, part)
        if name != dense:
            known = lineage_of(config), plan_beside(model)
            places[name] = places_of(architectures[dense], architectures[name], *known)
    if images is not None or data is not None:
        architectures[dense].check_looks("a page of images")
    labelled = None
    if data is not None:
        labelled = load_images(data, training=False)
        if "ForImageClassification" in model_class_of(load_any_config(models[0])).__name__:
            labelled = aligned(labelled, models[0])
    pictures = None if labelled is None else Pictures.from_labelled(labelled, NUM_IMAGES)
    if images is not None:
        pictures = Pictures.from_folder(images, NUM_IMAGES)
    kept = None if scores is None else OneShotScores.load(scores)
    loaded = {name: load_model(model) for model, name in names.items()}
    if labelled is not None and labelled.match is not None and not labelled.match.named:
        for one in loaded.values():
            one.config.id2label = dict(enumerate(labelled.label_names))
    if kept is not None:
        kept.check(loaded[dense])
    answers = timings = None
    if pictures is not None:
        answers = compare_answers(loaded, load_processor(models[0]), pictures, part=part, batch_size=batch_size)
    if architectures[dense].family.reads == "images":
        towers = {name: tower_module(model, part) for name, model in loaded.items()}
        timings = measure_speed(towers, batch_size=batch_size, image_size=image_size, rounds=rounds)
    return write_page(
        out,
        architectures,
        {name: where for name, (where, _) in places.items()},
        image_size=image_size,
        timings=timings,
        budgets=[] if kept is None else budgets_of(kept),
        scored_images=0 if kept is None else kept.images,
        answers=answers,
        pictures=pictures,
        metrics={names[model]: row for model, row in metrics.items()},
        guessed=[name for name, (_, known) in places.items() if not known],
    )
