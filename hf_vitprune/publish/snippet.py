"""What a model is for, and how to use it, as its card says it: what to install, and code that runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..families import PRUNED_PREFIX
from ..spec.architecture import unwrap
from ..utils.mixing import stock_type

#: Auto class -> task of the Hub (None: none that all of its models share); the first that maps a class is taken
_TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForUniversalSegmentation": "image-segmentation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedImageModeling": None,
    "AutoModelForPreTraining": None,
    "AutoBackbone": "image-feature-extraction",
    "AutoModel": "image-feature-extraction",
}
#: task of the Hub -> a call of its pipeline on an image, what it says, and whether that takes a tokenizer
_CALLS = {
    "image-classification": ('print(pipe("image.jpg"))', False),
    "zero-shot-image-classification": ('print(pipe("image.jpg", candidate_labels=["a cat", "a dog"]))', True),
    "image-feature-extraction": ('features = pipe("image.jpg", return_tensors=True)\nprint(features.shape)', False),
    "depth-estimation": ('pipe("image.jpg")["depth"].save("depth.png")', False),
    "image-segmentation": ('print([segment["label"] for segment in pipe("image.jpg")])', False),
}


@dataclass(frozen=True)
class Beside:
    """What a folder has beside the weights, and so what code may ask for; ``portable``: code that needs no library."""

    processor: bool = False
    tokenizer: bool = False
    adapter: bool = False
    portable: bool = False


def how_to_use(model: Any, config: PreTrainedConfig, repo_id: str | None, beside: Beside) -> tuple[str, list[str]]:
    """(what is needed, pieces of code): a pipeline, if there is one and all that it needs; loading the model alone.

    ``config``: of its pruned tower; ``beside``: what is saved with it.
    """
    place, base = repo_id or "path/to/model", unwrap(model)
    ours = config.model_type.startswith(PRUNED_PREFIX)
    task = pipeline_tag(base)
    name = _mapping(base, (stock_type(base),))  # the Auto class that maps its very class
    trust = ", trust_remote_code=True" if beside.portable and ours else ""
    lines = []
    if beside.adapter:
        lines = ["import hf_vitprune  # makes PEFT know adapters of pruned models"]
        needs = "These are adapters of a pruned model: they need `pip install hf_vitprune peft` beside transformers:"
    elif beside.portable and ours:
        needs = (
            "Its layers have sizes of their own. `modeling_hf_vitprune.py`, beside the weights, builds them with "
            "transformers alone; read it, and say so (where `hf_vitprune` is imported, nothing has to be said):"
        )
    elif ours:
        lines = ["import hf_vitprune  # makes transformers know pruned models"]
        needs = "Its layers have sizes of their own, so it needs `pip install hf_vitprune` beside transformers:"
    else:
        needs = "It is a stock transformers model, nothing else is needed:"
    call, reads_text = _CALLS.get(task or "", ("", False))
    pieces = []
    if call and name is not None and beside.processor and (beside.tokenizer or not reads_text):
        made = f'pipe = pipeline("{task}", model="{place}"{trust})'
        pieces.append("\n".join([*lines, "from transformers import pipeline", "", made, call]))
    module = "transformers"
    if name is None and trust:
        name = "AutoModel"
    elif name is None:
        name = type(base).__name__
        module = "hf_vitprune.modeling" if name.startswith("Pruned") else module
    made = f'model = {name}.from_pretrained("{place}"{trust})'
    return needs, [*pieces, "\n".join([*lines, f"from {module} import {name}", "", made])]


def pipeline_tag(model: Any) -> str | None:
    """The model's task on the Hub, for a class of a user's that of its stock one; None where there is none for it."""
    name = _mapping(model, type(model).__mro__)
    return "image-feature-extraction" if name is None else _TASKS[name]


def _mapping(model: Any, classes: tuple[type, ...]) -> str | None:
    for name in _TASKS:
        found = getattr(transformers, name)._model_mapping.get(type(model.config), ())
        if not set(found if isinstance(found, tuple) else (found,)).isdisjoint(classes):
            return name
    return None
