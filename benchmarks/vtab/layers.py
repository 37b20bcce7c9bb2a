"""What every layer of an adapted model knows: probe accuracy and SLS's score against depth, and the t-SNE maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_vitprune import SLSConfig
from hf_vitprune.methods.sls import LayerAnalysis, analyse_layers, extract_features
from hf_vitprune.utils.extras import need

from .data import load_task
from .experiment import Experiment
from .plots import plot_layers, plot_maps
from .preprocess import Examples
from .settings import LAST, RESULTS, Machine, Run
from .store import Store
from .tasks import TEST, find_task


def analyse(
    run: Run, store: Store, root: Path, machine: Machine, probe_images: int | None
) -> tuple[str, LayerAnalysis]:
    """Analyse the model of a results folder that was adapted for a run; adapt it first where it is not there.

    Args:
        run: task, adaptation and seed are read.
        store: of the results; its settings are used.
        root: folder with the tasks' folders.
        machine: where it runs.
        probe_images: test images that the linear probes are tested on, the same at every call; None for those of the
            settings.

    Returns:
        (what the task is reported as, the analysis).

    Raises:
        InvalidDataError: the task is not here, or its images cannot be scored.
    """
    need("figures", "matplotlib")
    settings = store.settings()
    assert settings is not None, "the store was claimed"
    data = load_task(find_task(run.task), root, settings.source, any_size=settings.any_size)
    experiment = Experiment(settings, data, store, machine)
    split = RESULTS[LAST]
    model, _ = experiment.adapted(run, split)
    config = SLSConfig(alpha=settings.alpha)
    testing: Any = experiment.examples(TEST)
    testing = Examples(testing.images.fixed_subset(probe_images), testing.preprocessing)
    features, labels = extract_features(model, experiment.examples(split), config)
    probe_features, probe_labels = extract_features(model, testing, config)
    analysis = analyse_layers(list(features.values()), labels, config, list(probe_features.values()), probe_labels)
    return data.title, analysis


def draw(analysis: LayerAnalysis, title: str, folder: Path, name: str) -> list[Path]:
    """Both figures.

    Returns:
        Their paths.
    """
    curves = plot_layers(
        title,
        analysis.probe_accuracy,
        analysis.scores,
        analysis.selection.threshold,
        analysis.correlation,
        folder / f"{name}--depth.png",
    )
    maps = plot_maps(title, analysis.maps, analysis.labels, analysis.scores, folder / f"{name}--maps.png")
    return [curves, maps]
