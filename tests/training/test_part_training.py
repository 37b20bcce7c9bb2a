"""Methods that learn inside a bigger model: by its own loss, and out of it with the tower small."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, default_data_collator

from hf_vitprune import (
    DistillationConfig,
    NViTConfig,
    PruningPlan,
    PruningTrainer,
    SLSConfig,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    count,
    get_pruning_model,
    mask,
    prune,
    towers,
    truncate,
)
from hf_vitprune.errors import (
    AdapterError,
    InvalidConfigError,
    ResumeError,
    UnsupportedModelError,
    UnsupportedUnitError,
)
from hf_vitprune.modeling import hosts
from hf_vitprune.utils.mixing import stock_type
from tiny import relative_error
from tiny_composites import dpt, dual, llava, outputs, paligemma, upernet

FEATURES = DistillationConfig(kind="features")
METHODS: dict[str, Any] = {
    "VTP": VTPConfig(target=0.6, round_to=1),
    "NViT": NViTConfig(target=0.7, interval=1),
    "SPViT": SPViTConfig(target=0.8, gate_learning_rate=3.0),
}


def examples(model: Any, inputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """What a processor makes of two rows, with the labels of the model's own loss."""
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(2)]
    for row in rows:
        if "input_ids" in row:
            row["labels"] = row["input_ids"].clone()
        else:
            row["labels"] = torch.arange(256).view(16, 16) % 3
    return rows * 4


def trained(model: Any, config: Any, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    pruning_model = get_pruning_model(model, config)
    args = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], save_strategy="no"
    )
    PruningTrainer(model=pruning_model, args=args, train_dataset=rows, **settings).train()
    return pruning_model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [lambda: llava(-1), upernet], ids=["LLaVA", "UperNet"])
def test_a_tower_learns_by_the_composites_own_loss(make: Any, method: str, tmp_path: Path) -> None:
    """Two steps; the export is the composite with a small tower, and computes what the trained one does."""
    model, inputs = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = next(iter(towers(model)))
    pruning_model = trained(model, METHODS[method], examples(model, inputs), tmp_path, compensate="none")
    head = next(name for name, _ in reversed(list(model.named_parameters())))
    assert not torch.equal(model.get_parameter(head), before[head])  # all of the composite is trained
    assert pruning_model.plan().part == part
    small = pruning_model.export(compensate="none")
    assert stock_type(small) is type(model)
    small.eval()
    pruning_model.eval()
    with torch.no_grad():
        expected = pruning_model(**inputs).logits
    assert relative_error(outputs(small, inputs)["logits"], expected) < 1e-4
    rows = examples(model, inputs)
    compensated = pruning_model.export(calibration=rows).eval()  # batches of the whole: the tower takes what it knows
    assert [p.shape for p in compensated.parameters()] == [p.shape for p in small.parameters()]
    if method == "VTP":
        assert not torch.equal(outputs(compensated, inputs)["logits"], outputs(small, inputs)["logits"])
    full = mask(pruning_model.unload(), pruning_model.plan()).eval()
    if method != "VTP":  # its plan folds scores, which a mask has too
        assert relative_error(outputs(full, inputs)["logits"], outputs(small, inputs)["logits"]) < 1e-5
    small.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    assert relative_error(outputs(loaded, inputs)["logits"], outputs(small, inputs)["logits"]) < 1e-6


