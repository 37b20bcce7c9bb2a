"""Zero-shot accuracy of a small CLIP or SigLIP, dense and with its image tower pruned without labels.

A CLIP-shaped model learns captions of rendered shapes (colour, shape, place) from scratch; then its image tower is
pruned to shares of its multiply-adds, from unlabelled images, and all 36 captions are told apart again:

    python examples/prune_clip_zero_shot.py
    python examples/prune_clip_zero_shot.py --model siglip --seed 0 1 2
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from hf_vitprune import OneShotScores, count, prune
from hf_vitprune.evaluation.zero_shot import zero_shot_accuracy

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
SHAPES = ("disc", "square", "cross")
PLACES = {"top left": (9, 9), "top right": (9, 23), "bottom left": (23, 9), "bottom right": (23, 23)}
NAMES = [f"{colour} {shape} at the {place}" for colour in COLOURS for shape in SHAPES for place in PLACES]
TEMPLATE = "a {}"
WORDS = ["[pad]", "[start]", *sorted({word for name in NAMES for word in TEMPLATE.format(name).split()}), "[end]"]
END = len(WORDS) - 1
SIZE = 32


def tokenizer(text: list[str], **_: Any) -> dict[str, torch.Tensor]:
    """Words to numbers: what a tokenizer does, for captions of one vocabulary."""
    rows = [[1, *(WORDS.index(word) for word in line.split()), END] for line in text]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def rendered(count: int, seed: int) -> dict[str, torch.Tensor]:
    """(count, 3, 32, 32) noisy images of shapes, and which of the 36 captions each has."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    jitter = torch.randint(-2, 3, (count, 2), generator=generator)
    radius = torch.randint(5, 7, (count,), generator=generator)
    for i, label in enumerate(labels.tolist()):
        colour, rest = divmod(label, len(SHAPES) * len(PLACES))
        shape, place = divmod(rest, len(PLACES))
        y, x = (c + int(j) for c, j in zip(list(PLACES.values())[place], jitter[i], strict=True))
        dy, dx, r = (rows - y).abs(), (columns - x).abs(), int(radius[i])
        inside = {
            "disc": dy**2 + dx**2 <= r**2,
            "square": torch.maximum(dy, dx) < r,
            "cross": (torch.minimum(dy, dx) < 2) & (torch.maximum(dy, dx) <= r),
        }[SHAPES[shape]]
        images[i] += inside * torch.tensor(list(COLOURS.values())[colour]).view(3, 1, 1) * 1.5
    return {"pixel_values": images, "labels": labels}


VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": SIZE, "patch_size": 8}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}


def untrained(name: str) -> Any:
    if name == "clip":
        return CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=64))
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 64}))
    torch.nn.init.constant_(model.logit_scale, math.log(10))  # as published; most pairs are wrong ones
    torch.nn.init.constant_(model.logit_bias, -10)
    return model


def trained(name: str, steps: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model = untrained(name).train()
    captions = tokenizer([TEMPLATE.format(name) for name in NAMES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = rendered(64, seed=1000 * seed + step + 1)
        logits = model(pixel_values=batch["pixel_values"], **captions).logits_per_image
        if name == "clip":
            loss = functional.cross_entropy(logits, batch["labels"])
        else:  # every pair of image and caption is right or wrong by itself
            right = functional.one_hot(batch["labels"], len(NAMES))
            loss = -functional.logsigmoid(logits * (2 * right - 1)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def tried(name: str, steps: int, seed: int, unlabelled: int, test_images: int) -> None:
    dense, test = trained(name, steps, seed), rendered(test_images, seed=10**6 + seed)

    def accuracy(model: Any) -> float:
        return zero_shot_accuracy(model, tokenizer, test, NAMES, TEMPLATE)

    print(f"dense: zero-shot accuracy {accuracy(dense):.1%}, {count(dense, part='vision').macs / 1e6:.1f}M MACs")
    images = rendered(unlabelled, seed=2 * 10**6 + seed)["pixel_values"]
    scores = OneShotScores.measure(dense, images, part="vision")
    for target in (0.75, 0.5, 0.35):
        plan = scores.plan(target)
        plain, fitted = prune(dense, plan), prune(dense, plan, calibration=images)
        kept = count(fitted, part="vision").macs / count(dense, part="vision").macs
        print(f"{kept:.0%} of the MACs: {accuracy(fitted):.1%} one-shot, {accuracy(plain):.1%} by slices alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("clip", "siglip"), default="clip")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the dense model")
    parser.add_argument("--images", type=int, default=512, help="unlabelled images that pruning sees")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    args = parser.parse_args()
    for seed in args.seed:
        tried(args.model, args.steps, seed, args.images, args.test_images)


if __name__ == "__main__":
    main()
