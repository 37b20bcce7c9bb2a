"""``hf-vitprune export``."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import typer

from .app import ForceOption, ModelArgument, OutArgument, empty_output, say


def export(
    model: ModelArgument,
    out: OutArgument,
    native: Annotated[
        bool, typer.Option("--native", help="As a stock transformers model, which loads without hf_vitprune.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Save a model as safetensors, with its image processor's settings; refuses shapes that --native cannot hold."""
    empty_output(out, force, model)

    import torch
    from transformers.initialization import no_init_weights
    from transformers.utils import cached_file

    from hf_vitprune.modeling.native import to_native

    from .saved import load_any_config, model_class_of

    config = load_any_config(model)
    model_class: Any = model_class_of(config)
    if native:  # refuse before weights are fetched
        with torch.device("meta"), no_init_weights():
            to_native(model_class(config))
    loaded = model_class.from_pretrained(model)
    result = to_native(loaded) if native else loaded
    result.save_pretrained(out)
    settings = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if settings is not None:
        shutil.copy(settings, out / "preprocessor_config.json")
    say(f"{type(result).__name__} saved in {out}")
