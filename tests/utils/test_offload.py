"""Weights that wait on the disk: pruned, scored and compensated as those in memory, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_vitprune import OneShotScores, PruningPlan, VTPConfig, criteria, get_pruning_model, mask, prune
from hf_vitprune.errors import CheckpointMismatchError, UnsupportedModelError
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.modeling.streamed import load_streamed
from hf_vitprune.utils import offload
from hf_vitprune.utils.offload import StateDict, Waiting, is_offloaded
from memory import live_bytes, only_new_objects
from plans import plan_named
from tiny import images, make

VIT, DINO, SWIN = "ViTForImageClassification", "Dinov2ForImageClassification", "SwinForImageClassification"
GATED = {"use_swiglu_ffn": True}


def pair(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A model in memory, and the same with its layers in several files on the disk."""
    model = make(name, **changes).to(dtype).eval()
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    return model, load_streamed(type(model), folder / "model", copies=folder / "copies")


def assert_equal(streamed: nn.Module, whole: nn.Module) -> None:
    ours, theirs = streamed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, theirs[name]), name
    assert not is_offloaded(streamed) and "forward" not in streamed.__dict__ and "to" not in streamed.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_shot_pruning_is_the_same_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model, streamed = pair(tmp_path, DINO, dtype, **GATED)
    layers = {n: p.device.type for n, p in streamed.named_parameters()}
    assert {kind for n, kind in layers.items() if ".layer." in n} == {"meta"}
    assert {kind for n, kind in layers.items() if ".layer." not in n} == {"cpu"}
    seen = images(24)
    whole, scores = (OneShotScores.measure(one, seen) for one in (model, streamed))
    assert scores.fingerprint == whole.fingerprint
    assert all(torch.equal(scores.tensors[name], tensor) for name, tensor in whole.tensors.items())
    plan = scores.plan(0.6, round_to=1)
    small = prune(streamed, plan, calibration=seen)
    assert_equal(small, prune(model, plan, calibration=seen))
    assert_equal(prune(streamed, scores.compensate(streamed, plan)), prune(model, whole.compensate(model, plan)))
    assert type(small) is type(prune(model, plan))
    with torch.no_grad():
        assert torch.equal(streamed(seen.to(dtype)).logits, model(seen.to(dtype)).logits)  # it is as it was
    assert {p.device.type for n, p in streamed.named_parameters() if ".layer." in n} == {"meta"}


@pytest.mark.parametrize(
    "name, plan", [(VIT, "embedding"), (VIT, "layers"), (VIT, "padded values"), (SWIN, "heads"), (SWIN, "layers")]
)
def test_plans_of_every_kind_are_the_same_bit_for_bit(name: str, plan: str, tmp_path: Path) -> None:
    model, streamed = pair(tmp_path, name)
    made = plan_named(plan, model)
    assert made is not None
    assert_equal(prune(streamed, made), prune(model, made))
    assert_equal(prune(streamed, made, calibration=images(8)), prune(model, made, calibration=images(8)))


def test_weights_that_wait_in_cpu_memory() -> None:
    """As where a GPU computes; here, the CPU does."""
    model = make(VIT)
    plan, seen = PruningPlan.random(model, 0.4), images(8)
    offloaded = cpu_offload(make(VIT), execution_device=torch.device("cpu"))
    assert is_offloaded(offloaded) and {p.device.type for p in offloaded.parameters()} == {"meta"}
    assert_equal(prune(offloaded, plan, calibration=seen), prune(model, plan, calibration=seen))
    assert OneShotScores.measure(offloaded, seen).fingerprint == OneShotScores.measure(model, seen).fingerprint


def test_magnitude_reads_the_layers(tmp_path: Path) -> None:
    model, streamed = pair(tmp_path, DINO, **GATED)
    expected = criteria.magnitude(model)
    assert all(torch.equal(found, expected[name]) for name, found in criteria.magnitude(streamed).items())


# ---------------------------------------------------------------------- memory
@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers had their weights in memory, whenever one got its own."""
    inside: set[int] = set()
    counts: list[int] = []
    enter, leave = Waiting._enter, Waiting._leave

    def entered(self: Any) -> None:
        enter(self)
        if self._empty:
            inside.add(id(self))
            counts.append(len(inside))

    def left(self: Any) -> None:
        leave(self)
        if self._inside == 0:
            inside.discard(id(self))

    monkeypatch.setattr(Waiting, "_enter", entered)
    monkeypatch.setattr(Waiting, "_leave", left)
    return counts


def test_one_layer_is_in_memory_at_a_time(present: list[int], tmp_path: Path) -> None:
    _, streamed = pair(tmp_path, DINO, num_hidden_layers=4, **GATED)
    scores = OneShotScores.measure(streamed, images(8), OneShotSettings(statistics=False))
    prune(streamed, scores.plan(0.7, round_to=1), calibration=images(8))
    assert len(present) > 20 and set(present) == {1}
    present.clear()
    prune(streamed, PruningPlan.dense(streamed).keep_layers([0, 3]), calibration=images(8))
    assert max(present) == 2  # a layer that takes over, and one that it takes over from


@pytest.mark.parametrize("in_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_never_two_copies_in_memory(in_memory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Live tensors whenever a tensor of the dense model is read: by the compensation, and by the cut after it."""
    with only_new_objects():
        _never_two_copies(in_memory, monkeypatch, tmp_path)


