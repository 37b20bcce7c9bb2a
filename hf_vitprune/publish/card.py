"""Model cards: what the model is, how it was pruned, what that changed, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from ..cost import count
from ..errors import InvalidConfigError
from ..families import PRUNED_PREFIX
from ..families.base import pair
from ..plan.lineage import lineage_of
from ..spec.architecture import Architecture, unwrap
from ..spec.origin import dense_of, pruned_tower
from .purpose import auto_class, pipeline_tag
from .report import comparison_markdown, human, layer_markdown

if TYPE_CHECKING:
    from ..latency.measure import Timing

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
#: parts of a record's info that say nothing to a reader
_INTERNAL_INFO = ("base_model", "plan", "altered_weights", "dense", "custom")


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
    portable: bool = False,
) -> ModelCard:
    """A card for a pruned model, a bigger one with a pruned tower in it, or for its native export.

    Args:
        model: the model; its weights are not read.
        base_model: Hub id of the model it was made from; by default what its config remembers.
        info: method and settings, for instance ``plan.info``; by default what its config remembers.
        before: metrics of the dense model (``{"accuracy": 0.81}``).
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
        portable: it is in a portable folder, which loads without this library.

    Raises:
        InvalidConfigError: metrics without a dataset, or timings without ``before`` and ``after``.
        UnsupportedModelError: no family is registered for the model, or several towers are pruned and no ``part``.
    """
    if after and not dataset:
        raise InvalidConfigError("metrics need the name of the dataset they were measured on: pass dataset=...")
    if timings is not None and not {"before", "after"} <= timings.keys():
        raise InvalidConfigError(f"timings has 'before' and 'after', got {', '.join(timings) or 'nothing'}")
    if dataset and Path(dataset).exists():
        dataset = Path(dataset).resolve().name
    model = unwrap(model)
    tower = pruned_tower(model, part)
    architecture = Architecture.of(model, tower.part if tower.path else None)
    config = model.get_submodule(tower.path).config
    remembered = lineage_of(config)
    base_model = _hub_id(base_model or remembered.get("base_model"))
    name = repo_id.split("/")[-1] if repo_id else type(model).__name__
    task = pipeline_tag(model)
    data = ModelCardData(
        base_model=base_model,
        datasets=_hub_id(dataset),
        library_name="transformers",
        license=license,
        model_name=name,
        pipeline_tag=task,
        tags=["hf_vitprune", "pruning", architecture.model_type, *tags],
        eval_results=_eval_results(after or {}, task, dataset, dataset_split),
    )
    reference = _reference(architecture, dense, config)
    settings = dict(remembered if info is None else info)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        summary=_summary(architecture, reference, base_model),
        install=_install(config, portable),
        snippet=_snippet(model, config, repo_id, portable),
        results=_results(architecture, reference, before, after, timings),
        measured_on=_measured_on(dataset if after else None, dataset_split, timings),
        settings=_settings({k: v for k, v in settings.items() if k not in _INTERNAL_INFO}),
        layers=layer_markdown(architecture),
        counted_for=_counted_for(architecture),
    )


def _hub_id(name: Any) -> str | None:
    """The name when it can be ``owner/name`` on the Hub; a folder on this machine is nobody else's business."""
    if not isinstance(name, str) or "/" not in name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _reference(architecture: Architecture, dense: Any, config: PreTrainedConfig) -> Architecture | None:
    """The dense architecture, where it is known and another one."""
    if dense is not None:
        reference = Architecture.given(dense, architecture.part)
    else:
        reference = dense_of(config, architecture.task).replace(part=architecture.part)
    return None if reference == architecture else reference


