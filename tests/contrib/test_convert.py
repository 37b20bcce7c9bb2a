"""Checkpoints of SPViT's authors: same logits as an unfolded reference, files that need code are refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    DeiTConfig,
    PreTrainedConfig,
    SwinConfig,
    ViTConfig,
)

from command_line import misused, printed, refused
from hf_vitprune import convert_spvit_checkpoint
from hf_vitprune.errors import (
    CheckpointMismatchError,
    InvalidArchitectureError,
    InvalidConfigError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from hf_vitprune.modeling.conv_mixer import fold_heads, mixing_probabilities
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.utils.checkpoint_file import read_checkpoint
from spvit_reference import Net, Reference, State, random_state
from tiny import images, relative_error, run

MIXERS = ["conv3x3", "conv1x1", "attention", "identity", "conv3x3"]
DEIT = Net([MIXERS], [[24, 9, 31, 17, 8]], 24, [3], (40, 24), 8)
SWIN = Net(
    [["conv1x1", "attention"], ["attention", "attention", "conv3x3", "identity"]],
    [[12, 7], [40, 31, 9, 22]],
    16,
    [2, 4],
    (32, 16),
    2,
    window=4,
    tau=100.0,
    eps=1e-5,
)
NETS = {
    "DeiT": DEIT,
    "distilled DeiT": replace(DEIT, distilled=True),
    "Swin": SWIN,
    "Swin, centre first": replace(SWIN, centre_first=True),
}


def config_of(net: Net) -> PreTrainedConfig:
    common: dict[str, Any] = {"image_size": list(net.image), "patch_size": net.patch, "num_labels": net.labels}
    if net.window:
        depths = [len(stage) for stage in net.mixers]
        return SwinConfig(embed_dim=net.width, depths=depths, num_heads=net.heads, window_size=net.window, **common)
    kind = DeiTConfig if net.distilled else ViTConfig
    sizes = {"hidden_size": net.width, "num_attention_heads": net.heads[0], "num_hidden_layers": len(net.mixers[0])}
    return kind(intermediate_size=4 * net.width, **sizes, **common)


def lists(net: Net) -> tuple[Any, Any]:
    return (net.mixers, net.hidden) if net.window else (net.mixers[0], net.hidden[0])


def converted(net: Net, state: State, **how: Any) -> Any:
    return convert_spvit_checkpoint(state, config_of(net), *lists(net), **how)


# ---------------------------------------------------------------------- same logits
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_same_logits(name: str, seed: int) -> None:
    net = NETS[name]
    state = random_state(net, seed)
    before = {key: tensor.clone() for key, tensor in state.items()}
    how = {"centre_column": 0} if net.centre_first else {}
    model = converted(net, state, **how)
    pixels = images(2, net.image)
    expected = Reference(net, state).logits(pixels)
    assert relative_error(run(model, pixels)["logits"].double(), expected) < 1e-5
    assert not model.training and all(torch.equal(state[key], tensor) for key, tensor in before.items())
    wrong = Reference(replace(net, centre_first=not net.centre_first), state).logits(pixels)
    assert relative_error(wrong, expected) > 1e-3  # the order of positions matters


@pytest.mark.parametrize("name", NETS)
def test_the_centre_is_found_by_what_was_trained(name: str) -> None:
    net = NETS[name]
    net = replace(net, mixers=[["attention" if m == "conv3x3" else m for m in stage] for stage in net.mixers])
    state = random_state(net, tables="trained")
    pixels = images(1, net.image)
    expected = Reference(net, state).logits(pixels)
    assert relative_error(run(converted(net, state), pixels)["logits"].double(), expected) < 1e-5


def folded(net: Net, state: State) -> State:
    """The form of the authors' tool: convolution blocks hold a convolution, its BatchNorm, and a 1 x 1 convolution."""
    made = dict(state)
    for i, mixer in enumerate(net.mixers[0]):
        name = f"blocks.{i}.attn."
        if not mixer.startswith("conv"):
            continue
        size = mixer[-3:]
        weights = [made.pop(f"{name}{key}").double() for key in ("v.weight", "v.bias", "proj.weight", "head_probs")]
        v, v_bias, o, table = weights
        convolution = fold_heads(v, v_bias, o, mixing_probabilities(table, net.tau), int(size[0]))
        made[f"{name}bconv.0.weight"] = convolution.weight.float()
        made[f"{name}bconv.0.bias"] = convolution.bias.float()
        made[f"{name}bconv.3.weight"] = convolution.output_weight.float()[..., None, None]
        made[f"{name}bconv.3.bias"] = made.pop(f"{name}proj.bias")
        for key in torch.nn.BatchNorm2d(1).state_dict():
            made[f"{name}bconv.1.{key}"] = made.pop(f"{name}bn_{size}.{key}")
    return made


