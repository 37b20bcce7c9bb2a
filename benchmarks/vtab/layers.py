"""What every layer of an adapted model knows: probe accuracy and SLS's score against depth, and the t-SNE maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hf_vitprune import SLSConfig
from hf_vitprune.methods.sls import LayerAnalysis, analyse_layers, extract_features
from hf_vitprune.utils.extras import need

from .adapters import check_peft
from .data import load_task
from .experiment import Experiment
from .images import Examples
from .plots import plot_layers, plot_maps
from .settings import LAST, RESULTS, Machine, Run, Settings
from .store import Store
from .tasks import TEST, find_task


def draw_layers(
    task: str, peft: str, seed: int, root: Path, output: Path, machine: Machine, probe_images: int, console: Console
) -> None:
    """Analyse the model of a results folder that was adapted for a run; adapt it first where it is not there.

    Args:
        probe_images: test images that the linear probes are tested on, the same at every call.
    """
    need("figures", "matplotlib")
    run = Run(find_task(task).name, check_peft(peft), "none", seed)
    store = Store(output)
    if store.settings() is None:
        store.claim(Settings())
    title, analysis = _analysed(run, store, root, machine, probe_images)
    store.save_layers(run, {"reported_as": title, "peft": peft, "seed": seed, **analysis.to_dict()})
    name, place = f"{title}, {peft}", output / "layers"
    curves = (analysis.probe_accuracy, analysis.scores, analysis.selection.threshold, analysis.correlation)
    maps = (analysis.maps, analysis.labels, analysis.scores)
    for path in (
        plot_layers(name, *curves, place / f"{run.adapted_name}--depth.png"),
        plot_maps(name, *maps, place / f"{run.adapted_name}--maps.png"),
    ):
        console.print(f"wrote {path}")
    correlation = "not defined" if analysis.correlation is None else f"{analysis.correlation:.2f}"
    console.print(f"{title}: rank correlation of score and probe accuracy {correlation}; {analysis.selection.reason}")


def _analysed(run: Run, store: Store, root: Path, machine: Machine, probe_images: int) -> tuple[str, LayerAnalysis]:
    """(what the task is reported as, the analysis)."""
    settings = store.settings()
    assert settings is not None, "the store was claimed"
    data = load_task(find_task(run.task), root, settings.source, any_size=settings.any_size)
    experiment, split, config = (
        Experiment(settings, data, store, machine),
        RESULTS[LAST],
        SLSConfig(alpha=settings.alpha),
    )
    model, _ = experiment.adapted(run, split)
    testing: Any = experiment.examples(TEST)
    testing = Examples(testing.images.fixed_subset(probe_images), testing.preprocessing)
    (features, labels), (probes, truth) = (
        extract_features(model, images, config) for images in (experiment.examples(split), testing)
    )
    return data.title, analyse_layers(list(features.values()), labels, config, list(probes.values()), truth)
