"""A backbone without a head, pruned and recovered from images without labels; runs on built-in digits in a minute.

With a model and images of your own:

    python examples/recover_backbone.py --model facebook/dinov2-small --images FOLDER --steps 300
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel, set_seed

from hf_vitprune import Compensation, OneShotScores, count, prune
from hf_vitprune.training.recovery import Recovery, recover
from hf_vitprune.utils.data import read_folder
from hf_vitprune_cli.app import empty_output


def digits() -> torch.Tensor:
    """(1797, 3, 16, 16) handwritten digits, their labels thrown away."""
    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 3, 1, 1)


def backbone() -> ViTModel:
    """A small one, of random weights: it stands for a pretrained one."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.1))


def main(arguments: list[str] | None = None) -> float:
    """Prune, recover and print; returns the feature loss at the end, as a fraction of that at the start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a backbone; by default a small one of random weights")
    parser.add_argument("--images", help="folder of images; by default built-in digits")
    parser.add_argument("--target", type=float, default=0.5, help="fraction of the MACs that may remain")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--learning-rate", type=float, help="by default 1e-5, and 1e-4 for the random weights")
    parser.add_argument("--out", help="folder for the small model")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.images is None):
        parser.error("--model and --images go together")
    if options.out is not None:
        empty_output(Path(options.out), options.force, options.model, options.images)

    set_seed(0)
    dense = (backbone() if options.model is None else AutoModel.from_pretrained(options.model)).eval()
    if options.images is None:
        pixels = digits()[:600]
    else:
        pixels = read_folder(options.images, AutoImageProcessor.from_pretrained(options.model), 1024)
    train, held_out = pixels[len(pixels) // 10 :], pixels[: len(pixels) // 10]

    few = train[:128]
    plan = OneShotScores.measure(dense, few).plan(options.target)
    small = prune(dense, plan, calibration=few, compensate=Compensation(images=None))
    print(f"{count(small).macs / count(dense).macs:.0%} of the MACs, compensated from {len(few)} images")

    rate = options.learning_rate or (1e-4 if options.model is None else 1e-5)
    settings = Recovery(steps=options.steps, learning_rate=rate)
    done = recover(small, dense, train, settings, held_out=held_out, plan=plan)
    print(done.one_line)
    if options.out is not None:
        small.save_pretrained(options.out)
    return done.losses[done.best] / done.losses[0]


if __name__ == "__main__":
    main()
