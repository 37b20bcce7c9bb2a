"""Pipelines over the tiny bigger models of ``tiny_composites``: their processors, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny import tensors

SQUARE = {"size": {"height": 16, "width": 16}}
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, 59)), "<image>"]  # the last one is tiny_composites.IMAGE_TOKEN


def tokenizer(**special: Any) -> Any:
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[PAD]", unk_token="[UNK]", **special)


def llava_processor() -> Any:
    images = t.CLIPImageProcessorPil(**SQUARE, crop_size=SQUARE["size"])
    fields = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    words = tokenizer(additional_special_tokens=["<image>"])
    return t.LlavaProcessor(images, words, patch_size=8, **fields)


def paligemma_processor() -> Any:
    images = t.SiglipImageProcessorPil(**SQUARE)
    images.image_seq_length = 4
    words = tokenizer(additional_special_tokens=["<image>"], bos_token="w2", eos_token="w3")
    return t.PaliGemmaProcessor(images, words)


def gemma3_processor() -> Any:
    marks = {"image_token": "<image>", "boi_token": "w7", "eoi_token": "w8"}
    words = tokenizer(bos_token="w2", eos_token="w3", extra_special_tokens=marks)
    return t.Gemma3Processor(t.Gemma3ImageProcessorPil(**SQUARE), words, image_seq_length=4)


GREEDY = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
#: composite -> task, its processor, and what the pipeline is called with beside the image
PIPELINES: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "DPT": ("depth-estimation", lambda: t.DPTImageProcessorPil(**SQUARE), {}),
    "DepthAnything": ("depth-estimation", lambda: t.DPTImageProcessorPil(**SQUARE), {}),
    "UperNet": ("image-segmentation", lambda: t.SegformerImageProcessorPil(**SQUARE), {}),
    "Mask2Former": ("image-segmentation", lambda: t.Mask2FormerImageProcessorPil(**SQUARE), {"subtask": "semantic"}),
    "LLaVA": ("image-text-to-text", llava_processor, {"text": "<image> w5 w6", **GREEDY}),
    "PaliGemma": ("image-text-to-text", paligemma_processor, {"text": "<image> w5 w6", **GREEDY}),
    "Gemma 3": ("image-text-to-text", gemma3_processor, {"text": "w7 w5 w6", **GREEDY}),
}


def plain(value: Any) -> Any:
    """What a pipeline gives, as JSON has it; numbers keep every bit."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Image.Image):
        return np.asarray(value).tolist()
    return value.tolist() if isinstance(value, torch.Tensor) else value


def through_pipeline(name: str, folder: Path) -> Any:
    """What it answers, and the sum of every tensor that its model gave for it."""
    task, _, more = PIPELINES[name]
    noise = np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype("uint8")
    arguments = {"images": Image.fromarray(noise)} if "text" in more else {"inputs": Image.fromarray(noise)}
    pipe, sums = t.pipeline(task, model=str(folder)), []
    pipe.model.register_forward_hook(lambda _, __, out: sums.append([float(x.double().sum()) for x in floats(out)]))
    return plain([pipe(**arguments, **more), sums])


def floats(output: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in tensors(output) if tensor.is_floating_point()]