def _never_two_copies(in_memory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, streamed = pair(tmp_path, DINO, num_hidden_layers=16, hidden_size=64)
    dense = sum(p.nbytes for p in model.parameters())
    plan = PruningPlan.magnitude(model, 0.5, units=("heads", "mlp"))
    seen, before, peaks = images(4), live_bytes(), [0]
    read: Callable[..., torch.Tensor] = StateDict.__getitem__

    def counted(self: StateDict, name: str) -> torch.Tensor:
        if name.endswith("norm1.weight"):  # once a layer
            peaks.append(live_bytes() - before)
        return read(self, name)

    monkeypatch.setattr(offload.StateDict, "__getitem__", counted)
    small = prune(model if in_memory else streamed, plan, calibration=seen)
    share = sum(p.nbytes for p in small.parameters()) / dense
    assert 0.4 < share < 0.65 and len(peaks) > 16
    # beside what is left: a layer of 16, and the images' hidden states; dense weights were there before
    assert share / 2 < max(peaks) / dense < share + 0.15


def test_weights_of_a_plan_of_ones_own_are_copied() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4)
    name = "vit.layers.0.attention.q_proj.weight"
    own = prune(model, plan).state_dict()[name].clone()
    small = prune(model, replace(plan, weights={name: own}))
    with torch.no_grad():
        small.get_parameter(name).zero_()
    assert bool(own.any())


# ---------------------------------------------------------------------- what goes wrong
def damaged(folder: Path, change: Callable[[Path], None], name: str = "layer.1.") -> Path:
    """A file of the folder with a tensor of layer 1 in it, changed."""
    for file in sorted((folder / "model").glob("*.safetensors")):
        if any(name in tensor for tensor in load_file(file)):
            change(file)
            return file
    raise AssertionError("no such file")


def lose_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layer.1." in name))
    save_file(tensors, file, {"format": "pt"})


def test_damaged_files_are_named_when_it_is_loaded(tmp_path: Path) -> None:
    model, _ = pair(tmp_path, DINO)
    load = {"model_class": type(model), "folder": tmp_path / "model", "copies": tmp_path / "copies"}
    damaged(tmp_path, lose_a_tensor)
    with pytest.raises(CheckpointMismatchError, match=r"lack 1 tensors of its layers \(first: dinov2.encoder.layer.1"):
        load_streamed(**load)
    file = damaged(tmp_path, lambda file: file.write_bytes(file.read_bytes()[:-40]))
    with pytest.raises(CheckpointMismatchError, match="damaged or cut short"):
        load_streamed(**load)
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        load_streamed(**load)


@pytest.mark.parametrize("change", [Path.unlink, lose_a_tensor, lambda file: file.write_bytes(b"x" * 100)])
def test_files_that_change_later_are_named(change: Callable[[Path], None], tmp_path: Path) -> None:
    _, streamed = pair(tmp_path, DINO)
    damaged(tmp_path, change)
    with pytest.raises(CheckpointMismatchError, match="layer.*cannot be read from where device_map left it"):
        OneShotScores.measure(streamed, images(4))
    with pytest.raises(CheckpointMismatchError, match="layer.*Fetch the files again"):
        prune(streamed, PruningPlan.random(streamed, 0.5, units=["mlp"]))


def test_what_needs_all_weights_is_refused(tmp_path: Path) -> None:
    _, streamed = pair(tmp_path, VIT)
    plan = PruningPlan.random(streamed, 0.4)
    adapted = get_peft_model(streamed, LoraConfig(target_modules=["q_proj", "query"]))
    for refused, what in (
        (lambda: mask(streamed, plan), "mask needs all weights"),
        (lambda: get_pruning_model(streamed, VTPConfig(pruning_ratio=0.4)), "training needs all weights"),
        (lambda: prune(adapted, plan), "adapters with their model needs all weights"),
    ):
        with pytest.raises(UnsupportedModelError, match=what):
            refused()
