"""Model cards: what the model is, how it was pruned, what that changed, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..cost import count
from ..errors import InvalidConfigError
from ..families.base import pair
from ..modeling.peft_twin import is_peft
from ..plan.lineage import lineage_of, plain_name
from ..spec.architecture import Architecture, dense_of, unwrap
from ..spec.configs import is_pruned
from ..spec.towers import pruned_tower
from .report import comparison_markdown, human, layer_markdown
from .snippet import Beside, how_to_use, pipeline_tag

if TYPE_CHECKING:
    from ..latency.measure import Timing

#: the file that a card is
CARD = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
#: parts of a record's info that say nothing to a reader, or have a place of their own
_INTERNAL = ("base_model", "base_folder", "plan", "altered_weights", "dense", "custom", "history", "training")
_TIMES = ("once", "twice")


def model_card(
    model: Any,
    *,
    base_model: str | None = None,
    info: Mapping[str, Any] | None = None,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    dataset: str | None = None,
    dataset_split: str | None = None,
    timings: Mapping[str, Timing] | None = None,
    dense: Any = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    repo_id: str | None = None,
    part: str | None = None,
    author: str | None = None,
    eval_results: Sequence[EvalResult] = (),
    plot: str | None = None,
    beside: Beside | None = None,
) -> ModelCard:
    """A card for a pruned model, a bigger one with a pruned tower in it, or for its native export.

    Args:
        model: the model, or a PeftModel over one; its weights are not read.
        base_model: Hub id of the model it was made from, or the folder, of which the card says the name alone; by
            default what its config remembers.
        info: method and settings, for instance ``plan.info``; by default what its config remembers.
        before: metrics of the model that was pruned (``{"accuracy": 0.81}``): of ``dense``, or what was pruned last.
        after: metrics of this model; they also go into the card's ``model-index``.
        dataset: Hub id or name of the data that the metrics were measured on (of a folder only the name is shown);
            needed with ``after``.
        dataset_split: its split.
        timings: what ``measure_speed({"before": dense_model, "after": model})`` gave.
        dense: the dense model or its Architecture; by default what the model's config remembers.
        license: of the base model, when known: a pruned model is a derived work of it.
        tags: more tags, beside ``hf_vitprune``, ``pruning`` and the family.
        repo_id: where the model will be; for the title and the loading example.
        part: which tower of a bigger model the card is about; by default its only one, or the only pruned one.
        author: who made it.
        eval_results: more of the ``model-index``, of an earlier card for instance; ``after`` goes before them.
        plot: file name, beside the card, of a figure of what is kept.
        beside: what else is saved with the model; by default nothing that an example could use.

    Raises:
        InvalidConfigError: metrics without a dataset, or timings without ``before`` and ``after``.
        UnsupportedModelError: no family is registered for the model, or several towers are pruned and no ``part``.
    """
    if after and not dataset:
        raise InvalidConfigError("metrics need the name of the dataset they were measured on: pass dataset=...")
    if timings is not None and not {"before", "after"} <= timings.keys():
        raise InvalidConfigError(f"timings has 'before' and 'after', got {', '.join(timings) or 'nothing'}")
    dataset = plain_name(dataset) if dataset else None
    whole, model, beside = model, unwrap(model), beside or Beside()
    beside = replace(beside, adapter=is_peft(whole) or beside.adapter)
    tower = pruned_tower(model, part)
    architecture = Architecture.of(model, tower.part if tower.path else None)
    config = model.get_submodule(tower.path).config
    remembered, pruned = lineage_of(config), is_pruned(config)
    source = base_model or remembered.get("base_model") or remembered.get("base_folder")
    trained, task = remembered.get("training") or [], pipeline_tag(model)
    name = repo_id.split("/")[-1] if repo_id else type(model).__name__
    # what the Hub calls the way from the base model to this one; it has no word for pruning
    relation = "adapter" if beside.adapter else "finetune" if trained else None
    data = ModelCardData(
        base_model=hub_id(source),
        base_model_relation=relation if hub_id(source) else None,
        datasets=hub_id(dataset),
        library_name="peft" if beside.adapter else "transformers",
        license=license,
        model_name=name,
        pipeline_tag=task,
        tags=["hf_vitprune", *(["pruning"] if pruned else []), architecture.model_type, *tags],
        eval_results=_eval_results(after or {}, task, dataset, dataset_split, eval_results) or None,
    )
    if dense is None:
        reference = dense_of(config, architecture.task).replace(part=architecture.part)
    else:
        reference = Architecture.given(dense, architecture.part)
    known = None if reference == architecture else reference
    rows = _rows(architecture, known, remembered, (before, after), timings, dense is not None, dataset)
    install, snippets = how_to_use(whole, config, repo_id, beside)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        pruned=pruned,
        part=architecture.part,
        kind=architecture.model_type,
        remains=_remains(architecture, known),
        source=Path(source).name if isinstance(source, str) else None,
        trained=("; then ".join(map(_stage, trained)) or "none on record") if remembered else None,
        dataset=f"{dataset} ({dataset_split})" if dataset and dataset_split else dataset,
        author=author,
        plot=plot,
        install=install,
        snippets="\n\nThe model alone:\n\n".join(f"```python\n{code}\n```" for code in snippets),
        results=comparison_markdown(rows) if len(rows) > 1 or after or timings else "",
        after=after,
        timing=None if timings is None else _timing(timings["after"]),
        settings=list(_settings(remembered if info is None else info)),
        layers=layer_markdown(architecture),
        counted_for=_counted_for(architecture),
    )


def hub_id(name: Any) -> str | None:
    """The name when it can be ``owner/name`` on the Hub; a folder on this machine is nobody else's business."""
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _eval_results(
    metrics: Mapping[str, float],
    task: str | None,
    dataset: str | None,
    split: str | None,
    kept: Sequence[EvalResult],
) -> list[EvalResult]:
    """Of these metrics, and those kept that are not measured anew."""
    own = [
        EvalResult(
            task_type=task or "image-feature-extraction",
            dataset_type=str(dataset),
            dataset_name=str(dataset),
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
    anew = {(result.dataset_type, result.dataset_split, result.metric_type) for result in own}
    return [*own, *(r for r in kept if (r.dataset_type, r.dataset_split, r.metric_type) not in anew)]


# ---------------------------------------------------------------------- every model from the dense one to this
def _rows(
    architecture: Architecture,
    dense: Architecture | None,
    remembered: Mapping[str, Any],
    metrics: tuple[Mapping[str, float] | None, Mapping[str, float] | None],
    timings: Mapping[str, Timing] | None,
    given: bool,
    dataset: str | None,
) -> list[dict[str, Any]]:
    """For ``comparison_markdown``: each model with its own size and its own metrics on this data.

    The metrics before are of ``dense`` where the caller gave it, else of what was pruned last: a model pruned twice
    was pruned from a smaller one than its dense model.
    """
    history = remembered.get("history", ())
    earlier = [
        {**_size(entry), **(entry.get("metrics", {}) if dataset and entry.get("dataset") == dataset else {})}
        for entry in history
    ]
    known = [] if dense is None else [_size(count(dense)._asdict())]
    place = next((i for i, entry in enumerate(history) if [_size(entry)] == known), None) if given else -1
    if place is None or not earlier:
        earlier, place = known or [{}], 0
    own = _size(count(architecture)._asdict())
    for row, found, name in zip((earlier[place], own), metrics, ("before", "after"), strict=True):
        row.update(found or {})
        if timings is not None:
            seconds = timings[name].seconds
            row |= {"latency_ms": seconds * 1000, "speedup": timings["before"].seconds / seconds}
    last = len(earlier) - 1
    shown = [
        {"name": _name(i, last), **row} for i, row in enumerate(earlier) if row and (i in (0, last) or len(row) > 2)
    ]
    return [*shown, {"name": "after", **own}]


def _size(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("params", "macs")}


def _name(i: int, last: int) -> str:
    if last == 0:
        return "before"
    return "dense" if i == 0 else f"pruned {_TIMES[i - 1] if i <= len(_TIMES) else f'{i} times'}"


# ---------------------------------------------------------------------- words
def _remains(architecture: Architecture, dense: Architecture | None) -> str:
    small = count(architecture)
    if dense is None:
        return f"{human(small.params)} parameters."
    full = count(dense)
    return (
        f"{human(small.params)} of {human(full.params)} parameters ({small.params / full.params:.0%}) and "
        f"{human(small.macs)} of {human(full.macs)} multiply-adds ({small.macs / full.macs:.0%}) remain."
    )


def _stage(stage: Mapping[str, Any]) -> str:
    """``"on labels, 130 steps of 64 images at a learning rate of 0.0001"``."""
    batch = f" of {stage['batch_size']} images" if "batch_size" in stage else ""
    return (
        f"on {stage['learned_from']}, {stage['steps']} steps{batch} at a learning rate of {stage['learning_rate']:g}"
    )


def _settings(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of what a reader wants to know of a record's info."""
    for name, value in info.items():
        if name in _INTERNAL or value is None:
            continue
        if isinstance(value, Mapping) and "learned_from" in value:
            value = _stage(value)
        elif isinstance(value, Mapping):  # of a compensation, not every layer's error
            value = {k: v for k, v in value.items() if k != "fits"}
        yield name.replace("_", " "), value if isinstance(value, str) else json.dumps(value, default=str)


def _timing(timing: Timing) -> str:
    s = timing.setting
    threads = f", {s['threads']} threads" if "threads" in s else ""
    return (
        f"median of {len(timing.samples)} interleaved rounds, a batch of {s['batch_size']} images of "
        f"{' x '.join(map(str, s['image_size']))} in {s['dtype']} on {s['device']}{threads} "
        f"(torch {s['torch']}, transformers {s['transformers']})."
    )


def _counted_for(architecture: Architecture) -> str:
    """What multiply-adds are counted for."""
    config: Any = architecture.family.sizes_config(architecture.config)
    if architecture.family.part == "text":
        return f"one text of {config.max_position_embeddings} tokens"
    if not hasattr(config, "image_size"):
        return "one image"
    height, width = pair(config.image_size)
    return f"one image of {height} x {width} pixels"
