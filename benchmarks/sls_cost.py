"""What the decision of SLS costs, against scoring every layer with scikit-learn's default t-SNE.

    python -m benchmarks.sls_cost                     # synthetic features, 12 layers of 1000 x 768
    python -m benchmarks.sls_cost --model FOLDER      # a trained image classifier's features of the digits
    python -m benchmarks.sls_cost --alpha 0.3 --rounds 3 --json cost.json
    python -m benchmarks.sls_cost --errors --profiles gradual early --seeds 1 2    # how far off cheap scores are

Three ways take turns in every round: every layer by plain scikit-learn, ``select_layers`` (scikit-learn's t-SNE from
the top down to the layer that fails), and ``select_layers`` with ``fast=True`` (a cheap t-SNE where that decides). The
ratios are of seconds on the clock, and medians over the rounds; decisions and scores are compared. With ``--errors``
nothing is timed: every layer is scored in full and cheaply.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from hf_vitprune import SLSConfig, select_layers
from hf_vitprune.latency.measure import device_name
from hf_vitprune.methods import LayerSelection
from hf_vitprune.methods.sls.scoring import estimated_score, layer_score

from .common import interleaved, ratio, show

IMAGES, CHANNELS, LAYERS, CLASSES = 1000, 768, 12, 10
Features = list[np.ndarray]


def synthetic(profile: str, seed: int = 0) -> tuple[Features, np.ndarray]:
    """Features whose classes come apart with depth, over clusters and lengths that have nothing to do with them.

    Args:
        profile: ``gradual``: over all layers; ``late``: in the last third; ``early``: in the first third.
    """
    rng = np.random.default_rng(seed)
    first, last = {"gradual": (0, 12), "late": (7, 12), "early": (0, 4)}[profile]
    labels = np.arange(IMAGES) % CLASSES
    centres, others = rng.normal(size=(CLASSES, CHANNELS)), rng.normal(size=(7, CHANNELS))
    nuisance = rng.integers(0, len(others), IMAGES)
    layers = []
    for depth in range(1, LAYERS + 1):
        signal = 0.1 + 0.5 * np.clip((depth - first) / (last - first), 0, 1)
        noise = rng.normal(size=(IMAGES, CHANNELS)) * (0.6 + 0.8 * rng.random((IMAGES, 1)))
        layers.append((signal * centres[labels] + 0.2 * others[nuisance] + noise).astype(np.float32))
    return layers, labels


def of_model(folder: str) -> tuple[Features, np.ndarray]:
    """A classifier's features of 1000 digits; narrow ones are turned into 768 channels, which keeps distances."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hf_vitprune.methods.sls import extract_features
    from hf_vitprune.utils.data import DIGITS, load_images

    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    train_set, _ = load_images(DIGITS).processed(processor)
    features, labels = extract_features(model, train_set, SLSConfig(max_samples=IMAGES))
    return [_widened(layer.numpy()) for layer in features.values()], labels.numpy()


def _widened(features: np.ndarray) -> np.ndarray:
    width = features.shape[1]
    if width >= CHANNELS:
        return features
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(CHANNELS, width)))
    return (features @ basis.T).astype(np.float32)


def every_layer(features: Features, labels: np.ndarray, alpha: float) -> LayerSelection:
    """The reference: scikit-learn's defaults, layer by layer, all of them."""
    scores = {}
    for number in range(len(features), 0, -1):
        points = TSNE(n_components=2, init="pca", random_state=0, perplexity=30).fit_transform(features[number - 1])
        points = (points - points.min(0)) / np.ptp(points, axis=0)
        scores[number] = float(silhouette_score(points, labels))
    return LayerSelection.of(scores, len(features), alpha)


def measure(features: Features, labels: np.ndarray, alpha: float, rounds: int) -> list[dict[str, Any]]:
    ways = {
        "every layer, scikit-learn": lambda: every_layer(features, labels, alpha),
        "select_layers": lambda: select_layers(features, labels, SLSConfig(alpha=alpha)),
        "select_layers, fast": lambda: select_layers(features, labels, SLSConfig(alpha=alpha, fast=True)),
    }
    made: dict[str, LayerSelection] = {}
    calls = {name: lambda name=name, way=way: made.update({name: way()}) for name, way in ways.items()}
    seconds = interleaved(calls, rounds, warm_up=False)
    reference = next(iter(ways))
    rows = []
    for name, times in seconds.items():
        exact = set(made[name].scores) - set(made[name].estimated)
        off = {n: abs(score - made[reference].scores[n]) for n, score in made[name].scores.items()}
        rows.append(
            {
                "way": name,
                "kept": made[name].kept_layers,
                "seconds": median(times),
                "ratio": ratio(times, seconds[reference]),
                "t-SNEs": len(exact),
                "estimates": len(made[name].estimated),
                "scores off by": max(off[n] for n in exact),
                "estimates off by": max((off[n] for n in made[name].estimated), default=0.0),
                "scores": {str(n): round(s, 4) for n, s in made[name].scores.items()},
            }
        )
    return rows


def compare_scores(name: str, features: Features, labels: np.ndarray) -> dict[str, Any]:
    """The full and the cheap score of every layer, from the top, and the largest difference."""
    config = SLSConfig()
    scores = [
        (layer_score(layer, labels, config), estimated_score(layer, labels, config)) for layer in reversed(features)
    ]
    worst = max(abs(full - cheap) for full, cheap in scores)
    print(f"{name}: full / cheap from the top:", ", ".join(f"{full:.3f} / {cheap:.3f}" for full, cheap in scores))
    print(f"{name}: cheap scores of {len(scores)} layers are off by at most {worst:.3f}", flush=True)
    return {"scores": scores, "worst": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="folders of trained image classifiers")
    parser.add_argument("--profiles", nargs="*", default=["gradual", "late", "early"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the synthetic features")
    parser.add_argument("--errors", action="store_true", help="how far off are the cheap scores, of all layers?")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = {f"{name}, seed {seed}": synthetic(name, seed) for name in args.profiles for seed in args.seeds}
    data |= {folder: of_model(folder) for folder in args.model}
    results: dict[str, Any] = {}
    for name, (features, labels) in data.items():
        if args.errors:
            results[name] = compare_scores(name, features, labels)
            continue
        results[name] = measure(features, labels, args.alpha, args.rounds)
        title = f"{name}: {len(features)} layers of {' x '.join(map(str, features[0].shape))}, alpha {args.alpha},"
        show({title: [{k: v for k, v in row.items() if k != "scores"} for row in results[name]]}, shown=".3g")
        profile = results[name][0]["scores"]
        print("scores from the top:", ", ".join(f"{score:.2f}" for score in profile.values()))
        if len({row["kept"] for row in results[name]}) > 1:
            print("THE DECISIONS DIFFER")
    if args.json:
        args.json.write_text(json.dumps({"device": device_name(), "alpha": args.alpha, "results": results}, indent=2))


if __name__ == "__main__":
    main()
