"""Model cards: what the model is, how it was pruned, what that changed, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from ..cost import count
from ..errors import InvalidConfigError
from ..families.base import pair
from ..modeling.peft_twin import is_peft
from ..plan.lineage import lineage_of, plain_name
from ..spec.architecture import Architecture, dense_of, unwrap
from ..spec.towers import pruned_tower
from .purpose import pipeline_tag
from .recipe import facts, measured_on, settings
from .report import comparison_markdown, human, layer_markdown
from .snippet import Beside, how_to_use
from .stages import stage_rows

if TYPE_CHECKING:
    from ..latency.measure import Timing

#: the file that a card is
CARD = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


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
    portable: bool = False,
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
        portable: it is in a portable folder, which loads without this library.

    Raises:
        InvalidConfigError: metrics without a dataset, or timings without ``before`` and ``after``.
        UnsupportedModelError: no family is registered for the model, or several towers are pruned and no ``part``.
    """
    if after and not dataset:
        raise InvalidConfigError("metrics need the name of the dataset they were measured on: pass dataset=...")
    if timings is not None and not {"before", "after"} <= timings.keys():
        raise InvalidConfigError(f"timings has 'before' and 'after', got {', '.join(timings) or 'nothing'}")
    dataset = plain_name(dataset) if dataset else None
    whole, model = model, unwrap(model)
    beside = beside or Beside()
    beside = replace(beside, portable=portable or beside.portable, adapter=is_peft(whole) or beside.adapter)
    tower = pruned_tower(model, part)
    architecture = Architecture.of(model, tower.part if tower.path else None)
    config = model.get_submodule(tower.path).config
    remembered = lineage_of(config)
    source = base_model or remembered.get("base_model") or remembered.get("base_folder")
    base_model = hub_id(source)
    name = repo_id.split("/")[-1] if repo_id else type(model).__name__
    task = pipeline_tag(model)
    results = _merged(_eval_results(after or {}, task, dataset, dataset_split), eval_results)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=None if base_model is None else _relation(beside.adapter, remembered),
        datasets=hub_id(dataset),
        library_name="peft" if beside.adapter else "transformers",
        license=license,
        model_name=name,
        pipeline_tag=task,
        tags=["hf_vitprune", "pruning", architecture.model_type, *tags],
        eval_results=results or None,
    )
    reference = _reference(architecture, dense, config)
    history = remembered.get("history", ())
    rows = stage_rows(
        architecture, reference, history, before, after, timings, given=dense is not None, dataset=dataset
    )
    install, snippets = how_to_use(whole, config, repo_id, beside)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        summary=_summary(architecture, reference, source),
        facts=facts(source, base_model, remembered, dataset, dataset_split, license, author),
        plot=plot,
        install=install,
        snippets="\n\nThe model alone:\n\n".join(f"```python\n{code}\n```" for code in snippets),
        results=comparison_markdown(rows) if len(rows) > 1 or after or timings else "",
        measured_on=measured_on(dataset if after else None, dataset_split, timings),
        settings=settings(remembered if info is None else info),
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


def _relation(adapter: bool, remembered: Mapping[str, Any]) -> str | None:
    """What the Hub calls the way from the base model to this one; it has no word for pruning."""
    if adapter:
        return "adapter"
    return "finetune" if remembered.get("training") else None


def _reference(architecture: Architecture, dense: Any, config: PreTrainedConfig) -> Architecture | None:
    """The dense architecture, where it is known and another one."""
    if dense is not None:
        reference = Architecture.given(dense, architecture.part)
    else:
        reference = dense_of(config, architecture.task).replace(part=architecture.part)
    return None if reference == architecture else reference


def _eval_results(
    metrics: Mapping[str, float], task: str | None, dataset: str | None, split: str | None
) -> list[EvalResult]:
    return [
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


def _merged(own: list[EvalResult], kept: Sequence[EvalResult]) -> list[EvalResult]:
    """All of them, without what is measured anew."""
    anew = {(result.dataset_type, result.dataset_split, result.metric_type) for result in own}
    old = [r for r in kept if (r.dataset_type, r.dataset_split, r.metric_type) not in anew]
    return [*own, *old]


def _summary(architecture: Architecture, reference: Architecture | None, source: Any) -> str:
    base_model = hub_id(source)
    of = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    kind = f"`{architecture.model_type}`"
    if architecture.part is not None:
        kind = f"its {architecture.part} tower, a {kind}; nothing else is changed"
    text = f"A pruned version{of} ({kind}), made with `hf_vitprune`: "
    if reference is None:
        return text + f"{human(count(architecture).params)} parameters."
    small, full = count(architecture), count(reference)
    return (
        f"{text}{human(small.params)} of {human(full.params)} parameters ({small.params / full.params:.0%}) and "
        f"{human(small.macs)} of {human(full.macs)} multiply-adds ({small.macs / full.macs:.0%}) remain."
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
