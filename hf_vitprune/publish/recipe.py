"""What a card says of where a model comes from and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..latency.measure import Timing

#: parts of a record's info that say nothing to a reader, or have a place of their own
_INTERNAL = ("base_model", "base_folder", "plan", "altered_weights", "dense", "custom", "history", "training")


def facts(
    source: Any,
    base_model: str | None,
    info: Mapping[str, Any],
    dataset: str | None,
    split: str | None,
    license: str | None,
    author: str | None,
) -> str:
    """A list of what readers look for first; what is not known is left out.

    Args:
        source: what it was made from: Hub id or folder, of which only the name is said.
        base_model: the same, where it is an id.
        info: the record's.
        dataset, split: of the metrics.
        license, author: as in ``model_card``.
    """
    lines = []
    if base_model is not None:
        lines.append(f"Base model: [{base_model}](https://huggingface.co/{base_model})")
    elif isinstance(source, str) and source:
        lines.append(f"Base model: `{Path(source).name}`, which is not on the Hub under this name")
    if info:
        lines.append(f"Training after pruning: {trained(info.get('training') or [])}")
    if dataset:
        lines.append(f"Evaluated on: {dataset}{f' ({split})' if split else ''}")
    if license:
        lines.append(f"License: {license}")
    elif base_model is not None:
        lines.append("License: not stated here; that of the base model holds, as this is a derived work")
    if author:
        lines.append(f"Author: {author}")
    return "\n".join(f"- {line}" for line in lines)


def trained(stages: list[Mapping[str, Any]]) -> str:
    """``"on labels, 130 steps of 64 images at a learning rate of 0.0001"``; several, one after another."""
    return "; then ".join(map(_stage, stages)) or "none on record"


def _stage(stage: Mapping[str, Any]) -> str:
    text = f"on {stage['learned_from']}, {stage['steps']} steps"
    if "batch_size" in stage:
        text += f" of {stage['batch_size']} images"
    return f"{text} at a learning rate of {stage['learning_rate']:g}"


def settings(info: Mapping[str, Any]) -> str:
    """Method and settings, as a list."""
    shown = {name: value for name, value in info.items() if name not in _INTERNAL and value is not None}
    return "\n".join(f"- {name.replace('_', ' ')}: `{_text(value)}`" for name, value in shown.items())


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "learned_from" in value:
        return _stage(value)
    if isinstance(value, Mapping):  # of a compensation, not every layer's error
        value = {k: v for k, v in value.items() if k != "fits"}
    return value if isinstance(value, str) else json.dumps(value, default=str)


def measured_on(dataset: str | None, split: str | None, timings: Mapping[str, Timing] | None) -> str:
    """Of what the numbers in the table are."""
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
