"""``hf-vitprune card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import ForceOption, ModelArgument, PartOption, empty_output, say


def card(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write, for instance README.md; with kept.png beside it.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was pruned from.")] = None,
    license: Annotated[str | None, typer.Option(help="License, that of the base model as a rule.")] = None,
    author: Annotated[str | None, typer.Option(help="Who made it.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where the model will be on the Hub.")] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="File of hf-vitprune evaluate --out; by default results.json, README.md or all_results.json "
            "of the folder."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="What all_results.json was measured on.")] = None,
    part: PartOption = None,
    force: ForceOption = False,
) -> None:
    """Write the model card of a saved model; prints it without --out. Metrics that are in its folder are kept."""
    if out is not None:
        empty_output(out, force, model, file=True)

    from hf_vitprune.evaluation.results import load_results
    from hf_vitprune.publish.card import model_card
    from hf_vitprune.publish.kept import PLOT, beside, draw, kept_of, license_of, settings_of

    from .saved import load_skeleton

    kept = kept_of(model, dataset)
    settings: dict[str, Any] = kept.settings
    if results is not None:
        settings |= settings_of(load_results(results))
    given = {"base_model": base_model, "license": license, "author": author}
    settings |= {name: value for name, value in given.items() if value is not None}
    if settings.get("license") is None:
        settings["license"] = license_of(settings.get("base_model"))
    skeleton = load_skeleton(model)
    plot = None if out is not None or not (Path(model) / PLOT).is_file() else PLOT
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot = PLOT if (out.parent / PLOT).is_file() else draw(skeleton, out.parent, part)
    text = str(
        model_card(
            skeleton,
            eval_results=kept.eval_results,
            repo_id=repo_id or (None if Path(model).exists() else model),
            part=part,
            plot=plot,
            beside=beside(model),
            **settings,
        )
    )
    if out is None:
        print(text)
        return
    out.write_text(text, encoding="utf-8")
    say(f"card written to {out}" + (f", with metrics of {kept.source}" if kept.source and results is None else ""))
