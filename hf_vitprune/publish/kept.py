"""What a model's folder says of it already: metrics, author, license, base model; and its figure."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, try_to_load_from_cache

from ..evaluation.results import results_of
from ..spec.architecture import Architecture
from ..spec.towers import pruned_tower
from .block_report import plot_kept
from .card import CARD, hub_id
from .snippet import Beside

PLOT = "kept.png"
#: of metrics whose data has no name
UNNAMED = "unnamed data"
#: what a Trainer measures besides
_NO_METRICS = ("runtime", "per_second", "preparation_time", "epoch")
_FIGURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+)\)")


@dataclass
class Kept:
    """What goes from a folder into its new card: known keywords of ``model_card``, more of the ``model-index``, and
    which file the metrics are from.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    eval_results: list[EvalResult] = field(default_factory=list)
    source: str | None = None


def kept_of(folder: str | Path, dataset: str | None = None) -> Kept:
    """What a folder says: results of an evaluation of these very weights, else its card, else a Trainer's results.

    ``dataset``: the data that ``all_results.json`` is of, which it does not say.

    Raises:
        InvalidDataError: ``results.json`` has no results.
    """
    folder, kept = Path(folder), Kept()
    if (folder / CARD).is_file():
        data: Any = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
        kept.eval_results = list(data.eval_results or [])
        ours = "hf_vitprune" in (data.tags or [])  # PEFT's cards name a path as base model
        known = {"license": data.license, "base_model": data.base_model if ours else None}
        kept.settings = {name: value for name, value in known.items() if isinstance(value, str)}
    results = results_of(folder)
    if results is not None:
        kept.settings |= settings_of(results)
        kept.source = "results.json"
    elif kept.eval_results:
        first = kept.eval_results[0]
        data_of = attrgetter("dataset_name", "dataset_split")
        same = {r.metric_type: r.metric_value for r in kept.eval_results if data_of(r) == data_of(first)}
        kept.settings |= {"after": same, "dataset": first.dataset_name, "dataset_split": first.dataset_split}
        kept.source = CARD
    elif metrics := _trainer_metrics(folder):
        kept.settings |= {"after": metrics, "dataset": dataset or UNNAMED}
        kept.source = "all_results.json"
    return kept


def license_of(model: str | None) -> str | None:
    """The license that a model's card states: of a folder, or of a Hub model whose card was fetched before."""
    if model is None:
        return None
    path: Any = Path(model) / CARD
    if not path.is_file():
        path = try_to_load_from_cache(model, CARD) if hub_id(model) else None
    stated = ModelCard.load(path, ignore_metadata_errors=True).data.license if isinstance(path, (str, Path)) else None
    return stated if isinstance(stated, str) else None


def settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results of ``hf-vitprune evaluate`` as keywords of ``model_card``."""
    found = {"after": results["metrics"], "dataset": results["data"], "dataset_split": results.get("split")}
    before = (results.get("dense") or {}).get("metrics")
    return found | ({"before": before} if before else {})


def metrics_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """Metrics in a Trainer's logs of an evaluation, without ``eval_``."""
    found = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not any(word in name for word in _NO_METRICS)
    }


def beside(folder: str | Path) -> Beside:
    """What a folder has beside the weights."""
    have = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    config = json.loads((Path(folder) / "config.json").read_text("utf-8")) if "config.json" in have else {}
    return Beside(
        processor=bool(have & {"preprocessor_config.json", "processor_config.json"}),
        tokenizer="tokenizer_config.json" in have,
        adapter="adapter_config.json" in have,
        portable=isinstance(config.get("portable"), dict),
    )


def draw(model: Any, folder: Path, part: str | None = None) -> str | None:
    """Draw what a model keeps into a folder, for its card; None, and nothing drawn, where matplotlib is missing.

    ``part``: which tower of a bigger model; by default its only one, or the only pruned one.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    tower = pruned_tower(model, part)
    return plot_kept(Architecture.of(model, tower.part if tower.path else None), folder / PLOT).name


def take_figures(text: str, source: Path, folder: Path, model: Any) -> None:
    """Put the figures that a card shows beside it: from the folder it was in, or drawn anew."""
    for name in _FIGURE.findall(text):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
        elif name == PLOT and not (folder / name).is_file():
            draw(model, folder)


def _trainer_metrics(folder: Path) -> dict[str, float]:
    for name in ("all_results.json", "eval_results.json"):
        if (folder / name).is_file():
            return metrics_of(json.loads((folder / name).read_text(encoding="utf-8")))
    return {}