def test_convolutions_that_were_folded_before() -> None:
    state = random_state(DEIT)
    model = converted(DEIT, folded(DEIT, state))
    assert [shape.mixer for shape in Architecture.of(model).layers] == MIXERS
    pixels = images(2, DEIT.image)
    assert relative_error(run(model, pixels)["logits"].double(), Reference(DEIT, state).logits(pixels)) < 1e-5
    wrong = {k: t for k, t in folded(DEIT, state).items() if k != "blocks.0.attn.bconv.1.running_var"}
    with pytest.raises(CheckpointMismatchError, match=r"lacks blocks.0.attn.bconv.1.running_var"):
        converted(DEIT, wrong)
    with pytest.raises(CheckpointMismatchError, match=r"layer 0 .* is conv3x3 in the checkpoint, and conv1x1"):
        convert_spvit_checkpoint(folded(DEIT, state), config_of(DEIT), ["conv1x1", *MIXERS[1:]], DEIT.hidden[0])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = converted(DEIT, random_state(DEIT))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = images(2, DEIT.image)
    assert torch.equal(run(loaded, pixels)["logits"], run(model, pixels)["logits"])
    assert loaded.config.pruning_config["info"]["method"] == "SPViT"


def test_words_of_the_authors() -> None:
    words = {"attention": "msa", "identity": "skip"}
    state = random_state(DEIT)
    model = convert_spvit_checkpoint(state, config_of(DEIT), [words.get(m, m) for m in MIXERS], DEIT.hidden[0])
    assert [shape.mixer for shape in Architecture.of(model).layers] == MIXERS


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_folded_heads_are_the_sum_of_all(data: st.DataObject) -> None:
    """Any number of heads, channels and grid; gradients reach every weight."""
    heads, channels, rows, columns = (data.draw(st.integers(1, 5)) for _ in range(4))
    kernel = data.draw(st.sampled_from([1, 3]))
    tau = data.draw(st.sampled_from([0.01, 1.0, 100.0]))
    net = replace(DEIT, width=heads * channels, heads=[heads], tau=tau, mixers=[[f"conv{kernel}x{kernel}"]])
    state = random_state(net, data.draw(st.integers(0, 9)))
    name = "blocks.0.attn"
    weights = [
        state[f"{name}.{key}"].double().requires_grad_() for key in ("v.weight", "v.bias", "proj.weight", "head_probs")
    ]
    v, v_bias, o, table = weights
    folded = fold_heads(v, v_bias, o, mixing_probabilities(table, tau), kernel)
    x = torch.randn(1, rows, columns, net.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), folded.weight, folded.bias, padding=kernel // 2)
    state |= {f"{name}.bn_{kernel}x{kernel}.{k}": t for k, t in IDENTITY_NORM.items()}
    state[f"{name}.proj.bias"] = torch.zeros(net.width)
    expected = Reference(net, state).convolution(name, x, heads, kernel)
    actual = hidden.clamp(min=0).permute(0, 2, 3, 1) @ folded.output_weight.T
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9)
    actual.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)


IDENTITY_NORM = {
    "running_mean": torch.zeros(1),
    "running_var": torch.ones(1, dtype=torch.float64) - 1e-5,
    "weight": torch.ones(1),
    "bias": torch.zeros(1),
}


