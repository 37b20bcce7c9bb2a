"""Gates folded into the parameters beside them compute what gates on the features do, and learn the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune import VTPConfig, get_pruning_model
from hf_vitprune.surgery.gates import FoldedGate, Gate
from tiny import make


def gradients(name: str, folded: bool, monkeypatch: pytest.MonkeyPatch, decided: bool = False) -> dict[str, Any]:
    """Outputs and all gradients of a step in double precision, with scores of both signs and one of zero."""
    calls = []

    def pays(self: FoldedGate, features: torch.Tensor) -> bool:
        calls.append(type(self.module))
        return folded

    monkeypatch.setattr(FoldedGate, "_pays", pays)
    wrapped = get_pruning_model(make(name), VTPConfig(pruning_ratio=0.4)).double().train()
    wrapped.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for gate in wrapped.method._gates().values():
        gate.score.data.copy_(torch.randn(len(gate.score), generator=generator, dtype=torch.float64))
        gate.score.data[1] = 0.0 if folded else 1e-200  # features remember their output, and divide by the gate
        if decided:
            gate.decide(torch.arange(len(gate.score)) % 3 > 0)
    pixels = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    outputs = wrapped(pixel_values=pixels).logits
    outputs.square().sum().backward()
    assert {nn.Linear, nn.LayerNorm} == set(calls)
    found = {key: p.grad for key, p in wrapped.named_parameters() if p.grad is not None}
    return {**found, "logits": outputs.detach()}


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification"])
def test_the_same_gradients(name: str, decided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = gradients(name, True, monkeypatch, decided)
    features = gradients(name, False, monkeypatch, decided)
    assert folded.keys() == features.keys() and sum("gates" in key for key in folded) >= 8
    for key, expected in features.items():
        torch.testing.assert_close(folded[key], expected, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_when_it_pays() -> None:
    linear, norm, gate = nn.Linear(8, 4), nn.LayerNorm(8), Gate(8, torch.device("cpu"))
    many, few = torch.randn(2, 3, 8), torch.randn(1, 4, 8)
    for module in (linear, norm):
        folded = FoldedGate.of(module, gate, type(module))
        assert folded is not None and folded._pays(many) and folded._pays(few) == (module is norm)
        with torch.no_grad():
            assert not folded._pays(many)
        with torch.autocast("cpu", torch.bfloat16):
            assert not folded._pays(many)
        gate.eval()
        assert not folded._pays(many)
        gate.train()
        assert FoldedGate.of(nn.Sequential(module), gate, type(module)) is None
    assert FoldedGate.of(nn.LayerNorm(8, bias=False), gate, nn.LayerNorm) is None
    assert FoldedGate.of(norm, gate, nn.Linear) is None


def test_nothing_is_left_behind() -> None:
    model = make("ViTForImageClassification")
    wrapped = get_pruning_model(model, VTPConfig(pruning_ratio=0.4))
    assert any("forward" in vars(module) for module in wrapped.modules())
    plain = wrapped.unload()
    assert not any("forward" in vars(module) for module in plain.modules())


def test_frozen_weights_and_no_bias() -> None:
    """LoRA's case: the gradient of a frozen weight is not kept, and that of the gate is there."""
    linear, gate = nn.Linear(8, 4, bias=False).requires_grad_(False), Gate(8, torch.device("cpu"))
    folded = FoldedGate.of(linear, gate, nn.Linear)
    assert folded is not None
    features = torch.randn(2, 3, 8, requires_grad=True)
    folded(features).square().sum().backward()
    plain = features.detach().requires_grad_()
    score = gate.score.detach().clone().requires_grad_()
    (linear.forward(plain * score)).square().sum().backward()
    torch.testing.assert_close(gate.score.grad, score.grad)
    torch.testing.assert_close(features.grad, plain.grad)
    assert linear.weight.grad is None
