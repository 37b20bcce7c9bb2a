"""A small tower put into a bigger model by hand: the model's config follows, and it loads as what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune import PruningPlan, prune, towers, truncate
from hf_vitprune.errors import NativeExportError
from hf_vitprune.modeling.native import to_native
from hf_vitprune.utils.mixing import stock_type
from tiny import make, relative_error
from tiny_composites import Made, auto_class, dual, llava, outputs, paligemma, upernet_swin

MAKERS: dict[str, Callable[[], Made]] = {
    "CLIP": dual("CLIP"),
    "SigLIP": dual("Siglip"),
    "LLaVA": lambda: llava(-1),
    "PaliGemma": paligemma,
    "UperNet": upernet_swin,
}


def narrow(tower: Any) -> Any:
    return prune(tower, PruningPlan.magnitude(tower, 0.5, units=["heads", "qk", "v", "mlp"]))


def shallow(tower: Any) -> Any:
    return truncate(tower, towers(tower)["vision"].layers - 1)


def swapped(name: str, change: Callable[[Any], Any]) -> tuple[Any, dict[str, torch.Tensor], str]:
    model, inputs = MAKERS[name]()
    path = next(tower.path for part, tower in towers(model).items() if part != "text")
    model.set_submodule(path, change(model.get_submodule(path)))
    return model, inputs, path


@pytest.mark.parametrize("set_too", [False, True], ids=["config left", "config set"])
@pytest.mark.parametrize("change", [narrow, shallow])
@pytest.mark.parametrize("name", MAKERS)
def test_saved_is_loaded(name: str, change: Callable[[Any], Any], set_too: bool, tmp_path: Path) -> None:
    """Whether the user sets the config, as for a tower that is not ours, or does not."""
    model, inputs, path = swapped(name, change)
    if set_too:
        field = "backbone_config" if name == "UperNet" else "vision_config"
        setattr(model.config, field, model.get_submodule(path).config)
    model.save_pretrained(tmp_path)
    loaded = auto_class(MAKERS[name]()[0]).from_pretrained(tmp_path).eval()
    assert stock_type(loaded) is stock_type(model)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    expected = outputs(model, inputs)
    assert all(relative_error(tensor, expected[key]) < 1e-6 for key, tensor in outputs(loaded, inputs).items())


@pytest.mark.parametrize("name", ["CLIP", "LLaVA"])
def test_the_dense_tower_put_back(name: str, tmp_path: Path) -> None:
    model, inputs = MAKERS[name]()
    before, fields = outputs(model, inputs), copy.deepcopy(model.config.vision_config.to_dict())
    path = towers(model)["vision"].path
    dense = model.get_submodule(path)
    model.set_submodule(path, narrow(dense))
    assert model.config.vision_config is model.get_submodule(path).config
    model.set_submodule(path, dense)
    assert model.config.vision_config.to_dict() == fields
    model.save_pretrained(tmp_path)
    loaded = auto_class(MAKERS[name]()[0]).from_pretrained(tmp_path).eval()
    assert all(torch.allclose(outputs(loaded, inputs)[key], tensor, atol=1e-5) for key, tensor in before.items())


@pytest.mark.parametrize("name", MAKERS)
def test_native_export(name: str, tmp_path: Path) -> None:
    """Towers of sizes that stock classes can hold: without this library's classes anywhere in the model."""
    model, inputs = MAKERS[name]()
    part = next(part for part in towers(model) if part != "text")
    plan = PruningPlan.dense(model, part)
    whole_layers = name in ("UperNet", "SigLIP")  # Swin, and a pooling head that takes its sizes from the config
    kept = range(len(plan.layers) - whole_layers)
    thin = [replace(entry, mlp=entry.mlp if whole_layers else entry.mlp[:-8]) for entry in plan.layers]
    small = prune(model, plan.with_layers(thin).keep_layers(kept), stock=False)
    assert "pruned" in str(small.config.to_dict())
    before = copy.deepcopy(small.state_dict())
    native = to_native(small)
    assert type(native) is type(model) and type(native.config) is type(model.config)
    assert not any(type(module).__name__.startswith("Pruned") for module in native.modules())
    expected = outputs(small, inputs)
    assert all(relative_error(tensor, expected[key]) < 1e-5 for key, tensor in outputs(native, inputs).items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in small.state_dict().items())
    native.save_pretrained(tmp_path)
    assert '"model_type": "pruned' not in (tmp_path / "config.json").read_text()
    loaded = outputs(type(model).from_pretrained(tmp_path).eval(), inputs)
    assert all(relative_error(tensor, expected[key]) < 1e-5 for key, tensor in loaded.items())
    uneven = prune(model, plan.with_layers([*thin[:-1], plan.layers[-1].with_mixer("none")]), stock=False)
    with pytest.raises(NativeExportError, match=f"{towers(model)[part].path}: .*layer"):
        to_native(uneven)


def test_the_dense_class_refuses_it(tmp_path: Path) -> None:
    model, _, _ = swapped("CLIP", narrow)
    model.save_pretrained(tmp_path)
    stock = type(MAKERS["CLIP"]()[0])
    for loose in (False, True):
        with pytest.raises(Exception, match="load with an Auto class or a Pruned class"):
            stock.from_pretrained(tmp_path, ignore_mismatched_sizes=loose)


def test_what_is_none_of_ours_is_left_alone() -> None:
    """Towers of which none is pruned, modules of other kinds, and models of the user's own."""
    model = MAKERS["CLIP"]()[0]
    before = model.config.vision_config
    model.vision_model = copy.deepcopy(model.vision_model)
    model.visual_projection = nn.Linear(32, 512, bias=False)
    model.vision_model = make("ViTModel")
    assert model.config.vision_config is before
    model.vision_model = narrow(make("DeiTModel"))
    assert model.config.vision_config is before and type(model) is type(MAKERS["CLIP"]()[0])
    holder = nn.Module()
    holder.tower = make("ViTModel")
    holder.tower = narrow(holder.tower)
    assert not hasattr(holder, "config")