def clip_rows(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Pairs of images and captions, without labels."""
    words, images = inputs["input_ids"], inputs["pixel_values"]
    return [{"input_ids": words[i % 3], "pixel_values": images[i % 2]} for i in range(8)]


def with_loss(rows: list[Any]) -> dict[str, Any]:
    return {**default_data_collator(rows), "return_loss": True}


#: composite -> how it is made, which of its towers learns, and its rows without labels
TAUGHT: dict[str, Any] = {
    "LLaVA": (lambda: llava(-1), None, lambda inputs: [{k: v[i % 2] for k, v in inputs.items()} for i in range(8)]),
    "CLIP": (dual("CLIP"), "vision", clip_rows),
    "DPT": (dpt, None, lambda inputs: [{"pixel_values": inputs["pixel_values"][i % 2]} for i in range(8)]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*TAUGHT, "CLIP by its own loss"])
def test_a_tower_learns_from_its_dense_self(name: str, method: str, tmp_path: Path) -> None:
    """Without labels; or, in a dual encoder, by the contrastive loss. The export computes what the mask does."""
    by_itself = "own" in name
    make, part, rows_of = TAUGHT[name.split()[0]]
    model, inputs = make()
    config = METHODS[method]
    if (name, method) == ("DPT", "NViT"):
        with pytest.raises(UnsupportedUnitError, match="leave the unit 'embedding' out"):
            get_pruning_model(model, replace(config, units=("embedding", "heads", "mlp")))
    pruning_model = get_pruning_model(model, config, part=part)
    before = copy.deepcopy(model.state_dict())
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], save_strategy="no"
    )
    settings: dict[str, Any] = {"data_collator": with_loss} if by_itself else {"distillation": FEATURES}
    rows = rows_of(inputs)
    PruningTrainer(model=pruning_model, args=args, train_dataset=rows, compensate="none", **settings).train()
    path = towers(model)[pruning_model.tower.part].path
    after = pruning_model.unload().state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert any(key.startswith(f"{path}.") for key in changed)
    assert by_itself == any(not key.startswith(f"{path}.") for key in changed)
    small = pruning_model.export(compensate="none").eval()
    assert 0 < count(small, part=part).macs < count(make()[0], part=part).macs
    full = mask(model, pruning_model.plan()).eval()
    ours, theirs = outputs(small, inputs), outputs(full, inputs)
    key = next(iter(ours))
    assert relative_error(ours[key], theirs[key]) < 1e-4


def test_a_small_tower_of_a_dual_encoder_is_recovered(tmp_path: Path) -> None:
    """Which of the two towers learns follows from which is pruned."""
    dense, inputs = dual("CLIP")()
    small = prune(dense, PruningPlan.random(dense, 0.4, ["mlp"], part="vision"))
    before = copy.deepcopy(small.state_dict())
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no")
    settings: dict[str, Any] = {"distillation": FEATURES, "train_dataset": clip_rows(inputs)}
    with pytest.raises(InvalidConfigError, match="share tensors: give a copy.deepcopy"):  # the text tower is one
        PruningTrainer(model=small, args=args, teacher=dense, **settings)
    settings["teacher"] = copy.deepcopy(dense)
    PruningTrainer(model=small, args=args, **settings).train()
    changed = {key for key, tensor in small.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and all(key.startswith("vision_model.") for key in changed)
    small = prune(small, PruningPlan.random(small, 0.4, ["mlp"], part="text"))
    with pytest.raises(UnsupportedModelError, match="choose one with part="):
        PruningTrainer(model=small, args=args, **settings)


def test_adapters_of_a_composite(tmp_path: Path) -> None:
    model, inputs = llava()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    pruning_model = trained(adapted, VTPConfig(target=0.6, round_to=1), examples(model, inputs), tmp_path)
    small = pruning_model.export(compensate="none").eval()
    with torch.no_grad():
        expected = pruning_model.eval()(**inputs).logits
        assert relative_error(small(**inputs).logits, expected) < 1e-4
    with pytest.raises(AdapterError, match="sets weights of a tower to zero"):
        get_pruning_model(get_peft_model(llava()[0], LoraConfig(target_modules=["q_proj"])), METHODS["NViT"])


def test_layers_that_are_read_stay() -> None:
    """By the model's config or the backbone's outputs; the error names who reads them, before any training."""
    with pytest.raises(InvalidConfigError, match="config.vision_feature_layer"):
        get_pruning_model(llava(-1)[0], SLSConfig())
    with pytest.raises(InvalidConfigError, match="can keep 3 to 3 of its 4"):
        get_pruning_model(llava(-2)[0], TruncationConfig(layers=2))
    with pytest.raises(InvalidConfigError, match="out_features"):
        get_pruning_model(upernet()[0], TruncationConfig(layers=2))
    pruning_model = get_pruning_model(llava(-2)[0], TruncationConfig(layers=3))
    assert pruning_model.export().config.vision_feature_layer == -1
    assert len(get_pruning_model(paligemma()[0], TruncationConfig(layers=2)).plan().layers) == 2


def test_hosts_that_cannot_be_loaded_again_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dual("CLIP")()[0]
    assert get_pruning_model(model, METHODS["VTP"], part="vision").tower.path == "vision_model"
    monkeypatch.setattr(hosts, "_hosts", {})
    with pytest.raises(UnsupportedModelError, match="CLIPModel makes its tower itself"):
        get_pruning_model(model, METHODS["VTP"], part="vision")


def test_layers_without_gradients_are_refused_and_the_cure_works(tmp_path: Path) -> None:
    model, inputs = llava(-2)
    with pytest.raises(UnsupportedModelError, match="layers 3 to 3 of the tower get none"):
        get_pruning_model(model, METHODS["NViT"])
    shorter = truncate(model, "unused")
    small = trained(shorter, METHODS["NViT"], examples(model, inputs), tmp_path).export()
    assert len(towers(small)) == 1 and towers(small)["vision"].layers == 3


def test_a_checkpoint_is_of_a_part() -> None:
    model = dual("CLIP")()[0]
    state = get_pruning_model(model, METHODS["VTP"], part="vision").state_dict()
    alone = get_pruning_model(dual("CLIP")()[0].vision_model, METHODS["VTP"])
    other = {k.replace("model.vision_model.", "model."): v for k, v in state.items()}
    with pytest.raises(ResumeError, match="part was vision and is None"):
        alone.load_state_dict(other, strict=False)
