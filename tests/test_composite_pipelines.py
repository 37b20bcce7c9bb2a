"""Bigger models with a pruned tower in a process of their own: their Auto class and pipelines, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_vitprune import PruningPlan, prune, towers
from test_composites import UNITS, auto_class, made
from tiny import run_python, tensors
from tiny_composites import COMPOSITES, outputs

SQUARE = {"size": {"height": 16, "width": 16}}
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, 59)), "<image>"]  # the last one is tiny_composites.IMAGE_TOKEN


def tokenizer() -> Any:
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "additional_special_tokens": ["<image>"]}
    return t.PreTrainedTokenizerFast(tokenizer_object=known, **special)


def llava_processor() -> Any:
    images = t.CLIPImageProcessorPil(**SQUARE, crop_size=SQUARE["size"])
    fields = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaProcessor(images, tokenizer(), patch_size=8, **fields)


#: composite -> task, its processor, and what the pipeline is called with beside the image
PIPELINES: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "DPT": ("depth-estimation", lambda: t.DPTImageProcessorPil(**SQUARE), {}),
    "DepthAnything": ("depth-estimation", lambda: t.DPTImageProcessorPil(**SQUARE), {}),
    "UperNet": ("image-segmentation", lambda: t.SegformerImageProcessorPil(**SQUARE), {}),
    "Mask2Former": ("image-segmentation", lambda: t.Mask2FormerImageProcessorPil(**SQUARE), {"subtask": "semantic"}),
    "LLaVA": (
        "image-text-to-text",
        llava_processor,
        {"text": "<image> w5 w6", "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}},
    ),
}

FRESH = """
import json, sys
from pathlib import Path
import torch, transformers
import hf_vitprune
from test_composite_pipelines import through_pipeline
from tiny import assert_same
from tiny_composites import COMPOSITES, outputs
root = Path(sys.argv[1])
for name, auto in json.loads((root / "auto.json").read_text()).items():
    for folder in sorted((root / name).iterdir()):
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        assert_same(outputs(model, COMPOSITES[name]()[1]), torch.load(folder / "outputs.pt", weights_only=True))
    expected = folder / "pipeline.json"
    if expected.is_file():
        assert through_pipeline(name, folder) == json.loads(expected.read_text()), name
    print(name)
"""


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every composite with each of its towers pruned, and what it gives here after loading."""
    root = tmp_path_factory.mktemp("composites")
    autos = {name: auto_class(made(name)[0]) for name in COMPOSITES}
    (root / "auto.json").write_text(json.dumps({name: auto.__name__ for name, auto in autos.items()}))
    for name, auto in autos.items():
        model, inputs, _ = made(name)
        for part in towers(model):
            folder = root / name / part
            prune(model, PruningPlan.random(model, 0.4, UNITS["all"], part=part)).save_pretrained(folder)
            torch.save(outputs(auto.from_pretrained(folder).eval(), inputs), folder / "outputs.pt")
        if name in PIPELINES:
            PIPELINES[name][1]().save_pretrained(folder)
            (folder / "pipeline.json").write_text(json.dumps(through_pipeline(name, folder)))
    return root


def test_a_fresh_process_gives_the_same_bits(saved: Path) -> None:
    assert run_python(FRESH, str(saved)).split("\n")[:-1] == list(COMPOSITES)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_look_through_the_small_tower(name: str, saved: Path) -> None:
    """What the model gave there is not what the dense one gives."""
    folder = next((saved / name).iterdir())
    result = json.loads((folder / "pipeline.json").read_text())
    other = folder.parent / "dense"
    made(name)[0].save_pretrained(other)
    PIPELINES[name][1]().save_pretrained(other)
    answer, sums = through_pipeline(name, other)
    assert answer and len(sums[0]) == len(result[1][0]) and sums[0] != result[1][0]
