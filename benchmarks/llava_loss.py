"""Loss of the language model of a small LLaVA, dense and with its tower pruned without labels.

    python -m benchmarks.llava_loss --seed 0 1 2

A LLaVA-shaped model learns to write captions of rendered shapes (those of ``examples/prune_clip_zero_shot.py``) from
scratch. Then the layer of its tower that nobody reads is dropped, the rest is pruned to shares of the multiply-adds
from unlabelled images, and the loss on the words of captions of other images is measured again (nats a word).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from examples.prune_clip_zero_shot import NAMES, TEMPLATE, VISION, WORDS, rendered, tokenizer
from hf_vitprune import OneShotScores, count, prune, truncate

IMAGE = len(WORDS)
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
LANGUAGE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}


def untrained() -> Any:
    """Its tower has a layer more than what is read of it, as LLaVA has (vision_feature_layer=-2)."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "num_hidden_layers": VISION["num_hidden_layers"] + 1}),
        text_config=LlamaConfig(
            **LANGUAGE, vocab_size=len(WORDS) + 1, pad_token_id=0, bos_token_id=1, eos_token_id=len(WORDS) - 1
        ),
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


def captioned(images: int, seed: int) -> dict[str, torch.Tensor]:
    """Images and, behind the places of their patches, the words of their captions; labels are of the words alone."""
    batch = rendered(images, seed)
    captions = tokenizer([TEMPLATE.format(NAMES[label]) for label in batch["labels"].tolist()])["input_ids"]
    places = torch.full((images, PATCHES), IMAGE)
    ids = torch.cat([captions[:, :1], places, captions[:, 1:]], 1)
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[:, 0] = -100
    return {"pixel_values": batch["pixel_values"], "input_ids": ids, "labels": labels}


def trained(steps: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model = untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        model(**captioned(64, seed=1000 * seed + step + 1)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def loss_of(model: Any, images: int, seed: int) -> float:
    """Mean over all words, in nats; every caption has as many words."""
    losses = [float(model(**captioned(100, seed + i)).loss) for i in range(images // 100)]
    return sum(losses) / len(losses)


def tried(steps: int, seed: int, unlabelled: int, test_images: int) -> None:
    whole, test_seed = trained(steps, seed), 10**6 + 1000 * seed
    dense = truncate(whole, "unused")
    share = count(dense).macs / count(whole).macs
    losses = [loss_of(model, test_images, test_seed) for model in (whole, dense)]
    print(f"dense: loss {losses[0]:.4f}; without the layer nobody reads, {share:.0%} of the MACs: {losses[1]:.4f}")
    images = captioned(unlabelled, seed=2 * 10**6 + seed)
    scores = OneShotScores.measure(dense, images)
    for target in (0.75, 0.5, 0.35):
        plan = scores.plan(target)
        plain, fitted = prune(dense, plan), prune(dense, plan, calibration=images)
        kept = count(fitted).macs / count(dense).macs
        found = [loss_of(model, test_images, test_seed) for model in (fitted, plain)]
        print(f"{kept:.0%} of the MACs: loss {found[0]:.4f} one-shot, {found[1]:.4f} by slices alone", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps of the dense model")
    parser.add_argument("--images", type=int, default=512, help="unlabelled images that pruning sees")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    args = parser.parse_args()
    for seed in args.seed:
        tried(args.steps, seed, args.images, args.test_images)


if __name__ == "__main__":
    main()
