"""2:4 sparsity: exact, held through training and resume, apart from structure, refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification, Trainer

from hf_vitprune import Architecture, PruningPlan, count, prune
from hf_vitprune.contrib.sparsity import (
    SparsityCallback,
    check_sparsity,
    sparse_linears,
    sparsify,
    sparsity_mask,
    use_sparse_kernels,
)
from hf_vitprune.errors import InvalidConfigError, SparsityError, UnsupportedDeviceError, UnsupportedModelError
from pruning_runs import DROPOUT, VIT, gated, lora_model, nvit, scatter_scores, state_of, trainer
from tiny import CLASSIFIERS, assert_same, make, run

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}


@settings(max_examples=30, deadline=None, database=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_the_two_largest_of_four_stay(rows: int, groups: int, seed: int, coarse: bool) -> None:
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if coarse else weight  # many ties and zeros
    mask = sparsity_mask(weight)
    for values, kept in zip(weight.view(-1, 4).tolist(), mask.view(-1, 4).tolist(), strict=True):
        order = sorted(range(4), key=lambda i: (-abs(values[i]), i))
        assert [i for i in range(4) if kept[i]] == sorted(order[:2])
    if not coarse:  # a weight of zero that was kept may lose to another one; nothing that counts changes
        assert torch.equal(sparsity_mask(weight * mask), mask)
    assert torch.equal(weight * mask * sparsity_mask(weight * mask), weight * mask)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_every_linear_of_the_layers_is_sparse_and_nothing_else(case: str) -> None:
    model = make(case)
    before, architecture = state_of(model), Architecture.of(model)
    with pytest.raises(SparsityError, match="q_proj is not 2:4 sparse"):
        check_sparsity(model)
    masks = sparsify(model)
    stored = check_sparsity(model)
    assert stored == sum(int(mask.sum()) for mask in masks.values()) == sum(m.numel() for m in masks.values()) // 2
    for name, tensor in model.state_dict().items():
        mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        assert torch.equal(tensor, before[name] if mask is None else before[name] * mask), name
    assert len(masks) == len(sparse_linears(model)) >= 6 * len(architecture.layers)
    assert Architecture.of(model) == architecture and count(model) == count(make(case))


@pytest.mark.parametrize("kind", [Trainer, None])
def test_training_keeps_the_zeros(kind: Any, tmp_path: Path) -> None:
    """Of a pruned model, with momentum and weight decay; saved and loaded as any other."""
    small = scatter_scores(nvit(target=0.5)).export().train()
    extra = {"kind": kind} if kind else {}
    callback = SparsityCallback()
    before = state_of(small)
    trainer(small, tmp_path, max_steps=3, callbacks=[callback], **ADAMW, **extra).train()
    check_sparsity(small)
    name = "vit.layers.1.mlp.fc1.weight"
    kept = sparsity_mask(before[name])
    after = small.state_dict()[name]
    assert (after[~kept] == 0).all() and (after[kept] != before[name][kept]).all()
    small.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert check_sparsity(loaded) == check_sparsity(small)
    assert_same(run(loaded), run(small.eval()))


def test_a_resumed_training_goes_on_with_its_zeros(tmp_path: Path) -> None:
    def training(folder: Path) -> Any:
        small = scatter_scores(nvit(model_changes=DROPOUT)).export().train()
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return trainer(small, folder, callbacks=[SparsityCallback()], **steps, **ADAMW)

    whole = training(tmp_path)
    whole.train()
    again = training(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.model.state_dict(), state_of(whole.model))
    check_sparsity(again.model)


def test_what_cannot_be_sparse_is_refused(tmp_path: Path) -> None:
    for model in (gated(), lora_model(), torch.nn.Linear(4, 4)):
        with pytest.raises(UnsupportedModelError, match="2:4 sparsity is for plain models"):
            sparsify(model)
    with pytest.raises(UnsupportedModelError, match="export"):
        trainer(gated(), tmp_path, callbacks=[SparsityCallback()]).train()
    odd = prune(make(VIT), PruningPlan.random(make(VIT), 0.4, units=["mlp"], round_to=1))
    assert Architecture.of(odd).layers[0].mlp % 4
    before = state_of(odd)
    with pytest.raises(InvalidConfigError, match=r"fc2 reads 29 channels, which are no groups of 4.*round_to"):
        sparsify(odd)
    assert_same(odd.state_dict(), before)


def test_kernels_are_refused_on_a_cpu() -> None:
    model = make(VIT)
    sparsify(model)
    before = state_of(model)
    with pytest.raises(UnsupportedDeviceError, match="CUDA GPU with sparse tensor cores.*on cpu"):
        use_sparse_kernels(model)
    assert_same(model.state_dict(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
def test_kernels_compute_the_same() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    model = make(VIT, **sizes).to("cuda", torch.float16)
    with pytest.raises(SparsityError, match="not 2:4 sparse"):
        use_sparse_kernels(model)
    sparsify(model)
    pixels = torch.randn(8, 3, 16, 16, device="cuda", dtype=torch.float16)
    expected = run(model, pixels)["logits"]
    assert len(use_sparse_kernels(model)) == len(sparse_linears(model))
    assert torch.allclose(run(model, pixels)["logits"], expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(InvalidConfigError, match="take float16 and bfloat16"):
        use_sparse_kernels(make(VIT).to("cuda"))
