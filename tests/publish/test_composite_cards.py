"""Cards of bigger models with a pruned tower in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from hf_vitprune import PruningPlan, count, prune, truncate
from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.publish import hub
from hf_vitprune.publish.card import model_card
from tiny_composites import COMPOSITES, auto_class, dual, llava

#: composite -> its task on the Hub
TASKS = {
    "LLaVA": "image-text-to-text",
    "PaliGemma": "image-text-to-text",
    "VisionEncoderDecoder": "image-text-to-text",
    "CLIP": "zero-shot-image-classification",
    "SigLIP": "zero-shot-image-classification",
    "DPT": "depth-estimation",
    "UperNet": "image-segmentation",
    "Mask2Former": "image-segmentation",
}
UNITS = ["heads", "qk", "v", "mlp"]


def pruned(model: Any, part: str | None = None, stock: bool = True) -> Any:
    return prune(model, PruningPlan.random(model, 0.4, UNITS, part=part), stock=stock)


@pytest.mark.parametrize("name", TASKS)
def test_the_snippet_of_the_card_loads_the_model(name: str, tmp_path: Path) -> None:
    model = COMPOSITES[name]()[0]
    part = "vision" if TASKS[name].startswith("zero") else None
    small = pruned(model, part)
    small.save_pretrained(tmp_path)
    text = str(model_card(small, dense=model))
    data = ModelCard(text).data
    assert data.pipeline_tag == TASKS[name] and "hf_vitprune" in data.tags
    assert f"{count(small, part=part).macs / count(model, part=part).macs:.0%}) remain" in text.replace("\n", " ")
    code = text.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("path/to/model", str(tmp_path)), found)
    assert type(found["model"]) is type(small)
    state = found["model"].state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in small.state_dict().items())


def test_what_is_said_of_the_tower_and_of_the_whole() -> None:
    model = llava()[0]
    model.config._name_or_path = "llava-hf/llava"
    model.config.vision_config._name_or_path = "openai/clip"
    text = str(model_card(pruned(model), repo_id="me/small"))
    assert ModelCard(text).data.base_model == "llava-hf/llava"
    assert "its vision tower, a `clip_vision_model`; nothing else is changed" in text
    assert "pip install hf_vitprune" in text and 'AutoModelForImageTextToText.from_pretrained("me/small")' in text
    text = str(model_card(truncate(model, "unused")))
    assert "nothing else is needed" in text and "import hf_vitprune" not in text


def test_which_tower_it_is_about() -> None:
    model = dual("CLIP")()[0]
    vision = pruned(model, "vision")
    assert model_card(vision).data.tags[-1] == "clip_vision_model"
    assert model_card(vision, part="text").data.tags[-1] == "clip_text_model"
    for both in (model, pruned(vision, "text")):
        with pytest.raises(UnsupportedModelError, match="choose one with part="):
            model_card(both)
    assert "its text tower" in str(model_card(pruned(vision, "text"), part="text"))


def test_the_card_of_the_dense_model_is_not_taken(tmp_path: Path) -> None:
    """A folder's card goes along with what is in the folder, and with nothing smaller."""
    model = llava()[0]
    for folder, text in ((tmp_path / "dense", "of the dense one"), (tmp_path / "small", "of the small one")):
        model.save_pretrained(folder)
        (folder / "README.md").write_text(text)
        loaded = auto_class(model).from_pretrained(folder)
        assert hub._card_beside(loaded) == text
        for smaller in (pruned(loaded), truncate(loaded, 3)):
            assert hub._card_beside(smaller) is None
        model = pruned(loaded, stock=False)
