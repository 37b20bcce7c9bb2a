"""Stochastic depth by hooks."""

from __future__ import annotations

import pytest
import torch

from hf_vitprune import VTPConfig, get_pruning_model
from hf_vitprune.contrib.drop_path import attach_drop_path
from hf_vitprune.errors import InvalidConfigError
from pruning_runs import VIT, spvit
from tiny import images, make, run


def test_branches_are_dropped_or_scaled_up() -> None:
    """Three layers, rate .5: chances 0, .25, .5; a branch of a sample is 0 or 4/3, 2 times what it was."""
    model = make(VIT).double().train()
    handles = attach_drop_path(model, 0.5)
    assert len(handles) == 4  # the first layer is never dropped
    for i, factor in ((0, 1.0), (1, 4 / 3), (2, 2.0)):
        layer = model.vit.layers[i]
        tokens = torch.randn(400, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        torch.manual_seed(3)
        for module in (layer.mlp, layer.attention):
            out, whole = module(tokens), module.eval()(tokens)
            module.train()
            out, whole = (x[0] if isinstance(x, tuple) else x for x in (out, whole))
            ratio = (out * whole).sum((1, 2)) / whole.square().sum((1, 2))
            kept = ratio > 0.5
            torch.testing.assert_close(ratio, kept.double() * factor, rtol=1e-9, atol=1e-12)
            assert kept.double().mean().item() == pytest.approx(1 / factor, abs=0.08)
    for handle in handles:
        handle.remove()
    assert not model.vit.layers[2].attention._forward_hooks


def test_eval_mode_gates_and_refusals() -> None:
    model = make(VIT)
    expected = run(model)["logits"]
    attach_drop_path(model, 0.9)
    assert torch.equal(run(model)["logits"], expected)
    gated = get_pruning_model(make(VIT), VTPConfig(pruning_ratio=0.3))
    handles = attach_drop_path(gated, 0.5)
    torch.manual_seed(0)
    one, two = (gated.train()(pixel_values=images(16)).logits for _ in range(2))
    assert not torch.equal(one, two)
    for handle in handles:
        handle.remove()
    assert torch.equal(gated(pixel_values=images()).logits, gated(pixel_values=images()).logits)
    # the searched mixer is dropped as a whole: the hook comes after those of the search
    search = spvit().train()
    attach_drop_path(search, 0.5)
    assert type(list(search.model.vit.layers[1].attention._forward_hooks.values())[-1]).__name__ == "_DropPath"
    with pytest.raises(InvalidConfigError, match="drop_path_rate=0.1"):
        attach_drop_path(make("SwinForImageClassification"), 0.1)
    assert attach_drop_path(make("SwinForImageClassification"), 0.0) == []
    with pytest.raises(InvalidConfigError, match=r"in \[0, 1\)"):
        attach_drop_path(model, 1.0)


def test_where_the_last_linear_lies_beside_the_rest_the_whole_branch_is_dropped() -> None:
    """A dropped branch of VideoMAE adds nothing, no bias either: at a chance near 1 the layer is the identity."""
    model = make("VideoMAEForVideoClassification").double().train()
    layer = model.videomae.encoder.layer[-1]
    with torch.no_grad():
        for last in (layer.attention.output.dense, layer.output.dense):
            last.bias.fill_(1.0)
    tokens = torch.randn(8, 5, model.config.hidden_size, dtype=torch.float64)
    out = layer(tokens)
    assert not torch.allclose(out[0] if isinstance(out, tuple) else out, tokens)
    torch.manual_seed(0)
    attach_drop_path(model, 1 - 1e-9)
    out = layer(tokens)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, tokens)
