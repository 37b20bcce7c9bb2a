"""``hf-vitprune evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import ForceOption, ModelArgument, PartOption, empty_output, say


def evaluate(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="As --data of prune: digits, a folder with one sub-folder a class, a Hub dataset; with --dense also "
            "a folder of images without labels.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the results; results.json in MODEL is found by card.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model: evaluated too, and its predictions or features compared.")
    ] = None,
    part: PartOption = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data; by default the one that prune does not train on.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many images, drawn at random.", min=2)] = None,
    top_k: Annotated[int, typer.Option(help="Also the share of images whose class is among the k likeliest.")] = 5,
    neighbours: Annotated[int, typer.Option(help="Of backbones: how many nearest images count.", min=1)] = 5,
    template: Annotated[str, typer.Option(help="Of dual encoders: caption of a class.")] = "a photo of a {}.",
    batch_size: Annotated[int, typer.Option(help="Images a forward pass; accuracy does not depend on it.", min=1)] = 8,
    force: ForceOption = False,
) -> None:
    """Measure a saved model on images: accuracy, and what its pipeline takes.

    Image classifiers by their classes' names; dual encoders by captions (zero-shot); backbones, and towers of bigger
    models (--part), by their features: the classes of nearest images, and with --dense the features' cosine.
    """
    if out is not None:
        empty_output(out, force, model, dense, file=True)
        from hf_vitprune.evaluation.results import check_can_save

        check_can_save()

    from .evaluated import Question, ask

    question = Question(data, part, split, limit, top_k, neighbours, template, batch_size)
    results = ask(question, model, dense)
    if out is not None:
        from hf_vitprune.evaluation.results import save_results

        say(f"results written to {save_results(out, results)}")
