"""``hf-vitprune card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import ForceOption, ModelArgument, PartOption, empty_output, say


def card(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, for instance README.md.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was pruned from.")] = None,
    license: Annotated[str | None, typer.Option(help="License, that of the base model as a rule.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where the model will be on the Hub.")] = None,
    part: PartOption = None,
    force: ForceOption = False,
) -> None:
    """Write the model card of a saved model; prints it without --out."""
    if out is not None:
        empty_output(out, force, model, file=True)

    import torch
    from transformers.initialization import no_init_weights

    from hf_vitprune.publish.card import model_card

    from .saved import load_any_config, model_class_of

    config = load_any_config(model)
    with torch.device("meta"), no_init_weights():  # a card needs no weights
        skeleton = model_class_of(config)(config)
    hub_id = repo_id or (None if Path(model).exists() else model)
    text = str(model_card(skeleton, base_model=base_model, license=license, repo_id=hub_id, part=part))
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    say(f"card written to {out}")
