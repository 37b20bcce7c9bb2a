"""Peak memory while the tower of a vision-language model is pruned: the language model is not copied.

    python -m benchmarks.composite_memory --parameters 1.1e9 --dtype bfloat16

A LLaVA of zeros (a language model of so many parameters, and a CLIP-shaped tower) is pruned in a process of its own;
what is printed is its resident memory with the model loaded, the peak while it is pruned, and both sizes.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_vitprune import PruningPlan, prune

from .common import in_process, resident, spent

MB = 2**20
#: ViT-B/16, as CLIP has it
TOWER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
#: width, layers, MLP of a Llama of 1.1 billion parameters with 32,000 words
LANGUAGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}


def model_of(parameters: float, dtype: torch.dtype) -> Any:
    """A LLaVA whose language model has about so many parameters; weights are zeros, written once."""
    words, width, mlp = 32_000, LANGUAGE["hidden_size"], LANGUAGE["intermediate_size"]
    layer = 2 * width**2 + 2 * width * width // 8 + 3 * width * mlp
    layers = max(1, round((parameters - 2 * words * width) / layer))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=224, patch_size=16, **TOWER),
        text_config=LlamaConfig(num_hidden_layers=layers, vocab_size=words, **LANGUAGE),
        vision_feature_layer=-1,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(dtype)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()  # memory that nobody has written to is not resident
    return model


def measured(parameters: float, dtype: str, adapters: bool = False) -> dict[str, float]:
    """Megabytes; run it in a process of its own, whose memory nothing else has touched."""
    model = model_of(parameters, getattr(torch, dtype))
    language = sum(p.numel() for p in model.model.language_model.parameters())
    tower_bytes = sum(p.nbytes for p in model.model.vision_tower.parameters())
    if adapters:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    plan = PruningPlan.magnitude(model, 0.5, units=("heads", "mlp"))
    before = resident()
    small, seconds, _, peak = spent(lambda: prune(model, plan))
    whole, old = (m.get_base_model() if adapters else m for m in (small, model))
    words = whole.model.language_model.embed_tokens.weight
    assert words.data_ptr() == old.model.language_model.embed_tokens.weight.data_ptr()
    return {
        "language model, parameters": language,
        "language model, MB": sum(p.nbytes for p in old.model.language_model.parameters()) / MB,
        "tower, MB": tower_bytes / MB,
        "small tower, MB": sum(p.nbytes for p in whole.model.vision_tower.parameters()) / MB,
        "resident before, MB": before / MB,
        "peak while pruning, MB more": (peak - before) / MB,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=1.1e9, help="of the language model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--adapters", action="store_true", help="LoRA on the language model and the tower")
    parser.add_argument("--here", action="store_true", help="in this process; print JSON")
    args = parser.parse_args()
    asked = (args.parameters, args.dtype, args.adapters)
    if args.here:
        print(json.dumps(measured(*asked)))
        return
    for name, value in in_process(measured, *asked).items():
        print(f"{name:>28}: {value:,.2f}" if value < 10 else f"{name:>28}: {value:,.0f}")


if __name__ == "__main__":
    main()
