"""What every layer of the dense models knows, and what SLS makes of it (arXiv 2407.14330, figure 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from hf_vitprune import SLSConfig
from hf_vitprune.methods.sls import analyse_layers, extract_features

from ..common import once
from .models import dense_model
from .tasks import Examples, load_task


def first(examples: Examples, images: int) -> Subset[dict[str, Any]]:
    return Subset(examples, range(min(images, len(examples))))


def analysed(family: str, name: str, seed: int, images: int, folder: Path) -> dict[str, Any]:
    """Scores of so many training images, accuracies of probes on as many test images; what was done before is read."""

    def analysis() -> dict[str, Any]:
        task, config = load_task(name), SLSConfig()
        model = dense_model(family, task, seed, folder / "dense")
        features, labels = extract_features(model, first(task.train, images), config)
        tests, test_labels = extract_features(model, first(task.test, images), config)
        found = analyse_layers(list(features.values()), labels, config, list(tests.values()), test_labels)
        return {"family": family, "task": name, "seed": seed, **found.to_dict()}

    return once(folder / "layers" / f"{family}-{name}-{images}-seed{seed}.json", analysis)