def _eval_results(
    metrics: Mapping[str, float], task: str | None, dataset: str | None, split: str | None
) -> list[EvalResult] | None:
    results = [
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
    return results or None


# ---------------------------------------------------------------------- paragraphs
def _summary(architecture: Architecture, reference: Architecture | None, base_model: str | None) -> str:
    source = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    kind = f"`{architecture.model_type}`"
    if architecture.part is not None:
        kind = f"its {architecture.part} tower, a {kind}; nothing else is changed"
    text = f"A pruned version{source} ({kind}), made with `hf_vitprune`: "
    if reference is None:
        return text + f"{human(count(architecture).params)} parameters."
    small, full = count(architecture), count(reference)
    return (
        f"{text}{human(small.params)} of {human(full.params)} parameters ({small.params / full.params:.0%}) and "
        f"{human(small.macs)} of {human(full.macs)} multiply-adds ({small.macs / full.macs:.0%}) remain."
    )


def _results(
    architecture: Architecture,
    reference: Architecture | None,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    timings: Mapping[str, Timing] | None,
) -> str:
    rows: list[dict[str, Any]] = []
    for name, shape, metrics in (("before", reference, before), ("after", architecture, after)):
        row: dict[str, Any] = {"name": name, **(metrics or {})}
        if shape is not None:
            cost = count(shape)
            row |= {"params": cost.params, "macs": cost.macs}
        if timings is not None:
            row |= {"latency_ms": timings[name].seconds * 1000}
            row["speedup"] = timings["before"].seconds / timings[name].seconds
        rows.append(row)
    known = [row for row in rows if len(row) > 1]
    return comparison_markdown(known) if len(known) > 1 or after or timings else ""


def _measured_on(dataset: str | None, split: str | None, timings: Mapping[str, Timing] | None) -> str:
    sentences = [f"Metrics: {dataset}{f' ({split})' if split else ''}."] if dataset else []
    if timings is not None:
        timing = timings["after"]
        s = timing.setting
        threads = f", {s['threads']} threads" if "threads" in s else ""
        sentences.append(
            f"Latency: median of {len(timing.samples)} interleaved rounds, a batch of {s['batch_size']} images of "
            f"{' x '.join(map(str, s['image_size']))} in {s['dtype']} on {s['device']}{threads} "
            f"(torch {s['torch']}, transformers {s['transformers']})."
        )
    return "\n".join(sentences)


def _settings(info: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Mapping):  # of a compensation, not every layer's error
            value = {k: v for k, v in value.items() if k != "fits"}
        return value if isinstance(value, str) else json.dumps(value, default=str)

    return "\n".join(f"- {key.replace('_', ' ')}: `{text(value)}`" for key, value in info.items() if value is not None)


def _install(config: PreTrainedConfig, portable: bool) -> str:
    if portable and config.model_type.startswith(PRUNED_PREFIX):
        return (
            "Its layers have sizes of their own. `modeling_hf_vitprune.py`, beside the weights, builds them with "
            "transformers alone; read it, and say so (where `hf_vitprune` is imported, nothing has to be said):"
        )
    if config.model_type.startswith(PRUNED_PREFIX):
        return "Its layers have sizes of their own, so it needs `pip install hf_vitprune` beside transformers:"
    return "It is a stock transformers model, nothing else is needed:"


def _snippet(model: Any, config: PreTrainedConfig, repo_id: str | None, portable: bool) -> str:
    is_pruned_class = config.model_type.startswith(PRUNED_PREFIX)
    name, module = auto_class(model), "transformers"
    path = repo_id or "path/to/model"
    if portable and is_pruned_class:
        name = name or "AutoModel"
        call = f'model = {name}.from_pretrained("{path}", trust_remote_code=True)'
        return "\n".join([f"from transformers import {name}", "", call])
    if name is None:
        name = type(model).__name__
        module = "hf_vitprune.modeling" if name.startswith("Pruned") else module
    lines = ["import hf_vitprune  # makes transformers know pruned models"] if is_pruned_class else []
    return "\n".join([*lines, f"from {module} import {name}", "", f'model = {name}.from_pretrained("{path}")'])


def _counted_for(architecture: Architecture) -> str:
    """What multiply-adds are counted for."""
    config: Any = architecture.family.sizes_config(architecture.config)
    if architecture.family.part == "text":
        return f"one text of {config.max_position_embeddings} tokens"
    if not hasattr(config, "image_size"):
        return "one image"
    height, width = pair(config.image_size)
    return f"one image of {height} x {width} pixels"