# ---------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, h: (m[:4], h[:4]), InvalidArchitectureError, "lists are for 4 layers, the config has 5"),
        (lambda m, h: (m, h[:4]), InvalidArchitectureError, "5 mixers, and mlp_hidden is"),
        (lambda m, h: (["conv5x5", *m[1:]], h), InvalidArchitectureError, "layer 0: unknown mixer 'conv5x5'"),
        (lambda m, h: (m, [*h[:2], 0.5, *h[3:]]), InvalidArchitectureError, "layer 2: mlp is 0.5"),
        (
            lambda m, h: (["conv1x1", *m[1:]], h),
            CheckpointMismatchError,
            r"layer 0 \(blocks.0\) is conv3x3 in the checkpoint, and conv1x1 in the list",
        ),
        (
            lambda m, h: (["attention", *m[1:]], h),
            CheckpointMismatchError,
            "layer 0 .* conv3x3 in the checkpoint, and attention",
        ),
        (lambda m, h: ([*m[:3], "none", m[4]], h), CheckpointMismatchError, "layer 3 .* identity in the checkpoint"),
        (lambda m, h: (m, [24, 9, 30, 17, 8]), CheckpointMismatchError, "layer 2 .* 31 hidden neurons .* 30 in mlp"),
    ],
)
def test_lists_that_do_not_fit(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_spvit_checkpoint(random_state(DEIT), config_of(DEIT), *change(MIXERS, DEIT.hidden[0]))


def without(name: str) -> Any:
    return lambda state: {k: t for k, t in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.0.attn.head_probs"), "lacks blocks.0.attn.head_probs"),
        (without("blocks.1.attn.bn_1x1.running_var"), "lacks blocks.1.attn.bn_1x1.running_var"),
        (without("blocks.2.attn.qk.bias"), r"lacks the weights of 2 tensors \(first: vit.layers.2"),
        (without("pos_embed"), "first: vit.embeddings.position_embeddings"),
        (lambda s: {**s, "blocks.3.attn.v.weight": s["blocks.0.attn.v.weight"]}, "also holds 1 .*blocks.3.attn.v"),
        (lambda s: {**s, "blocks.7.norm1.weight": torch.ones(24)}, "also holds 1 .*blocks.7"),
        (lambda s: {**s, "dist_token": s["cls_token"]}, "more than the config has: 1 .*distillation_token"),
        (lambda s: {**s, "blocks.0.attn.bn_1x1.weight": torch.ones(8)}, "layer 0 .*search"),
        (
            lambda s: {**s, "head.weight": torch.ones(7, 24)},
            r"classifier.weight is \(7, 24\) .*\(5, 24\) by the config",
        ),
        (lambda s: {**s, "pos_embed": torch.ones(1, 5, 24)}, "position_embeddings"),
        (lambda s: {**s, "blocks.0.attn.head_probs": torch.ones(3, 8)}, r"head_probs is \(3, 8\)"),
        (lambda s: {**s, "blocks.0.attn.head_probs": torch.ones(5, 9)}, r"head_probs is \(5, 9\)"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, message: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=message):
        converted(DEIT, change(random_state(DEIT)))


def test_impossible_settings() -> None:
    state = random_state(DEIT)
    with pytest.raises(UnsupportedModelError, match="SPViT checkpoints are of DeiT or Swin"):
        convert_spvit_checkpoint(state, BertConfig(), *lists(DEIT))
    for how in ({"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"centre_column": 3}):
        with pytest.raises(InvalidConfigError):
            converted(DEIT, state, **how)
    nested = [["conv1x1", "attention"], "attention"]
    with pytest.raises(InvalidArchitectureError):
        convert_spvit_checkpoint(random_state(SWIN), config_of(SWIN), nested, SWIN.hidden)


# ---------------------------------------------------------------------- files
class Code:
    """A pickle that calls a function when it is read."""

    def __reduce__(self) -> Any:
        return print, ("code was run",)


class Settings:
    """A class that only its own project has."""


STATE = {"weight": torch.ones(2)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "record", [STATE, {"model": STATE, "args": argparse.Namespace(lr=1e-3)}, {"state_dict": STATE}]
)
def test_files_of_tensors(record: Any, zipped: bool, tmp_path: Path) -> None:
    torch.save(record, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_checkpoint(tmp_path / "model.pth")["weight"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("code", [Code(), Settings()])
def test_files_with_code_are_refused(
    code: Any, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": STATE, "config": code}, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match=r"running code .*print|running code .*Settings"):
        read_checkpoint(tmp_path / "model.pth")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 damaged"])
def test_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointMismatchError, match="no checkpoint of PyTorch"):
        read_checkpoint(tmp_path / "model.pth")
    for record in ([1], {}, {"model": {"a": 1}}):
        torch.save(record, tmp_path / "model.pth")
        with pytest.raises(CheckpointMismatchError, match="holds no state dict"):
            read_checkpoint(tmp_path / "model.pth")


# ---------------------------------------------------------------------- command line
def test_command(tmp_path: Path) -> None:
    state = random_state(SWIN)
    torch.save({"model": state, "epoch": 3}, tmp_path / "model.pth")
    config_of(SWIN).save_pretrained(tmp_path / "base")
    mixers, hidden = lists(SWIN)
    (tmp_path / "layers.json").write_text(json.dumps({"mixer": mixers, "mlp_hidden": hidden}))
    how = ["--base", tmp_path / "base", "--layers", tmp_path / "layers.json"]
    text = printed("convert", tmp_path / "model.pth", tmp_path / "out", *how)
    assert "conv3x3" in text and "identity" in text
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    pixels = images(1, SWIN.image)
    expected = Reference(SWIN, state).logits(pixels)
    assert relative_error(run(loaded, pixels)["logits"].double(), expected) < 1e-5
    assert "is there already" in refused("convert", tmp_path / "model.pth", tmp_path / "out", *how)
    printed("convert", tmp_path / "model.pth", tmp_path / "out", *how, "--force", "--centre-column", 0)
    other = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert relative_error(run(other, pixels)["logits"].double(), expected) > 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "mixer and mlp_hidden"), ('{"mixer": []}', "mixer and mlp_hidden")],
)
def test_command_with_bad_lists(content: str, message: str, tmp_path: Path) -> None:
    torch.save(random_state(DEIT), tmp_path / "model.pth")
    config_of(DEIT).save_pretrained(tmp_path / "base")
    (tmp_path / "layers.json").write_text(content)
    how = ["--base", tmp_path / "base", "--layers", tmp_path / "layers.json"]
    assert message in misused("convert", tmp_path / "model.pth", tmp_path / "out", *how)
    assert not (tmp_path / "out").exists()
