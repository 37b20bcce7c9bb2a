"""SPViT: convolutions whose factor is zero leave the same gradients as if all of them were remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_vitprune import SPViTConfig, get_pruning_model
from hf_vitprune.methods.spvit import hooks
from tiny import make


def gradients(name: str, single_path: bool, remembered: bool, seed: int, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setattr(hooks, "distributed", lambda: remembered)  # processes remember all of them
    torch.manual_seed(7)
    wrapped = get_pruning_model(make(name), SPViTConfig(target=0.6, single_path=single_path)).double().train()
    torch.manual_seed(seed)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    outputs = wrapped(pixel_values=pixels).logits
    outputs.square().sum().backward()
    running = {key: value.clone() for key, value in wrapped.named_buffers() if "running" in key}
    return {key: p.grad for key, p in wrapped.named_parameters()} | running | {"logits": outputs.detach()}


@pytest.mark.parametrize("single_path", [True, False])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification"])
def test_the_same_gradients(name: str, single_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = 0
    for seed in range(4):
        expected = gradients(name, single_path, True, seed, monkeypatch)
        found = gradients(name, single_path, False, seed, monkeypatch)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] is None) == (gradient is None), key
            if gradient is not None:
                torch.testing.assert_close(
                    found[key], gradient, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: key + m
                )
                learned += "branches" in key and bool(gradient.count_nonzero())
    assert learned  # at some draw a convolution is what counts


def test_less_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(remembered: bool) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            gradients("ViTForImageClassification", True, remembered, 0, monkeypatch)
        return sum(sizes)

    assert saved(False) < saved(True)
